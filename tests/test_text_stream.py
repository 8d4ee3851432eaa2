"""Text as it streams: nothing is shown that a later token could change, and nothing behind the stop text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classiclm.data.tokenizers import ByteBPE, CharTokenizer
from classiclm.generate.text import pieces

END = 999


def decode(tokens):
    """Tokens as byte strings in a table of their own: id -> bytes."""
    return b"".join(TABLE[token] for token in tokens).decode("utf-8", errors="replace")


# Every byte, and some longer tokens that begin or end inside a character or hold several.
TABLE = {i: bytes([i]) for i in range(256)}
LONGER = [
    b"ab",
    b"abc",
    b"a\xf0",
    b"\x9f\x98\x80b",
    b"\xe2\x82",
    b"\xac\xe2",
    b"\xef\xbf\xbd",
    b"\xc3\xa9\xc3",
    b"\xff",
]
TABLE |= {256 + i: token for i, token in enumerate(LONGER)}


def tokens_of(*parts):
    ids = {value: key for key, value in TABLE.items()}
    return [ids[part] for part in parts]


def stream(tokens, stop=None, end=END, decode=decode):
    return list(pieces(iter(tokens), decode, stop, end))


def cut(text, stop):
    return text.split(stop, 1)[0] if stop else text


@pytest.mark.parametrize("text", ["é", "€", "😀", "a😀é€b", "👨‍👩‍👧", "日本語"])
def test_no_half_character_is_shown_when_it_comes_byte_by_byte(text):
    shown = ""
    for piece in pieces(iter(text.encode()), decode):
        shown += piece
        assert text.startswith(shown)
    assert shown == text


def test_each_character_is_shown_with_its_last_byte():
    made = pieces(iter("aé😀".encode()), decode)
    assert [piece for piece in made if piece] == ["a", "é", "😀"]


def test_a_character_split_over_longer_tokens_is_shown_whole():
    assert (
        "".join(stream(tokens_of(b"a\xf0", b"\x9f\x98\x80b", b"\xe2\x82", b"\xac\xe2", b"\x82", b"\xac"))) == "a😀b€€"
    )


def test_a_whole_character_behind_garbage_stays_whole():
    assert "".join(stream(list(b"\xff\xf0\x9f\x98\x80"))) == "\ufffd😀"
    assert "".join(stream([*b"\xef\xbf\xbd", *"😀".encode()])) == "\ufffd😀"


def test_a_half_character_at_the_very_end_comes_out_as_a_replacement():
    assert "".join(stream(list("é".encode()[:1]))) == "\ufffd"
    assert "".join(stream([97, *"😀".encode()[:3]])) == decode([97, *"😀".encode()[:3]])


@pytest.mark.parametrize("stop", ["\n", "END", "😀", "aab", "é€", "\n\n"])
@pytest.mark.parametrize("before", ["", "x", "aa", "aaa", "EN", "\n", "EEN EN"])
def test_a_stop_text_split_over_tokens_is_left_out_with_all_behind_it(stop, before):
    consumed = []

    def tokens():
        for byte in (before + stop + "behind it").encode():
            consumed.append(byte)
            yield byte

    assert "".join(pieces(tokens(), decode, stop)) == cut(before + stop, stop)
    assert len(consumed) <= len((before + stop).encode())  # no token is asked for that cannot be shown


@pytest.mark.parametrize("text", ["E", "EN", "x EN", "ENEN", "a ENx", "EEEN", "E N D"])
def test_what_only_begins_like_the_stop_text_comes_out_in_the_end(text):
    assert "".join(stream(text.encode(), "END")) == text


def test_what_may_begin_the_stop_text_is_held_back():
    made = pieces(iter(b"aENxEND"), decode, "END")
    assert [next(made) for _ in range(4)] == ["a", "", "", "ENx"]
    assert "".join(made) == ""


def test_a_stop_text_inside_the_last_unfinished_token_is_found():
    assert "".join(stream(tokens_of(b"b", b"a\xf0"), "a")) == "b"
    assert "".join(stream(tokens_of(b"b", b"a\xf0", b"b"), "a")) == "b"


def test_the_end_of_a_text_ends_the_stream_and_is_not_shown():
    assert "".join(stream([97, 98, END, 99])) == "ab"
    assert "".join(stream([END])) == ""
    assert "".join(stream([*tokens_of(b"E", b"N"), END, 68], "END")) == "EN"
    assert "".join(stream([0xC3, END, 0xA9])) == "\ufffd"


def test_no_tokens_give_no_text():
    assert "".join(stream([])) == ""
    assert "".join(stream([], "END")) == ""


@pytest.mark.parametrize("stop", [None, ""])
def test_no_stop_text_stops_nothing(stop):
    assert "".join(stream(b"abc", stop)) == "abc"


PARTS = st.lists(st.sampled_from([*b"aab\nE", *"é€😀".encode(), *range(256, 256 + len(LONGER))]), max_size=40)
STOPS = st.none() | st.text(st.sampled_from("aab\nEé€😀\ufffd"), max_size=4)


@settings(deadline=None, max_examples=1000)
@given(tokens=PARTS, stop=STOPS)
def test_the_pieces_together_are_the_whole_text_up_to_the_first_stop(tokens, stop):
    expected = cut(decode(tokens), stop)
    shown = ""
    for piece in pieces(iter(tokens), decode, stop):
        shown += piece
        assert expected.startswith(shown)
    assert shown == expected


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=30), stop=st.none() | st.text(max_size=3))
def test_the_packages_own_tokenizers_stream_as_they_decode(text, stop):
    for tokenizer in (ByteBPE.train("the thé 😀😀", 262), CharTokenizer.train(text + "x")):
        made = stream(tokenizer.encode(text), stop, tokenizer.end_of_text, tokenizer.decode)
        assert "".join(made) == cut(text, stop)


WORDS = ["my", "lord", ",", "dine", "with"]


def decode_words(ids):
    """A tokenizer of words: spaces between, none at either end."""
    return " ".join(WORDS[i] for i in ids)


@pytest.mark.parametrize("n_before", [0, 1, 3])
def test_words_are_joined_with_spaces_to_what_stands_before_and_to_one_another(n_before):
    ids = list(range(5))
    made = list(pieces(ids[n_before:], decode_words, before=ids[:n_before]))
    assert decode_words(ids[:n_before]) + "".join(made) == "my lord , dine with"
    assert len(made) == len(ids) - n_before + 1  # each word as it comes, and the rest, which is empty
