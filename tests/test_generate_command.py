"""The generate command: one prompt, many, JSON, a conversation. The oracle is the Python API with the same seed."""

import io
import json
import os
from pathlib import Path

import pytest
import torch

from classiclm.data import plays
from classiclm.data.tokenizers import GPT1BPE, ByteBPE, CharTokenizer, load_tokenizer
from classiclm.generate.beam import continue_text
from classiclm.generate.sample import generate
from classiclm.registry import load


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A few steps of a tiny GPT-3 with 512 byte-level tokens."""
    from classiclm.cli import main

    folder = tmp_path_factory.mktemp("generate")
    (folder / "plays.txt").write_text(plays.generate(30_000, seed=3))
    numbers = {"n_layers": 2, "d_model": 16, "n_heads": 2, "n_ctx": 16, "band": 4}
    sizes = [word for name, value in numbers.items() for word in (f"--model.{name}", str(value))]
    train = ["train", "gpt3-tiny", "--data", str(folder / "plays.txt"), "--steps", "5", "--device", "cpu", *sizes]
    assert main([*train, "--out", str(folder / "run")]) == 0
    return folder / "run"


def expected(run, prompt, n, seed, **settings):
    model, tokenizer = load(run)
    ids = tokenizer.encode(prompt)
    new = generate(model, torch.tensor([ids]), n, seed=seed, **settings)[0, len(ids) :].tolist()
    if tokenizer.end_of_text in new:
        new = new[: new.index(tokenizer.end_of_text)]
    return new, tokenizer.decode(new)


@pytest.mark.parametrize("n", [5, 60])
def test_the_text_on_stdout_is_the_models(cli, run, n):
    code, out, err = cli("generate", run, "--prompt", "HAMLET:", "--max_new_tokens", n, "--seed", 4, "--device", "cpu")
    assert (code, err) == (0, "")
    assert out == "HAMLET:" + expected(run, "HAMLET:", n, 4)[1] + "\n"
    again = cli("generate", run, "--prompt", "HAMLET:", "--max_new_tokens", n, "--seed", 4, "--device", "cpu")
    assert again[1] == out


def test_json_holds_prompt_text_tokens_log_probabilities_settings_and_seed(cli, run):
    flags = ["--max_new_tokens", 12, "--top_k", 5, "--temperature", 0.7, "--seed", 2, "--json", "--device", "cpu"]
    code, out, _ = cli("generate", run, "--prompt", "The ", *flags)
    row = json.loads(out)
    tokens, text = expected(run, "The ", 12, 2, temperature=0.7, top_k=5)
    assert code == 0
    assert (row["prompt"], row["text"], row["tokens"], row["seed"]) == ("The ", text, tokens, 2)
    assert len(row["log_probabilities"]) == len(tokens)
    assert all(value < 0 for value in row["log_probabilities"])
    assert row["settings"] == {"temperature": 0.7, "top_k": 5, "top_p": None, "max_new_tokens": 12, "stop": None}


def test_prompts_from_a_file_and_from_stdin_come_in_order_each_with_its_own_seed(cli, run, tmp_path, monkeypatch):
    prompts = ["HAMLET:", "O", "A long line that is longer than the window of this small model reads at once"]
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(prompts) + "\n\n")
    flags = ["--max_new_tokens", 9, "--seed", 7, "--json", "--device", "cpu"]
    code, out, err = cli("generate", run, "--prompts", path, *flags)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [row["prompt"] for row in rows] == prompts
    assert [row["tokens"] for row in rows] == [expected(run, p, 9, 7 + i)[0] for i, p in enumerate(prompts)]
    assert err.count("only its end is used") == 1
    monkeypatch.setattr("sys.stdin", io.StringIO(path.read_text()))
    assert cli("generate", run, "--prompts", "-", *flags)[1] == out


def test_a_stop_text_and_a_stop_id_end_the_text_and_are_left_out(cli, run):
    tokens, text = expected(run, "O", 80, 1, temperature=1.0)
    flags = ["--prompt", "O", "--max_new_tokens", 80, "--seed", 1, "--temperature", 1.0, "--device", "cpu"]
    stop = text[20:22]
    _, out, _ = cli("generate", run, *flags, "--stop", stop)
    assert out == "O" + text[: text.index(stop)] + "\n"
    _, as_json, _ = cli("generate", run, *flags, "--stop", stop, "--json")
    assert json.loads(as_json)["text"] == text[: text.index(stop)]
    assert json.loads(as_json)["ended"] is True
    _, out, _ = cli("generate", run, *flags, "--stop_id", tokens[7], "--json")
    assert json.loads(out)["tokens"] == tokens[: tokens.index(tokens[7])]


def test_a_conversation_goes_on_after_a_mistake_and_ends_with_an_empty_line(cli, run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("HAMLET:\nO\n\nnever read\n"))
    code, out, err = cli("generate", run, "--interactive", "--max_new_tokens", 6, "--seed", 3, "--device", "cpu")
    assert code == 0
    first, second = expected(run, "HAMLET:", 6, 3)[1], expected(run, "O", 6, 4)[1]
    assert out == f"HAMLET:{first}\nO{second}\n"
    assert "never" not in out
    assert "an empty line ends" in err


NOT_IN_A_SEARCH = (("--stop", "a"), ("--stop_id", "3"), ("--temperature", "1"), ("--top_k", "3"), ("--top_p", "0.5"))


# From the beginning


def test_a_text_begins_behind_the_end_of_a_document_or_else_behind_a_line_break():
    text = "to be\nor not to be\n"
    assert (end := ByteBPE.train(text, 300)).beginning == [end.end_of_text]
    assert (characters := CharTokenizer.train(text)).decode(characters.beginning) == "\n"
    words = GPT1BPE.train(text, 40)
    assert words.beginning == words.encode("be\nor")[1:2]
    assert words.decode(words.beginning) == "\n"


def test_a_vocabulary_without_a_line_break_has_no_beginning():
    assert CharTokenizer.train("to be or not").beginning == []
    assert GPT1BPE.train("to be or not", 40).beginning == []


def test_the_published_gpt1_begins_behind_its_last_token():
    if not (Path(os.environ.get("CLASSICLM_DATA", "")) / "tokenizers/gpt1-vocab_40000.bpe").is_file():
        pytest.skip("GPT-1's vocabulary is not on this machine")
    assert load_tokenizer("gpt1").beginning == [40_477]  # "\n</w>"


def test_without_a_prompt_and_a_line_break_to_begin_with_a_prompt_is_asked_for(cli, tmp_path):
    (tmp_path / "line.txt").write_text("to be or not to be " * 60)
    train = ["train", "ladder-1", "--data", tmp_path / "line.txt", "--steps", 1, "--batch", 1, "--device", "cpu"]
    assert cli(*train, "--model.n_ctx", 8, "--out", tmp_path / "run")[0] == 0
    code, out, err = cli("generate", tmp_path / "run", "--device", "cpu")
    assert (code, out) == (2, "")
    assert "--prompt: is missing" in err


# One kind of answer


def searched(run, prompt, n, beam, **settings):
    """What the Python API finds, as tokens and as text."""
    model, tokenizer = load(run)
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    found = continue_text(model, ids, n, beam, end=tokenizer.end_of_text, **settings)
    return found, tokenizer.decode(found)


def test_what_a_search_finds_is_told_as_what_is_drawn_is(cli, run):
    flags = ["generate", run, "--prompt", "O ", "--max_new_tokens", 7, "--device", "cpu"]
    tokens, text = searched(run, "O ", 7, 3, alpha=0.1)
    found = json.loads(cli(*flags, "--beam", 3, "--alpha", 0.1, "--json")[1])
    assert found == {
        "prompt": "O ",
        "text": text,
        "tokens": tokens,
        "ended": len(tokens) < 7,
        "settings": {"beam": 3, "alpha": 0.1, "max_new_tokens": 7},
    }
    drawn = json.loads(cli(*flags, "--json")[1])
    assert found.keys() == drawn.keys() - {"seed", "log_probabilities"}
    assert cli(*flags, "--beam", 3, "--alpha", 0.1)[1] == f"O {text}\n"


def test_typed_lines_are_answered_by_json_if_that_is_asked_for(cli, run, monkeypatch):
    flags = ["--interactive", "--json", "--max_new_tokens", 6, "--seed", 3, "--device", "cpu"]
    monkeypatch.setattr("sys.stdin", io.StringIO("HAMLET:\nO\n\n"))
    rows = [json.loads(line) for line in cli("generate", run, *flags)[1].splitlines()]
    texts = [expected(run, "HAMLET:", 6, 3)[1], expected(run, "O", 6, 4)[1]]
    assert [(row["prompt"], row["text"], row["seed"]) for row in rows] == [("HAMLET:", texts[0], 3), ("O", texts[1], 4)]


# A search within n_ctx = 16


LONG = "word " * 40


def test_a_search_without_further_flags_writes_what_fits(cli, run):
    code, out, err = cli("generate", run, "--beam", 2, "--json", "--device", "cpu")
    assert code == 0, err
    row = json.loads(out)
    assert row["settings"]["max_new_tokens"] == 15
    assert row["tokens"] == searched(run, load(run)[1].beginning, 15, 2)[0]
    assert err.count("\n") == 1
    assert "at most 15" in err


@pytest.mark.parametrize(("flags", "n"), [(["--max_new_tokens", 5], 5), ([], 8)])
def test_a_search_goes_on_from_the_end_of_a_prompt_that_is_too_long(cli, run, flags, n):
    code, out, err = cli("generate", run, "--beam", 2, "--prompt", LONG, "--json", "--device", "cpu", *flags)
    assert code == 0, err
    tokens = load(run)[1].encode(LONG)
    assert json.loads(out)["tokens"] == searched(run, tokens[n - 16 :], n, 2)[0]
    assert f"{len(tokens)} tokens" in err
    assert f"the last {16 - n} " in err


def test_a_prompt_that_fits_is_searched_from_as_a_whole_unless_more_is_asked_for_than_it_leaves(cli, run):
    n_prompt = len(load(run)[1].encode("HAMLET:"))
    flags = ["generate", run, "--prompt", "HAMLET:", "--beam", 2, "--overflow", "error", "--device", "cpu"]
    code, out, err = cli(*flags, "--json")
    assert code == 0, err
    assert json.loads(out)["tokens"] == searched(run, "HAMLET:", 16 - n_prompt, 2)[0]
    code, out, err = cli(*flags, "--max_new_tokens", 17 - n_prompt)
    assert (code, out) == (3, "")
    assert "--prompt" in err


# Files with a bad line


@pytest.mark.parametrize("bad", ["\ud800", LONG])
@pytest.mark.parametrize("how", [["--beam", 2], ["--seed", 1], ["--json"]])
def test_a_bad_line_is_named_before_anything_is_written(cli, run, tmp_path, monkeypatch, bad, how):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"O\n\nHAMLET:\n{bad}\nO\n"))
    flags = ["--max_new_tokens", 3, "--overflow", "error", "--device", "cpu"]
    code, out, err = cli("generate", run, "--prompts", "-", *flags, *how)
    assert (code, out) == (3, "")
    assert err.startswith("error: standard input, line 4: ")
    assert err.count("\n") == 1


def test_a_bad_line_among_more_than_a_batch_is_named_with_its_file(cli, run, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("O\n" * 40 + LONG)
    code, out, err = cli("generate", run, "--prompts", path, "--max_new_tokens", 1, "--overflow", "error")
    assert (code, out) == (3, "")
    assert err.startswith(f"error: {path}, line 41: has ")


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (["--prompt", ""], 2, "--prompt"),
        (["--prompt", "a", "--interactive"], 2, "--interactive"),
        (["--prompts", "./none.txt"], 3, "none.txt"),
        (["--prompt", "word " * 40, "--overflow", "error"], 3, "--prompt"),
        (["--top_p", "0"], 2, "top_p"),
        (["--temperature", "-1"], 2, "temperature"),
        (["--temperature", "nan"], 2, "temperature"),
        (["--stop_id", "-3"], 2, "stop_id"),
        (["--checkpoint", "12"], 3, "step-00000012"),
        (["--beam", "2", "--prompt", "word " * 40, "--overflow", "error"], 3, "--prompt"),
        (["--beam", "2", "--max_new_tokens", "16"], 2, "--max_new_tokens"),
        (["--greedy", "--beam", "3"], 2, "--beam"),
        (["--greedy", "--temperature", "0.5"], 2, "--temperature"),
        (["--alpha", "0.6"], 2, "--alpha"),
        *((["--beam", "2", flag, value], 2, f"{flag}: has no effect") for flag, value in NOT_IN_A_SEARCH),
    ],
)
def test_mistakes_are_one_line_with_their_exit_code(cli, run, flags, code, named):
    got, out, err = cli("generate", run, *flags)
    assert got == code
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err
