"""The generate command: one prompt, many, JSON, a conversation. The oracle is the Python API with the same seed."""

import io
import json

import pytest
import torch

from classiclm.data import plays
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
    ],
)
def test_mistakes_are_one_line_with_their_exit_code(cli, run, flags, code, named):
    got, out, err = cli("generate", run, *flags)
    assert got == code
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err
