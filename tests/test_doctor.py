"""The doctor: what it says of a machine that is well, of one that lacks things, and of one that calculates wrongly."""

import re
import tomllib
from pathlib import Path

import pytest
import torch

from classiclm.commands import doctor
from classiclm.data.corpora import SHAKESPEARE
from classiclm.train import gauges
from classiclm.train.machine import Machine

CPU = Machine("cpu", "a CPU", bf16=False, fp16=False, memory=8 << 30)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gauges, "_SECONDS", 0.0)
    monkeypatch.setitem(gauges._SIZE, "cpu", 64)
    return tmp_path / "cache" / "classiclm"


def test_the_doctor_finds_this_machine_sound_and_says_why_it_chooses_its_precision(cli):
    code, out, _ = cli("doctor", "--device", "cpu")
    assert code == 0
    assert "cpu fp32, attention written" in out
    assert out.count("ok: differs by") >= 2
    assert re.search(r"precision +(bf16|fp32): this CPU", out)
    assert torch.__version__ in out


def test_the_doctor_notices_wrong_arithmetic(cli, monkeypatch):
    real = doctor._logits_and_gradient

    def wrong(device, precision, path):
        logits, gradient = real(device, precision, path)
        return (logits.roll(1, dims=-1) if path == "fused" else logits), gradient

    monkeypatch.setattr(doctor, "_logits_and_gradient", wrong)
    code, out, _ = cli("doctor", "--device", "cpu")
    assert code == 1
    assert "WRONG" in out
    assert not doctor.Check("nan", float("nan"), 1.0).ok


def test_the_doctor_measures_peaks_that_runs_then_know(cli, cache):
    assert gauges.known_peak("cpu", "fp32") is None
    out = cli("doctor", "--device", "cpu")[1]
    said = float(re.search(r"peak fp32 +([\d.e-]+) TFLOPs/s", out)[1])
    assert gauges.known_peak("cpu", "fp32") == pytest.approx(said * 1e12, rel=0.01)
    assert (cache / "peaks.json").is_file()


def test_a_machine_that_is_busy_does_not_lower_its_peak():
    for measured in (2e12, 3e12, 1e12):
        ((_, words),) = doctor.peaks(CPU, measure=lambda device, precision, peak=measured: peak)
    assert words.startswith("3 TFLOPs/s")
    assert gauges.known_peak("cpu", "fp32") == 3e12


def test_a_cache_that_cannot_be_written_is_said_and_harms_nothing(cache):
    cache.parent.write_text("a file")
    ((name, words),) = doctor.peaks(CPU, measure=lambda device, precision: 2e12)
    assert name == "peak fp32"
    assert words.startswith("2 TFLOPs/s")
    assert "not remembered" in words


def test_the_extras_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    listed = project["optional-dependencies"]
    named = {
        extra: tuple(re.match(r"[\w-]+", need)[0] for need in needs if not need.startswith("classiclm"))
        for extra, needs in listed.items()
        if extra not in ("dev", "docs")
    }
    assert named == doctor.EXTRAS


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(doctor.EXTRAS, "eval", ("numpy", "no-such-package"))
    words = dict(doctor.extras())["extra eval"]
    assert re.match(r"numpy [\d.]+; missing no-such-package: pip install 'classiclm\[eval\]'", words)


def test_files_that_are_missing_are_named_with_their_place_and_found_once_there(monkeypatch, tmp_path, cache):
    monkeypatch.setenv("CLASSICLM_DATA", str(tmp_path))
    assert f"place {SHAKESPEARE.place} in {cache}" in dict(doctor.files())["shakespeare"]
    (tmp_path / SHAKESPEARE.place).parent.mkdir()
    (tmp_path / SHAKESPEARE.place).write_text("text")
    assert dict(doctor.files())["shakespeare"] == str((tmp_path / SHAKESPEARE.place).parent)
    assert "multi30k/val.en.gz" in dict(doctor.files())["multi30k"]


def test_the_data_folder_and_the_room_in_the_cache_are_said(monkeypatch, tmp_path):
    monkeypatch.delenv("CLASSICLM_DATA", raising=False)
    assert "not set" in dict(doctor.storage())["CLASSICLM_DATA"]
    monkeypatch.setenv("CLASSICLM_DATA", str(tmp_path / "none"))
    rows = dict(doctor.storage())
    assert rows["CLASSICLM_DATA"].endswith("no such folder")
    assert re.search(r"[\d,.]+ GB free$", rows["cache"])


def test_a_missing_compiler_is_said_with_what_to_install(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install g++" in dict(doctor.about(CPU))["torch.compile"]
    compiler = tmp_path / "clang++"
    compiler.write_text("#!/bin/sh")
    compiler.chmod(0o755)
    assert dict(doctor.about(CPU))["torch.compile"] == str(compiler)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert dict(doctor.about(CPU))["torch.compile"].startswith("CXX=no-such-compiler is not there")


def test_a_driver_without_a_torch_for_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert dict(doctor.about(CPU))["GPU"] == "none"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "torch is built without CUDA" in dict(doctor.about(CPU))["GPU"]
