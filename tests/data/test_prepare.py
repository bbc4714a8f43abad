from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data import corpora, token_files
from fastgpt.data import prepare as module
from fastgpt.data.prepare import (
    _jobs,
    _State,
    _tokenize,
    cut,
    ensure,
    last_cut,
    ordered_map,
    prepare,
    with_tokenizer,
)
from fastgpt.data.token_files import open_dataset
from fastgpt.data.tokenizer import _LONG, BPETokenizer, ByteTokenizer, CharTokenizer
from fastgpt.errors import UserError

from .conftest import TEXT, python

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
    monkeypatch.setattr(module, "last_cut", lambda text: looked.append(len(text)) or 0)
    data = b"x" * 100_000
    assert b"".join(cut(chunked(data, 100), 100, forced=20_000)) == data
    assert sum(looked) < 4 * len(data)


class Texts:
    """A source of documents given as (split, text)."""

    n_bytes = None
    identity = {"a": 1}

    def __init__(self, documents):
        self._documents = documents

    def documents(self):
        for split, text in self._documents:
            yield split, text.encode()
            yield split, None


def some_documents(n=60):
    return [
        ("val" if i % 7 == 3 else "train", f"{i} " + TEXT[i % 50 :] * (i % 4)) for i in range(n)
    ]


def run(folder, source, tokenizer, workers=1):
    state = _State(folder, {"of": 1})
    _tokenize(state, source, tokenizer, workers)
    return {s: [folder / f["file"] for f in shards] for s, shards in state.shards.items()}


def ids_of(paths):
    return np.concatenate([token_files.inspect(p).open()[:] for p in paths]).tolist()


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # hundreds of tiny files; no power cut here
    monkeypatch.setattr(module, "JOB_BYTES", 500)
    monkeypatch.setattr(token_files, "SHARD_TOKENS", 700)


def make(kind, ranks):
    if kind == "char":
        return CharTokenizer(sorted(set("0123456789" + TEXT)))
    return ByteTokenizer() if kind == "byte" else BPETokenizer("small", ranks)


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_files_hold_the_documents_tokens(tmp_path, small, ranks, kind):
    tok, documents = make(kind, ranks), some_documents()
    files = run(tmp_path / "p", Texts(documents), tok)
    for split, paths in files.items():
        want = []
        for where, text in documents:
            if where == split:
                want += tok.encode(text).tolist() + ([] if tok.eot is None else [tok.eot])
        assert ids_of(paths) == want
        counts = [token_files.inspect(p).count for p in paths]
        assert all(n == 700 for n in counts[:-1]) and 0 < counts[-1] <= 700
        assert len(counts) > 1


def test_threads_do_not_change_a_byte(tmp_path, small, ranks):
    tok, results = make("bpe", ranks), []
    for workers in (1, 2, 3, 8):
        files = run(tmp_path / str(workers), Texts(some_documents(150)), tok, workers)
        results.append([(p.name, p.read_bytes()) for paths in files.values() for p in paths])
    assert all(r == results[0] for r in results)


def test_a_document_of_many_pieces_ends_once(small):
    text = TEXT * 20
    jobs = list(_jobs(Texts([("train", text), ("val", "x")])))
    items = [item for job in jobs for item in job]
    texts = [text for _, text in items]
    assert len(texts) > 6 and b"".join(texts[:-3]).decode() == text
    assert None not in texts[:-3] and texts[-3:] == [None, b"x", None]


class Stop(Exception):
    pass


def test_going_on_after_any_interruption_gives_the_same_files(tmp_path, small, ranks, capsys):
    tok, documents = make("bpe", ranks), some_documents(150)
    want = {
        p.name: p.read_bytes()
        for paths in run(tmp_path / "whole", Texts(documents), tok).values()
        for p in paths
    }
    resumed = set()
    for n in range(0, 150, 9):
        folder = tmp_path / f"cut{n}"

        def broken(n=n):
            yield from documents[:n]
            raise Stop

        class Broken(Texts):
            def documents(self, broken=broken):
                for split, text in broken():
                    yield split, text.encode()
                    yield split, None

        with pytest.raises(Stop):
            run(folder, Broken([]), tok)
        capsys.readouterr()
        files = run(folder, Texts(documents), tok)
        resumed.add(capsys.readouterr().out)
        assert {p.name: p.read_bytes() for ps in files.values() for p in ps} == want
    assert len(resumed) > 5, "it did go on from several places"


def test_finished_shards_are_not_made_again(tmp_path, small, ranks, monkeypatch):
    tok, documents = make("bpe", ranks), some_documents(150)
    with pytest.raises(Stop):
        run(tmp_path / "p", Texts(itertools.chain(documents[:120], raising())), tok)
    encoded = []
    monkeypatch.setattr(
        BPETokenizer,
        "encode_bytes",
        lambda self, data: encoded.append(data) or self.encode(data.decode()),
    )
    run(tmp_path / "p", Texts(documents), tok)
    assert 30 <= len(encoded) < 100


def raising():
    raise Stop
    yield


def damage_shard(folder):
    path = sorted(folder.glob("tokens_train*"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        damage_shard,
        lambda d: sorted(d.glob("tokens_train*"))[0].unlink(),
        lambda d: (d / "state.json").unlink(),
        lambda d: (d / "state.json").write_text("{"),
        lambda d: (d / "state.json").write_text("[]"),
        lambda d: (d / "stale.tmp").write_text("x"),
        lambda d: (d / "state.json").write_text(
            json.dumps({**json.loads((d / "state.json").read_text()), "purpose": "other"})
        ),
    ],
)
def test_leftovers_that_do_not_fit_are_made_again(tmp_path, small, change):
    tok, documents = ByteTokenizer(), some_documents(100)
    whole = run(tmp_path / "w", Texts(documents), tok)
    with pytest.raises(Stop):
        run(tmp_path / "p", Texts(itertools.chain(documents[:90], raising())), tok)
    change(tmp_path / "p")
    again = run(tmp_path / "p", Texts(documents), tok)
    for split, paths in whole.items():
        assert [p.read_bytes() for p in again[split]] == [p.read_bytes() for p in paths]
    names = {p.name for paths in again.values() for p in paths}
    assert set(os.listdir(tmp_path / "p")) - {"state.json"} == names


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "SHARD_TOKENS", 4 << 20)
    line = "a line of text that repeats without end, or so it seems\n"

    def peak(n_documents):
        source = Texts(("train", line * 2000) for _ in range(n_documents))
        tracemalloc.start()
        run(tmp_path / str(n_documents), source, ByteTokenizer())
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(200) < 1.2 * peak(20) < 24 << 20  # 22 MB against 2 MB of text


# --- ordered_map


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_ordered_map_keeps_the_order_and_few_in_work(threads):
    taken = []
    results = ordered_map(lambda x: x * x, (taken.append(i) or i for i in range(100)), threads)
    for n, value in enumerate(results):
        assert value == n * n and len(taken) - n <= 2 * threads + 1


def test_ordered_map_runs_in_parallel():
    barrier = threading.Barrier(3, timeout=20)
    assert list(ordered_map(lambda x: barrier.wait() >= 0, range(3), 3)) == [True] * 3


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("where", ["function", "items"])
def test_ordered_map_raises_the_first_error_and_ends(threads, where):
    def work(x):
        if where == "function" and x >= 5:
            raise Stop(x)
        return x

    def items():
        yield from range(5)
        if where == "items":
            raise Stop(5)
        yield from range(5, 10**6)

    done = []
    with pytest.raises(Stop, match="5"):
        for x in ordered_map(work, items(), threads):
            done.append(x)
    assert done == list(range(len(done))) and threading.active_count() < 10


def test_bpe_is_trained_on_evenly_spread_text(monkeypatch):
    source = Texts(("train", f"text {i}") for i in range(100))
    source.n_bytes = 100 * 7
    monkeypatch.setattr(module, "BPE_TRAIN_BYTES", 70)
    texts = list(module._training_texts(source, "bpe:300"))
    assert texts == [f"text {i}" for i in range(9, 100, 10)]


def test_an_error_leaves_nothing_behind_without_a_finished_shard(tmp_path, settings):
    from fastgpt.data.prepare import prepare

    path = tmp_path / "t.txt"
    path.write_text("a")
    with pytest.raises(UserError, match="too little text for a train split"):
        prepare(settings(input=str(path)))
    assert not list((tmp_path / "data").glob(".*.partial"))


WORDS = TEXT * 30


def text_of(split, tokenizer):
    return tokenizer.decode(split.gather(np.array([0]), len(split))[0])


def tokens(folder: Path) -> dict[str, bytes]:
    """All that matters in a folder, byte for byte (the scan holds times of change)."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".fastgpt_scan.json"}


def visible(data_dir) -> list[str]:
    folder = Path(data_dir)
    return sorted(n for n in os.listdir(folder) if not n.startswith(".")) if folder.exists() else []


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "my text.txt"
    path.write_text(WORDS)
    return path


@pytest.fixture
def stdlib(tmp_path, monkeypatch):
    """A small standard library."""
    root = tmp_path / "lib"
    for i in range(100):
        path = root / ("pkg" if i % 3 else "test") / f"m{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# module {i}\n" * 10)
    (root / "pkg" / "latin.py").write_bytes("# coding: latin-1\n# ü\n".encode("latin-1"))
    (root / "pkg" / "data.txt").write_text("no python")
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(root))
    return root


# --- what is made


@pytest.mark.parametrize("tokenizer", ["byte", "char", "gpt2", "bpe:400", "bpe"])
def test_a_file_is_made_into_a_dataset(settings, text, as_gpt2, tokenizer, capsys):
    vocab_file = str(as_gpt2) if tokenizer in ("gpt2", "bpe") else ""
    cfg = settings(input=str(text), tokenizer=tokenizer, vocab_file=vocab_file, workers=2)
    folder = prepare(cfg)
    ds = open_dataset(folder)
    n = int(len(WORDS) * 0.9)
    # bytes and chars are ids one by one, BPE tokens are those of the two texts as a whole
    for split, part in ((ds.train, WORDS[:n]), (ds.val, WORDS[n:])):
        assert (
            split.gather(np.array([0]), len(split))[0].tolist()
            == ds.tokenizer.encode(part).tolist()
        )
    out = capsys.readouterr()
    assert out.out.count("\n") == 1 and ds.describe() in out.out and out.err == ""
    assert folder.name.startswith(f"my_text-{tokenizer.replace(':', '')}-")


def test_the_standard_library_needs_no_network(settings, stdlib, tmp_path):
    folder = ensure(settings())
    assert folder == tmp_path / "data" / "python_stdlib"
    ds = open_dataset(folder)
    both = text_of(ds.train, ds.tokenizer) + text_of(ds.val, ds.tokenizer)
    assert both.count("\0") == 67 and "# ü" in both and "no python" not in both
    assert ds.vocab_size == 256


def test_a_folder_is_made_into_a_dataset(settings, tmp_path):
    for i in range(50):
        (tmp_path / "in" / f"d{i % 5}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / f"d{i % 5}" / f"{i}.md").write_text(f"document {i}")
    ds = open_dataset(prepare(settings(input=str(tmp_path / "in"))))
    docs = text_of(ds.train, ds.tokenizer).split("\0") + text_of(ds.val, ds.tokenizer).split("\0")
    assert sorted(docs) == sorted([f"document {i}" for i in range(50)] + ["", ""])


def test_workers_do_not_change_a_byte(settings, text, ranks, monkeypatch):
    monkeypatch.setattr("fastgpt.data.prepare.JOB_BYTES", 300)
    made = []
    for workers in (1, 2, 4, 0):
        cfg = settings(input=str(text), tokenizer="bpe:300", workers=workers, overwrite=True)
        made.append(tokens(prepare(cfg)))
    assert all(m == made[0] for m in made)


# --- names: found again, never confused


def test_the_same_is_found_again(settings, text, capsys):
    cfg = settings(input=str(text))
    folder = prepare(cfg)
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    capsys.readouterr()
    assert prepare(cfg) == folder == ensure(cfg)
    assert "already there" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_other_content_gets_another_folder(settings, text):
    folders = [prepare(settings(input=str(text)))]
    text.write_text(WORDS + "more")
    folders.append(prepare(settings(input=str(text))))
    folders.append(prepare(settings(input=str(text), tokenizer="char")))
    folders.append(prepare(settings(input=str(text), val_fraction=0.2)))
    folders.append(prepare(settings(input=str(text), dataset="mine")))
    assert len(set(folders)) == 5 and folders[4].name.startswith("mine-byte-")
    contents = [tokens(f) for f in folders]
    text.write_text(WORDS)
    assert ensure(settings(input=str(text))) == folders[0]
    assert [tokens(f) for f in folders] == contents


def test_a_moved_text_is_the_same(settings, text):
    folder = prepare(settings(input=str(text)))
    text.parent.joinpath("elsewhere").mkdir()
    moved = text.rename(text.parent / "elsewhere" / text.name)
    assert ensure(settings(input=str(moved))) == folder


def test_a_named_corpus_from_a_file(settings, text, monkeypatch, tmp_path):
    """--dataset=shakespeare_char --input=FILE: its settings, and its name where it is that text."""
    ours = prepare(settings(dataset="shakespeare_char", input=str(text)))
    assert ours.name.startswith("shakespeare_char-") and open_dataset(ours).tokenizer.name == "char"
    import dataclasses
    import hashlib

    corpus = dataclasses.replace(
        corpora.CORPORA["shakespeare_char"], sha256=hashlib.sha256(WORDS.encode()).hexdigest()
    )
    monkeypatch.setitem(corpora.CORPORA, "shakespeare_char", corpus)
    real = prepare(settings(dataset="shakespeare_char", input=str(text)))
    assert real.name == "shakespeare_char" and ensure(settings(dataset="shakespeare_char")) == real


@pytest.mark.parametrize(
    ("dataset", "tokenizer"),
    [("python_stdlib", "byte"), ("shakespeare_char", "char"), ("openwebtext", "gpt2")],
)
def test_input_takes_the_tokenizer_of_the_named_corpus(settings, text, as_gpt2, dataset, tokenizer):
    vocab_file = str(as_gpt2) if tokenizer == "gpt2" else ""
    ds = open_dataset(prepare(settings(dataset=dataset, input=str(text), vocab_file=vocab_file)))
    assert ds.tokenizer.name == tokenizer
    assert 0.05 < len(ds.val) / (len(ds.train) + len(ds.val)) < 0.2


def test_a_foreign_folder_in_the_way_is_left_alone(settings, stdlib, tmp_path):
    (tmp_path / "data" / "python_stdlib").mkdir(parents=True)
    (tmp_path / "data" / "python_stdlib" / "notes.txt").write_text("keep")
    folder = prepare(settings(overwrite=True))
    assert folder.name.startswith("python_stdlib-") and ensure(settings()) == folder
    assert os.listdir(tmp_path / "data" / "python_stdlib") == ["notes.txt"]


def test_nanogpts_own_files_are_used_as_they_are(settings, tmp_path):
    folder = tmp_path / "data" / "shakespeare_char"
    folder.mkdir(parents=True)
    for name in ("train.bin", "val.bin"):
        np.arange(100, dtype="<u2").tofile(folder / name)
    cfg = settings(dataset="shakespeare_char")
    assert ensure(cfg) == folder == prepare(cfg)
    assert ensure(settings(dataset="shakespeare_char", tokenizer="char")) == folder


def test_a_dataset_may_be_a_folder(settings, tmp_path, monkeypatch):
    folder = tmp_path / "data" / "custom"
    folder.mkdir(parents=True)
    for name in ("train.bin", "val.bin"):
        np.arange(100, dtype="<u2").tofile(folder / name)
    assert ensure(settings(dataset="custom")) == folder
    assert ensure(settings(dataset=str(folder))) == folder
    monkeypatch.chdir(tmp_path)
    assert ensure(settings(dataset="data/custom")) == Path("data/custom")


def test_overwrite_makes_it_anew(settings, text):
    cfg = settings(input=str(text))
    folder = prepare(cfg)
    want = tokens(folder)
    (folder / "extra").write_text("x")
    assert tokens(prepare(settings(input=str(text), overwrite=True))) == want


def test_a_damaged_dataset_is_made_anew_by_prepare(settings, text, capsys):
    cfg = settings(input=str(text))
    folder = prepare(cfg)
    want = tokens(folder)
    os.truncate(folder / "tokens_train_000000.bin", 2000)
    assert ensure(cfg) == folder  # it is there; opening it says what is wrong
    with pytest.raises(UserError, match="truncated.*prepare"):
        open_dataset(folder)
    assert tokens(prepare(cfg)) == want and "making it anew" in capsys.readouterr().out


# --- what is refused


BAD = {
    "no file": ({"input": "/no/such/file"}, "--input=/no/such/file: there is no such file"),
    "device": ({"input": "/dev/null"}, "neither a file nor a folder"),
    "typo": ({"dataset": "shakespere_char"}, "did you mean shakespeare_char?"),
    "unknown": ({"dataset": "zzz"}, "no corpus of this name.*corpora: python_stdlib,"),
    "tokenizer": ({"tokenizer": "bpe:12"}, "257 .. 1000000"),
    "fraction": ({"val_fraction": 1.0}, "below 1"),
    "negative fraction": ({"val_fraction": -0.1}, "at least 0"),
    "vocab": ({"tokenizer": "gpt2", "vocab_file": "/no/file"}, "--vocab_file=/no/file"),
    "vocab for bytes": ({"vocab_file": __file__}, "--vocab_file goes with"),
    "no vocab": ({"tokenizer": "gpt2"}, "vocabulary is not on this machine"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_settings(settings, stdlib, kind):
    changes, says = BAD[kind]
    cfg = settings(**changes)
    with pytest.raises(UserError, match=says) as e:
        ensure(cfg)
    assert "\n" not in str(e.value) and visible(cfg.data_dir) == []
    data = Path(cfg.data_dir)
    assert not list(data.glob(".*.partial")), "half-written"


def test_a_full_disk(settings, text, full_disk):
    text.write_text(WORDS * 10)
    folder = full_disk(64 << 10)
    with pytest.raises(UserError, match="no space left.*--data_dir") as e:
        prepare(settings(input=str(text), data_dir=str(folder)))
    assert "\n" not in str(e.value)
    assert visible(folder) == [] and not list(folder.glob(".*.partial"))


def test_a_file_size_limit(settings, text, tmp_path):
    """As a full disk, where none can be mounted."""
    code = """
import resource, sys
from types import SimpleNamespace
from fastgpt.data.prepare import prepare
from fastgpt.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
cfg = SimpleNamespace(dataset="x", input=sys.argv[1], tokenizer="byte", vocab_file="", shards=10,
                      data_dir=sys.argv[2], val_fraction=0, workers=1, overwrite=False)
try:
    prepare(cfg)
except UserError as e:
    sys.exit(f"UserError: {e}")
"""
    process = python(code, str(text), str(tmp_path / "data"))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "UserError: cannot write" in err and "no space left" in err
    assert visible(tmp_path / "data") == [] and not list((tmp_path / "data").glob(".*.partial"))


def test_a_read_only_folder(settings, text, read_only, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    ready = prepare(settings(input=str(text)))
    read_only(data)
    assert ensure(settings(input=str(text))) == ready  # what is there can be used
    assert open_dataset(ready).vocab_size == 256
    with pytest.raises(UserError, match="cannot write.*--data_dir") as e:
        ensure(settings(input=str(text), tokenizer="char"))
    assert "\n" not in str(e.value)


def test_a_file_where_the_folder_should_be(settings, text, tmp_path):
    (tmp_path / "data").write_text("x")
    with pytest.raises(UserError, match="cannot write.*name another folder"):
        prepare(settings(input=str(text)))


# --- several at once, and kills


PREPARE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell may have it ignored
from types import SimpleNamespace
from fastgpt.data import prepare as module, token_files
from fastgpt.data.prepare import prepare
module.JOB_BYTES, token_files.SHARD_TOKENS = 4096, 5000
_, text, data_dir, vocab_file = sys.argv
prepare(SimpleNamespace(dataset="x", input=text, tokenizer="bpe", vocab_file=vocab_file, shards=10,
                        data_dir=data_dir, val_fraction=0, workers=2, overwrite=False))
"""


def test_two_at_once_make_one(settings, tmp_path, text, as_gpt2):
    args = (str(text), str(tmp_path / "data"), str(as_gpt2))
    both = [python(PREPARE, *args) for _ in range(2)]
    results = [(p.communicate(timeout=60), p.returncode) for p in both]
    assert [code for _, code in results] == [0, 0], results
    assert len(visible(tmp_path / "data")) == 1


def test_waiting_for_another_process(settings, text, capsys, tmp_path):
    import fcntl

    cfg = settings(input=str(text))
    folder = prepare(cfg)
    want = tokens(folder)
    with open(tmp_path / "data" / ".cache" / f"{folder.name}.lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        again = threading.Thread(
            target=prepare, args=(settings(input=str(text), overwrite=True),), daemon=True
        )
        again.start()
        deadline = time.monotonic() + 20
        out = ""
        while "waiting for another process" not in out and time.monotonic() < deadline:
            time.sleep(0.02)
            out += capsys.readouterr().out
        assert "waiting for another process" in out and again.is_alive()
    again.join(20)
    assert not again.is_alive() and tokens(folder) == want


def test_killed_at_any_moment_then_run_again(settings, tmp_path, ranks, as_gpt2):
    """SIGKILL, ten times, then once to the end: the files are those of an undisturbed run."""
    path = tmp_path / "big.txt"
    path.write_text(TEXT * 1500)
    start = time.monotonic()
    process = python(PREPARE, str(path), str(tmp_path / "one"), str(as_gpt2))
    assert process.wait(60) == 0, process.communicate()
    took = time.monotonic() - start
    (name,) = visible(tmp_path / "one")
    args, kills = (str(path), str(tmp_path / "two"), str(as_gpt2)), 0
    rng = random.Random(time.time_ns())
    moments = [round(rng.uniform(0.3, 1.0), 3) for _ in range(10)]
    for moment in moments:
        process = python(PREPARE, *args)
        try:
            process.wait(took * moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate(timeout=60)
        found = visible(tmp_path / "two")
        if found:  # whole or not at all
            assert tokens(tmp_path / "two" / name) == tokens(tmp_path / "one" / name), moments
            if kills:
                break
            # The run that was timed had a busier machine: begin again, with less time.
            shutil.rmtree(tmp_path / "two")
            took /= 2
    process = python(PREPARE, *args)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert kills > 0
    assert tokens(tmp_path / "two" / name) == tokens(tmp_path / "one" / name), moments
    leftovers = {n for n in os.listdir(tmp_path / "two") if n != ".cache"}
    assert leftovers == {name}, moments


@pytest.mark.parametrize("moment", ["old moved", "new moved"])
def test_a_kill_while_it_is_replaced(settings, text, monkeypatch, moment):
    cfg = settings(input=str(text), overwrite=True)
    folder = prepare(cfg)
    want = tokens(folder)
    rename, renames = os.rename, []

    class Killed(BaseException):
        pass

    def dying(source, target):
        rename(source, target)
        renames.append(target)
        if len(renames) == ["old moved", "new moved"].index(moment) + 1:
            raise Killed

    monkeypatch.setattr(os, "rename", dying)
    with pytest.raises(Killed):
        prepare(cfg)
    monkeypatch.setattr(os, "rename", rename)
    assert tokens(prepare(settings(input=str(text)))) == want
    assert visible(cfg.data_dir) == [folder.name]


def test_interrupt_ends_at_once(settings, tmp_path, as_gpt2):
    path = tmp_path / "big.txt"
    path.write_text(TEXT * 20_000)
    process = python(PREPARE, str(path), str(tmp_path / "data"), str(as_gpt2))
    deadline = time.monotonic() + 30
    while not list((tmp_path / "data").glob(".*.partial/*.bin")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT, err
    assert "KeyboardInterrupt" in err
    assert visible(tmp_path / "data") == []
    assert not list((tmp_path / "data").glob(".*.partial/.*.tmp")), "unfinished shards are removed"


def test_memory_is_bounded_in_a_process_of_its_own(settings, tmp_path, text):
    """Peak resident memory grows by less than the text does."""
    code = """
import resource, sys
from types import SimpleNamespace
from fastgpt.data.prepare import prepare
def run(path):
    prepare(SimpleNamespace(dataset="x", input=path, tokenizer="byte", vocab_file="", shards=10,
                            data_dir=sys.argv[3], val_fraction=0, workers=1, overwrite=False))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(run(sys.argv[1]), run(sys.argv[2]))
"""
    for name, n in (("small", 8), ("large", 72)):
        with open(tmp_path / name, "w") as f:
            for _ in range(n):
                f.write("a line of text, as there are many\n" * 30_000)
    process = python(code, str(tmp_path / "small"), str(tmp_path / "large"), str(tmp_path / "data"))
    out, err = process.communicate(timeout=100)
    small, large = map(float, out.split()[-2:])
    assert large - small < 40, (small, large, err)  # MiB, for 73 MB of text, 147 MB of tokens


# --- token files without a tokenizer


@pytest.fixture
def foreign(tmp_path):
    """A folder of nanoGPT's, with ids up to the given one and no vocabulary."""

    def make(max_id: int) -> Path:
        folder = tmp_path / f"ids{max_id}"
        folder.mkdir()
        for split in ("train", "val"):
            np.array([*range(40), max_id] * 5, np.uint16).tofile(folder / f"{split}.bin")
        return folder

    return make


def test_the_tokenizer_that_is_named_goes_with_foreign_ids(settings, foreign, as_gpt2, ranks):
    dataset = open_dataset(foreign(510))
    assert dataset.tokenizer is None
    for named in (
        {"tokenizer": "gpt2", "vocab_file": str(as_gpt2)},
        {"vocab_file": str(as_gpt2)},
        {"tokenizer": "bpe", "vocab_file": str(as_gpt2)},
    ):
        found = with_tokenizer(dataset, settings(dataset="x", **named)).tokenizer
        assert found.vocab_size == len(ranks) + 1
    assert with_tokenizer(dataset, settings(dataset="x")).tokenizer is None


def test_gpt2_s_is_taken_where_the_ids_say_so(settings, foreign, as_gpt2, tmp_path):
    """Found in the data folder's cache, as on a machine that has prepared data before."""
    many, few = open_dataset(foreign(50_000)), open_dataset(foreign(900))
    assert with_tokenizer(many, settings(dataset="x")).tokenizer is None, "it is not here yet"
    cache = tmp_path / "data" / ".cache"
    cache.mkdir(parents=True)
    shutil.copy(as_gpt2, cache / "gpt2.tiktoken")
    assert with_tokenizer(many, settings(dataset="x")).tokenizer.name == "gpt2"
    assert with_tokenizer(few, settings(dataset="x")).tokenizer is None
    assert with_tokenizer(few, settings(dataset="openwebtext")).tokenizer.name == "gpt2"


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"tokenizer": "char"}, "--tokenizer=char: .* holds ids without text: it is made from"),
        ({"tokenizer": "bpe:300"}, "holds ids without text: name its ranks with --vocab_file"),
        ({"tokenizer": "byte"}, "holds id 510, this tokenizer has 256: it is not the one"),
        ({"tokenizer": "nope"}, "--tokenizer=nope: choose byte, char"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(settings, foreign, named, message):
    with pytest.raises(UserError, match=message):
        with_tokenizer(open_dataset(foreign(510)), settings(dataset="x", **named))


def test_a_folder_s_own_tokenizer_is_not_another(settings, text):
    dataset = open_dataset(prepare(settings(input=str(text), tokenizer="byte")))
    assert with_tokenizer(dataset, settings(tokenizer="byte")) is dataset
    with pytest.raises(UserError, match="--tokenizer=gpt2: the ids in .* are of byte"):
        with_tokenizer(dataset, settings(dataset=str(dataset.folder), tokenizer="gpt2"))
