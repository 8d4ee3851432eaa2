"""What a machine reaches: measured, remembered for this machine alone, and never made up."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from classiclm.errors import Error
from classiclm.train import gauges
from classiclm.train.gauges import known_peak, measure_peak, memory_in_use, remember_peak


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "classiclm" / "peaks.json"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_peak_is_about_what_a_stopwatch_says(precision, monkeypatch):
    monkeypatch.setattr(gauges, "_SECONDS", 0.1)
    n, dtype = 512, torch.float32 if precision == "fp32" else torch.bfloat16
    peak = measure_peak("cpu", precision, size=n)
    a, b = torch.rand(n, n).to(dtype), torch.rand(n, n).to(dtype)
    times = []
    for _ in range(30):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    assert 0.3 < peak / (2 * n**3 / min(times)) < 3


def test_measuring_draws_no_random_number(monkeypatch):
    monkeypatch.setattr(gauges, "_SECONDS", 0.0)
    before = torch.get_rng_state()
    measure_peak("cpu", "fp32", size=64)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_peak_is_unknown_until_it_is_remembered_and_then_for_its_precision_alone(cache):
    assert known_peak("cpu", "bf16") is None
    remember_peak("cpu", "bf16", 2e12)
    assert known_peak("cpu", "bf16") == 2e12
    assert known_peak("cpu", "fp32") is None
    remember_peak("cpu", "fp32", 3e11)
    remember_peak("cpu", "bf16", 2.5e12)
    assert (known_peak("cpu", "fp32"), known_peak("cpu", "bf16")) == (3e11, 2.5e12)
    assert len(json.loads(cache.read_bytes())) == 2


@pytest.mark.parametrize("change", ["threads", "torch", "cpu"])
def test_a_peak_of_other_threads_another_torch_or_another_cpu_does_not_count(change, monkeypatch):
    remember_peak("cpu", "fp32", 3e11)
    if change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    else:
        monkeypatch.setattr(gauges, "_cpu", lambda: "another")
    assert known_peak("cpu", "fp32") is None


@pytest.mark.parametrize("content", ["", "no JSON", "[1]", "{}", '{"KEY": "fast"}', '{"KEY": -1}', '{"KEY": null}'])
def test_a_cache_that_makes_no_sense_is_no_peak_and_can_be_written_anew(content, cache):
    cache.parent.mkdir()
    cache.write_text(content.replace("KEY", gauges._key("cpu", "fp32")))
    assert known_peak("cpu", "fp32") is None
    remember_peak("cpu", "fp32", 3e11)
    assert known_peak("cpu", "fp32") == 3e11


def test_a_cache_that_cannot_be_written_is_an_error_of_one_line(cache):
    cache.parent.parent.joinpath("classiclm").write_text("a file")
    with pytest.raises(Error) as e:
        remember_peak("cpu", "fp32", 3e11)
    assert e.value.code == 4


def test_memory_in_use_grows_with_what_is_used():
    if not Path("/proc/self/statm").is_file():
        pytest.skip("the resident set is read on Linux only")
    before = memory_in_use("cpu")
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert memory_in_use("cpu") - before == pytest.approx(block.numel(), rel=0.1)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    assert memory_in_use("cpu") == pytest.approx(pages * os.sysconf("SC_PAGE_SIZE"), rel=0.05)
