"""Faults on purpose, see the folder faults: its quick part here, and all of it, with its table, in the slow tests."""

import subprocess
import sys
from pathlib import Path

import pytest

from faults import corruption, crash, mutants

ROOT = Path(__file__).parent.parent


def test_no_fault_at_a_call_of_a_save_loses_a_checkpoint():
    """Every eleventh call here; the slow test takes all."""
    tally = crash.every_case(("save, publish, prune", "over a damaged one"), stride=11)
    assert sum(tally.cases.values()) >= 60
    assert tally.losses == []


def test_every_damage_to_any_file_of_a_checkpoint_is_found_and_the_one_before_is_taken():
    tally = corruption.every_mutation()
    assert sum(tally.cases.values()) >= 200
    assert tally.losses == []


@pytest.mark.parametrize("mutant", mutants.MUTANTS)
def test_the_harness_catches_a_wrong_protocol(mutant):
    assert mutants.caught(mutant) is not None


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_is_lost_by_any_fault_or_by_killing_runs_at_random(capsys):
    command = [sys.executable, "-m", "tests.faults", "--kills", "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1700)
    with capsys.disabled():
        print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stdout + done.stderr
