from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import struct
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hyp
from hypothesis import strategies as st

from fastgpt.data import tokenizer as module
from fastgpt.data.tokenizer import (
    GPT2_PATTERN,
    MAX_BYTES,
    ByteTokenizer,
    CharTokenizer,
    dump_ranks,
    load_tokenizer,
    make_tokenizer,
    parse_ranks,
    read_meta,
    train_ranks,
)
from fastgpt.errors import UserError

from .conftest import TEXT, python


@pytest.fixture(params=["byte", "char", "gpt2", "bpe:400"])
def tokenizer(request, as_gpt2):
    vocab_file = str(as_gpt2) if request.param == "gpt2" else ""
    return make_tokenizer(request.param, vocab_file=vocab_file, texts=[TEXT * 20])


def test_decoding_gives_the_text_back(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.uint16 and ids.ndim == 1 and ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode_bytes(ids.tolist()) == TEXT.encode()
    assert np.array_equal(tokenizer.encode_bytes(TEXT.encode()), ids)
    assert tokenizer.encode("").shape == (0,) and tokenizer.decode([]) == ""


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    again = load_tokenizer(tmp_path / "t")
    assert (again.name, again.vocab_size, again.eot) == (
        tokenizer.name,
        tokenizer.vocab_size,
        tokenizer.eot,
    )
    assert again.fingerprint == tokenizer.fingerprint
    assert np.array_equal(again.encode(TEXT), tokenizer.encode(TEXT))


def test_ids_outside_the_vocabulary_are_refused(tokenizer):
    for ids in ([tokenizer.vocab_size], [0, -1]):
        with pytest.raises(ValueError, match=f"0 .. {tokenizer.vocab_size - 1}"):
            tokenizer.decode(ids)


@hyp(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_survives_bytes_and_bpe(ranks, text):
    from fastgpt.data.tokenizer import BPETokenizer

    for tok in (ByteTokenizer(), BPETokenizer("small", ranks)):
        try:
            data = text.encode()
        except UnicodeEncodeError:
            return
        assert tok.decode_bytes(tok.encode(text)) == data


def test_bytes_are_a_vocabulary_of_256_and_end_with_0():
    tok = ByteTokenizer()
    assert (tok.vocab_size, tok.eot) == (256, 0)
    assert tok.encode("aé").tolist() == [97, 0xC3, 0xA9]


def test_chars_are_numbered_as_nanogpt_does():
    tok = make_tokenizer("char", texts=["hello", " world\n"])
    assert tok.chars == sorted(set("hello world\n")) and tok.eot is None
    assert tok.encode("lo").tolist() == [tok.chars.index("l"), tok.chars.index("o")]


@pytest.mark.parametrize("char", ["b", "\x00", "é", "🙂", "\U0010ffff"])
def test_unknown_characters_are_named(char):
    tok = CharTokenizer("acz\u3000")
    with pytest.raises(UserError, match=f"U\\+{ord(char):04X}.*4 characters"):
        tok.encode(f"ac{char}a")


def test_special_tokens_in_text_are_text(ranks, as_gpt2):
    tok = make_tokenizer("gpt2", vocab_file=str(as_gpt2))
    ids = tok.encode("a<|endoftext|>b")
    assert tok.eot == tok.vocab_size - 1 == 511
    assert tok.eot not in ids and tok.decode(ids) == "a<|endoftext|>b"
    assert tok.decode([tok.eot]) == "<|endoftext|>"


def test_more_than_65536_ids_take_four_bytes():
    tok = CharTokenizer(map(chr, range(0x10000, 0x10000 + (1 << 16) + 1)))
    assert tok.encode(chr(0x20000)).dtype == np.uint32
    assert tok.encode(chr(0x20000)).tolist() == [1 << 16]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("word", "byte, char, gpt2, or bpe:N"),
        ("", "byte, char, gpt2, or bpe:N"),
        ("bpe:", "N the vocabulary's size"),
        ("bpe:x", "N the vocabulary's size"),
        ("bpe:-5", "N the vocabulary's size"),
        ("bpe:1e3", "N the vocabulary's size"),
        ("byte:5", "byte, char, gpt2"),
        ("gpt2:", "byte, char, gpt2"),
        ("bpe:0", "257 .. 1000000"),
        ("bpe:256", "257 .. 1000000"),
        ("bpe:1000001", "257 .. 1000000"),
        ("bpe", "--vocab_file"),
    ],
)
def test_bad_specs(spec, says):
    with pytest.raises(UserError) as e:
        make_tokenizer(spec, texts=["text"])
    assert says in str(e.value) and "\n" not in str(e.value)


def test_vocab_file_is_for_bpe_only(as_gpt2):
    with pytest.raises(UserError, match="gpt2 or bpe"):
        make_tokenizer("byte", vocab_file=str(as_gpt2))


# --- rank files


def damaged(ranks: dict[bytes, int], kind: str) -> bytes:
    lines = dump_ranks(ranks).splitlines(keepends=True)
    return {
        "not base64": b"".join([*lines[:5], b"!!! 5\n", *lines[6:]]),
        "no rank": b"".join([*lines[:5], b"YQ==\n", *lines[6:]]),
        "rank twice": b"".join([*lines, base64.b64encode(b"zzzz") + b" 7\n"]),
        "gap": b"".join([*lines[:300], *lines[301:]]),
        "byte missing": dump_ranks({t: i for i, t in enumerate(list(ranks)[1:])}),
        "empty": b"",
        "binary": bytes(range(256)) * 10,
    }[kind]


@pytest.mark.parametrize(
    "kind", ["not base64", "no rank", "rank twice", "gap", "byte missing", "empty", "binary"]
)
def test_damaged_rank_files(ranks, tmp_path, kind):
    path = tmp_path / "ranks.tiktoken"
    path.write_bytes(damaged(ranks, kind))
    for spec in ("gpt2", "bpe"):
        with pytest.raises(UserError, match="ranks.tiktoken") as e:
            make_tokenizer(spec, vocab_file=str(path))
        assert "\n" not in str(e.value)


def test_another_vocabulary_is_not_gpt2(ranks, tmp_path):
    path = tmp_path / "mine.tiktoken"
    path.write_bytes(dump_ranks(ranks))
    with pytest.raises(UserError, match="not GPT-2's vocabulary.*--tokenizer=bpe"):
        make_tokenizer("gpt2", vocab_file=str(path))
    tok = make_tokenizer("bpe", vocab_file=str(path))
    assert (tok.name, tok.vocab_size) == ("bpe:512", 512)
    with pytest.raises(UserError, match="bpe:512"):
        make_tokenizer("bpe:400", vocab_file=str(path))
    with pytest.raises(UserError, match="No such file"):
        make_tokenizer("bpe", vocab_file=str(tmp_path / "none"))


def test_layout_of_a_rank_file_does_not_matter(as_gpt2, ranks):
    as_gpt2.write_bytes(b"\r\n".join(dump_ranks(ranks).split(b"\n")))
    assert make_tokenizer("gpt2", vocab_file=str(as_gpt2)).vocab_size == 512


def test_gpt2_is_found_in_the_caches(as_gpt2, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tt"))
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match="--vocab_file=FILE"):
        make_tokenizer("gpt2", cache=cache)
    key = hashlib.sha1(module.GPT2_URL.encode()).hexdigest()
    (tmp_path / "tt").mkdir()
    (tmp_path / "tt" / key).write_bytes(as_gpt2.read_bytes())
    assert make_tokenizer("gpt2", cache=cache).name == "gpt2"
    (tmp_path / "tt" / key).unlink()
    cache.mkdir()
    (cache / module.GPT2_NAME).write_bytes(as_gpt2.read_bytes())
    assert make_tokenizer("gpt2", cache=cache).name == "gpt2"


def test_gpt2_downloads_only_when_told_to(as_gpt2, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tt"))
    asked = []

    def fetch(url, path, **kwargs):
        asked.append((url, kwargs["sha256"]))
        path.parent.mkdir()
        path.write_bytes(as_gpt2.read_bytes())
        return path

    monkeypatch.setattr(module, "fetch", fetch)
    with pytest.raises(UserError, match="fastgpt prepare"):
        make_tokenizer("gpt2", cache=tmp_path / "cache")
    assert not asked
    make_tokenizer("gpt2", cache=tmp_path / "cache", download=True)
    assert asked == [(module.GPT2_URL, module.GPT2_SHA256)]


def test_the_pattern_splits_as_gpt2_published_it():
    """Against the pattern of GPT-2's release, without possessive quantifiers."""
    import regex

    published = regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )
    ours = regex.compile(GPT2_PATTERN)

    @hyp(max_examples=300, deadline=None)
    @given(st.lists(st.sampled_from([*"aB1!'  \n\t\u3000é世", "'ll", "'ve", "'x"])).map("".join))
    def same(text):
        assert ours.findall(text) == published.findall(text)

    same()


# --- training


def test_training_depends_on_the_texts_alone():
    pytest.importorskip("rustbpe")
    code = """
import sys, hashlib
from fastgpt.data.tokenizer import dump_ranks, train_ranks
texts = ["tie tie eit eit aabb bbaa %d" % i for i in range(300)] + ["aaaa aaaaaaa baaab " * 50]
print(hashlib.sha256(dump_ranks(train_ranks(texts, 330))).hexdigest())
"""
    runs = [
        python(code, env={"RAYON_NUM_THREADS": str(n), "PYTHONHASHSEED": str(n)}) for n in (1, 2, 5)
    ]
    outputs = [run.communicate(timeout=60) for run in runs]
    assert len({out for out, _ in outputs}) == 1 and outputs[0][0], outputs


def test_training_makes_exactly_the_size(ranks):
    tok = make_tokenizer("bpe:300", texts=[TEXT * 20])
    assert (tok.vocab_size, tok.eot, tok.name) == (300, 299, "bpe:300")
    assert parse_ranks(tok.rank_file, "x") == train_ranks([TEXT * 20], 300)


def test_smallest_vocabulary_is_bytes():
    pytest.importorskip("rustbpe")
    tok = make_tokenizer("bpe:257", texts=[TEXT])
    assert tok.encode("ab").tolist() == [97, 98] and tok.eot == 256


def test_too_little_text_to_train_on():
    pytest.importorskip("rustbpe")
    with pytest.raises(UserError, match=r"bpe:5000: this text .* say --tokenizer=bpe:\d+ or less"):
        make_tokenizer("bpe:5000", texts=["ab ab"])


def test_training_without_rustbpe(monkeypatch):
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    with pytest.raises(UserError, match=r"pip install.*\[bpe\]"):
        make_tokenizer("bpe:300", texts=["text"])


def test_training_survives_endless_whitespace():
    pytest.importorskip("rustbpe")
    make_tokenizer("bpe:258", texts=["ab ab" + " " * 1_500_000 + "ab ab"])


# --- damaged folders


def folder_with(tmp_path, tok):
    tok.save(tmp_path / "t")
    return tmp_path / "t"


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: (d / "tokenizer.json").unlink(),
        lambda d: (d / "tokenizer.tiktoken").unlink(),
        lambda d: (d / "tokenizer.json").write_text(""),
        lambda d: (d / "tokenizer.json").write_text("[]"),
        lambda d: (d / "tokenizer.json").write_text('{"name": "byte"}'),
        lambda d: (d / "tokenizer.json").write_bytes(b"\xff\xfe"),
        lambda d: os.truncate(d / "tokenizer.json", 50),
        lambda d: os.truncate(d / "tokenizer.tiktoken", 3000),
        lambda d: swap(d / "tokenizer.tiktoken"),
        lambda d: edit(d / "tokenizer.json", "version", 2),
        lambda d: edit(d / "tokenizer.json", "vocab_size", 513),
        lambda d: edit(d / "tokenizer.json", "eot", 0),
    ],
)
def test_damaged_tokenizer_folders(ranks, as_gpt2, tmp_path, damage):
    folder = folder_with(tmp_path, make_tokenizer("gpt2", vocab_file=str(as_gpt2)))
    damage(folder)
    with pytest.raises(UserError, match="tokenizer\\.") as e:
        load_tokenizer(folder)
    assert "\n" not in str(e.value)


def swap(path):
    """Exchange the tokens of two ranks: well-formed, but another vocabulary."""
    lines = [line.split() for line in path.read_bytes().splitlines()]
    lines[300][0], lines[301][0] = lines[301][0], lines[300][0]
    path.write_bytes(b"".join(b" ".join(line) + b"\n" for line in lines))


def edit(path, key, value):
    spec = json.loads(path.read_text())
    spec[key] = value
    path.write_text(json.dumps(spec))


CHARS = sorted(set("\n !?abcABCé世"))
META = {
    "vocab_size": len(CHARS),
    "itos": dict(enumerate(CHARS)),
    "stoi": {c: i for i, c in enumerate(CHARS)},
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nanogpts_meta_is_read(tmp_path, protocol):
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(META, protocol))
    size, tok = read_meta(path)
    assert size == tok.vocab_size == len(CHARS) and tok.chars == CHARS
    assert tok.decode(tok.encode("Abc 世")) == "Abc 世"


def test_all_of_unicode_is_read(tmp_path):
    chars = [chr(i) for i in range(1 << 16) if not 0xD800 <= i < 0xE000]
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars))}
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(meta))
    assert read_meta(path)[0] == len(chars)


@pytest.mark.parametrize(
    "extra",
    [
        {"itos": None},
        {"itos": {0: "a"}},
        {"itos": {i: "ab" for i in range(len(CHARS))}},
        {"itos": dict.fromkeys(range(len(CHARS)), "a")},
        {"itos": {i: i for i in range(len(CHARS))}},
    ],
)
def test_without_characters_there_is_a_size_only(tmp_path, extra):
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps({**META, **extra, "more": [1.5, None, True, 2**70]}))
    assert read_meta(path) == (len(CHARS), None)


class Reduce:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def system(marker):
    return Reduce(os.system, (f"touch {marker}",))


def hostile(marker) -> dict[str, bytes]:
    class Persistent(pickle.Pickler):
        def persistent_id(self, obj):
            return "evil" if isinstance(obj, Reduce) else None

    import io

    buffer = io.BytesIO()
    Persistent(buffer).dump({**META, "x": system(marker)})
    dumps = pickle.dumps
    push = b"\x80\x04"
    return {
        "system": dumps(system(marker)),
        "system, protocol 0": dumps(system(marker), 0),
        "nested": dumps({**META, "itos": {0: [{"deep": system(marker)}]}}),
        "as a key": dumps({system(marker): 1}),
        "eval": dumps(Reduce(eval, (f"open({str(marker)!r}, 'w')",))),
        "class": dumps({**META, "x": Reduce}),
        "builtin": dumps({**META, "x": getattr}),
        "a tuple": dumps({**META, "x": (1, 2)}),
        "a set": dumps({**META, "x": {1}}),
        "bytes": dumps({**META, "x": b"12"}),
        "persistent": buffer.getvalue(),
        "persistent, protocol 0": b"Pevil\n.",
        "inst": b"(S'touch " + str(marker).encode() + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'touch " + str(marker).encode() + b"'\no.",
        "extension": push + b"\x82\x01.",
        "huge memo": push + b"}r\xff\xff\xff\x7f.",
        "huge memo, protocol 0": b"}p2000000000\n.",
        "huge bytearray": push + b"\x96" + struct.pack("<Q", 1 << 40) + b"x.",
        "huge string": push + b"\x8d" + struct.pack("<Q", 1 << 40) + b"x.",
        "huge number": b"I" + b"9" * 100_000 + b"\n.",
        "huge long": push + b"\x8b" + struct.pack("<i", 1 << 30) + b"x.",
        "deep": b"]" * 1_000_000 + b"a" * 999_999 + b".",
        "truncated": dumps(META)[:50],
        "empty": b"",
        "no stop": push + b"}",
        "stack underflow": push + b"s.",
        "append to a dict": push + b"}K\x01a.",
        "unhashable key": push + b"}]K\x01s.",
        "memo not there": push + b"h\x05.",
        "bad utf-8": push + b"\x8c\x02\xff\xff.",
        "text": b"not a pickle at all",
        "zeros": bytes(100),
        "no dict": dumps([1, 2, 3]),
        "no size": dumps({"itos": {}}),
        "size 0": dumps({"vocab_size": 0}),
        "size negative": dumps({"vocab_size": -5}),
        "size of 2 bytes exceeded": dumps({"vocab_size": 65537}),
        "size a string": dumps({"vocab_size": "65"}),
        "size a bool": dumps({"vocab_size": True}),
    }


@pytest.mark.parametrize("kind", hostile("x"))
def test_anything_else_is_refused_and_nothing_runs(tmp_path, kind):
    marker, path = tmp_path / "ran", tmp_path / "meta.pkl"
    path.write_bytes(hostile(marker)[kind])
    with pytest.raises(UserError, match=r"meta\.pkl") as e:
        read_meta(path)
    assert not marker.exists() and "\n" not in str(e.value) and len(str(e.value)) < 400


def test_the_hostile_ones_do_run_elsewhere(tmp_path):
    """So the test above would notice."""
    marker = tmp_path / "ran"
    pickle.loads(hostile(marker)["system"])
    assert marker.exists()


def test_large_files_are_not_even_read(tmp_path):
    path = tmp_path / "meta.pkl"
    with open(path, "wb") as f:
        f.truncate(MAX_BYTES + 1)
    with pytest.raises(UserError, match="no vocabulary"):
        read_meta(path)
