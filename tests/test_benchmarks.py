"""benchmarks/: the arithmetic of its page, that the sides of a comparison do the same work, and that all of it runs."""

import contextlib
import io
import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import fixtures, harness, measures, profiling, report, turns, worker  # noqa: E402
from benchmarks import losses as curves  # noqa: E402
from benchmarks.cases import CASES, Case, Entry, Measure  # noqa: E402
from benchmarks.contenders import commands, limits, nanogpt, ours, torch_, transformers_  # noqa: E402
from benchmarks.work import IGNORE, Work, batches  # noqa: E402

from classiclm.nn.attention import set_attention_path  # noqa: E402
from classiclm.objectives import CausalLM, MaskedLM, Translation  # noqa: E402

TOY = {"n_layers": 2, "d_model": 32, "n_heads": 2, "n_ctx": 16, "length": 16, "batch": 3, "vocab_size": 97}
WORKS = {
    "causal": Work("causal", "gpt2-124m", **TOY),
    "masked": Work("masked", "bert-base", **TOY),
    "pairs": Work("pairs", "transformer2017-base", **TOY),
}


def row(name, role, seconds, **more):
    base = {"name": name, "role": role, "x": None, "limit": None, "why": None, "peak": 10_000_000, "idle": 0.0}
    base |= {"amount": {"step": 100}, "seconds": {"step": seconds}, "n_params": 12_000_000, "note": f"as {name} does"}
    return base | more


def case(*rows, bars=(), axis=None):
    return {
        "name": "train-x", "title": "Training x", "about": "A step.", "axis": axis, "load": [[0.5, 0, 0], [2.5, 0, 0]],
        "measures": [{"name": "step", "unit": "tokens/s"}], "bars": list(bars), "contenders": list(rows),
    }  # fmt: skip


def bar(ours_, theirs, floor, of="speed"):
    return {"ours": ours_, "theirs": theirs, "floor": floor, "goal": None, "of": of}


def page(*cases):
    machine = {"cpu": "a CPU", "flags": ["avx2"], "cores": 2, "threads": 2, "ram_gib": 8.0, "system": "Linux"}
    machine |= {"python": "3.11", "packages": {"torch": "2.13", "litgpt": None}, "date": "2026-01-01"}
    return report.page({"machine": machine, "repeats": 3, "quick": False, "cases": list(cases)})


# Arithmetic


def test_a_ratio_is_the_median_of_the_rounds_ratios_and_not_the_ratio_of_medians():
    mine, theirs = row("ours", "ours", [1.0, 2.0, 4.0]), row("peer", "peer", [3.0, 2.0, 8.0])
    assert measures.times_as_fast(mine, theirs, "step") == 2.0  # of 3, 1, 2; the medians' ratio is 1.5
    assert measures.times_as_fast(theirs, mine, "step") == 0.5


def test_a_ratio_leaves_out_rounds_that_one_of_them_has_not_taken():
    assert measures.times_as_fast(row("a", "ours", [1.0, None, 1.0]), row("b", "peer", [2.0, 9.0]), "step") == 2.0
    assert measures.times_as_fast(row("a", "ours", []), row("b", "peer", [2.0]), "step") is None


def test_quartiles_are_those_of_the_values_themselves():
    assert measures.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 4.0)
    assert measures.quartiles([7.0]) == (7.0, 7.0)


def test_a_rate_is_amount_per_second_and_seconds_where_nothing_is_counted():
    assert measures.rate(row("a", "ours", [0.5]), "step", 0.5) == 200
    assert measures.rate(row("a", "ours", [0.5], amount={"step": None}), "step", 0.5) == 0.5


def test_the_fastest_is_the_one_with_the_smallest_median_of_its_kind():
    rows = [row("ours", "ours", [1]), row("peer a", "peer", [1, 5, 9]), row("peer b", "peer", [4, 4, 4])]
    rows.append(row("peer c", "peer", [], why="missing"))
    assert measures.fastest(rows, "step", "peer")["name"] == "peer b"
    assert measures.fastest(rows, "step", prefix="peer a")["name"] == "peer a"
    assert measures.fastest(rows, "step", "limit") is None
    assert measures.fastest(rows, "step", prefix="peer a or peer b")["name"] == "peer b"


@pytest.mark.parametrize(("of", "floor", "met"), [("speed", 2.0, True), ("speed", 2.1, False)])
def test_a_bar_of_speed_is_met_from_its_floor_up(of, floor, met):
    judged = measures.judge(
        case(row("ours", "ours", [1.0]), row("peer", "peer", [2.0])), bar("ours", "peer", floor, of)
    )
    assert (judged["ratio"], judged["met"]) == (2.0, met)


@pytest.mark.parametrize(("peak", "met"), [(10_000_000, True), (12_000_000, False)])
def test_a_bar_of_memory_is_met_up_to_its_floor(peak, met):
    rows = row("ours", "ours", [1.0], peak=peak), row("peer", "peer", [2.0])
    assert measures.judge(case(*rows), bar("ours", "peer", 1.0, "memory"))["met"] is met


def test_a_bar_of_seconds_is_ours_alone_in_the_first_measure():
    rows = row("ours", "ours", [2.0, 3.0, 9.0]), row("peer", "peer", [1.0, 1.0, 1.0])
    for floor, met in ((3.0, True), (2.9, False)):
        judged = measures.judge(case(*rows), bar("ours", "peer", floor, "seconds"))
        assert (judged["ratio"], judged["met"]) == (3.0, met)


def test_a_bar_against_nobody_is_not_judged():
    assert measures.judge(case(row("ours", "ours", [1.0])), bar("ours", "peer", 1.0)) is None


def test_what_is_slower_is_the_best_of_ours_behind_the_best_peer():
    behind = case(row("ours", "ours", [2.0]), row("ours b", "ours", [3.0]), row("peer", "peer", [1.0]))
    assert [(mine["name"], ratio) for _, mine, _, ratio in measures.slower(behind)] == [("ours", 0.5)]
    assert measures.slower(case(row("ours", "ours", [1.0]), row("peer", "peer", [1.1]))) == []


# The page


def test_the_page_has_rates_ratios_shares_of_the_limit_and_whoever_is_missing():
    text = page(
        case(
            row("ours", "ours", [0.5, 0.5, 0.25], limit="bare"),
            row("peer", "peer", [1.0, 1.0, 1.0], idle=0.5),
            row("gone", "peer", [], why="gone is not installed"),
            row("bare", "limit", [0.125, 0.125, 0.125]),
            bars=[bar("ours", "peer", 3.0)],
        )
    )
    assert "| **ours** | 200 | 200 to 267 | 2.00 | 25% | 10 | as ours does |" in text
    assert "| peer | 100 | 100 to 100 | 1.00 |  | 10 | as peer does |" in text
    assert "| bare | 800 | 800 to 800 |  |  | 10 | as bare does |" in text
    assert "- gone did not take part: gone is not installed" in text
    assert "- peer took 50% of a core while it waited" in text
    assert "| train-x | ours | peer | speed 2.00 | at least 3 | missed |" in text
    assert "nothing that was measured here" in text
    assert "load average around a case was at most 2.5" in text


def test_the_page_says_what_was_slower():
    text = page(case(row("ours", "ours", [2.0]), row("peer", "peer", [1.0])))
    assert "- train-x, step: ours at 0.50 times the speed of peer" in text


def test_the_page_has_the_profile_in_shares():
    profile = dict.fromkeys(profiling.GROUPS, 0.0) | {"matrix products": 3.0, "dropout": 1.0}
    text = page(case(row("ours", "ours", [1.0], profile=profile)))
    assert "| matrix products | 75% |" in text
    assert "| dropout | 25% |" in text


def test_a_curve_has_a_picture_that_is_well_formed(tmp_path):
    points = [row(f"T = {x}", "ours", [seconds], x=x) for x, seconds in ((128, 1.0), (256, 2.0))]
    grown = case(*points, axis="context") | {"name": "grow-context"}
    data = {"repeats": 1, "quick": True, "cases": [grown]}
    machine = {"cpu": "", "flags": [], "cores": 1, "threads": 1, "ram_gib": 1, "system": "", "python": "", "date": ""}
    path = report.write(data | {"machine": machine | {"packages": {}}}, tmp_path)
    assert "toy sizes" in path.read_text()
    assert "| T = 256 | 12,000,000 | 50 | 50 to 50 | 0.50 | 10 |" in path.read_text()
    drawing = ElementTree.parse(tmp_path / "img/grow-context.svg")
    assert len(drawing.findall(".//{http://www.w3.org/2000/svg}polyline")) == 2


def test_two_files_make_one_page_and_two_machines_do_not(tmp_path):
    def file(name, cpu, cases):
        path, head = tmp_path / name, {"repeats": 3}
        path.write_text(
            json.dumps({**head, "machine": {"cpu": cpu}, "cases": [{"name": c, "from": name} for c in cases]})
        )
        return path

    old = file("old", "A", ["train-gpt2-124m", "train-shakespeare"])
    new = file("new", "A", ["train-gpt2-124m"])
    found = [(case["name"], case["from"]) for case in command.merged([old, new])["cases"]]
    assert found == [("train-shakespeare", "old"), ("train-gpt2-124m", "new")]
    with pytest.raises(SystemExit):
        command.merged([old, file("other", "B", [])])


# Equal work


OBJECTIVES = {"causal": CausalLM(), "masked": MaskedLM(), "pairs": Translation()}


def our_loss(kind, model, batch):
    objective = OBJECTIVES[kind]
    with torch.no_grad():
        return float(objective(model.eval(), batch).total(objective.counts(batch)))


@pytest.fixture(params=["causal", "masked"])
def kind(request):
    pytest.importorskip("transformers")
    return request.param


def test_transformers_has_our_parameters_and_with_our_weights_our_loss(kind):
    work = WORKS[kind]
    model, theirs = fixtures.build(work), transformers_.make(work)
    assert model.count_parameters() == sum(p.numel() for p in theirs.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    _, tensors = fixtures.hf_tensors(model, {"causal": "gpt2", "masked": "bert"}[kind])
    assert theirs.load_state_dict(tensors, strict=False).unexpected_keys == []
    with torch.no_grad():
        loss = float(theirs.eval()(**transformers_.rows(work, n=1)).loss)
    batch = batches(work, n=1)[0]
    if kind == "causal":  # their labels are the inputs, one place further
        batch["targets"] = torch.cat([batch["inputs"][:, 1:], torch.full((work.batch, 1), IGNORE)], dim=1)
    assert loss > 2
    assert our_loss(kind, model, batch) == pytest.approx(loss, rel=1e-4)


def their_names(i, side):
    """Our linear layers and norms of a block -> torch's."""
    block = f"inner.{side}.layers.{i}"
    crossed = {"ln1": "norm1", "mlp.up": "linear1", "mlp.down": "linear2", "attn.o": "self_attn.out_proj"}
    if side == "encoder":
        return block, crossed | {"ln2": "norm2"}
    return block, crossed | {"ln2": "norm2", "ln3": "norm3", "cross.o": "multihead_attn.out_proj"}


def in_torchs_names(weights, n_layers):
    tensors = {"tokens.weight": weights["tok_emb.weight"]}
    for side in ("encoder", "decoder"):
        for i in range(n_layers):
            block, names = their_names(i, side)
            mine = f"{side}.{i}"
            for our, their in names.items():
                tensors |= {f"{block}.{their}.{p}": weights[f"{mine}.{our}.{p}"] for p in ("weight", "bias")}
            for our, their in (("attn", "self_attn"), ("cross", "multihead_attn"))[: 1 if side == "encoder" else 2]:
                for p in ("weight", "bias"):
                    joined = torch.cat([weights[f"{mine}.{our}.{slot}.{p}"] for slot in "qkv"])
                    tensors[f"{block}.{their}.in_proj_{p}"] = joined
    return tensors


def test_torchs_transformer_has_our_parameters_and_with_our_weights_our_loss():
    work = WORKS["pairs"]
    model, theirs = fixtures.build(work), torch_.make(work).eval()
    assert model.count_parameters() == sum(p.numel() for p in theirs.parameters())
    theirs.load_state_dict(in_torchs_names(model.state_dict(), work.n_layers))
    batch = batches(work, n=1)[0]
    with torch.no_grad():
        loss = float(torch_.loss_of(theirs, batch, smoothing=0.0))
    assert our_loss("pairs", model, batch) == pytest.approx(loss, rel=1e-5)
    assert loss > math.log(work.vocab_size) - 0.5


def test_litgpt_has_our_parameters_but_the_positions():
    pytest.importorskip("litgpt")
    from benchmarks.contenders import litgpt_

    work = WORKS["causal"]
    theirs = sum(p.numel() for p in litgpt_.make(work).parameters())
    assert theirs == fixtures.build(work).count_parameters() - work.n_ctx * work.d_model


@pytest.mark.parametrize("kind", WORKS)
def test_the_limit_counts_the_matrix_products_of_our_model(kind):
    work = WORKS[kind]
    model, batch, objective = fixtures.build(work), batches(work, n=1)[0], OBJECTIVES[kind]
    set_attention_path(model, "written")
    with FlopCounterMode(display=False) as counter:
        objective(model, batch).total(objective.counts(batch)).backward()
    assert 3 * sum(p.flops for p in limits.products(work, work.batch)) == counter.get_total_flops()


def test_a_product_is_prepared_with_both_of_its_backward_products():
    with FlopCounterMode(display=False) as counter:
        for call in limits.prepared(limits.Product(5, 7, 11, count=2, batch=3), torch.float32, backward=True):
            call()
    assert counter.get_total_flops() == 3 * 2 * (2 * 3 * 5 * 7 * 11)


# Everything runs


class OneTurn(turns.Turns):
    """A single turn, without a process."""

    def __init__(self, folder, **settings):
        self.answers = io.StringIO()
        super().__init__(io.StringIO("go\n"), self.answers, folder, warm_up=1, **settings)

    def messages(self):
        return [json.loads(line) for line in self.answers.getvalue().splitlines()]


def take_one_turn(entry, work, tmp_path, monkeypatch, **settings):
    turn = OneTurn(tmp_path, **settings)
    job = {"target": entry.target, "work": harness.dataclasses.asdict(entry.work or work), "options": entry.options}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'src'}")
    worker.run(job, turn)
    return turn.messages()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder for files that contenders share, which are made only once."""
    return tmp_path_factory.mktemp("shared")


def is_slow(entry):
    return (entry.target == "ranks:train" and entry.options["ranks"] > 1) or entry.target.startswith("commands:")


OURS = [
    pytest.param(case, entry, id=f"{case.name}-{entry.name}", marks=[pytest.mark.slow] if is_slow(entry) else [])
    for case in (case.quick() for case in CASES)
    for entry in case.entries
    if entry.role == "ours"
]


@pytest.mark.parametrize(("case", "entry"), OURS)
def test_our_side_of_every_case_runs_at_toy_size(case, entry, shared, monkeypatch):
    ready, done = take_one_turn(entry, case.work, shared, monkeypatch)
    assert ready["event"] == "ready"
    assert set(done["seconds"]) == {measure.name for measure in case.measures}
    unknown = entry.target.startswith("commands:") and done["peak"] is None  # smaller than who started it
    assert unknown or done["peak"] >= 0
    if entry.target in ("ours:train", "ranks:train"):
        assert ready["n_params"] == fixtures.build(entry.work or case.work).count_parameters()


def test_our_side_learns_what_it_is_timed_on():
    step = ours.Step(
        ours.make_trainer(WORKS["causal"].with_sizes(batch=2), ["--warmup", "0", "--lr", "1e-2"]), WORKS["causal"]
    )
    step.batches, step.parts = step.batches[:1], step.parts[:1]
    step()
    first = step.loss
    for _ in range(5):
        step()
    assert step.loss < first - 0.1


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_profile_names_what_a_step_consists_of(dropout, tmp_path, monkeypatch):
    work = WORKS["causal"].with_sizes(dropout=dropout)
    entry = Entry("ours", "ours:train", "ours")
    _, done = take_one_turn(entry, work, tmp_path, monkeypatch, profiling=True)
    profile = done["profile"]
    assert list(profile) == list(profiling.GROUPS)
    assert all(profile[name] > 0 for name in profiling.GROUPS if name not in ("dropout", "copies and casts"))
    assert (profile["dropout"] > 0) is (dropout > 0)


def test_the_profile_leaves_everything_as_it_was():
    from classiclm.nn import attention

    before, model = attention.attend, fixtures.build(WORKS["causal"])
    with profiling.scopes(model):
        assert attention.attend is not before
        assert any(module._forward_hooks for module in model.modules())
    assert attention.attend is before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_work_of_a_seed_is_always_the_same_and_has_the_shapes_it_says():
    for kind, work in WORKS.items():
        first, again = batches(work), batches(work)
        assert all(torch.equal(a[name], b[name]) for a, b in zip(first, again, strict=True) for name in a)
        assert first[0]["inputs"].shape == (work.batch, work.length)
        assert not torch.equal(first[0]["inputs"], first[1]["inputs"])
        assert first[0]["targets"].shape[1] == (work.n_places if kind == "masked" else work.length)
    places = batches(WORKS["masked"])[0]["places"]
    assert (places.diff(dim=1) > 0).all()


# The harness


def test_the_order_of_turns_moves_on_by_one_each_round():
    assert [harness.rotated("abc", number) for number in range(4)] == [
        list("abc"),
        list("bca"),
        list("cab"),
        list("abc"),
    ]
    assert harness.rotated([], 3) == []


def test_decoding_is_long_less_short_and_the_prefill_is_what_is_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(turns.time, "perf_counter", lambda: now[0])

    def write(n):
        now[0] += 5.0 + 0.5 * (n - 1)  # the prompt, then a step for each further token

    assert turns.decoding(write, 8)() == {"decode": 4.0, "prefill": 5.0}


FAKE = """
import torch
from dataclasses import dataclass
@dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
        print("number of parameters: many")
    def get_num_params(self, non_embedding=True):
        return self.table.weight.numel()
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("using fused AdamW: no")
        return torch.optim.SGD(self.parameters(), lr=0.1)
    def forward(self, inputs, targets):
        logits = self.table(inputs)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def test_contenders_take_turns_and_whoever_cannot_is_named_with_the_reason(tmp_path):
    (tmp_path / "model.py").write_text(FAKE)
    work = WORKS["causal"]
    entries = (
        Entry("theirs", "nanogpt:train", "peer", {"precision": "fp32"}),
        Entry("gone", "ctranslate2_:decode", "peer", {"precision": "no such type"}),
        Entry("bad", "limits:no_such_function", "limit"),
        Entry("reading", "limits:reading", "limit", {"precision": "fp32"}),
    )
    measured = Case(
        "c", "C", "About.", work.with_sizes(new_tokens=2), entries, (Measure("step"), Measure("decode")), {}
    )
    said = []
    settings = harness.Settings(repeats=3, warm_up=0, at_once=2, nanogpt=str(tmp_path), say=said.append)
    result = harness.measure(measured, settings, tmp_path)
    json.dumps(result)
    theirs, gone, bad, reading = result["contenders"]
    assert theirs["why"] is None
    assert theirs["n_params"] == 97 * 97
    assert len(theirs["seconds"]["step"]) == 3
    assert all(seconds > 0 for seconds in theirs["seconds"]["step"])
    assert theirs["peak"] > 0
    assert gone["why"] in ("CTranslate2 has no no such type on this CPU", "ctranslate2 is not installed")
    assert "no_such_function" in bad["why"]
    assert reading["seconds"] == {"step": [None] * 3, "decode": reading["seconds"]["decode"]}
    assert reading["idle"] is not None
    assert len(said) == 4


def test_a_contender_that_dies_is_out_with_its_last_words(tmp_path):
    (tmp_path / "model.py").write_text(
        "import os, sys\nprint('my last words', file=sys.stderr, flush=True)\nos._exit(3)\n"
    )
    entry = Entry("theirs", "nanogpt:train", "peer", {"precision": "fp32"})
    contender = harness.Contender(entry, WORKS["causal"], harness.Settings(nanogpt=str(tmp_path)), tmp_path)
    contender.prepare()
    contender.close()
    assert contender.why == "ended with code 3: my last words"


def test_a_contender_that_takes_too_long_is_out(tmp_path):
    (tmp_path / "model.py").write_text("import time\ntime.sleep(60)\n")
    entry = Entry("theirs", "nanogpt:train", "peer", {"precision": "fp32"})
    settings = harness.Settings(nanogpt=str(tmp_path), patience=0.2)
    contender = harness.Contender(entry, WORKS["causal"], settings, tmp_path)
    contender.prepare()
    contender.close()
    assert contender.why == "took more than 0 s"


def test_without_a_checkout_nanogpt_is_missing():
    with pytest.raises(turns.Missing, match="--nanogpt DIR"):
        nanogpt.make(WORKS["causal"], None)


def test_the_peak_of_a_command_is_its_own_or_unknown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = turns.resident()["VmHWM"]
    assert commands.run(["-c", "pass"]).peak is None
    assert commands.run(["-c", f"len(bytes({own}) + b'x' * {own})"]).peak > 2 * own


def test_the_first_output_of_a_command_is_timed_apart_from_its_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert commands.run(["-c", "pass"]).first is None
    ran = commands.run(["-c", "import time; print('a', flush=True); time.sleep(0.5); print('b' * 100_000)"])
    assert 0 < ran.first <= ran.seconds - 0.5


# Losses of fast and readable forms


def test_a_distance_is_between_means_over_seeds_and_a_spread_is_over_seeds():
    n = curves.WINDOW
    plain = [[1.0] * n + [2.0] * n + [9.0], [3.0] * n + [2.0] * n + [9.0]]
    result = {"preset": "p", "steps": 2 * n + 1, "readable": plain, "fast": [[2.5] * n + [1.0] * n + [9.0]] * 2}
    assert curves.distances(result) == [(0.5, 2**0.5), (1.0, 0.0)]


def test_the_readable_form_computes_what_the_fast_one_does_from_other_operations():
    from classiclm.nn.blocks import PreLNBlock

    torch.manual_seed(0)
    block, x = PreLNBlock(16, 2).double(), torch.randn(2, 5, 16, dtype=torch.float64)
    made, calls = {}, {}
    for name, form in (("fast", contextlib.nullcontext()), ("readable", curves.readable())):
        with form, torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            made[name] = block(x)
        calls[name] = {event.key for event in profile.key_averages()}
    torch.testing.assert_close(made["fast"], made["readable"])
    assert "aten::native_layer_norm" in calls["fast"] - calls["readable"]


def test_losses_of_both_forms_are_close_and_not_the_same(capsys, tmp_path):
    curves.main(["gpt2-shakespeare-cpu", "--data", "plays", "--seeds", "2", "--steps", "20", "--out", str(tmp_path)])
    data = json.loads((tmp_path / "losses.json").read_text())
    (result,) = data["losses"]
    assert len(result["readable"]) == len(result["fast"]) == 2
    assert result["readable"] != result["fast"]
    assert result["readable"][0] != result["readable"][1]
    for plain, fast in zip(result["readable"], result["fast"], strict=True):
        assert plain == pytest.approx(fast, abs=0.02)
    assert "gpt2-shakespeare-cpu" in capsys.readouterr().out
    assert "Fast forms learn what readable ones do" in report.page(data)


def test_a_loss_is_a_bar_and_a_column():
    mine, peer = row("ours", "ours", [1.0], loss=[1.6, 1.5, 1.7]), row("peer", "peer", [2.0], loss=[1.9])
    made = page(case(mine, peer, bars=[bar("ours", "peer", 1.75, "loss"), bar("ours", "peer", 1.55, "loss")]))
    assert "loss 1.60 | at most 1.75 |  |" in made
    assert "loss 1.60 | at most 1.55 | missed |" in made
    assert "| 1.600, 1.500, 1.700 |" in made


# The command


def test_every_case_is_listed(capsys):
    assert command.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(f"{case.name}: " in out for case in CASES)
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("words", [["no-such-case"], ["--python", "litgpt"], ["--repeats", "many"]])
def test_wrong_words_end_it_with_code_2(words, capsys):
    with pytest.raises(SystemExit) as e:
        command.main(words)
    assert e.value.code == 2


def test_names_choose_cases_by_their_beginning():
    assert {case.name for case in command.choose(["decode-gpt2", "start-help"])} == {
        "decode-gpt2-124m-1", "decode-gpt2-124m-8", "start-help",
    }  # fmt: skip


def test_every_bar_is_between_contenders_that_there_are():
    for case_ in CASES:
        names = [entry.name for entry in case_.entries]
        for wanted in case_.bars:
            for begins in [*wanted.ours.split(" or "), *wanted.theirs.split(" or ")]:
                assert any(name.startswith(begins) for name in names)
        assert all(entry.limit is None or entry.limit in [*names, "import torch"] for entry in case_.entries)
