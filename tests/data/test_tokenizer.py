import base64
import io
import json
import os
import pickle
import re
import struct
import sys

import numpy as np
import pytest
import regex  # tiktoken needs it too
from hypothesis import given
from hypothesis import settings as hyp
from hypothesis import strategies as st

from fastgpt.data import progress
from fastgpt.data import tokenizer as module
from fastgpt.data.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    dump_ranks,
    load_tokenizer,
    make_tokenizer,
)
from fastgpt.errors import UserError
from tests.fakes import Reduce

from .conftest import TEXT, python, tree


@pytest.fixture(params=["byte", "char", "gpt2", "bpe:400"])
def tokenizer(request, as_gpt2):
    vocab_file = str(as_gpt2) if request.param == "gpt2" else ""
    return make_tokenizer(request.param, vocab_file=vocab_file, texts=[TEXT * 20])


def test_decoding_gives_the_text_back(tokenizer, tmp_path):
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.uint16 and ids.ndim == 1 and ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode_bytes(ids.tolist()) == TEXT.encode()
    assert tokenizer.encode("").shape == (0,) and tokenizer.decode([]) == ""
    for wrong in ([tokenizer.vocab_size], [0, -1]):
        with pytest.raises(ValueError, match=f"0 .. {tokenizer.vocab_size - 1}"):
            tokenizer.decode(wrong)
    tokenizer.save(tmp_path / "t")
    again = load_tokenizer(tmp_path / "t")
    assert again.to_json() == tokenizer.to_json() and again.fingerprint == tokenizer.fingerprint
    assert np.array_equal(again.encode(TEXT), ids)


def test_ids_are_numbered_as_promised(as_gpt2):
    byte = ByteTokenizer()
    assert (byte.vocab_size, byte.eot) == (256, 0)
    assert byte.encode("aé").tolist() == [97, 0xC3, 0xA9]
    char = make_tokenizer("char", texts=["hello", " world\n"])  # as nanoGPT does
    assert char.chars == [*"\n dehlorw"] and char.eot is None
    assert char.encode("lo").tolist() == [5, 6]
    bpe = make_tokenizer("gpt2", vocab_file=str(as_gpt2))  # special tokens in text are text
    ids = bpe.encode("a<|endoftext|>b")
    assert bpe.eot == bpe.vocab_size - 1 == 511 and bpe.decode([bpe.eot]) == "<|endoftext|>"
    assert bpe.eot not in ids and bpe.decode(ids) == "a<|endoftext|>b"
    wide = CharTokenizer(map(chr, range(0x10000, 0x10000 + (1 << 16) + 1)))
    assert wide.encode(chr(0x20000)).dtype == np.uint32, "ids past 65,535 take four bytes"
    assert wide.encode(chr(0x20000)).tolist() == [1 << 16]


@pytest.mark.parametrize("char", ["b", "\x00", "é", "🙂", "\U0010ffff"])
def test_unknown_characters_are_named(char):
    tok = CharTokenizer("acz\u3000")
    with pytest.raises(UserError, match=f"U\\+{ord(char):04X}.*4 of this vocabulary"):
        tok.encode(f"ac{char}a")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        *((spec, "byte, char, gpt2, or bpe:N") for spec in ("word", "", "byte:5", "gpt2:")),
        *((f"bpe:{n}", "N the vocabulary's size") for n in ("", "x", "-5", "1e3", "9" * 5000)),
        *((f"bpe:{n}", "257 .. 1000000") for n in (0, 256, 1_000_001)),
        ("bpe", "--vocab_file"),
    ],
)
def test_bad_specs(spec, says):
    with pytest.raises(UserError) as e:
        make_tokenizer(spec, texts=["text"])
    assert says in str(e.value)


# --- long whitespace, at which tiktoken's regular expressions overflow


@pytest.mark.parametrize("blank", [" ", "\n", " \n\t", "\u3000 "])
@pytest.mark.parametrize("n", [module._LONG - 1, module._LONG, 3 * module._LONG + 1])
@pytest.mark.parametrize("after", ["", "a", "1", "!", "'s", "\x1c"])
def test_long_whitespace_has_the_tokens_of_plain_tiktoken(ranks, blank, n, after):
    bpe, run = BPETokenizer("small", ranks), (blank * n)[:n]
    text = f"x{run}{after}{run[:5]}y"
    assert bpe.encode(text).tolist() == bpe._tiktoken.encode_ordinary(text)


def test_endless_whitespace_is_no_trouble(ranks):
    bpe, text = BPETokenizer("small", ranks), "a" + " " * 2_000_000 + "b"
    assert bpe.decode(bpe.encode(text)) == text
    make_tokenizer("bpe:258", texts=["ab ab" + " " * 1_500_000 + "ab ab"])


# --- rank files


def test_vocabularies_from_a_file(ranks, tmp_path):
    path = tree(tmp_path, {"mine.tiktoken": dump_ranks(ranks)}) / "mine.tiktoken"
    with pytest.raises(UserError, match="not GPT-2's vocabulary.*--tokenizer=bpe"):
        make_tokenizer("gpt2", vocab_file=str(path))
    tok = make_tokenizer("bpe", vocab_file=str(path))
    assert (tok.name, tok.vocab_size) == ("bpe:512", 512)
    with pytest.raises(UserError, match="bpe:512"):
        make_tokenizer("bpe:400", vocab_file=str(path))
    with pytest.raises(UserError, match="No such file"):
        make_tokenizer("bpe", vocab_file=str(tmp_path / "none"))
    with pytest.raises(UserError, match="gpt2 or bpe"):
        make_tokenizer("byte", vocab_file=str(path))


def test_gpt2_is_found_in_the_cache_or_downloaded(as_gpt2, server, tmp_path, monkeypatch):
    data = as_gpt2.read_bytes()
    as_gpt2.write_bytes(b"\r\n".join(data.split(b"\n")))  # the layout does not matter
    assert make_tokenizer("gpt2", vocab_file=str(as_gpt2)).vocab_size == 512
    server.files["/ranks"] = data
    monkeypatch.setattr(module, "GPT2_URL", f"{server.url}/ranks")
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match="fastgpt prepare.*--vocab_file=FILE"):
        make_tokenizer("gpt2", cache=cache)
    for _ in range(2):
        assert make_tokenizer("gpt2", cache=cache, download=True).name == "gpt2"
    assert server.asked == ["/ranks"] and (cache / "gpt2.tiktoken").read_bytes() == data


PUBLISHED = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@hyp(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*"aB1!'  \n\t\u3000é世", "'ll", "'ve", "'x"])).map("".join))
def test_the_pattern_splits_as_gpt2_published_it(text):
    assert regex.findall(module.GPT2_PATTERN, text) == regex.findall(PUBLISHED, text)


# --- training


def test_training_depends_on_the_texts_alone():
    pytest.importorskip("rustbpe")
    code = """
from fastgpt.data.tokenizer import dump_ranks, train_ranks
texts = ["tie tie eit eit aabb bbaa %d" % i for i in range(300)] + ["aaaa aaaaaaa baaab " * 50]
print(dump_ranks(train_ranks(texts, 330)))
"""
    runs = [
        python(code, env={"RAYON_NUM_THREADS": str(n), "PYTHONHASHSEED": str(n)}) for n in (1, 5)
    ]
    (first, err), (second, _) = (run.communicate(timeout=60) for run in runs)
    assert first == second and first, err


def test_training_makes_exactly_the_size(ranks, monkeypatch, capsys):
    monkeypatch.setattr(progress.Every, "due", lambda self: True)
    for size in (257, 300):
        tok = make_tokenizer(f"bpe:{size}", texts=[TEXT * 20])
        assert (tok.vocab_size, tok.eot, tok.name) == (size, size - 1, f"bpe:{size}")
        assert module.parse_ranks(tok.rank_file, "x") == module.train_ranks([TEXT * 20], size)
    assert re.search(r"^merging: \d+ merges of 299 merges, \d+ %, ", capsys.readouterr().err, re.M)
    with pytest.raises(UserError, match=r"bpe:5000: this text .* say --tokenizer=bpe:\d+ or less"):
        make_tokenizer("bpe:5000", texts=["ab ab"])
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    with pytest.raises(UserError, match=r"pip install.*\[bpe\]"):
        make_tokenizer("bpe:300", texts=["text"])


# --- damaged files


def edit(key, value):
    def damage(folder):
        path = folder / "tokenizer.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return damage


RANKS = [
    lambda lines: [*lines[:5], b"!!! 5\n", *lines[6:]],
    lambda lines: [*lines[:5], b"YQ==\n", *lines[6:]],
    lambda lines: [*lines, base64.b64encode(b"zzzz") + b" 7\n"],
    lambda lines: [*lines[:300], *lines[301:]],
    lambda lines: [line.split()[0] + b" %d\n" % i for i, line in enumerate(lines[1:])],
    lambda lines: [],
    lambda lines: [bytes(range(256)) * 10],
]
FILES = [
    lambda d: (d / "tokenizer.json").unlink(),
    lambda d: (d / "tokenizer.tiktoken").unlink(),
    lambda d: (d / "tokenizer.json").write_bytes(b"\xff\xfe"),
    lambda d: (d / "tokenizer.json").write_text("[" * 100_000),
    lambda d: os.truncate(d / "tokenizer.json", 50),
    lambda d: os.truncate(d / "tokenizer.tiktoken", 3000),
    edit("version", 2),
    edit("vocab_size", 513),
    edit("ranks_sha256", "0" * 64),
]


@pytest.mark.parametrize("change", RANKS)
def test_damaged_ranks_are_named(ranks, change):
    lines = dump_ranks(ranks).splitlines(keepends=True)
    with pytest.raises(UserError, match="^some.tiktoken: "):
        module.parse_ranks(b"".join(change(lines)), "some.tiktoken")


@pytest.mark.parametrize("damage", FILES)
def test_damaged_files_are_named(as_gpt2, tmp_path, damage):
    make_tokenizer("gpt2", vocab_file=str(as_gpt2)).save(tmp_path / "t")
    damage(tmp_path / "t")
    with pytest.raises(UserError, match="tokenizer\\."):
        load_tokenizer(tmp_path / "t")


# --- nanoGPT's meta.pkl

CHARS = sorted(set("\n !?abcABCé世"))
META = {
    "vocab_size": len(CHARS),
    "itos": dict(enumerate(CHARS)),
    "stoi": {c: i for i, c in enumerate(CHARS)},
}


@pytest.fixture
def meta(tmp_path):
    """Reads what is given as a meta.pkl."""

    def read(content):
        path = tmp_path / "meta.pkl"
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
        return module.read_meta_pkl(path)

    return read


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nanogpts_meta_is_read(meta, protocol):
    size, tok = meta(pickle.dumps(META, protocol))
    assert size == tok.vocab_size == len(CHARS) and tok.chars == CHARS
    assert tok.decode(tok.encode("Abc 世")) == "Abc 世"
    chars = [chr(i) for i in range(0xE000, 1 << 16)]
    assert meta({"vocab_size": len(chars), "itos": dict(enumerate(chars))})[1].chars == chars


def test_without_characters_there_is_a_size_only(meta):
    n = len(CHARS)
    for values in (["ab"] * n, ["a"] * n, range(n), ["a"], []):
        itos = dict(enumerate(values)) or None
        assert meta({**META, "itos": itos, "more": [1.5, None, True, 2**70]}) == (n, None)


def hostile(marker) -> dict[str, bytes]:
    class Persistent(pickle.Pickler):
        def persistent_id(self, obj):
            return "evil" if isinstance(obj, Reduce) else None

    buffer, dumps, push = io.BytesIO(), pickle.dumps, b"\x80\x04"
    system = Reduce(os.system, (f"touch {marker}",))
    Persistent(buffer).dump({**META, "x": system})
    kinds = {
        "system": dumps(system),
        "nested": dumps({**META, "itos": {0: [{"deep": system}]}}),
        "persistent": buffer.getvalue(),
        "inst": b"(S'touch " + str(marker).encode() + b"'\nios\nsystem\n.",
        "extension": push + b"\x82\x01.",
        "huge memo": push + b"}r\xff\xff\xff\x7f.",
        "huge bytearray": push + b"\x96" + struct.pack("<Q", 1 << 40) + b"x.",
        "huge string": push + b"\x8d" + struct.pack("<Q", 1 << 40) + b"x.",
        "huge number": b"I" + b"9" * 100_000 + b"\n.",
        "deep": b"]" * 100_000 + b"a" * 99_999 + b".",
        "truncated": dumps(META)[:50],
        "over 16 MB": bytes((16 << 20) + 1),
        "no dict": dumps([1, 2, 3]),
    }
    values: tuple = (Reduce, getattr, (1, 2), {1}, b"12")
    kinds |= {f"holds {value!r}": dumps({**META, "x": value}) for value in values}
    sizes: tuple = (0, -5, 65537, "65", True)
    return kinds | {f"size {size!r}": dumps({"vocab_size": size}) for size in sizes}


@pytest.mark.parametrize("kind", hostile("x"))
def test_anything_else_is_refused_and_nothing_runs(meta, tmp_path, kind):
    marker = tmp_path / "ran"
    with pytest.raises(UserError, match=r"meta\.pkl") as e:
        meta(hostile(marker)[kind])
    assert not marker.exists() and len(str(e.value)) < 500
    pickle.loads(hostile(marker)["system"])
    assert marker.exists(), "it would have been noticed"
