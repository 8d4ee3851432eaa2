"""Samples of a run: they are what the saved weights write, they change nothing else, and none is missing or too many.

The oracle for the text of a sample is the checkpoint of its step, which writes without a cache or through the model
alone; the oracle for the rest of the run is the same run without samples.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from classiclm.commands import runs
from classiclm.commands.runs import make_trainer
from classiclm.commands.train import TrainFlags, plain, resolve
from classiclm.errors import BAD_INPUT, RESOURCE, USAGE, Error
from classiclm.files import sha256_of_file
from classiclm.generate.beam import translate
from classiclm.generate.sample import generate
from classiclm.registry import open_run
from classiclm.train import checkpoint
from classiclm.train.distributed import World
from classiclm.train.machine import Plan
from classiclm.train.progress import ProgressLog
from classiclm.train.samples import Sampler, Samples
from test_trainer import TIMES, fit_and_die_after

SOURCE = Path(__file__).resolve().parent.parent / "src"
SIZES = "--model.n_layers 1 --model.d_model 16 --model.n_heads 2 --model.dropout 0.1 --device cpu --eval_windows 5"
OFTEN = "--lr 0.05 --warmup 1 --steps 9 --log_every 1 --eval_every 4 --save_every 3 --keep 9"
KINDS = {
    "causal": f"gpt2-shakespeare-cpu --model.n_ctx 12 --batch 4 {SIZES} {OFTEN}",
    "masked": f"bert-shakespeare --model.n_ctx 32 --tokenizer wordpiece-80 --batch 4 {SIZES} {OFTEN}",
    "pairs": f"transformer2017-multi30k --model.n_ctx 24 --tokenizer bpe-270 --batch 120 {SIZES} {OFTEN}",
}
GERMAN = ["ein", "hund", "katze", "mann", "sieht", "den", "ball"]
ENGLISH = ["a", "dog", "cat", "man", "sees", "the", "ball"]


@pytest.fixture
def data(tmp_path):
    """Kind of learning -> the flags for its data."""
    draw = random.Random(5)
    sentences = [[draw.randrange(7) for _ in range(draw.randint(3, 8))] for _ in range(160)]
    lines = {words[0]: [" ".join(words[i] for i in s) for s in sentences] for words in (GERMAN, ENGLISH)}
    folder = tmp_path / "data"
    folder.mkdir()
    text = folder / "text.txt"
    text.write_text("\n\n".join("\n".join(lines["a"][i : i + 4]) for i in range(0, 160, 4)) + "\n")
    for name, words in (("de", "ein"), ("en", "a")):
        (folder / f"train.{name}").write_text("\n".join(lines[words][:150]) + "\n")
        (folder / f"val.{name}").write_text("\n".join(lines[words][150:]) + "\n")
    of_text = f"--data {text}"
    return {"causal": of_text, "masked": of_text, "pairs": f"--data {folder} --data.source de --data.target en"}


@pytest.fixture
def trainer_of(data):
    """trainer_of("causal", run, "--sample_every 3") -> a fresh trainer."""

    def make(kind, run, flags=""):
        config = plain(resolve(TrainFlags, f"{KINDS[kind]} {data[kind]} {flags}".split(), "train")[0])
        return make_trainer(run, config)

    return make


def sums_of(run):
    """Of every file of every checkpoint."""
    return {str(path.relative_to(run)): sha256_of_file(path) for path in sorted((run / "checkpoints").glob("*/*"))}


def rows_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def texts_of(run):
    """Step -> the bytes of its sample."""
    return {int(path.stem.removeprefix("step-")): path.read_bytes() for path in (run / "samples").iterdir()}


def named(text):
    """The lines "name: text" of a sample, by name."""
    lines = [line.partition(":") for line in text.splitlines() if line]
    return {
        name: [rest.lstrip() for other, _, rest in lines if other == name]
        for name in dict.fromkeys(n for n, *_ in lines)
    }


# Nothing else changes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_a_sample_of_every_step_has_the_bytes_and_rows_of_one_without(kind, precision, trainer_of, tmp_path):
    trainer_of(kind, tmp_path / "without", f"--precision {precision}").fit()
    trainer_of(kind, tmp_path / "with", f"--precision {precision} --sample_every 1").fit()
    assert sums_of(tmp_path / "with") == sums_of(tmp_path / "without")
    assert rows_of(tmp_path / "with") == rows_of(tmp_path / "without")
    assert sorted(texts_of(tmp_path / "with")) == list(range(1, 10))
    assert not (tmp_path / "without" / "samples").exists()


@pytest.mark.parametrize("training", [True, False])
def test_a_writer_that_draws_and_changes_the_mode_leaves_both_as_they_were(tmp_path, trainer_of, training):
    trainer = trainer_of("causal", tmp_path / "run", "--sample_every 1")

    def write(model):
        model.eval()
        return str(torch.rand(3) + len(model.config.__dict__))

    trainer.model.train(training)
    sampler = Sampler(tmp_path, trainer.model, write, trainer.config, trainer.plan, World())
    before = torch.get_rng_state()
    assert sampler(1, lambda: False)
    assert torch.equal(torch.get_rng_state(), before)
    assert {module.training for module in trainer.model.modules()} == {training}


# What is written


@pytest.mark.parametrize("prompt", [None, "a dog"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_text_is_what_the_saved_model_writes_without_a_cache(trainer_of, tmp_path, precision, prompt):
    trainer = trainer_of("causal", tmp_path / "run", f"--sample_every 3 --precision {precision}")
    given = "" if prompt is None else prompt
    if prompt is not None:
        config = dataclasses.replace(trainer.config, sample_prompt=prompt)
        trainer = make_trainer(tmp_path / "run", config)
    trainer.fit()
    for step in (3, 6, 9):
        loaded = open_run(tmp_path / "run", str(step))
        start = torch.tensor([loaded.tokenizer.encode(given or "\n")])
        tokens = generate(loaded.model, start, 200, temperature=0.8, top_k=50, seed=0, use_cache=False)
        expected = loaded.tokenizer.decode(tokens[0].tolist()) + "\n"
        assert texts_of(tmp_path / "run")[step].decode() == (expected if given else expected[1:])
    assert len(set(texts_of(tmp_path / "run").values())) == 3


def test_generate_prints_the_sample_of_a_checkpoint(trainer_of, tmp_path, cli):
    trainer_of("causal", tmp_path / "run", "--sample_every 3").fit()
    code, out, _ = cli("generate", tmp_path / "run", "--checkpoint", "6", "--top_k", "50", "--device", "cpu")
    assert (code, out.encode()) == (0, texts_of(tmp_path / "run")[6])


def test_a_text_without_line_breaks_goes_on_from_its_first_validation_token(tmp_path, text_file):
    text_file.write_text("abcd" * 300)
    sizes = f"gpt2-shakespeare-cpu --model.n_ctx 12 --batch 4 --steps 2 --sample_every 2 {SIZES} --data {text_file}"
    make_trainer(tmp_path, plain(resolve(TrainFlags, sizes.split(), "train")[0])).fit()
    text = texts_of(tmp_path)[2].decode()
    assert text[0] == ("abcd" * 300)[1080]
    assert len(text) == 1 + 200 + 1


def test_blanks_are_filled_with_the_likeliest_tokens_of_the_saved_model(trainer_of, tmp_path):
    trainer_of("masked", tmp_path / "run", "--sample_every 9").fit()
    lines = named(texts_of(tmp_path / "run")[9].decode())
    (masked,), (filled,), (text,) = lines["masked"], lines["filled"], lines["text"]
    assert masked.count("[MASK]") > 1
    assert [a == b or a == "[MASK]" for a, b in zip(masked.split(), text.split(), strict=True)]
    loaded = open_run(tmp_path / "run")
    words = loaded.tokenizer
    ids = [words.cls]
    for word in masked.split():
        ids += [words.mask] if word == "[MASK]" else words.encode(word)
    logits = loaded.model(torch.tensor([[*ids, words.sep]])).mlm[0]
    logits[:, [words.pad, words.unk, words.cls, words.sep, words.mask]] = -torch.inf
    found = [int(logits[i].argmax()) if token == words.mask else token for i, token in enumerate(ids)]
    assert filled == words.decode(found[1:])


def test_the_first_validation_sentences_are_translated_as_the_saved_model_does(trainer_of, data, tmp_path):
    trainer_of("pairs", tmp_path / "run", "--sample_every 9").fit()
    lines = named(texts_of(tmp_path / "run")[9].decode())
    folder = tmp_path / "data"
    assert lines["source"] == (folder / "val.de").read_text().splitlines()[:3]
    assert lines["reference"] == (folder / "val.en").read_text().splitlines()[:3]
    loaded = open_run(tmp_path / "run")
    end = loaded.tokenizer.end_of_text
    for source, written in zip(lines["source"], lines["translation"], strict=True):
        (tokens,) = translate(loaded.model, [[*loaded.tokenizer.encode(source), end]], end, end, use_cache=False)
        assert loaded.tokenizer.decode(tokens).splitlines()[0].strip() == written.strip()


@pytest.mark.parametrize(
    ("kind", "prompt", "shown"),
    [
        ("masked", "the [MASK] sees [SEP] a ball", {"masked": ["the [MASK] sees [SEP] a ball"]}),
        ("pairs", "ein hund", {"source": ["ein hund"]}),
    ],
)
def test_a_prompt_takes_the_place_of_the_validation_text(trainer_of, tmp_path, kind, prompt, shown):
    config = trainer_of(kind, tmp_path / "run", "--sample_every 9").config
    make_trainer(tmp_path / "run", dataclasses.replace(config, sample_prompt=prompt)).fit()
    lines = named(texts_of(tmp_path / "run")[9].decode())
    assert {name: lines[name] for name in shown} == shown
    assert not {"text", "reference"} & set(lines)


@pytest.mark.parametrize(
    ("kind", "prompt", "code", "why"),
    [
        ("causal", "a Q", BAD_INPUT, "is not among"),
        ("causal", "", USAGE, "is empty"),
        ("masked", "no blank", USAGE, r"sample_prompt: has no \[MASK\]"),
        ("masked", "[MASK] " * 40, BAD_INPUT, "sample_prompt: has 42 tokens"),
        ("pairs", "ein hund " * 40, BAD_INPUT, "more than the model's 24 tokens"),
    ],
)
def test_a_prompt_that_is_of_no_use_is_told_before_training(trainer_of, tmp_path, kind, prompt, code, why):
    config = trainer_of(kind, tmp_path / "run", "--sample_every 9").config
    with pytest.raises(Error, match=why) as caught:
        make_trainer(tmp_path / "run", dataclasses.replace(config, sample_prompt=prompt))
    assert caught.value.code == code


def test_a_prompt_without_samples_is_refused(trainer_of, tmp_path):
    with pytest.raises(Error, match="has no effect without sample_every"):
        trainer_of("causal", tmp_path / "run", "--sample_prompt dog")


# None is missing, none is left over


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_with_the_samples_of_one_that_was_not(kind, trainer_of, tmp_path):
    trainer_of(kind, tmp_path / "whole", "--sample_every 2").fit()
    run = tmp_path / "run"
    for step in (2, 5, 7):
        fit_and_die_after(trainer_of(kind, run, "--sample_every 2"), step)
    (run / "samples" / "step-00000008.txt").write_text("of a future that did not come")
    (run / "samples" / "notes.txt").write_text("mine")
    trainer_of(kind, run, "--sample_every 2").fit()
    (run / "samples" / "notes.txt").unlink()
    assert texts_of(run) == texts_of(tmp_path / "whole")
    assert sorted(texts_of(run)) == [2, 4, 6, 8, 9]


def test_samples_behind_the_checkpoint_are_removed_although_no_more_are_written(trainer_of, tmp_path):
    fit_and_die_after(trainer_of("causal", tmp_path / "run", "--sample_every 1"), 7)
    assert sorted(texts_of(tmp_path / "run"))[-1] == 7
    trainer_of("causal", tmp_path / "run").fit()
    assert sorted(texts_of(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]
    fit_and_die_after(trainer_of("causal", tmp_path / "new", "--sample_every 1"), 1)
    trainer = trainer_of("causal", tmp_path / "new")
    for folder in (tmp_path / "new" / "checkpoints").iterdir():
        folder.rename(tmp_path / folder.name)  # as if it had been killed before the first was saved
    trainer.fit()
    assert texts_of(tmp_path / "new") == {}


def asked_in_pass(monkeypatch, trainer, step, n):
    """SIGTERM in the n-th pass of the sample of a step; the passes that were begun in it are counted."""
    real, passes = trainer.task.sample, []

    def write(model):
        if trainer.state.step != step:
            return real(model)

        def signalled(module, *_):
            passes.append(1)
            if len(passes) == n:
                os.kill(os.getpid(), signal.SIGTERM)

        hook = trainer.model.tok_emb.register_forward_pre_hook(signalled)
        try:
            return real(model)
        finally:
            hook.remove()

    monkeypatch.setattr(trainer.sampler, "write", write)
    return passes


@pytest.mark.parametrize(("kind", "step", "n"), [("causal", 4, 6), ("causal", 9, 6), ("pairs", 4, 8), ("pairs", 9, 2)])
def test_a_signal_ends_a_sample_at_the_next_token_and_it_is_written_when_the_run_goes_on(
    kind, step, n, trainer_of, tmp_path, monkeypatch, cli
):
    trainer_of(kind, tmp_path / "whole", "--sample_every 1").fit()
    run = tmp_path / "run"
    trainer = trainer_of(kind, run, "--sample_every 1")
    passes = asked_in_pass(monkeypatch, trainer, step, n)
    result = trainer.fit()
    assert (result.step, result.signal) == (step, signal.SIGTERM)
    assert len(passes) == n
    assert sorted(texts_of(run)) == list(range(1, step))
    assert checkpoint.saved_steps(run)[-1] == step
    assert trainer_of(kind, run, "--sample_every 1").fit().signal is None
    assert texts_of(run) == texts_of(tmp_path / "whole")
    assert rows_of(run) == rows_of(tmp_path / "whole")


def test_how_often_and_from_what_may_change_when_a_run_goes_on(trainer_of, tmp_path):
    trainer_of("causal", tmp_path / "run", "--steps 3 --sample_every 3").fit()
    trainer_of("causal", tmp_path / "run", "--steps 9 --sample_every 4 --sample_prompt dog").fit()
    texts = texts_of(tmp_path / "run")
    assert sorted(texts) == [3, 4, 8, 9]
    assert all(texts[step].startswith(b"dog") for step in (4, 8, 9))
    assert not texts[3].startswith(b"dog")


# Faults


def test_a_sample_that_cannot_be_written_ends_the_run_as_metrics_do(trainer_of, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "samples").write_text("a file in its place")
    with pytest.raises(Error, match="samples: cannot be written") as caught:
        trainer_of("causal", run, "--sample_every 2").fit()
    assert caught.value.code == RESOURCE
    assert [row["step"] for row in rows_of(run)] == [1, 2]


def test_what_a_killed_writer_left_is_swept(trainer_of, tmp_path):
    leftover = tmp_path / "run" / "samples" / ".classiclm-tmp-step-00000001.txt-0"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("half of")
    trainer_of("causal", tmp_path / "run", "--sample_every 9").fit()
    assert [path.name for path in leftover.parent.iterdir()] == ["step-00000009.txt"]


def test_only_the_first_of_many_processes_writes(tmp_path):
    class Second(World):
        def any(self, flag):
            return True  # as the first one says

    model = torch.nn.Linear(1, 1)
    plan = Plan("cpu", "fp32", 1, False, ())
    config = dataclasses.replace(TrainFlags(preset="gpt2-124m"), sample_every=1, steps=2)
    sampler = Sampler(tmp_path, model, lambda model: "seen", config, plan, Second(rank=1, size=2))
    assert sampler(1, lambda: False) == "seen"
    assert not (tmp_path / "samples").exists()


# What is shown


def test_the_first_line_with_anything_in_it_is_shown_without_control_characters(capsys):
    progress = ProgressLog("train", 300, 0)
    progress.wrote(250, "\n  \n\x1b[31mred\x07 " + "x" * 200 + "\nmore")
    progress.wrote(300, " \n")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("train: step 250/300 writes: [31mred  xxx")
    assert first.isprintable()
    assert first.endswith("xxx...")
    assert len(first) < 140
    assert second == "train: step 300/300 writes: (white space)"
    ProgressLog("train", 300, 0, shown=False).wrote(250, "text")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_trackers_have_the_samples_that_stand_once_each(name, trainer_of, tmp_path, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    fit_and_die_after(trainer_of("causal", run, f"--sample_every 2 --tracker {name}"), 5)
    trainer_of("causal", run, f"--sample_every 2 --tracker {name}").fit()
    expected = {step: text.decode() for step, text in texts_of(run).items()}
    assert samples_in(name, run) == expected


def samples_in(name, run):
    """Step -> text, read back from a tracker's files."""
    from test_trackers import tensorboard_events, wandb_records

    if name == "tensorboard":
        values = [
            (event.step, v) for event in tensorboard_events(run) for v in event.summary.value if v.tag == "sample"
        ]
        texts = [(step, v.tensor.string_val[0].decode()) for step, v in values]
        assert len(dict(texts)) == len(texts)
        return {step: "".join(line[4:] + "\n" for line in text.split("\n")) for step, text in texts}
    history = [r.history for r in wandb_records(run) if r.WhichOneof("record_type") == "history"]
    rows = [
        {"/".join([i.key or "", *i.nested_key]).lstrip("/"): json.loads(i.value_json) for i in h.item} for h in history
    ]
    assert len({row["step"] for row in rows}) == len(rows) == 9
    return {row["step"]: row["sample"] for row in rows if "sample" in row}


def test_files_are_named_and_ordered_by_step(tmp_path):
    samples = Samples(tmp_path)
    for step in (1000, 20, 3):
        samples.add(step, f"at {step}\ud800")
    assert sorted(path.name for path in samples.folder.iterdir()) == [f"step-{s:08d}.txt" for s in (3, 20, 1000)]
    assert samples.rows() == [{"step": s, "sample": f"at {s}?"} for s in (3, 20, 1000)]


# Several processes


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "strategy"), [("causal", "fsdp"), ("masked", "ddp"), ("pairs", "fsdp")])
def test_two_processes_sample_without_a_trace_also_before_their_first_step(kind, strategy, data, tmp_path):
    """The run that goes on finds its last sample missing, and so begins with it."""

    def train(run, steps, *flags):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += ["-m", "classiclm", "train", *KINDS[kind].split(), *data[kind].split(), "--strategy", strategy]
        command += ["--out", run, "--steps", steps, "--precision", "fp32", "--timeout", 60, *flags]
        environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    for name, flags in (("with", ["--sample_every", 3]), ("without", [])):
        train(tmp_path / name, 3, *flags)
        (tmp_path / name / "samples" / "step-00000003.txt").unlink(missing_ok=True)
        train(tmp_path / name, 5, *flags)
    assert sums_of(tmp_path / "with") == sums_of(tmp_path / "without")
    assert rows_of(tmp_path / "with") == rows_of(tmp_path / "without")
    texts = texts_of(tmp_path / "with")
    assert sorted(texts) == [3, 5]
    alone = tmp_path / "alone"
    alone.mkdir()
    config = plain(resolve(TrainFlags, f"{KINDS[kind]} {data[kind]} --sample_every 1".split(), "train")[0])
    write = runs.make_trainer(alone, config).task.sample
    for step in (3, 5):
        assert texts[step].decode() == write(open_run(tmp_path / "with", str(step)).model)
