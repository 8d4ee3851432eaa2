"""What `auto` chooses, against brute force and tables; the clock that says how long is left."""

import dataclasses
import math
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classiclm import registry
from classiclm.commands.tasks import KINDS
from classiclm.errors import USAGE, Error
from classiclm.train import machine
from classiclm.train.machine import Machine, Sizes, choose_compile, choose_micro_batch, choose_precision, look
from classiclm.train.progress import Clock, describe, format_seconds

CPU = Machine("cpu", "a CPU", bf16=False, fp16=False, memory=8 << 30)
AMX = Machine("cpu", "a CPU with AMX", bf16=True, fp16=False, memory=8 << 30)
OLD_GPU = Machine("cuda", "a V100", bf16=False, fp16=True, memory=16 << 30)
NEW_GPU = Machine("cuda", "an A100", bf16=True, fp16=True, memory=80 << 30)
MAC = Machine("mps", "Apple arm64", bf16=False, fp16=False, memory=16 << 30)


# Micro-batches


def fits(n, sizes, precision, here):
    """The rule in its own words: 24 MiB of fp32 activations on a CPU; half of what a model leaves of a GPU's memory."""
    tokens = n * sizes.n_ctx
    if here.device == "cpu":
        return tokens * max(sizes.d_ff, sizes.vocab_size) * 4 <= 24 * 2**20
    kept = 9 * sizes.n_layers * sizes.d_ff * (4 if precision == "fp32" else 2) + 3 * sizes.vocab_size * 4
    return tokens * kept <= int((here.memory - 16 * sizes.n_params) / 2)


@given(
    batch=st.integers(1, 600),
    sizes=st.builds(
        Sizes,
        n_ctx=st.sampled_from([8, 64, 256, 1024]),
        d_ff=st.sampled_from([32, 512, 1536, 3072, 6400]),
        n_layers=st.integers(1, 48),
        vocab_size=st.sampled_from([65, 512, 50_257]),
        n_params=st.sampled_from([10**5, 10**8, 10**9]),
    ),
    precision=st.sampled_from(["fp32", "bf16"]),
    here=st.sampled_from([CPU, OLD_GPU, NEW_GPU, MAC]),
)
def test_the_micro_batch_is_the_largest_divisor_that_fits(batch, sizes, precision, here):
    chosen = choose_micro_batch(batch, sizes, precision, here)
    divisors = [d for d in range(1, batch + 1) if batch % d == 0]
    assert chosen == max([d for d in divisors if fits(d, sizes, precision, here)], default=1)


def test_a_model_too_large_for_any_memory_still_gets_one_sequence_at_a_time():
    assert choose_micro_batch(64, Sizes(2048, 100_000, 96, 50_257, 10**9), "bf16", CPU) == 1
    assert choose_micro_batch(64, Sizes(2048, 50_000, 96, 50_257, 10**12), "bf16", NEW_GPU) == 1
    assert choose_micro_batch(1, Sizes(8, 8, 1, 65, 100), "fp32", CPU) == 1


def test_an_enormous_batch_is_decided_at_once():
    assert choose_micro_batch(2**31 - 1, Sizes(64, 512, 4, 65, 10**6), "fp32", CPU) == 1  # a prime
    assert choose_micro_batch(2**30, Sizes(256, 1536, 6, 65, 10**7), "fp32", CPU) == 16


def test_a_wide_vocabulary_counts():
    """At 50,257 tokens the logits are wider than the MLP: validation and training take fewer windows at once."""
    small, large = Sizes(1024, 3072, 12, 512, 10**8), Sizes(1024, 3072, 12, 50_257, 10**8)
    assert choose_micro_batch(64, large, "fp32", CPU) == 1 < choose_micro_batch(64, small, "fp32", CPU)


def test_compiling_is_for_gpus_and_comes_with_its_reason():
    assert choose_compile("auto", CPU)[0] is False
    assert choose_compile("auto", MAC)[0] is False
    assert choose_compile(True, CPU) == (True, "compiled, as asked")
    assert choose_compile(False, NEW_GPU)[0] is False
    assert all(choose_compile(asked, CPU)[1] for asked in (True, False, "auto"))


# Precision


@pytest.mark.parametrize(
    ("asked", "here", "expected"),
    [
        ("auto", CPU, "fp32"),
        ("auto", AMX, "bf16"),
        ("auto", OLD_GPU, "fp16"),
        ("auto", NEW_GPU, "bf16"),
        ("auto", MAC, "fp32"),
        ("fp32", NEW_GPU, "fp32"),
        ("bf16", CPU, "bf16"),
        ("fp16", NEW_GPU, "fp16"),
        ("fp16", OLD_GPU, "fp16"),
    ],
)
def test_the_precision_is_what_was_asked_or_the_fastest_there_is(asked, here, expected):
    precision, why = choose_precision(asked, here)
    assert precision == expected
    assert (why == "as asked") == (asked != "auto")


@pytest.mark.parametrize("here", [CPU, AMX, MAC])
def test_fp16_without_a_loss_scaler_is_a_usage_error(here):
    with pytest.raises(Error) as caught:
        choose_precision("fp16", here)
    assert caught.value.code == USAGE
    assert str(caught.value).startswith("precision: ")


# Devices


@pytest.fixture
def torch_has(monkeypatch):
    def pretend(cuda=False, mps=False):
        monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(machine.torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize("device", ["cuda", "mps", "tpu", ""])
def test_an_absent_device_is_a_usage_error_that_says_what_there_is(torch_has, device):
    torch_has()
    with pytest.raises(Error) as caught:
        look(device)
    assert caught.value.code == USAGE
    assert f"device {device}" in str(caught.value)
    assert str(caught.value).endswith("use one of: cpu.")


def test_auto_takes_apples_gpu_before_the_cpu(torch_has):
    torch_has(mps=True)
    assert look().device == look("mps").device == "mps"
    assert look("cpu").device == "cpu"
    torch_has()
    assert look().device == "cpu"


@pytest.mark.parametrize(
    ("flags", "fast"),
    [({"avx2"}, False), ({"avx512f"}, False), ({"amx_bf16"}, True), ({"avx512_bf16", "avx2"}, True), ({"bf16"}, True)],
)
def test_a_cpu_is_fast_in_bf16_if_it_has_the_instructions(torch_has, monkeypatch, flags, fast):
    torch_has()
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(flags))
    here = look("cpu")
    assert here.bf16 is fast
    assert not here.fp16
    assert here.memory > 1 << 27


# The clock


@settings(deadline=None, max_examples=100)
@given(rate=st.floats(0.01, 1000), every=st.integers(1, 20), n=st.integers(2, 120), begin=st.floats(0, 1e6))
def test_at_a_constant_rate_the_remaining_time_is_steps_over_rate(rate, every, n, begin):
    total = every * n
    clock = Clock(total)
    assert clock.mark(0, begin) is None
    for i in range(1, n + 1):
        left = clock.mark(i * every, begin + i * every / rate)
        assert left == pytest.approx((total - i * every) / rate, rel=1e-4, abs=1e-3)
    assert left == 0


def test_a_pause_or_a_slow_start_is_forgotten():
    clock, now = Clock(1000), 0.0
    for step in range(100):
        clock.mark(step, now := now + 1)
    now += 3600  # the machine slept
    assert clock.mark(100, now) > 10 * 900
    for step in range(101, 200):
        left = clock.mark(step, now := now + 1)
    assert left == pytest.approx(801)


def test_a_clock_that_begins_in_the_middle_counts_from_there():
    clock = Clock(100)
    assert clock.mark(60, 5.0) is None
    assert clock.mark(60, 6.0) is None  # no step since: no rate yet
    assert clock.mark(70, 15.0) == pytest.approx(30 * 10 / 10)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (42, "42 s"),
        (59.4, "59 s"),
        (59.6, "1:00 min"),
        (60, "1:00 min"),
        (187, "3:07 min"),
        (3599.4, "59:59 min"),
        (3599.6, "1:00:00 h"),
        (3729, "1:02:09 h"),
        (100 * 3600 + 1, "100:00:01 h"),
    ],
)
def test_seconds_in_words(seconds, text):
    assert format_seconds(seconds) == text


def test_a_row_in_words():
    row = {"step": 3, "loss": 1.23456, "tokens_per_s": 12345.6}
    assert describe(row, None) == "loss 1.2346, 12,346 tokens/s"
    assert describe({**row, "val_loss": 2.0}, 61) == "loss 1.2346, val 2.0000, 12,346 tokens/s, 1:01 min to go"
    assert "nan" in describe({**row, "loss": math.nan}, None)


@pytest.mark.parametrize("batch", [4096, 4099, 25_000, 25_013])
def test_a_batch_that_is_counted_in_tokens_needs_no_divisor(batch):
    preset = registry.preset("transformer2017-multi30k")
    config = SimpleNamespace(**vars(dataclasses.replace(preset.recipe, batch=batch)), model=preset.config)
    assert KINDS["pairs"].micro_batch(config, 6_000_000, "bf16", AMX) == 24 * 2**20 // (8000 * 4)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is for glibc")
@pytest.mark.parametrize(("variables", "keeps"), [({}, True), ({"MALLOC_ARENA_MAX": "4"}, False)])
def test_freed_memory_is_kept_unless_the_user_has_decided(variables, keeps):
    program = (
        "import torch\n"
        "from classiclm.train.machine import keep_freed_memory\n"
        "def resident():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('VmRSS')) >> 10\n"
        "keep_freed_memory()\n"
        "before = resident()\n"
        "torch.ones(100 << 18)\n"  # 100 MB, freed at once
        "print(resident() - before)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | variables
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 90) == keeps
