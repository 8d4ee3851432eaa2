"""Checkpoints: the library's own bytes, any optimizer, any number of processes, old formats, and what is kept."""

import dataclasses
import json
import math
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn

from classiclm.commands.runs import make_trainer
from classiclm.data.corpora import Data
from classiclm.errors import BAD_INPUT, DIVERGED, RESOURCE, Error
from classiclm.files import defect
from classiclm.models.gpt2 import Config
from classiclm.optim import PaperAdam
from classiclm.recipe import Recipe
from classiclm.train import checkpoint
from classiclm.train.checkpoint import State, folder_of, saved_steps
from classiclm.train.settings import TrainConfig
from classiclm.train.tensors import Piece, part_name, reading, stream

FIXTURE = Path(__file__).parent / "fixtures" / "format1"
OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, fused=True),
    "amsgrad": lambda ps: torch.optim.AdamW(ps, amsgrad=True),
    "muon": lambda ps: torch.optim.Muon([p for p in ps if p.ndim == 2], lr=0.1),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "paper": lambda ps: PaperAdam(ps, 1e-2, (0.9, 0.99), 1e-8, 0.1, corrected=True),
}


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.ModuleDict({"a": nn.Linear(5, 7), "b": nn.Linear(7, 3, bias=False), "unused": nn.Linear(2, 2)})


def train(model, optimizer, n, seed=1):
    torch.manual_seed(seed)
    for _ in range(n):
        model["b"](model["a"](torch.randn(4, 5)).tanh()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(optimizer="adamw", n=3):
    model = make_model()
    made = OPTIMIZERS[optimizer](list(model.parameters()))
    train(model, made, n)
    return model, made


def weights_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


# The format


def test_a_stream_of_tensors_is_byte_for_byte_what_the_library_saves():
    tensors = {
        "wide": torch.arange(6).reshape(2, 3),
        "z": torch.randn(3, 4).bfloat16(),
        'a/ä"\\\n': torch.randn(2, 2),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "transposed": torch.randn(3, 5).t(),
        "double": torch.randn(2).double(),
        **{str(t): torch.ones(3).to(t) for t in (torch.float16, torch.int32, torch.int16, torch.int8, torch.uint8)},
        "bool": torch.tensor([True, False, True]),
    }
    expected = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    assert b"".join(stream({name: Piece(tensor) for name, tensor in tensors.items()})) == expected
    assert b"".join(stream({})) == save({})


def test_no_second_copy_of_a_tensor_is_made_for_writing():
    tensor = torch.zeros(1000, 10)
    data = list(stream({"a": Piece(tensor)}))[1]
    tensor[0, 0] = 1
    assert bytes(data[:4]) == b"\0\0\x80\x3f"  # 1.0 in fp32: it is the tensor's own memory


def test_a_saved_checkpoint_is_read_by_the_library(tmp_path):
    model, optimizer = trained()
    folder = checkpoint.save(tmp_path, model, optimizer, State(step=3), {"model.json": "{}"})
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, model.state_dict()[name])
    moments = load_file(folder / "optimizer.safetensors")
    used = [name for name, _ in model.named_parameters() if not name.startswith("unused")]
    assert set(moments) == {"step"} | {f"{kind}/{name}" for kind in ("exp_avg", "exp_avg_sq") for name in used}
    assert moments["step"] == 3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_any_optimizer_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path, optimizer):
    model, made = trained(optimizer)
    folder = checkpoint.save(tmp_path, model, made, State(step=3), {})
    again = make_model(seed=5)
    other = OPTIMIZERS[optimizer](list(again.parameters()))
    checkpoint.load_weights(folder, again)
    checkpoint.load_moments(folder, again, other)
    shutil.rmtree(folder)  # what was loaded must not lie in the files
    train(model, made, 2, seed=9)
    train(again, other, 2, seed=9)
    assert all(map(torch.equal, weights_of(model), weights_of(again)))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert made.state[a].keys() == other.state[b].keys()


def test_counts_of_updates_that_differ_are_each_kept(tmp_path):
    model, optimizer = trained()
    model["unused"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    folder = checkpoint.save(tmp_path, model, optimizer, State(step=4), {})
    again = make_model()
    other = torch.optim.AdamW(again.parameters())
    checkpoint.load_moments(folder, again, other)
    assert [int(other.state[p]["step"]) for p in again.parameters()] == [3, 3, 3, 1, 1]


def test_a_state_that_is_no_tensor_is_not_lost_in_silence(tmp_path):
    model, optimizer = trained()
    optimizer.state[model["a"].weight]["mood"] = 3
    with pytest.raises(ValueError, match="mood"):
        checkpoint.save(tmp_path, model, optimizer, State(step=1), {})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_weight_that_is_not_finite_forbids_the_save(tmp_path, value, dtype):
    model, optimizer = trained()
    model.to(dtype)
    with torch.no_grad():
        model["b"].weight[2, 6] = value
    with pytest.raises(Error, match=r"b\.weight is not finite") as e:
        checkpoint.save(tmp_path, model, optimizer, State(step=3), {})
    assert e.value.code == DIVERGED
    assert saved_steps(tmp_path) == []


def test_the_checkpoint_of_a_step_is_replaced_by_its_new_one(tmp_path):
    model, optimizer = trained()
    checkpoint.save(tmp_path, model, optimizer, State(step=3), {"note": "old"})
    folder = checkpoint.save(tmp_path, model, optimizer, State(step=3), {"note": "new"})
    assert defect(folder) is None
    assert (folder / "note").read_text() == "new"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


# Format 1


def test_a_checkpoint_of_format_1_loads_and_its_run_goes_on_to_where_it_went(tmp_path):
    """Made by the last version that wrote format 1, which also made `expected`, the weights six steps later."""
    text = tmp_path / "small.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log.\n" * 80)
    run = shutil.copytree(FIXTURE / "run", tmp_path / "run")
    recipe = dataclasses.asdict(Recipe(batch=4, steps=12, lr=1e-2, warmup=2))
    model = Config(n_layers=2, d_model=16, n_heads=2, n_ctx=12, dropout=0.1)
    every = {"log_every": 1, "eval_every": 6, "save_every": 6, "keep": 3, "eval_windows": 4}
    rest = {"device": "cpu", "precision": "fp32", "micro_batch": 2, "compile": False}
    config = TrainConfig(**recipe, **every, **rest, preset="gpt2-shakespeare-cpu", data=Data(str(text)), model=model)
    trainer = make_trainer(run, config)
    (run / "config.yaml").write_text(trainer_config(trainer))
    assert trainer.fit().step == 12
    expected = load_file(FIXTURE / "expected.safetensors")
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == list(range(1, 13))
    for name, tensor in trainer.model.state_dict().items():
        assert torch.allclose(tensor, expected[name], rtol=1e-4, atol=1e-5), name


def trainer_config(trainer):
    from classiclm.config import to_yaml

    return to_yaml(trainer.config)


# Many processes, here threads


class Threads:
    """Ranks as threads: what each brings is swapped at a barrier."""

    def __init__(self, rank, size, shared):
        self.rank, self.size, self.shared = rank, size, shared

    def gather(self, value):
        self.shared["texts"][self.rank] = json.dumps(value)
        self.shared["barrier"].wait(20)
        answer = [json.loads(text) for text in self.shared["texts"]]
        self.shared["barrier"].wait(20)
        return answer


def on_ranks(size, work):
    """work(world) on each rank; what each returned or raised."""
    shared = {"texts": [None] * size, "barrier": threading.Barrier(size)}
    answers = [None] * size

    def run(rank):
        try:
            answers[rank] = work(Threads(rank, size, shared))
        except Exception as e:
            answers[rank] = e

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return answers


def shared_snapshot(rank, size, tensors, step=3):
    """What rank `rank` would bring under FSDP2: an even share of the rows of each tensor, one scalar for all."""
    pieces = {}
    for name, tensor in tensors.items():
        share = -(-tensor.shape[0] // size)
        first = min(rank * share, tensor.shape[0])
        rows = tensor[first : first + share]
        if len(rows):
            pieces[name] = Piece(rows, first, tensor.shape[0])
    moments = {f"exp_avg/{name}": piece for name, piece in pieces.items()} | {"step": Piece(torch.tensor(3.0))}
    texts = {"state.json": json.dumps(vars(State(step=step))), "model.json": "{}"}
    return checkpoint.Snapshot(step, pieces, moments, texts, shared_out=True)


TENSORS = {"a": torch.randn(7, 3), "b": torch.randn(2, 2, 2), "c": torch.randn(5), "d": torch.randn(1, 4).bfloat16()}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_rows_written_by_any_number_of_processes_are_read_by_one_or_in_any_shares(tmp_path, size):
    answers = on_ranks(
        size, lambda world: checkpoint.publish(tmp_path, shared_snapshot(world.rank, size, TENSORS), world)
    )
    folder = folder_of(tmp_path, 3)
    assert answers == [folder] * size
    assert defect(folder) is None
    names = {part_name(stem, rank, size) for stem in ("model", "optimizer") for rank in range(size)}
    assert {path.name for path in folder.iterdir()} == names | {"state.json", "model.json", "MANIFEST.json"}
    with reading(folder, "model") as reader:
        assert reader.shapes == {name: tensor.shape for name, tensor in TENSORS.items()}
        for name, tensor in TENSORS.items():
            assert torch.equal(reader.read(name), tensor)
            for first in range(len(tensor)):
                for end in range(first + 1, len(tensor) + 1):
                    assert torch.equal(reader.rows(name, range(first, end)), tensor[first:end])
    with reading(folder, "optimizer") as reader:
        assert torch.equal(reader.read("step"), torch.tensor(3.0))
        assert torch.equal(reader.read("exp_avg/a"), TENSORS["a"])


def test_rows_that_no_file_has_are_missed(tmp_path):
    on_ranks(2, lambda world: checkpoint.publish(tmp_path, shared_snapshot(world.rank, 2, TENSORS), world))
    folder = folder_of(tmp_path, 3)
    (folder / part_name("model", 1, 2)).unlink()
    assert "lacks model-00002" in defect(folder)
    with reading(folder, "model") as reader, pytest.raises(Error, match="lacks row 4 of a") as e:
        reader.read("a")
    assert e.value.code == BAD_INPUT


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("fault", ["infinite", "full"])
def test_a_rank_that_fails_makes_all_abort_the_save_and_the_old_one_stays(tmp_path, victim, fault, monkeypatch):
    on_ranks(2, lambda world: checkpoint.publish(tmp_path, shared_snapshot(world.rank, 2, TENSORS), world))
    real = checkpoint.write_into

    def write_into(folder, files):
        if part_name("model", victim, 2) in files:
            raise OSError(28, "No space left on device")
        return real(folder, files)

    def work(world):
        bad = {**TENSORS, "a": torch.full((7, 3), math.inf)} if (fault, world.rank) == ("infinite", victim) else TENSORS
        return checkpoint.publish(tmp_path, shared_snapshot(world.rank, 2, bad, step=4), world)

    if fault == "full":
        monkeypatch.setattr(checkpoint, "write_into", write_into)
    answers = on_ranks(2, work)
    assert [answer.code for answer in answers] == [DIVERGED if fault == "infinite" else RESOURCE] * 2
    if fault == "full":
        assert all("the last checkpoint is that of step 3" in str(answer) for answer in answers)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert defect(folder_of(tmp_path, 3)) is None


def test_processes_with_the_same_weights_write_the_files_of_one(tmp_path):
    model, optimizer = trained()

    def work(world):
        return checkpoint.save(tmp_path / "many", model, optimizer, State(step=3), {"model.json": "{}"}, world)

    on_ranks(3, work)
    checkpoint.save(tmp_path / "one", model, optimizer, State(step=3), {"model.json": "{}"})
    many, one = folder_of(tmp_path / "many", 3), folder_of(tmp_path / "one", 3)
    assert {p.name: p.read_bytes() for p in many.iterdir()} == {p.name: p.read_bytes() for p in one.iterdir()}


# Room


def test_too_little_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    model, optimizer = trained()
    checkpoint.save(tmp_path, model, optimizer, State(step=3), {})
    n_bytes = sum(path.stat().st_size for path in folder_of(tmp_path, 3).iterdir())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 99))
    with pytest.raises(Error) as e:
        checkpoint.save(tmp_path, model, optimizer, State(step=4), {})
    assert e.value.code == RESOURCE
    assert str(folder_of(tmp_path, 4)) in str(e.value)
    assert "99 are free" in str(e.value)
    assert "the last checkpoint is that of step 3" in str(e.value)
    needed = int(str(e.value).partition("needs ")[2].partition(" bytes")[0].replace(",", ""))
    tensors = sum(4 * p.numel() for p in model.parameters()) + 4 + 8 * (35 + 7 + 21)
    assert tensors < needed < 1.2 * n_bytes
    assert saved_steps(tmp_path) == [3]
