"""Weights from elsewhere: what transformers itself writes, OpenAI's files of GPT-1, and what is neither."""

import io
import json
import os
import pickle
import random
import shutil
import struct

import numpy as np
import pytest
import safetensors.torch
import torch

import classiclm
from classiclm.commands import import_
from classiclm.convert import openai_npy, vocabularies
from classiclm.data.tokenizers import GPT1BPE, ByteBPE, CharTokenizer, WordPiece
from classiclm.errors import Error
from classiclm.models import gpt1

transformers = pytest.importorskip("transformers")

TEXT = "The cat sat on the mat, and the dog's bone lay in the garden, where no one looks but I. " * 40
SENTENCE = "the cat's bone sat in the garden."
BPE, GPT1_BPE, PIECES = ByteBPE.train(TEXT, 290), GPT1BPE.train(TEXT, 90), WordPiece.train(TEXT, 80)


@pytest.fixture
def take(tmp_path, capsys):
    """take(folder, ...) -> (exit code, the line on stderr or of the error); the run is tmp_path / "run"."""

    def do(source, *flags):
        try:
            code = import_.main([str(source), "--out", str(tmp_path / "run"), *map(str, flags)], "classiclm import")
        except Error as e:
            code, line = e.code, str(e)
            assert "\n" not in line
            assert ". Fix: " in line
            assert not list((tmp_path / "run").glob("checkpoints/step*"))
            return code, line
        captured = capsys.readouterr()
        assert captured.out == ""
        return code, captured.err

    return do


def large(model):
    """Random weights of std 0.3."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" in name:  # Marian's sines
                continue
            is_gain = "weight" in name and any(part in name for part in ("ln_", "LayerNorm", "layer_norm"))
            parameter.normal_(1.0 if is_gain else 0.0, 0.3)
    return model.eval()


def their_gpt2(**changes):
    sizes = {"n_layer": 2, "n_embd": 24, "n_head": 3, "n_positions": 40, "vocab_size": 290, **changes}
    return large(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)))


def their_gpt1(n_heads):
    sizes = {"n_layer": 2, "n_embd": 24, "n_head": n_heads, "n_positions": 40, "vocab_size": GPT1_BPE.vocab_size}
    return large(transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**sizes)))


def vocabulary_of(tokenizer):
    """ids and merges, as the library tells them."""
    tree = json.loads(tokenizer.to_json())
    return tree["model"]["vocab"], [tuple(pair) for pair in tree["model"].get("merges", [])]


def their_tokenizer(kind, tokenizer):
    """transformers' own class with our vocabulary, which writes tokenizer.json in its own way."""
    vocab, merges = vocabulary_of(tokenizer)
    return getattr(transformers, kind)(vocab=vocab, **({"merges": merges} if merges else {}))


@pytest.fixture
def saved(tmp_path):
    """A folder of a GPT-2 as transformers saves it, with its tokenizer, and the model."""
    model = their_gpt2()
    model.save_pretrained(tmp_path / "hf")
    their_tokenizer("GPT2Tokenizer", BPE).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf", model


def equal_logits(run, theirs, tokens):
    ours, _ = classiclm.load(run)
    expected = theirs(tokens).logits
    assert expected.std() >= 1
    assert ((ours(tokens) - expected).abs().max() / expected.std()).item() <= 1e-5


TOKENS = torch.arange(30)[None] * 7 % 60


# What transformers writes


def test_its_gpt2_gives_its_logits_and_its_tokens(saved, take, tmp_path):
    folder, theirs = saved
    code, line = take(folder)
    assert code == 0
    assert "(gpt2, imported)" in line
    assert "fp32" not in line
    equal_logits(tmp_path / "run", theirs, TOKENS)
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    ours = classiclm.load(tmp_path / "run")[1]
    for text in (SENTENCE, "  Zoë 😀\n\n don't"):
        assert ours.encode(text) == fast(text)["input_ids"]
    assert ours.end_of_text == 0


def test_its_gpt1_gives_its_logits(take, tmp_path):
    theirs = their_gpt1(3)
    theirs.save_pretrained(tmp_path / "hf")
    fast = their_tokenizer("OpenAIGPTTokenizer", GPT1_BPE)
    fast.save_pretrained(tmp_path / "hf")
    assert take(tmp_path / "hf")[0] == 0
    equal_logits(tmp_path / "run", theirs, TOKENS)
    text = "The cat sat on the mat"
    assert classiclm.load(tmp_path / "run")[1].encode(text) == fast(text)["input_ids"]


@pytest.mark.parametrize("lowercase", [True, False])
def test_its_bert_gives_its_logits_and_its_tokens(lowercase, take, tmp_path):
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=24, num_attention_heads=3, intermediate_size=50, max_position_embeddings=40,
        vocab_size=PIECES.vocab_size,
    )  # fmt: skip
    theirs = large(transformers.BertForPreTraining(config))
    theirs.save_pretrained(tmp_path / "hf")
    fast = transformers.BertTokenizer(vocab=vocabulary_of(PIECES)[0], do_lower_case=lowercase)
    fast.save_pretrained(tmp_path / "hf")
    assert take(tmp_path / "hf")[0] == 0
    ours, tokenizer = classiclm.load(tmp_path / "run")
    logits, expected = ours(TOKENS, TOKENS % 2), theirs(TOKENS, token_type_ids=TOKENS % 2)
    assert expected.prediction_logits.std() >= 1
    assert (logits.mlm - expected.prediction_logits).abs().max() / expected.prediction_logits.std() <= 1e-5
    assert (logits.nsp - expected.seq_relationship_logits).abs().max() <= 1e-4
    for text in ("The CAT's bone!", "the cat, sat"):
        assert tokenizer.encode(text) == fast(text, add_special_tokens=False)["input_ids"]
    assert (tokenizer.unk in tokenizer.encode("THE")) is not lowercase


def test_its_marian_gives_its_logits(take, tmp_path):
    config = transformers.MarianConfig(
        encoder_layers=2, decoder_layers=2, d_model=24, encoder_attention_heads=3, decoder_attention_heads=3,
        encoder_ffn_dim=50, decoder_ffn_dim=50, max_position_embeddings=40, vocab_size=290, pad_token_id=0,
        eos_token_id=0, decoder_start_token_id=0, forced_eos_token_id=None, scale_embedding=True,
        activation_function="relu",
    )  # fmt: skip
    theirs = large(transformers.MarianMTModel(config))
    theirs.save_pretrained(tmp_path / "hf")
    (tmp_path / "bpe").mkdir()
    (tmp_path / "bpe" / "tokenizer.json").write_text(BPE.to_json())
    assert take(tmp_path / "hf", "--tokenizer", tmp_path / "bpe")[0] == 0
    ours, _ = classiclm.load(tmp_path / "run")
    expected = theirs(TOKENS, decoder_input_ids=TOKENS.flip(1)[:, :9]).logits
    assert expected.std() >= 1
    assert (ours(TOKENS, TOKENS.flip(1)[:, :9]) - expected).abs().max() / expected.std() <= 1e-5


def test_a_folder_in_several_files_is_read_through_its_index(saved, take, tmp_path):
    folder, theirs = saved
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert take(folder)[0] == 0
    equal_logits(tmp_path / "run", theirs, TOKENS)


def test_a_file_with_its_config_beside_it_and_a_body_without_head_are_read(saved, take, tmp_path):
    folder, theirs = saved
    theirs.transformer.save_pretrained(folder)  # names without "transformer."
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert take(folder / "weights.safetensors")[0] == 0
    equal_logits(tmp_path / "run", theirs, TOKENS)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "float16"), (torch.bfloat16, "bfloat16")])
def test_half_precision_is_read_as_fp32_and_said(dtype, name, saved, take, tmp_path):
    folder, theirs = saved
    theirs.to(dtype).save_pretrained(folder)
    code, line = take(folder)
    assert code == 0
    assert f"kept as {name} and now in fp32" in line
    kept = safetensors.torch.load_file(tmp_path / "run" / "checkpoints" / "step-00000000" / "model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    equal_logits(tmp_path / "run", theirs.float(), TOKENS)


# Tokenizers of other forms


def write_pair(folder, tokenizer, vocab_name, merges_name):
    vocab, merges = vocabulary_of(tokenizer)
    (folder / vocab_name).write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges), ""]
    (folder / merges_name).write_text("\n".join(lines))


def test_ids_and_merges_in_two_files_are_gpt2s_tokenizer(saved, take, tmp_path):
    folder, _ = saved
    (folder / "tokenizer.json").unlink()
    write_pair(folder, BPE, "vocab.json", "merges.txt")
    assert take(folder)[0] == 0
    ours = classiclm.load(tmp_path / "run")[1]
    assert ours.encode(TEXT) == BPE.encode(TEXT)
    assert ours.end_of_text == 0
    assert ours.fingerprint == BPE.fingerprint


def test_a_space_before_each_text_and_another_kind_of_tokenizer_are_refused(saved, take):
    folder, _ = saved
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text())
    words = {"type": "WordLevel", "unk_token": "cat", "vocab": {"cat": 0, "dog": 1}}
    for change, why in (
        ({"pre_tokenizer": {**tree["pre_tokenizer"], "add_prefix_space": True}}, "a space before each text"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "not GPT-2's"),
        ({"normalizer": {"type": "NFC"}}, "not GPT-2's"),
        ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}}, "of the kind Unigram"),
        ({"model": words, "added_tokens": []}, "words, not characters"),
        ({"model": {"type": "WordPiece", "vocab": {"cat": 1}}, "added_tokens": []}, "not 0, 1, 2 and so on"),
        ({"model": None}, ""),
    ):
        path.write_text(json.dumps(tree | change))
        code, line = take(folder)
        assert code == 3, change
        assert str(path) in line
        assert why in line


def test_a_folder_without_a_tokenizer_needs_the_flag_and_one_that_does_not_fit_is_refused(saved, take, tmp_path):
    folder, _ = saved
    (folder / "tokenizer.json").unlink()
    code, line = take(folder)
    assert code == 3
    assert "--tokenizer" in line
    other = tmp_path / "other"
    other.mkdir()
    for size, expected in ((289, 3), (291, 3), (290, 0)):
        (other / "tokenizer.json").write_text(ByteBPE.train("abracadabra " * 9 + TEXT, size).to_json())
        code, line = take(folder, "--tokenizer", other)
        assert code == expected, line
        assert code == 0 or "rows for 290" in line


@pytest.fixture
def vocabulary_file(tmp_path):
    """vocabulary_file(tokenizer, **changes) -> the path of its tokenizer.json; a dict changes a part of its tree."""

    def write(tokenizer, **changes):
        tree = json.loads(tokenizer.to_json())
        for key, value in changes.items():
            tree[key] = tree[key] | value if isinstance(tree[key], dict) and key == "model" else value
        path = tmp_path / "vocabulary.json"
        path.write_text(json.dumps(tree))
        return path

    return write


def their_bert(**sizes):
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=24, num_attention_heads=3, intermediate_size=50, max_position_embeddings=40,
        vocab_size=290, **sizes,
    )  # fmt: skip
    return transformers.BertForPreTraining(config)


def their_marian(**changes):
    sizes = {
        "encoder_layers": 1, "decoder_layers": 1, "d_model": 24, "encoder_attention_heads": 3,
        "decoder_attention_heads": 3, "encoder_ffn_dim": 50, "decoder_ffn_dim": 50, "max_position_embeddings": 40,
        "vocab_size": 290, "pad_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0,
        "forced_eos_token_id": None, "scale_embedding": True, "activation_function": "relu",
    }  # fmt: skip
    return transformers.MarianMTModel(transformers.MarianConfig(**sizes | changes))


def test_a_tokenizer_of_another_kind_than_the_family_needs_is_refused(take, tmp_path, vocabulary_file):
    """All are of 290 tokens, as the weights."""
    pieces = WordPiece.from_vocabulary(
        [*(f"[{n}]" for n in ("PAD", "UNK", "CLS", "SEP", "MASK")), *map(chr, range(64, 349))]
    )
    characters = CharTokenizer([chr(64 + i) for i in range(290)])
    models = {"bert": their_bert(), "marian": their_marian(), "gpt2": their_gpt2()}
    for name, wrong, why in (
        ("bert", BPE, "is no WordPiece"), ("bert", characters, "is no WordPiece"),
        ("marian", pieces, "<|endoftext|>"), ("marian", characters, "<|endoftext|>"),
        ("gpt2", pieces, "which is BERT's"),
    ):  # fmt: skip
        assert wrong.vocab_size == 290
        models[name].save_pretrained(tmp_path / name)
        code, line = take(tmp_path / name, "--tokenizer", vocabulary_file(wrong))
        assert code == 3, (name, wrong)
        assert why in line
        (tmp_path / name / "tokenizer.json").write_text(wrong.to_json())
        assert take(tmp_path / name)[0] == 3
    assert take(tmp_path / "gpt2", "--tokenizer", vocabulary_file(characters))[0] == 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}}, "add_prefix_space"),
        ({"model": {"continuing_subword_prefix": "##"}}, "continuing_subword_prefix"),
        ({"model": {"ignore_merges": True}}, "ignore_merges"),
        ({"model": {"merges": ["a b c"]}}, "is no pair"),
        ({"model": {"merges": ["a nothing"]}}, ""),
    ],
    ids=str,
)
def test_a_tokenizer_that_is_named_is_checked_as_one_in_the_folder(change, why, saved, take, vocabulary_file):
    folder, _ = saved
    path = vocabulary_file(BPE, **change)
    code, line = take(folder, "--tokenizer", path)
    assert code == 3
    assert line.startswith(f"{path}: is no tokenizer of ours (")
    assert why in line
    assert line.count("Fix:") == 1


def test_a_bpe_of_words_needs_unk_and_no_bytes(take, tmp_path, vocabulary_file):
    their_gpt1(3).save_pretrained(tmp_path / "hf")
    tree = json.loads(GPT1_BPE.to_json())
    without = {("!" if token == "<unk>" else token): i for token, i in tree["model"]["vocab"].items()}
    clip = {"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]}
    for change, why in (
        ({"model": {"vocab": without, "unk_token": None}}, "no <unk>"),
        ({"pre_tokenizer": clip}, "on bytes"),
        ({"model": {"end_of_word_suffix": "@@"}}, "'@@'"),
        ({"model": {"fuse_unk": True}}, "fuse_unk"),
    ):
        code, line = take(tmp_path / "hf", "--tokenizer", vocabulary_file(GPT1_BPE, **change))
        assert code == 3, change
        assert why in line
    assert take(tmp_path / "hf", "--tokenizer", vocabulary_file(GPT1_BPE))[0] == 0


def test_a_wordpiece_with_other_rules_than_berts_is_refused_and_the_rule_named(take, tmp_path):
    fast = transformers.BertTokenizer(vocab=vocabulary_of(PIECES)[0])
    fast.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer.json"
    theirs = json.loads(path.read_text())
    several = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}
    for tree, change, why in (
        (theirs, {"pre_tokenizer": {"type": "WhitespaceSplit"}}, "WhitespaceSplit"),
        (theirs, {"pre_tokenizer": None}, "pre-tokenizer (none)"),
        (theirs, {"model": theirs["model"] | {"continuing_subword_prefix": "@@"}}, "'@@'"),
        (theirs, {"model": theirs["model"] | {"unk_token": "[CLS]"}}, "unk_token"),
        (theirs, {"normalizer": several}, "NFKC"),
        (theirs, {"normalizer": None}, "normalizer (none)"),
        (theirs, {"normalizer": theirs["normalizer"] | {"clean_text": False}}, "clean_text"),
        (theirs, {"normalizer": theirs["normalizer"] | {"strip_accents": False}}, "accents"),
        (json.loads(PIECES.to_json()), {"pre_tokenizer": {"type": "BertPreTokenizer"}}, "normalizer"),
    ):
        path.write_text(json.dumps(tree | change))
        with pytest.raises(Error) as caught:
            vocabularies.read(tmp_path / "hf")
        assert caught.value.code == 3
        assert why in str(caught.value)
    cased = WordPiece.from_vocabulary(list(vocabulary_of(PIECES)[0]), lowercase=False)
    for tokenizer in (PIECES, cased):
        path.write_text(tokenizer.to_json())
        assert vocabularies.read(tmp_path / "hf").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(("value", "code"), [("false", 3), (0, 3), (None, 3), (False, None), (True, None)])
def test_do_lower_case_is_true_or_false(value, code, tmp_path):
    vocabulary = vocabulary_of(PIECES)[0]
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": value}))
    if code is None:
        assert (vocabularies.read(tmp_path).unk in vocabularies.read(tmp_path).encode("THE")) is not value
        return
    with pytest.raises(Error, match="do_lower_case") as caught:
        vocabularies.read(tmp_path)
    assert caught.value.code == code


def test_a_vocabulary_without_its_merges_and_one_without_special_tokens_are_told_in_words(saved, take):
    folder, _ = saved
    (folder / "tokenizer.json").write_text('{"model": null}')
    lines = [take(folder)]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    lines.append(take(folder))
    (folder / "vocab.json").unlink()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    lines.append(take(folder))
    for (code, line), words in zip(
        lines, ("of another type", "merges.txt beside it is missing", "lacks [CLS]"), strict=True
    ):
        assert code == 3
        assert words in line
        assert line.count("Fix:") == 1
        assert not any(raw in line for raw in ("Errno", "NoneType", "subscript"))


def test_an_empty_path_is_a_usage_error_and_nothing_is_written(saved, take, tmp_path, monkeypatch):
    folder, _ = saved
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    for arguments in (["", "--out", str(tmp_path / "run")], [str(folder), "--out", ""]):
        with pytest.raises(Error) as caught:
            import_.main(arguments, "classiclm import")
        assert caught.value.code == 2
    assert take(folder, "--tokenizer", "")[0] == 2
    assert sorted(folder.iterdir()) == before
    assert not (tmp_path / "run").exists()


# OpenAI's files


def write_release(folder, model, tokenizer):
    """As OpenAI's training code orders its variables: positions, tokens, blocks; and cut into ten equal pieces."""
    body = model.transformer
    arrays = [body.positions_embed.weight, body.tokens_embed.weight]
    for block in body.h:
        attn, mlp = block.attn, block.mlp
        arrays += [attn.c_attn.weight[None], attn.c_attn.bias, attn.c_proj.weight[None], attn.c_proj.bias]
        arrays += [block.ln_1.weight, block.ln_1.bias]
        arrays += [mlp.c_fc.weight[None], mlp.c_fc.bias, mlp.c_proj.weight[None], mlp.c_proj.bias]
        arrays += [block.ln_2.weight, block.ln_2.bias]
    flat = np.concatenate([array.detach().numpy().ravel() for array in arrays])
    folder.mkdir()
    for i, piece in enumerate(np.array_split(flat, 10)):
        np.save(folder / f"params_{i}.npy", piece)
    (folder / "params_shapes.json").write_text(json.dumps([list(array.shape) for array in arrays]))
    write_pair(folder, tokenizer, "encoder_bpe_40000.json", "vocab_40000.bpe")


@pytest.fixture
def release(tmp_path):
    model = their_gpt1(12)
    write_release(tmp_path / "model", model, GPT1_BPE)
    return tmp_path / "model", model


def test_openais_ten_files_give_the_logits_and_the_tokens(release, take, tmp_path):
    folder, theirs = release
    assert take(folder)[0] == 0
    equal_logits(tmp_path / "run", theirs, TOKENS)
    assert classiclm.load(tmp_path / "run")[1].encode(SENTENCE) == GPT1_BPE.encode(SENTENCE)


def test_the_published_shapes_are_those_of_our_preset():
    """params_shapes.json of the release: 2 + 12 x 12 shapes, 116,534,784 numbers."""
    shapes = [[512, 768], [40478, 768]]
    for _ in range(12):
        shapes += [[1, 768, 2304], [2304], [1, 768, 768], [768], [768], [768]]
        shapes += [[1, 768, 3072], [3072], [1, 3072, 768], [768], [768], [768]]
    assert sum(int(np.prod(shape)) for shape in shapes) == 116_534_784
    assert openai_npy.config_of([tuple(shape) for shape in shapes], "shapes") == gpt1.PRESETS["gpt1-117m"]


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def npy(array=None, header=None, body=b""):
    """The bytes of a .npy file; of version 1.0 with this header if one is given."""
    if header is None:
        file = io.BytesIO()
        np.save(file, array, allow_pickle=True)
        return file.getvalue()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


def test_damaged_files_of_the_release_are_bad_input_and_nothing_in_them_runs(release, take, tmp_path):
    folder, _ = release
    path, whole = folder / "params_3.npy", (folder / "params_3.npy").read_bytes()
    bad = [
        npy(np.array([Canary(tmp_path / "ran")], dtype=object)),
        pickle.dumps(Canary(tmp_path / "ran")),
        npy(np.zeros((len(whole) - 128) // 4, np.float64)),
        npy(np.zeros(10, np.float32)),
        whole[:-3],
        whole[:60],
        b"",
        npy(header=b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999,)}\n"),
        npy(header=b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}\n", body=b"1234"),
        npy(header=b"__import__('os').mkdir('ran')\n"),
        npy(header=b"(" * 9000),
        npy(header=b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n", body=b"12345678"),
    ]
    for data in bad:
        path.write_bytes(data)
        assert take(folder)[0] == 3, data[:80]
    path.unlink()
    assert take(folder)[0] == 3
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("shapes", [None, "{", "[]", "[[1]]", "5", "[[40, 24], [90, 24], [7]]", "swapped", "[[-1]]"])
def test_shapes_that_are_no_gpt1s_are_bad_input(shapes, release, take):
    folder, _ = release
    path = folder / "params_shapes.json"
    tree = json.loads(path.read_text())
    if shapes == "swapped":
        shapes = json.dumps([*tree[:3], tree[4], tree[3], *tree[5:]])
    path.unlink() if shapes is None else path.write_text(shapes)
    code, line = take(folder)
    assert code == 3
    assert str(path) in line


# Files that are no weights


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "m.pt", "m.pth", "m.ckpt", "m.pkl", "pytorch_model-00001-of-00002.bin"]
)
def test_pickles_are_refused_with_the_way_to_convert_them_and_are_not_opened(name, saved, take, tmp_path):
    folder, _ = saved
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
    for source in (folder, folder / name):
        code, line = take(source)
        assert code == 3
        assert "is a pickle" in line
        assert "save_pretrained" in line
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001", "tf_model.h5"])
def test_tensorflow_checkpoints_are_refused(name, take, tmp_path):
    folder = tmp_path / "tf"
    folder.mkdir()
    (folder / name).write_bytes(b"\0")
    sources = [folder, folder / name] + [folder / "bert_model.ckpt"] * name.startswith("bert")
    for source in sources:
        code, line = take(source)
        assert code == 3
        assert "TensorFlow" in line


def hostile(whole):
    """Bytes under the name of model.safetensors, none of them sound."""
    torch_file = io.BytesIO()
    torch.save({"a": torch.ones(3)}, torch_file)
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    wide = header.replace(b"[2]", b"[99999999999999]")
    return [
        b"", b"\0" * 7, b"\0" * 8, whole[:100], whole[:-1], torch_file.getvalue(), pickle.dumps({"a": 1}),
        pickle.dumps({"a": 1}, protocol=0), b"\x89HDF\r\n\x1a\n" + b"\0" * 99, b"<!DOCTYPE html>" * 9,
        struct.pack("<Q", 2**63) + header, struct.pack("<Q", len(header)) + header,
        struct.pack("<Q", len(wide)) + wide + b"\0" * 8, struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", len(header)) + header.replace(b"F32", b"XYZ") + b"\0" * 8,
        struct.pack("<Q", len(header)) + header.replace(b"0,8", b"8,0") + b"\0" * 8,
    ]  # fmt: skip


def test_whatever_else_is_called_safetensors_is_bad_input(saved, take):
    folder, _ = saved
    path = folder / "model.safetensors"
    for data in hostile(path.read_bytes()):
        path.write_bytes(data)
        code, line = take(folder)
        assert code == 3, data[:60]
        assert str(path) in line
        assert len(line) < 700


def test_a_pickle_under_the_name_of_safetensors_is_called_one_and_is_not_opened(saved, take, tmp_path):
    folder, _ = saved
    canary = Canary(tmp_path / "ran")
    as_torch_does = io.BytesIO()
    torch.save(canary, as_torch_does)
    for data in (as_torch_does.getvalue(), *(pickle.dumps(canary, protocol=version) for version in (2, 3, 4, 5))):
        (folder / "model.safetensors").write_bytes(data)
        code, line = take(folder)
        assert code == 3
        assert "is a pickle" in line
    assert not (tmp_path / "ran").exists()


def test_random_damage_is_bad_input_or_harmless(saved, take, tmp_path):
    folder, theirs = saved
    path = folder / "model.safetensors"
    whole, draw = path.read_bytes(), random.Random(0)
    header, refused = 8 + struct.unpack("<Q", whole[:8])[0], 0
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(header)] = draw.randrange(256)
        path.write_bytes(data)
        code, line = take(folder)
        assert code in (0, 3), line
        if code == 3:
            refused += 1
            continue
        equal_logits(tmp_path / "run", theirs, TOKENS)
        shutil.rmtree(tmp_path / "run")
    assert refused > 30  # most bytes of a header matter


def test_missing_mis_shaped_and_non_finite_tensors_are_named(saved, take):
    folder, _ = saved
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = "transformer.h.1.mlp.c_fc.weight"
    for changed in (
        {key: value for key, value in tensors.items() if key != name},
        tensors | {name: tensors[name][1:].clone()},
        tensors | {name: tensors[name].int()},
        tensors | {name: tensors[name] * float("nan")},
    ):
        safetensors.torch.save_file(changed, path)
        code, line = take(folder)
        assert code == 3
        assert "mlp" in line


@pytest.mark.parametrize(
    "index",
    [
        b"", b"[]", b"{}", b'{"weight_map": []}',
        b'{"weight_map": {"a": "/etc/passwd"}}', b'{"weight_map": {"a": 5}}', b'{"weight_map": {"a": "b.safetensors"}}',
        b'{"weight_map": {"a": "x.bin"}}', b'{"weight_map": {"a": "whole.safetensors"}}', b"[" * 200_000,
    ],
)  # fmt: skip
def test_an_index_that_is_damaged_or_points_elsewhere_is_bad_input(index, saved, take):
    folder, _ = saved
    (folder / "model.safetensors").rename(folder / "whole.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(index)
    assert take(folder)[0] == 3


def test_an_index_may_only_name_files_beside_it(saved, take):
    folder, _ = saved
    (folder / "model.safetensors").rename(folder.parent / "whole.safetensors")
    names = safetensors.torch.load_file(folder.parent / "whole.safetensors")
    for file in ("../whole.safetensors", str(folder.parent / "whole.safetensors")):
        index = {"weight_map": dict.fromkeys(names, file)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        code, line = take(folder)
        assert code == 3
        assert "beside it" in line


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama"}, {"model_type": None}, {"n_layer": 10**9}, {"n_layer": "2"}, {"n_embd": 25},
        {"n_head": 0}, {"vocab_size": 10**15}, {"activation_function": "relu"}, {"n_positions": True},
        {"n_layer": [2]}, {"resid_pdrop": 7},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_ours_cannot_follow_is_bad_input(change, saved, take):
    folder, _ = saved
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | change))
    assert take(folder)[0] == 3


@pytest.mark.parametrize("size", [10**18, 2**62, 2**63 - 1])
def test_sizes_beyond_any_tensor_are_bad_input(size, take, tmp_path):
    release = tmp_path / "release"
    models = {"gpt1": their_gpt1(3), "gpt2": their_gpt2(), "bert": their_bert(), "marian": their_marian()}
    positions = {"gpt1": "n_positions", "gpt2": "n_positions"}
    for name, model in models.items():
        model.save_pretrained(release)
        tree = json.loads((release / "config.json").read_text())
        for key in (positions.get(name, "max_position_embeddings"), "vocab_size"):
            changed = json.dumps(tree | {key: size, "decoder_vocab_size": None})
            (release / "config.json").write_text(changed)
            code, line = take(release)
            assert code == 3, (name, key)
            assert line.count("Fix:") == 1
        shutil.rmtree(release)


def test_the_tanh_form_of_gelu_may_have_its_other_name(saved, take, tmp_path):
    folder, _ = saved
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"activation_function": "gelu_pytorch_tanh"}))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    assert take(folder)[0] == 0
    equal_logits(tmp_path / "run", theirs, TOKENS)


def test_of_several_dropouts_the_residual_one_is_taken_and_the_others_are_named(saved, take, tmp_path):
    folder, theirs = saved
    tree = json.loads((folder / "config.json").read_text())
    changes = {"resid_pdrop": 0.3, "attn_pdrop": 0.2, "embd_pdrop": 0.3}
    (folder / "config.json").write_text(json.dumps(tree | changes))
    code, line = take(folder)
    assert code == 0
    assert "attn_pdrop is 0.2, here 0.3" in line
    assert "embd" not in line
    equal_logits(tmp_path / "run", theirs, TOKENS)
    assert classiclm.load(tmp_path / "run")[0].config.dropout == 0.3
    shutil.rmtree(tmp_path / "run")
    their_marian(dropout=0.2, attention_dropout=0.1).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(BPE.to_json())
    code, line = take(tmp_path / "hf")
    assert code == 0
    assert "attention_dropout is 0.1, here 0.0" in line
    assert "training only" in line


def test_a_missing_file_of_several_is_said_to_be_missing(saved, take):
    folder, theirs = saved
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="20KB")
    absent = sorted(folder.glob("*.safetensors"))[1]
    absent.unlink()
    code, line = take(folder)
    assert code == 3
    assert line.startswith(f"{absent}: is missing.")


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 200_000])
def test_a_config_that_is_no_json_object_is_bad_input(text, saved, take):
    folder, _ = saved
    (folder / "config.json").write_bytes(text)
    assert take(folder)[0] == 3


def test_a_lone_file_says_that_the_config_has_to_be_beside_it(saved, take, tmp_path):
    folder, _ = saved
    (tmp_path / "lone").mkdir()
    lone = tmp_path / "lone" / "model.safetensors"
    (folder / "model.safetensors").rename(lone)
    code, line = take(lone)
    assert code == 3
    assert "config.json" in line
    assert "beside" in line
    assert take(tmp_path / "nowhere")[0] == take(folder)[0] == take(folder / "config.json")[0] == 3


def test_a_run_that_has_checkpoints_is_not_overwritten(saved, take, tmp_path):
    folder, _ = saved
    assert take(folder)[0] == 0
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(Error) as caught:
        import_.main([str(folder), "--out", str(tmp_path / "run")], "classiclm import")
    assert caught.value.code == 2
    assert before == sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*"))
