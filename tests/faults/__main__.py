"""python -m tests.faults [--kills N] [--quick]: the table of all faults; the exit code is 1 if anything was lost."""

import argparse
import sys
import time

import torch

from . import corruption, crash, kills, mutants


def table(n_kills, again, quick):
    """name -> the tally of each group of faults, as they are done."""
    yield "crash points", crash.every_case(stride=5 if quick else 1)
    yield "corruptions", corruption.every_mutation()
    yield "protocol mutants", judged()
    yield "simultaneous starts", kills.simultaneous_starts(1 if quick else 3)
    if n_kills:
        yield "random SIGKILL", kills.random_kills(n_kills, again=again)


def judged():
    """The tally of the mutants: one that is not caught is a loss of the harness."""
    tally = crash.Tally()
    for name in mutants.MUTANTS:
        tally.cases["mutants"] += 1
        found = mutants.caught(name)
        tally.cases["caught"] += found is not None
        if found is None:
            tally.losses.append(f"mutant {name!r} is not caught")
    return tally


def summed(name, tally):
    """What there was of each kind; of crash points, by fault and not by scenario."""
    if name != "crash points":
        return tally.cases
    by_kind = {}
    for (_, kind), n in tally.cases.items():
        by_kind[kind] = by_kind.get(kind, 0) + n
    return {"cases": sum(by_kind.values()), **by_kind}


def main():
    """Print the table; 1 if anything was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="runs that are killed at random")
    parser.add_argument("--again", type=int, default=1, help="how often each of them is killed")
    parser.add_argument("--quick", action="store_true", help="every fifth crash point only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    n_lost = 0
    for name, tally in table(arguments.kills, arguments.again, arguments.quick):
        counts = ", ".join(f"{kind} {n}" for kind, n in summed(name, tally).items())
        print(f"{name:20} lost {len(tally.losses)}   {counts}", flush=True)
        for loss in tally.losses[:20]:
            print(f"    {loss}", flush=True)
        n_lost += len(tally.losses)
    return 1 if n_lost else 0


if __name__ == "__main__":
    began = time.monotonic()
    code = main()
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(code)
