"""classiclm tokenizer: what is learnt is what training learns, what is shown is counted anew here, errors are told."""

import json
import re

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from classiclm.commands import tokenizer as command
from classiclm.data import plays
from classiclm.data.locate import find
from classiclm.data.tokenizers import BERT_FILE, GPT1_FILES, GPT1BPE, GPT2_FILES, ByteBPE, CharTokenizer, WordPiece
from classiclm.data.tokenizers import load_tokenizer as load
from classiclm.errors import BAD_INPUT, RESOURCE, USAGE, Error

MIXED = "Naïve Café, don't!  日本語 का\nПРИВЕТ мир, λόγος مرحبا 가나 e\u0301t 42 😀"
SCRIPTS = {
    "Latin": r"(?:\p{Script=Latin}\p{M}*)+",
    "Cyrillic": r"\p{Script=Cyrillic}+",
    "Greek": r"\p{Script=Greek}+",
    "Han": r"\p{Script=Han}",
    "Arabic": r"\p{Script=Arabic}+",
    "Devanagari": r"\p{Script=Devanagari}+",
    "other": r"\p{Script=Hangul}+",
}
SMALL = ["--steps", 1, "--batch", 2, "--device", "cpu", "--eval_windows", 1]
SMALL += ["--model.n_layers", 1, "--model.d_model", 8, "--model.n_heads", 2]
published = {"gpt1": GPT1_FILES, "gpt2": GPT2_FILES, "bert": (BERT_FILE,)}


def needs(name):
    missing = any(find(file) is None for file in published[name])
    return pytest.mark.skipif(missing, reason=f"the vocabulary of {name} is not on this machine")


@pytest.fixture
def run(capsys):
    """run("show", ...) -> (stdout, stderr); the exit code has to be 0."""

    def call(*arguments):
        capsys.readouterr()
        assert command.main([str(argument) for argument in arguments], "classiclm tokenizer") == 0
        return tuple(capsys.readouterr())

    return call


@pytest.fixture
def corpus(tmp_path):
    """A text in blocks with blank lines between, whose end has words that its beginning has not."""
    path = tmp_path / "text.txt"
    path.write_text(plays.generate(12_000, seed=3) + "\n\nzyzzyva jukebox zyzzyva jukebox\n\n" * 60)
    return path


@pytest.fixture
def pairs(tmp_path):
    """Sentence pairs without validation files: the last part of the training pairs is for validation."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "train.de").write_text("".join(f"Ein Hund läuft über Feld {i}.\n" for i in range(60)))
    (folder / "train.en").write_text("".join(f"A dog runs over field {i}.\n" for i in range(60)))
    return folder


def written(path, tokenizer):
    path.write_text(tokenizer.to_json())
    return path


def shown(run, *arguments):
    return json.loads(run("show", *arguments, "--json")[0])


def failure(*arguments):
    with pytest.raises(Error) as caught:
        command.main([str(argument) for argument in arguments], "classiclm tokenizer")
    assert "\n" not in str(caught.value)
    return caught.value.code, str(caught.value)


# train


@pytest.mark.parametrize(
    ("preset", "kind", "more"),
    [
        ("gpt2-shakespeare-cpu", "char", []),
        ("gpt2-shakespeare-cpu", "bpe-400", []),
        ("gpt2-shakespeare-cpu", "gpt1-bpe-400", []),
        ("gpt2-shakespeare-cpu", "wordpiece-400", ["--task", "causal"]),
        ("bert-shakespeare", "wordpiece-400", []),
        ("transformer2017-multi30k", "bpe-300", []),
    ],
)
def test_it_learns_the_very_tokenizer_of_a_training_run(preset, kind, more, cli, run, corpus, pairs, tmp_path):
    of_pairs = preset.startswith("transformer2017")
    data = ["--data", pairs, "--data.source", "de", "--data.target", "en"] if of_pairs else ["--data", corpus]
    data += ["--data.val_share", 0.3]
    code, _, err = cli("train", preset, *data, "--tokenizer", kind, "--out", tmp_path / "run", *SMALL)
    assert code == 0, err
    _, said = run("train", kind, *data, "--out", tmp_path / "own", *more)
    (of_run,) = tmp_path.glob("run/checkpoints/step-*/tokenizer.json")
    assert (tmp_path / "own/tokenizer.json").read_bytes() == of_run.read_bytes()
    assert f"fingerprint {load(str(of_run)).fingerprint}" in said
    assert f"{load(str(of_run)).vocab_size:,} tokens; " in said
    whole = ["--data.val_share", 0.01]  # the part that was kept for validation matters, except to an alphabet
    run("train", kind, *data, *whole, "--out", tmp_path / "whole", *more)
    assert ((tmp_path / "whole/tokenizer.json").read_bytes() == of_run.read_bytes()) == (kind == "char")


def test_a_corpus_of_pairs_is_known_as_one_and_both_sides_are_learnt_from(run, pairs, tmp_path):
    direction = ["--data.source", "de", "--data.target", "en", "--data.val_share", 0.5]
    run("train", "bpe-300", "--data", pairs, *direction, "--out", tmp_path / "t.json")
    lines = [(pairs / f"train.{side}").read_text().splitlines()[:30] for side in ("de", "en")]
    expected = ByteBPE.train("\n".join(lines[0] + lines[1]), 300)
    assert load(str(tmp_path / "t.json")).to_json() == expected.to_json()


def test_a_model_trains_with_the_file(cli, run, corpus, tmp_path):
    run("train", "bpe-300", "--data", corpus, "--out", tmp_path / "mine")
    for name in ("mine", "mine/tokenizer.json"):
        out = tmp_path / name.replace("/", "-")
        arguments = ["--tokenizer", tmp_path / name, "--out", out, *SMALL]
        assert cli("train", "gpt2-shakespeare-cpu", "--data", corpus, *arguments)[0] == 0
        (copy,) = out.glob("checkpoints/step-*/tokenizer.json")
        assert copy.read_bytes() == (tmp_path / "mine/tokenizer.json").read_bytes()


def ratio_in(said):
    return float(re.search(r"([0-9.]+) bytes per token on the validation part", said)[1])


@pytest.mark.parametrize("kind", ["char", "bpe-300"])
def test_bytes_per_token_are_those_of_the_last_part_of_the_text(kind, run, corpus, tmp_path):
    _, said = run("train", kind, "--data", corpus, "--data.val_share", 0.25, "--out", tmp_path / "t.json")
    text, tokenizer = corpus.read_text(), load(str(tmp_path / "t.json"))
    last = text[int(len(text) * 0.75) :]
    ids = tokenizer.encode(last)
    first = len(tokenizer.decode(ids[:1]).encode())  # which no model predicts
    assert ratio_in(said) == pytest.approx((len(last.encode()) - first) / (len(ids) - 1), abs=6e-4)


def test_bytes_per_token_of_pairs_are_those_of_both_sides_without_end_tokens(run, pairs, tmp_path):
    direction = ["--data.source", "de", "--data.target", "en", "--data.val_share", 0.5]
    _, said = run("train", "bpe-300", "--data", pairs, *direction, "--out", tmp_path / "t.json")
    lines = [line for side in ("de", "en") for line in (pairs / f"train.{side}").read_text().splitlines()[30:]]
    n_tokens = sum(len(load(str(tmp_path / "t.json")).encode(line)) for line in lines)
    assert ratio_in(said) == pytest.approx(sum(len(line.encode()) for line in lines) / n_tokens, abs=6e-4)


def test_bytes_per_token_of_sentences_are_those_of_the_last_documents(run, tmp_path):
    (tmp_path / "d.txt").write_text("\n\n".join(f"one two three.\nfour {word}" for word in "abcdefgh"))
    flags = ["--data", tmp_path / "d.txt", "--data.val_share", 0.25, "--out", tmp_path / "t.json"]
    _, said = run("train", "wordpiece-80", *flags)
    lines = ["one two three.", "four g", "one two three.", "four h"]
    n_tokens = sum(len(load(str(tmp_path / "t.json")).encode(line)) for line in lines)
    assert ratio_in(said) == pytest.approx(sum(map(len, lines)) / n_tokens, abs=6e-4)


def test_a_text_with_too_few_pairs_to_merge_is_told(run, tmp_path):
    (tmp_path / "t.txt").write_text("ab " * 50)
    _, said = run("train", "bpe-2000", "--data", tmp_path / "t.txt", "--out", tmp_path / "t.json")
    assert "not 2,000" in said


def test_another_file_is_never_overwritten_and_the_same_one_is_fine(run, corpus, tmp_path):
    out = tmp_path / "made/here"
    run("train", "bpe-300", "--data", corpus, "--out", out)
    before = (out / "tokenizer.json").read_bytes()
    assert "is there already, the same" in run("train", "bpe-300", "--data", corpus, "--out", out)[1]
    code, said = failure("train", "bpe-301", "--data", corpus, "--out", out)
    assert (code, "exists and is another file" in said) == (USAGE, True)
    assert (out / "tokenizer.json").read_bytes() == before
    assert failure("train", "bpe-300", "--data", corpus, "--out", corpus)[0] == USAGE
    assert corpus.read_text().startswith(plays.generate(12_000, seed=3))
    assert [path.name for path in out.iterdir()] == ["tokenizer.json"]  # and nothing temporary


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], USAGE, "classiclm tokenizer train"),
        (["trane"], USAGE, "did you mean 'train'"),
        (["train", "bpe-300"], USAGE, "out"),
        (["train", "--out", "x"], USAGE, "KIND"),
        (["train", "bep-300", "--out", "x"], USAGE, "did you mean 'bpe-"),
        (["train", "bpe-", "--out", "x"], USAGE, "no kind"),
        (["train", "gpt2", "--out", "x"], USAGE, "--tokenizer gpt2"),
        (["train", "./t.json", "--out", "x"], USAGE, "not learnt"),
        (["train", "bpe-12", "--data", "TEXT", "--out", "x"], USAGE, "257"),
        (["train", "bpe-300", "--data", "TEXT", "--out", "x", "--task", "sweeps"], USAGE, "task"),
        (["train", "bpe-300", "--data", "./none.txt", "--out", "x"], BAD_INPUT, "none.txt"),
        (["train", "char", "--data", "PAIRS", "--data.source", "de", "--out", "x"], USAGE, "end-of-text"),
        (["train", "bpe-300", "--data", "TEXT", "--task", "pairs", "--out", "x"], BAD_INPUT, "sentence pairs"),
        (["train", "bpe-300", "--data", "TEXT", "--out", "TEXT/below"], RESOURCE, "cannot be written"),
        (["show"], USAGE, "TOKENIZER"),
        (["show", "gpt3"], USAGE, "gpt2"),
        (["show", "./none.json"], BAD_INPUT, "does not exist"),
        (["show", "CHAR", "--text", "a", "--data", "TEXT"], USAGE, "two texts"),
        (["show", "CHAR", "--text", "abc?"], BAD_INPUT, "U+003F"),
        (["show", "CHAR", "--data", "./none.txt"], BAD_INPUT, "none.txt"),
        (["show", "CHAR", "--txet", "a"], USAGE, "--text"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_errors_are_one_line_with_their_code(arguments, code, words, corpus, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    char = written(tmp_path / "char.json", CharTokenizer("abc"))
    places = {"TEXT": corpus, "PAIRS": pairs, "CHAR": char}
    arguments = [re.sub("TEXT|PAIRS|CHAR", lambda match: str(places[match[0]]), word) for word in arguments]
    got, said = failure(*arguments)
    assert got == code
    assert words in said
    assert not (tmp_path / "x").exists()


# show


@pytest.fixture
def learnt(tmp_path):
    """The path of each kind's tokenizer.json, learnt from the mixed text."""
    made = {
        "char": CharTokenizer.train(MIXED),
        "bpe": ByteBPE.train(MIXED * 3, 300),
        "gpt1-bpe": GPT1BPE.train(MIXED * 3, 150),
        "wordpiece": WordPiece.train(MIXED * 3, 150),
    }
    return {kind: written(tmp_path / f"{kind}.json", tokenizer) for kind, tokenizer in made.items()}


def test_the_json_of_a_tokenizer_has_these_keys_and_types(run, learnt):
    special = {"char": [], "bpe": ["<|endoftext|>"], "gpt1-bpe": ["<unk>"]}
    special["wordpiece"] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    for kind, path in learnt.items():
        result, tokenizer = shown(run, path), load(str(path))
        assert list(result) == [
            "tokenizer", "kind", "vocab_size", "special_tokens", "end_of_text", "fingerprint", "longest",
        ]  # fmt: skip
        assert (result["tokenizer"], result["kind"]) == (str(path), kind)
        assert result["vocab_size"] == tokenizer.vocab_size
        assert result["fingerprint"] == tokenizer.fingerprint
        assert result["end_of_text"] == tokenizer.end_of_text
        assert [token["piece"] for token in result["special_tokens"]] == special[kind]
        assert all(tokenizer.decode([token["id"]]).strip() == token["piece"] for token in result["special_tokens"])


def test_the_longest_tokens_are_those_of_most_bytes(run, learnt):
    for path in learnt.values():
        tokenizer = load(str(path))
        result = shown(run, path)
        special = {token["id"] for token in result["special_tokens"]}
        # the length of what decoding one token gives, without the space that marks a word's end and ## inside
        texts = [tokenizer.decode([i]).removesuffix(" ").removeprefix("##") for i in range(tokenizer.vocab_size)]
        whole = {i for i, text in enumerate(texts) if "\ufffd" not in text and i not in special}
        longest = max(len(texts[i].encode()) for i in whole)
        assert result["longest"][0]["bytes"] >= longest
        assert all(texts[t["id"]].encode() == t["piece"].encode() for t in result["longest"] if t["id"] in whole)
        sizes = [token["bytes"] for token in result["longest"]]
        assert sizes == sorted(sizes, reverse=True)
        assert len(sizes) == 10


def test_the_json_of_a_text_has_these_keys_and_counts(run, learnt):
    for kind, path in learnt.items():
        text, ids = shown(run, path, "--text", MIXED)["text"], load(str(path)).encode(MIXED)
        assert list(text) == [
            "tokens", "characters", "bytes", "bytes_per_token", "fertility", "lossless", "lost", "first_difference",
            "pieces",
        ]  # fmt: skip
        assert (text["tokens"], text["characters"], text["bytes"]) == (len(ids), len(MIXED), len(MIXED.encode()))
        assert text["bytes_per_token"] == len(MIXED.encode()) / len(ids)
        assert [piece["id"] for piece in text["pieces"]] == ids
        assert all(list(piece) == ["piece", "id", "start", "end", "covers"] for piece in text["pieces"])
        assert text["lossless"] == (kind in ("char", "bpe")) == (text["first_difference"] is None)


def test_the_pieces_of_lossless_kinds_cover_the_text_without_gaps(run, learnt):
    for kind in ("char", "bpe"):
        pieces = shown(run, learnt[kind], "--text", MIXED)["text"]["pieces"]
        assert [piece["start"] for piece in pieces] == [0, *(piece["end"] for piece in pieces[:-1])]
        assert pieces[-1]["end"] == len(MIXED.encode())
        for piece in pieces:
            raw = MIXED.encode()[piece["start"] : piece["end"]]
            if "<0x" not in piece["piece"]:
                assert raw.decode() == piece["piece"] == piece["covers"]


def test_bytes_that_are_no_whole_character_are_shown_as_numbers(run, tmp_path):
    path = written(tmp_path / "t.json", ByteBPE.train("a", 257))  # no merge at all
    pieces = shown(run, path, "--text", "a日<0xE6>")["text"]["pieces"]
    assert [piece["piece"] for piece in pieces] == ["a", "<0xE6>", "<0x97>", "<0xA5>", *"<0xE6>"]
    assert command.readable(b" \xe6\x97\xa5\xe6\x97x\xff") == " 日<0xE6><0x97>x<0xFF>"


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_byte_level_is_lossless_and_says_so_for_any_text(text):
    tokenizer = ByteBPE.train(MIXED, 280)
    result = command.measure(tokenizer, text, rows=99)
    assert result["lossless"]
    assert result["lost"] == {}
    assert sum(piece["end"] - piece["start"] for piece in result["pieces"][:99]) == len(text.encode())


def test_pieces_of_words_cover_their_letters_though_rewritten(run, learnt):
    covers = [
        (p["piece"], p["covers"]) for p in shown(run, learnt["wordpiece"], "--text", "Café 日本!")["text"]["pieces"]
    ]
    assert "".join(piece.removeprefix("##") for piece, _ in covers) == "cafe日本!"
    assert "".join(cover for _, cover in covers) == "Café日本!"
    covers = [
        (p["piece"], p["covers"]) for p in shown(run, learnt["gpt1-bpe"], "--text", "Café, don't!")["text"]["pieces"]
    ]
    assert "".join(piece.removesuffix("</w>") for piece, _ in covers) == "café,don't!"
    assert "".join(cover for _, cover in covers) == "Café,don't!"


@pytest.mark.parametrize("script", SCRIPTS)
def test_fertility_of_a_character_tokenizer_is_letters_per_word(script, run, learnt):
    text = shown(run, learnt["char"], "--text", MIXED)["text"]
    words = regex.findall(SCRIPTS[script], MIXED)
    assert text["fertility"][script] == {
        "words": len(words),
        "tokens": sum(map(len, words)),
        "tokens_per_word": sum(map(len, words)) / len(words),
    }
    assert list(text["fertility"]) == list(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_fertility_of_a_byte_tokenizer_is_bytes_per_word(script, run, tmp_path):
    path = written(tmp_path / "t.json", ByteBPE.train("a", 257))
    words = regex.findall(SCRIPTS[script], MIXED)
    row = shown(run, path, "--text", MIXED)["text"]["fertility"][script]
    assert row["tokens_per_word"] == pytest.approx(sum(len(word.encode()) for word in words) / len(words))


def test_a_token_over_two_words_is_divided_and_a_space_in_front_belongs_to_the_word(run, tmp_path):
    path = written(tmp_path / "t.json", ByteBPE.train("日本 cat日本 cat" * 50, 290))
    text = shown(run, path, "--text", "日本 cat cat")["text"]
    assert [piece["piece"] for piece in text["pieces"]] == ["日本", " cat", " cat"]
    assert text["fertility"]["Han"] == {"words": 2, "tokens": 1.0, "tokens_per_word": 0.5}
    assert text["fertility"]["Latin"] == {"words": 2, "tokens": 2.0, "tokens_per_word": 1.0}


def test_what_is_lost_is_named(run, learnt):
    lost = shown(run, learnt["wordpiece"], "--text", "Café  Cafe é🚀")["text"]
    assert lost["lost"] == {"upper_case": 2, "accents": 1, "white_space": True, "unknown": ["é🚀"]}
    assert lost["first_difference"]["at"] == 0
    lost = shown(run, learnt["gpt1-bpe"], "--text", "Café — Q")["text"]
    assert lost["lost"] == {"upper_case": 1, "white_space": True, "unknown": ["Q", "—"]}
    lost = shown(run, learnt["gpt1-bpe"], "--text", "don’t")["text"]
    assert lost["lost"] == {"white_space": True, "others": ["’"]}


def test_the_table_says_what_the_json_says(run, learnt):
    out, err = run("show", learnt["bpe"], "--text", "Café 日")
    text = shown(run, learnt["bpe"], "--text", "Café 日")["text"]
    for piece in text["pieces"]:
        cells = [
            repr(piece["piece"]),
            repr(piece["covers"]),
            piece["id"],
            piece["start"],
            piece["end"] - piece["start"],
        ]
        assert re.search(r"\s+".join(re.escape(str(cell)) for cell in cells), out)
    assert f"{text['tokens']} tokens, 6 characters, 9 bytes: {9 / text['tokens']:.3f} bytes per token" in out
    assert "lossless" in out
    assert err == ""
    assert "lost: upper case 1, accents 1" in run("show", learnt["wordpiece"], "--text", "Café")[0]
    alone = run("show", learnt["bpe"])[0]
    assert "300 tokens; special: <|endoftext|> = 0" in alone
    assert load(str(learnt["bpe"])).fingerprint in alone


def test_a_corpus_is_measured_whole_and_listed_in_part(run, learnt, tmp_path):
    (tmp_path / "c.txt").write_text(MIXED * 30)
    of_text = shown(run, learnt["char"], "--text", MIXED * 30, "--rows", 7)["text"]
    of_data = shown(run, learnt["char"], "--data", tmp_path / "c.txt", "--rows", 7)["text"]
    assert of_data == of_text
    assert len(of_data["pieces"]) == 7
    assert f"and {len(MIXED) * 30 - 100:,} more" in run("show", learnt["char"], "--data", tmp_path / "c.txt")[0]


def test_a_corpus_of_pairs_is_measured_on_both_sides(run, learnt, pairs):
    direction = ["--data.source", "de", "--data.target", "en"]
    text = shown(run, learnt["bpe"], "--data", pairs, *direction)["text"]
    both = (pairs / "train.de").read_text() + (pairs / "train.en").read_text()
    kept_apart = 1  # by a validation split: the sources of both, then the targets of both
    assert text["bytes"] == len(both.encode()) - kept_apart


def test_an_empty_text_has_no_tokens(run, learnt):
    for path in learnt.values():
        text = shown(run, path, "--text", "")["text"]
        assert (text["tokens"], text["bytes_per_token"], text["fertility"], text["pieces"]) == (0, None, {}, [])
        assert "0 tokens" in run("show", path, "--text", "")[0]


def test_a_bpe_that_is_not_of_bytes_is_refused(tmp_path):
    tree = json.loads(ByteBPE.train("a", 257).to_json())
    tree["model"]["vocab"]["\u2581the"] = 257
    (tmp_path / "t.json").write_text(json.dumps(tree))
    assert failure("show", tmp_path / "t.json")[0] == BAD_INPUT


@pytest.mark.parametrize(
    ("name", "size", "kind", "piece"),
    [
        pytest.param("gpt1", 40_478, "gpt1-bpe", "hello</w>", marks=needs("gpt1")),
        pytest.param("gpt2", 50_257, "bpe", "Hello", marks=needs("gpt2")),
        pytest.param("bert", 30_522, "wordpiece", "hello", marks=needs("bert")),
    ],
)
def test_the_published_ones_are_shown(name, size, kind, piece, run):
    result = shown(run, name, "--text", "Hello")
    assert (result["vocab_size"], result["kind"]) == (size, kind)
    assert [(p["piece"], p["covers"]) for p in result["text"]["pieces"]] == [(piece, "Hello")]


def test_bytes_per_token_leave_out_the_end_of_each_file(run, tmp_path):
    (tmp_path / "files").mkdir()
    for name, text in {"a": "b" * 70, "b": "cat sat", "c": "mat"}.items():
        (tmp_path / f"files/{name}.txt").write_text(text)
    flags = ["--data", tmp_path / "files", "--data.val_share", 0.125, "--out", tmp_path / "t.json"]
    _, said = run("train", "bpe-257", *flags)  # no merge: a token is a byte, and "cat sat" and "mat" are kept
    assert ratio_in(said) == 1.0


def test_a_mark_without_a_letter_begins_no_word_and_belongs_to_none():
    tokenizer = ByteBPE.train("a", 257)
    assert command.measure(tokenizer, "\u0301ab", 9)["fertility"]["Latin"] == {
        "words": 1,
        "tokens": 2.0,
        "tokens_per_word": 2.0,
    }


def test_a_text_that_is_encoded_in_parts_is_covered_as_a_whole(monkeypatch):
    tokenizer, text = WordPiece.train(MIXED * 3, 150), "Cafe cafe don Cafe cafe"
    whole = command.measure(tokenizer, text, 99)
    monkeypatch.setattr("classiclm.data.tokenizer.PIECE", 6)
    assert command.measure(tokenizer, text, 99) == whole


def test_special_tokens_in_a_text_are_text(run, learnt):
    for kind, word in {"wordpiece": "[MASK]", "bpe": "<|endoftext|>"}.items():
        text = shown(run, learnt[kind], "--text", f"a {word}")["text"]
        assert word not in [piece["piece"] for piece in text["pieces"]]
        assert text["pieces"][-1]["end"] == len(word) + 2
