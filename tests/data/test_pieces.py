import sys
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data import pieces
from fastgpt.data.pieces import cut, last_cut
from fastgpt.data.tokenizers import _LONG, BPETokenizer

# Every kind of character the pretokenizer or the cutter tells apart, with all of Unicode behind.
KINDS = "aZé9٣世🙂'\"!.-_ \n\t\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u2028\u202f\u205f\u3000\u200b"
SUFFIXES = ["'s", "'ll", " 't", "  ", "\n\n ", " a", "\u3000\n"]
texts = st.lists(
    st.one_of(
        st.sampled_from([*KINDS, *SUFFIXES]),
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    ),
    max_size=40,
).map("".join)


@pytest.fixture(scope="module")
def bpe(ranks):
    return BPETokenizer("small", ranks)


def chunked(data: bytes, n: int):
    return (data[i : i + n] for i in range(0, len(data), n))


@settings(max_examples=400, deadline=None)
@given(text=texts, size=st.integers(1, 12), chunk=st.integers(1, 9))
def test_tokens_of_pieces_are_the_tokens_of_the_whole(bpe, text, size, chunk):
    data = text.encode()
    parts = list(cut(chunked(data, chunk), size))
    assert b"".join(parts) == data
    ids = [i for piece in parts for i in bpe.encode_bytes(piece).tolist()]
    assert ids == bpe.encode(text).tolist(), parts


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_every_admissible_place_splits_the_tokens(bpe, text):
    data, whole, end = text.encode(), bpe.encode(text).tolist(), len(text.encode())
    while (at := last_cut(data[:end])) > 0:
        left, right = bpe.encode_bytes(data[:at]), bpe.encode_bytes(data[at:])
        assert [*left.tolist(), *right.tolist()] == whole, (data[:at], data[at:])
        end = at


def test_every_whitespace_of_the_pretokenizer_is_whitespace_to_python():
    """The cutter asks str.isspace; what only the pretokenizer calls space would be unsafe."""
    import regex  # tiktoken needs it too

    space = regex.compile(r"\s")
    for point in range(sys.maxunicode + 1):
        if space.match(chr(point)):
            assert chr(point).isspace(), hex(point)


def test_cuts_where_expected():
    assert [last_cut(t) for t in (b"", b"a", b"ab", b" a", b"a ", b"ab \n c", b"\n\n")] == [
        *(0, 0, 0, 0, 1, 2, 0)
    ]
    assert last_cut("世界。\n".encode()) == 9
    assert last_cut("\u3000\n".encode()) == 0
    long = b"word " + b"x" * 10_000
    assert last_cut(long) == 4
    for n in (4094, 4095, 4096, 4097, 8192):  # around the window it looks back by
        assert last_cut(b"a " + b"x" * n) == 1


def test_pieces_have_about_the_size_asked_for():
    data = b"some words and more\n" * 5000
    parts = list(cut(chunked(data, 1000), 4096))
    assert all(4096 - 20 <= len(p) <= 4096 + 1000 for p in parts[:-1])


def test_a_text_without_places_is_cut_between_characters():
    text = "世界" * 1000
    parts = list(cut(chunked(text.encode(), 100), 64, forced=500))
    assert "".join(piece.decode() for piece in parts) == text
    assert all(len(piece) <= 600 for piece in parts)


def test_memory_stays_bounded_on_a_long_text():
    line = b"a line of text that repeats without end, or so it seems\n"
    tracemalloc.start()
    total = sum(len(p) for p in cut((line * 1000 for _ in range(400)), 1 << 18))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 400_000 * len(line)
    assert peak < 2 << 20, peak


@pytest.mark.parametrize("blank", [" ", "\n", " \n\t", "\u3000 "])
@pytest.mark.parametrize("n", [_LONG - 1, _LONG, _LONG + 1, 3 * _LONG])
@pytest.mark.parametrize("after", ["", "a", "1", "!", "'s", "\x1c"])
def test_long_whitespace_has_the_tokens_of_plain_tiktoken(bpe, blank, n, after):
    run = (blank * n)[:n]
    text = f"x{run}{after}{run[:5]}y"
    assert bpe.encode(text).tolist() == bpe._tiktoken.encode_ordinary(text)


def test_whitespace_that_overflows_plain_tiktoken(bpe):
    text = "a" + " " * 2_000_000 + "b"
    assert bpe.decode(bpe.encode(text)) == text


def test_a_text_without_places_is_searched_in_linear_time(monkeypatch):
    looked = []
    monkeypatch.setattr(pieces, "last_cut", lambda text: looked.append(len(text)) or 0)
    data = b"x" * 100_000
    assert b"".join(cut(chunked(data, 100), 100, forced=20_000)) == data
    assert sum(looked) < 4 * len(data)
