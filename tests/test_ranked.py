"""The fast encoder gives the ids of the library's, for learnt vocabularies too, or is not taken."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from classiclm.data.locate import find
from classiclm.data.ranked import equal_ranks, make_ranked
from classiclm.data.tokenizers import GPT2_FILES, ByteBPE, load_tokenizer

pytest.importorskip("tiktoken")
TEXT = "the cat sat on the mat; the other cats' mats, 12 and 123!\n\n\tGrüße, naïve \U0001f600\n" * 3
needs_gpt2 = pytest.mark.skipif(
    any(find(file) is None for file in GPT2_FILES), reason="GPT-2's vocabulary is not on this machine"
)


@pytest.fixture(scope="module", params=[300, 400])
def bpe(request):
    return ByteBPE.train(TEXT, request.param)


def by_library(bpe, text):
    return tokenizers.Tokenizer.from_str(bpe.to_json()).encode(text, add_special_tokens=False).ids


@settings(deadline=None, max_examples=300)
@given(text=st.one_of(st.text(), st.text(alphabet="the cat's mo 12\n\t", max_size=60)))
def test_the_fast_encoder_gives_the_librarys_ids(bpe, text):
    assert bpe.ranked is not None
    special_aside = text.replace("<|endoftext|>", "")
    assert bpe.ranked.encode(special_aside) == by_library(bpe, special_aside)
    assert bpe.ranked.encode_array(special_aside).tolist() == by_library(bpe, special_aside)


def test_a_long_text_takes_the_fast_encoder_and_special_tokens_in_it_stay_text(bpe, monkeypatch):
    text = TEXT * 500 + "<|endoftext|>"
    fast = bpe.encode(text)
    slow = ByteBPE(tokenizers.Tokenizer.from_str(bpe.to_json()))
    monkeypatch.setattr(type(slow), "ranked", None)
    assert fast == slow.encode(text)
    assert bpe.end_of_text not in fast
    assert bpe.encode_array(text).tolist() == fast


def edited(bpe, edit):
    rules = json.loads(bpe.to_json())
    edit(rules)
    return tokenizers.Tokenizer.from_str(json.dumps(rules))


def two_ways_to_one_token(rules):
    model = rules["model"]
    a, b, c = "x", "y", "z"
    model["vocab"] |= {a + b: 9001, b + c: 9002, a + b + c: 9003}
    model["merges"] = [*model["merges"], [a, b], [b, c], [a + b, c], [a, b + c]]


def a_token_that_no_merge_reaches(rules):
    rules["model"]["vocab"] |= {"qzqz": 9001}


def merges_in_another_order_than_ids(rules):
    rules["model"]["merges"].reverse()


def a_prefix_space(rules):
    rules["pre_tokenizer"]["add_prefix_space"] = True


def a_normalizer(rules):
    rules["normalizer"] = {"type": "Lowercase"}


def an_added_word(rules):
    rules["added_tokens"].append(
        {"id": 9001, "content": "cat", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": False}
    )


@pytest.mark.parametrize(
    "edit",
    [
        two_ways_to_one_token,
        a_token_that_no_merge_reaches,
        merges_in_another_order_than_ids,
        a_prefix_space,
        a_normalizer,
        an_added_word,
    ],
)
def test_a_vocabulary_whose_ids_do_not_say_what_its_merges_say_has_no_fast_encoder(edit):
    bpe = ByteBPE.train(TEXT, 300)
    assert equal_ranks(edited(bpe, lambda rules: None)) is not None
    assert equal_ranks(edited(bpe, edit)) is None


@needs_gpt2
@pytest.mark.parametrize("every", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_gpt2s_fast_encoder_cuts_every_character_as_the_library_does(every):
    gpt2 = load_tokenizer("gpt2")
    ranked = make_ranked(gpt2._tokenizer)
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000 and (i < 0x800 or i % every == 0)]
    texts = [
        "".join(f"a{c}b 1{c}2 .{c}. {c} " for c in characters[i : i + 500]) for i in range(0, len(characters), 500)
    ]
    library = gpt2._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    for text, expected in zip(texts, library, strict=True):
        assert ranked.encode(text) == expected.ids


@needs_gpt2
@pytest.mark.parametrize("character", ["c", " ", "^", "\n", "1", "é", "\u3000", "\U0001f600"])
@pytest.mark.timeout(30)
def test_a_million_equal_characters_come_back(character):
    gpt2 = load_tokenizer("gpt2")
    text = character * 1_000_000
    assert gpt2.decode(gpt2.encode(text)) == text
