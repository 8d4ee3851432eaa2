"""Every family through the one trainer and the same commands: killed and resumed, written with, measured, misused."""

import gzip
import io
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import save

from classiclm import registry
from classiclm.data.tokenizers import WordPiece, load_tokenizer
from classiclm.data.wordpiece import SPECIAL
from classiclm.files import publish_folder, sha256_of_file
from classiclm.generate.beam import translate
from classiclm.generate.fill import fill
from classiclm.generate.sample import generate
from classiclm.models import transformer2017
from classiclm.models.bert import BERT
from classiclm.train import checkpoint
from classiclm.train.trainer import Trainer

SIZES = "--model.n_layers 2 --model.d_model 16 --model.n_heads 2 --model.n_ctx 24 --device cpu"
SHORT = "--steps 14 --save_every 4 --eval_every 5 --log_every 3 --eval_windows 4"
FAMILIES = {
    "ladder": f"ladder-12 --batch 4 --model.n_ctx 24 {SHORT} --device cpu",
    "gpt1": f"gpt1-tiny --tokenizer gpt1-bpe-600 --batch 4 {SHORT} {SIZES}",
    "gpt2": f"gpt2-shakespeare-cpu --batch 4 --model.dropout 0.1 {SHORT} {SIZES}",
    "gpt3": f"gpt3-tiny --tokenizer bpe-300 --batch 4 --model.band 8 {SHORT} {SIZES}",
    "bert": f"bert-shakespeare --tokenizer wordpiece-300 --batch 4 --model.dropout 0.1 --first_ctx 12 {SHORT} {SIZES}",
    "transformer2017": f"transformer2017-multi30k --tokenizer bpe-300 --batch 120 --warmup 5 {SHORT} {SIZES}",
}
families = pytest.mark.parametrize("family", FAMILIES)
WORDS = ["der", "hund", "läuft", "im", "schnee", "ein", "mann", "sieht", "die", "frau", "und", "das", "kind", "gras"]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """A text of documents with a sentence per line, and a folder of sentence pairs."""
    root, draw = tmp_path_factory.mktemp("corpora"), random.Random(0)

    def sentence():
        return " ".join(draw.choices(WORDS, k=draw.randint(3, 9)))

    (root / "text.txt").write_text("\n\n".join("\n".join(sentence() for _ in range(5)) for _ in range(40)))
    pairs = root / "pairs"
    pairs.mkdir()
    for split, n in (("train", 80), ("val", 12), ("test_small", 9)):
        lines = [sentence() for _ in range(n)]
        with gzip.open(pairs / f"{split}.de.gz", "wt", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        (pairs / f"{split}.en").write_text("\n".join(line.upper() for line in lines) + "\n")
    return root


def command(family, corpora, run):
    data = ["--data.source", "de", "--data.target", "en"] if family == "transformer2017" else []
    place = corpora / "pairs" if family == "transformer2017" else corpora / "text.txt"
    return ("train", *FAMILIES[family].split(), "--data", place, *data, "--out", run)


@pytest.fixture(scope="module")
def trained(corpora, tmp_path_factory):
    """Family -> the folder of its run, trained once without interruption."""
    from classiclm.cli import main

    made = {}

    def run_of(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("runs") / family
            assert main([str(word) for word in command(family, corpora, made[family])]) == 0
        return made[family]

    return run_of


class Killed(BaseException):
    """Stands for a SIGKILL inside this process."""


def die_at(monkeypatch, step):
    real = Trainer._train_step

    def train_step(self):
        if self.state.step == step:
            raise Killed
        return real(self)

    monkeypatch.setattr(Trainer, "_train_step", train_step)


def weights_of(run):
    return sha256_of_file(checkpoint.newest_valid(run)[0] / "model.safetensors")


def rows_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in rows]


@families
def test_a_run_of_every_family_killed_twice_ends_with_the_same_bytes_and_rows(
    family, trained, corpora, tmp_path, cli, monkeypatch
):
    for step in (3, 11):
        with monkeypatch.context() as patch:
            die_at(patch, step)
            with pytest.raises(Killed):
                cli(*command(family, corpora, tmp_path))
    code, _, err = cli(*command(family, corpora, tmp_path))
    assert code == 0, err
    assert "continuing" in err
    assert weights_of(tmp_path) == weights_of(trained(family))
    assert rows_of(tmp_path) == rows_of(trained(family))


@families
def test_every_family_learns_something(family, trained):
    rows = rows_of(trained(family))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["step"] == 14


@families
def test_every_family_writes_and_is_measured(family, trained, cli):
    prompt = "der [MASK] läuft" if family == "bert" else "der hund"
    code, out, err = cli("generate", trained(family), "--prompt", prompt, "--max_new_tokens", 4, "--device", "cpu")
    assert code == 0, err
    assert out
    code, out, err = cli("evaluate", trained(family), "--device", "cpu", "--json")
    assert code == 0, err
    (row,) = json.loads(out)
    last = rows_of(trained(family))[-1]
    assert row["loss"] == pytest.approx(last["val_loss"], rel=0.03)  # training measures in bf16 where that is fast


def test_the_masked_row_says_both_losses_and_how_often_the_pair_was_told(trained, cli):
    (row,) = json.loads(cli("evaluate", trained("bert"), "--device", "cpu", "--json")[1])
    assert row["loss"] == pytest.approx(row["mlm"] + row["nsp"])
    assert 0 <= row["nsp_accuracy"] <= 1
    assert 1 < row["unigram_entropy"] < 6
    last = rows_of(trained("bert"))[-1]
    assert last["val_loss"] == pytest.approx(last["val_mlm"] + last["val_nsp"])
    assert "bits_per_byte" not in last


def test_the_blanks_are_filled_and_their_candidates_have_probabilities(trained, cli):
    run = trained("bert")
    code, out, err = cli("generate", run, "--prompt", "der [MASK] und [MASK]", "--json", "--device", "cpu")
    assert code == 0, err
    answer = json.loads(out)
    assert [len(blank) for blank in answer["candidates"]] == [5, 5]
    assert all(0 < p <= 1 for blank in answer["candidates"] for _, p in blank)
    assert answer["candidates"][0][0][0].removeprefix("##") in answer["text"]
    assert "[MASK]" not in answer["text"]


def test_a_blank_is_never_filled_with_a_special_token_and_no_word_is_lost():
    """The model knows only how frequent tokens are, and the special ones are the most frequent."""
    words = ["to", "be", "or", "not", "noble"]
    tokenizer = WordPiece.from_vocabulary([*SPECIAL, *words])
    model = BERT.from_preset("bert-shakespeare", n_layers=1, d_model=8, n_heads=2, n_ctx=16, vocab_size=10)
    bias = torch.tensor([5.0, 6.0, 7.0, 9.0, 8.0, 1.0, 2.0, 0.0, -1.0, 3.0])
    model.load_state_dict({"mlm.ln.weight": torch.zeros(8), "mlm.ln.bias": torch.zeros(8), "mlm.bias": bias}, False)
    filled = fill(model, tokenizer, "to [MASK] or [MASK] be [SEP] not to [MASK]", top=4)
    assert filled.text == "to noble or noble be not to noble"
    assert filled.tokens == [5, 9, 7, 9, 6, 8, 5, 9]
    for blank in filled.candidates:
        assert [word for word, _ in blank] == ["noble", "be", "to", "or"]
        assert [p for _, p in blank] == pytest.approx((bias.exp() / bias.exp().sum())[[9, 6, 5, 7]].tolist())
    assert len(fill(model, tokenizer, "[MASK]", top=50).candidates[0]) == len(words)


def test_bleu_is_measured_on_a_test_set_and_its_signature_is_printed(trained, cli):
    run = trained("transformer2017")
    code, out, err = cli("evaluate", run, "--split", "test_small", "--beam", 2, "--device", "cpu")
    assert code == 0, err
    assert "tok:13a" in out
    assert "BLEU of beam 2" in out
    (row,) = json.loads(cli("evaluate", run, "--split", "test_small", "--beam", 1, "--device", "cpu", "--json")[1])
    assert 0 <= row["bleu"] <= 100


def test_the_mean_of_the_last_checkpoints_is_their_mean(trained):
    run = trained("transformer2017")
    steps = checkpoint.saved_steps(run)[-3:]
    each = [registry.open_run(run, str(step)).model.state_dict() for step in steps]
    mean = registry.open_run(run, "mean-3").model.state_dict()
    for name in mean:
        assert (mean[name] - sum(weights[name] for weights in each) / 3).abs().max() < 1e-6


def test_more_checkpoints_than_there_are_cannot_be_averaged(trained, cli):
    code, _, err = cli("evaluate", trained("transformer2017"), "--checkpoint", "mean-90", "--device", "cpu")
    assert code == 3
    assert "not 90" in err


WRONG = {
    "pairs given to a GPT": ("gpt2", "pairs", 3, "pairs"),
    "pairs given to a BERT": ("bert", "pairs", 3, "pairs"),
    "text without pairs given to a translator": ("transformer2017", "text.txt", 3, "pairs"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_wrong_kind_of_data_is_told_in_one_line(name, corpora, tmp_path, cli):
    family, place, expected, word = WRONG[name]
    words = [corpora / place if w in (corpora / "text.txt", corpora / "pairs") else w
             for w in command(family, corpora, tmp_path / "run")]  # fmt: skip
    code, _, err = cli(*words)
    assert code == expected, err
    assert word in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(
    ("family", "prompt", "code", "words"),
    [("bert", "no blank here", 2, "[MASK]"), ("transformer2017", None, 2, "--prompt"), ("gpt2", "", 2, "empty")],
)
def test_a_prompt_that_does_not_fit_the_model_is_told(family, prompt, code, words, trained, cli):
    flags = [] if prompt is None else ["--prompt", prompt]
    got, _, err = cli("generate", trained(family), *flags, "--device", "cpu")
    assert got == code
    assert words in err


def test_a_gpt1_without_a_prompt_begins_behind_its_line_break(trained, cli):
    model, tokenizer = registry.load(trained("gpt1"))
    begin = tokenizer.encode("der\nhund")[-2:-1]
    assert tokenizer.decode(begin) == "\n"
    text = tokenizer.decode(generate(model, torch.tensor([begin]), 6, seed=2)[0, 1:].tolist())
    flags = ["generate", trained("gpt1"), "--max_new_tokens", 6, "--seed", 2, "--device", "cpu"]
    code, out, err = cli(*flags)
    assert (code, out) == (0, text + "\n"), err
    row = json.loads(cli(*flags, "--json")[1])
    assert (row["prompt"], row["text"]) == (None, text)


@families
def test_the_answer_of_every_family_has_the_same_keys_and_takes_the_common_flags(family, trained, cli):
    prompt = "der [MASK] läuft" if family == "bert" else "der hund"
    flags = ["--max_new_tokens", 3, "--seed", 5, "--device", "cpu", "--checkpoint", "last", "--json"]
    code, out, err = cli("generate", trained(family), "--prompt", prompt, *flags)
    assert code == 0, err
    row = json.loads(out)
    tokenizer = registry.load(trained(family))[1]
    assert [*row][:3] == ["prompt", "text", "tokens"]
    assert isinstance(row["settings"], dict)
    assert row["prompt"] == prompt
    assert row["text"].strip() == tokenizer.decode(row["tokens"]).strip()


WITHOUT_EFFECT = {
    "bert": "--beam 2, --alpha 0.5, --greedy, --temperature 1, --top_k 3, --top_p 0.5, --stop a, --stop_id 3"
    ", --overflow crop",
    "transformer2017": "--temperature 1, --top_k 3, --top_p 0.5, --stop a, --stop_id 3, --overflow crop"
    ", --beam 3 --greedy, --alpha 1 --greedy",
}


@pytest.mark.parametrize(
    ("family", "flags"), [(family, flags) for family, rows in WITHOUT_EFFECT.items() for flags in rows.split(", ")]
)
def test_a_flag_without_effect_on_a_kind_of_model_is_refused(family, flags, trained, cli):
    code, out, err = cli("generate", trained(family), "--prompt", "der [MASK]", *flags.split(), "--device", "cpu")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {flags.split()[0]}: has no effect: ")
    assert err.count("\n") == 1


@pytest.fixture(scope="module")
def talkative(trained, tmp_path_factory):
    """A translator with 24 learned positions and large random weights, which seldom comes to an end."""
    run = trained("transformer2017")
    info = json.loads((checkpoint.newest_valid(run)[0] / "model.json").read_bytes())
    info["config"]["positions"] = "learned"
    model = transformer2017.build(transformer2017.Config(**info["config"]))
    draw = torch.Generator().manual_seed(0)
    weights = {name: 0.5 * torch.randn(w.shape, generator=draw) for name, w in model.state_dict().items()}
    changed = {"model.json": json.dumps(info).encode(), "model.safetensors": save(weights)}
    return damaged(run, tmp_path_factory.mktemp("talkative"), lambda files: changed)


def test_a_translation_has_at_most_so_many_new_tokens(talkative, tmp_path, cli):
    """Alone and beside longer ones, as the search of the Python API with that limit finds it."""
    model, tokenizer = registry.load(talkative)
    sentences, end = ["der hund", "ein mann sieht", "das", "der"], tokenizer.end_of_text
    sources = [[*tokenizer.encode(sentence), end] for sentence in sentences]
    assert len(set(map(len, sources))) > 1
    (tmp_path / "sentences.txt").write_text("\n".join(sentences))
    flags = ["generate", talkative, "--prompts", tmp_path / "sentences.txt", "--device", "cpu", "--json"]
    for most, beam in ((1, 3), (4, 3), (9, 1), (None, 4)):
        words = ["--greedy"] if beam == 1 else ["--beam", beam]
        words += [] if most is None else ["--max_new_tokens", most]
        rows = [json.loads(line) for line in cli(*flags, *words)[1].splitlines()]
        extras = [50 if most is None else most - len(source) for source in sources]
        found = [translate(model, [s], end, end, beam, extra=n)[0] for s, n in zip(sources, extras, strict=True)]
        assert [row["tokens"] for row in rows] == found
        assert [row["ended"] for row in rows] == [len(tokens) < (most or 24) for tokens in found]
        assert max(map(len, found)) == (most or 24)
        assert rows[0]["settings"] == {"beam": beam, "alpha": 0.6, "max_new_tokens": most}


@pytest.mark.parametrize("bad", ["no blank", "der [MASK] " * 20])
def test_a_bad_line_of_texts_with_blanks_is_named_before_any_is_filled(bad, trained, tmp_path, cli):
    path = tmp_path / "prompts.txt"
    path.write_text(f"der [MASK]\n\n{bad}\nder [MASK]\n")
    code, out, err = cli("generate", trained("bert"), "--prompts", path, "--device", "cpu")
    assert (code, out) == (3, "")
    assert err.startswith(f"error: {path}, line 3: has ")
    assert err.count("\n") == 1


def test_a_sentence_that_is_too_long_is_named_by_its_line(talkative, tmp_path, cli):
    path = tmp_path / "sentences.txt"
    path.write_text(f"der hund\n\n{'der hund ' * 30}\n")
    code, out, err = cli("generate", talkative, "--prompts", path, "--device", "cpu")
    assert (code, out) == (3, "")
    assert err.startswith(f"error: {path}, line 3: has ")
    assert "positions for 24" in err


def test_the_nets_of_1986_are_no_language_models(tmp_path, cli):
    assert cli("train", "rumelhart1986-symmetry", "--steps", 3, "--out", tmp_path)[0] == 0
    for words in (("generate", tmp_path), ("evaluate", tmp_path), ("export", tmp_path, "--to", "hf", "--out", "x")):
        code, _, err = cli(*words)
        assert code == 2
        assert "rumelhart1986" in err


def test_a_masked_model_wants_a_tokenizer_with_masks(corpora, tmp_path, cli):
    words = [w if w != "wordpiece-300" else "bpe-300" for w in command("bert", corpora, tmp_path)]
    code, _, err = cli(*words)
    assert code == 2
    assert "wordpiece" in err


def damaged(run, target, change):
    """A copy of a run whose newest checkpoint was changed and published anew, with sums that hold."""
    folder = checkpoint.newest_valid(run)[0]
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "MANIFEST.json"}
    new = target / "checkpoints" / folder.name
    new.parent.mkdir(parents=True)
    shutil.copy(run / "config.yaml", target)
    publish_folder(new, files | change(files), {"step": 14})
    return target


@families
def test_a_vocabulary_or_weights_that_do_not_fit_the_checkpoint_are_told(family, trained, tmp_path, cli):
    run = trained(family)
    info = json.loads((checkpoint.newest_valid(run)[0] / "model.json").read_bytes())
    wider = {**info, "config": {**info["config"], "d_model": 32}}
    larger = {**info, "config": {**info["config"], "vocab_size": info["config"]["vocab_size"] + 1}}
    changes = {
        "wider": {"model.json": json.dumps(wider).encode()},
        "larger": {"model.json": json.dumps(larger).encode()},
        "pickle": {"model.safetensors": b"\x80\x04\x95\x10\x00\x00\x00cos\nsystem\n."},
        "torn": {"model.safetensors": (checkpoint.newest_valid(run)[0] / "model.safetensors").read_bytes()[:100]},
    }
    for name, change in changes.items():
        bad = damaged(run, tmp_path / name, lambda files, change=change: change)
        code, _, err = cli("evaluate", bad, "--device", "cpu")
        assert code == 3, f"{name}: {err}"
        assert err.count("\n") == 1


def test_another_tokenizer_than_the_models_is_told(trained, tmp_path, cli):
    smaller = (checkpoint.newest_valid(trained("gpt2"))[0] / "tokenizer.json").read_bytes()
    bad = damaged(trained("gpt3"), tmp_path / "bad", lambda files: {"tokenizer.json": smaller})
    code, _, err = cli("generate", bad, "--device", "cpu")
    assert code == 3
    assert "tokens" in err


def test_a_runs_tokenizer_is_found_by_the_runs_folder(trained):
    for family in FAMILIES:
        assert load_tokenizer(str(trained(family))).vocab_size == registry.load(trained(family))[0].config.vocab_size


def test_a_file_of_sentences_is_translated_line_by_line_as_each_would_be_alone(trained, tmp_path, cli):
    (tmp_path / "sentences.txt").write_text("der hund\nein mann sieht die frau\ndas kind\n")
    run = trained("transformer2017")
    code, out, err = cli(
        "generate", run, "--prompts", tmp_path / "sentences.txt", "--beam", 2, "--device", "cpu", "--json"
    )
    assert code == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    for answer in answers:
        alone = cli("generate", run, "--prompt", answer["prompt"], "--beam", 2, "--device", "cpu", "--json")[1]
        assert json.loads(alone) == answer
    assert [answer["prompt"] for answer in answers] == ["der hund", "ein mann sieht die frau", "das kind"]


def test_a_conversation_with_a_translator_outlives_a_mistake(trained, cli, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("der hund\nein mann\n\n"))
    code, out, err = cli("generate", trained("transformer2017"), "--interactive", "--device", "cpu")
    assert code == 0, err
    assert out.count("\n") == 2


def test_validation_pairs_that_do_not_fit_are_told_and_none_at_all_is_an_error(corpora, tmp_path, cli):
    words = [4 if w == "24" else w for w in command("transformer2017", corpora, tmp_path / "run")]
    code, _, err = cli(*words)
    assert code == 3
    assert "enough for the shortest" in err
    code, _, err = cli(*[15 if w == "24" else w for w in command("transformer2017", corpora, tmp_path / "run")])
    assert code == 0, err
    assert "of more than 15 tokens left out" in err


def test_a_long_sentence_is_left_out_of_the_measure_of_a_model_with_learned_positions(corpora, tmp_path, cli):
    words = command("transformer2017", corpora, tmp_path / "run")
    assert cli(*words, "--model.positions", "learned", "--model.n_ctx", 20, "--steps", 2)[0] == 0
    code, out, err = cli(
        "evaluate", tmp_path / "run", "--split", "test_small", "--device", "cpu", "--json", "--beam", 1
    )
    assert code == 0, err
    assert "left out" in err
    assert json.loads(out)[0]["checkpoint"] == "last"


def test_the_first_step_is_no_part_of_a_mean(trained, cli):
    run = trained("transformer2017")
    steps = [step for step in checkpoint.saved_steps(run) if step > 1]
    _, _, err = cli("evaluate", run, "--checkpoint", f"mean-{len(steps)}", "--device", "cpu", "--beam", 1)
    assert f"the mean of steps {', '.join(map(str, steps))}" in err
    assert cli("evaluate", run, "--checkpoint", f"mean-{len(steps) + 1}", "--device", "cpu")[0] == 3


@pytest.mark.parametrize(
    ("family", "flags", "word"),
    [
        ("bert", ["--model.n_segments", 1], "second segment"),
        ("transformer2017", ["--label_smoothing", 0.999], "label_smoothing"),
    ],
)
def test_settings_that_cannot_be_are_told(family, flags, word, corpora, tmp_path, cli):
    code, _, err = cli(*command(family, corpora, tmp_path), *flags)
    assert code == 2
    assert word in err


def test_a_translator_is_measured_on_another_folder_in_its_own_direction(trained, corpora, tmp_path, cli):
    """Neither --data nor an import may forget which way a model translates."""
    run, pairs = trained("transformer2017"), corpora / "pairs"
    whole = json.loads(cli("evaluate", run, "--beam", 1, "--device", "cpu", "--json")[1])[0]
    again = json.loads(cli("evaluate", run, "--data", pairs, "--beam", 1, "--device", "cpu", "--json")[1])[0]
    assert again == whole
    other_way = ("--data.source", "en", "--data.target", "de")
    turned = json.loads(cli("evaluate", run, *other_way, "--beam", 1, "--device", "cpu", "--json")[1])[0]
    assert turned["loss"] != whole["loss"]
    assert cli("export", run, "--to", "hf", "--out", tmp_path / "hf")[0] == 0
    assert cli("import", tmp_path / "hf", "--out", tmp_path / "run")[0] == 0
    code, _, err = cli("evaluate", tmp_path / "run", "--device", "cpu")
    assert code == 3
    assert "--data" in err
    there = ("--data", pairs, "--data.source", "de", "--data.target", "en", "--beam", 1, "--device", "cpu", "--json")
    imported = json.loads(cli("evaluate", tmp_path / "run", *there)[1])[0]
    assert imported["loss"] == pytest.approx(whole["loss"], rel=1e-3)  # the norms' epsilon is Marian's now


def test_languages_are_refused_where_nothing_is_translated(corpora, tmp_path, cli):
    code, _, err = cli(*command("gpt2", corpora, tmp_path), "--data.source", "de")
    assert code == 2
    assert "sentence pairs" in err


def test_a_second_separator_in_a_prompt_is_told(trained, cli):
    code, _, err = cli("generate", trained("bert"), "--prompt", "der [MASK] [SEP] und [SEP] das", "--device", "cpu")
    assert code == 2
    assert "more than one [SEP]" in err
