import dataclasses
import fcntl
import hashlib
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hyp
from hypothesis import strategies as st

from fastgpt.data import corpora, token_files
from fastgpt.data import prepare as module
from fastgpt.data.prepare import cut, ensure, ordered_map, prepare, with_tokenizer
from fastgpt.data.token_files import TokenFile, open_dataset
from fastgpt.data.tokenizer import BPETokenizer
from fastgpt.errors import UserError

from .conftest import TEXT, python

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


# --- cutting text into jobs

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


@hyp(max_examples=500, deadline=None)
@given(text=texts, size=st.integers(1, 12), chunk=st.integers(1, 9))
def test_tokens_of_pieces_are_the_tokens_of_the_whole(ranks, text, size, chunk):
    bpe = BPETokenizer("small", ranks)
    parts = list(cut((text[i : i + chunk] for i in range(0, len(text), chunk)), size, 1000))
    assert "".join(parts) == text
    ids = [i for piece in parts for i in bpe.encode(piece).tolist()]
    assert ids == bpe.encode(text).tolist(), parts


def test_every_whitespace_of_the_pretokenizer_is_whitespace_to_python():
    """The cutter asks Python; what only the pretokenizer calls space would be unsafe."""
    import regex  # tiktoken needs it too

    space = regex.compile(r"\s")
    for point in range(sys.maxunicode + 1):
        if space.match(chr(point)):
            assert chr(point).isspace(), hex(point)


def test_pieces_have_about_the_size_asked_for(monkeypatch):
    lines = ["some words and more\n" * 50] * 100
    assert all(4096 - 20 <= len(p) <= 4096 + 1000 for p in list(cut(lines, 4096, 10**6))[:-1])
    words = ["世界" * 50] * 20  # without a safe place: anywhere, if it must be
    parts = list(cut(words, 64, 500))
    assert "".join(parts) == "".join(words) and all(len(piece) <= 600 for piece in parts)
    looked = []

    class Counting:
        match = staticmethod(lambda text: looked.append(len(text)))

    monkeypatch.setattr(module, "_SAFE", Counting)
    assert "".join(cut(["x" * 100] * 1000, 100, 20_000)) == "x" * 100_000
    assert sum(looked) < 4 * 100_000, "searched in linear time"


# --- tokenizing


class Texts:
    """A source of documents given as (split, text)."""

    identity: dict = {}

    def __init__(self, documents, n_bytes=1):
        self._documents, self.n_bytes = documents, n_bytes

    def documents(self):
        for split, text in self._documents:
            yield from ((split, text[i : i + 300]) for i in range(0, len(text), 300))
            yield split, None


def test_files_hold_the_documents_tokens(tmp_path, monkeypatch, ranks):
    """Whatever the number of threads."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # hundreds of tiny files; no power cut here
    monkeypatch.setattr(module, "JOB_CHARS", 500)
    monkeypatch.setattr(token_files, "SHARD_TOKENS", 700)
    bpe = BPETokenizer("small", ranks)
    documents = [
        ("val" if i % 7 == 3 else "train", f"{i} " + TEXT[i % 50 :] * (i % 4)) for i in range(150)
    ]
    for threads in (1, 2, 3, 8):
        folder = tmp_path / str(threads)
        folder.mkdir()
        for split, shards in module._write_shards(folder, Texts(documents), bpe, threads).items():
            texts = [text for where, text in documents if where == split]
            ids = np.concatenate([TokenFile(folder / s["file"])[:] for s in shards])
            assert ids.tolist() == [i for t in texts for i in (*bpe.encode(t).tolist(), bpe.eot)]
            assert {s["tokens"] for s in shards[:-1]} == {700} and len(shards) > 1
        assert tokens(folder) == tokens(tmp_path / "1")


def test_ordered_map_keeps_the_order_and_few_in_work():
    taken = []
    for threads in (1, 2, 5):
        taken.clear()
        results = ordered_map(lambda x: x * x, (taken.append(i) or i for i in range(100)), threads)
        for n, value in enumerate(results):
            assert value == n * n and len(taken) - n <= 2 * threads + 1
    barrier = threading.Barrier(3, timeout=20)
    assert list(ordered_map(lambda x: barrier.wait() >= 0, range(3), 3)) == [True] * 3
    with pytest.raises(ZeroDivisionError):
        list(ordered_map(lambda x: 1 // (5 - x), range(10**6), 3))
    assert threading.active_count() < 10


def test_bpe_is_trained_on_evenly_spread_text(monkeypatch):
    source = Texts([("train", f"text {i}") for i in range(100)], n_bytes=100 * 7)
    monkeypatch.setattr(module, "BPE_TRAIN_BYTES", 70)
    found = list(module._training_texts(source, "bpe:300"))
    assert found == [f"text {i}" for i in range(0, 100, 10)]
    assert len(list(module._training_texts(source, "char"))) == 100


# --- what is made


@pytest.mark.parametrize("tokenizer", ["byte", "char", "gpt2", "bpe:400", "bpe"])
def test_a_file_is_made_into_a_dataset(settings, text, as_gpt2, tokenizer, capsys):
    vocab_file = str(as_gpt2) if tokenizer in ("gpt2", "bpe") else ""
    cfg = settings(input=str(text), tokenizer=tokenizer, vocab_file=vocab_file, workers=2)
    folder = prepare(cfg)
    ds = open_dataset(folder)
    n = int(len(WORDS) * 0.9)
    for split, part in ((ds.train, WORDS[:n]), (ds.val, WORDS[n:])):
        ids = split.gather(np.array([0]), len(split))[0]
        assert ids.tolist() == ds.tokenizer.encode(part).tolist()
    out = capsys.readouterr()
    assert out.out == ds.describe() + "\n" and out.err == ""
    assert folder.name.startswith(f"my_text-{tokenizer.replace(':', '')}-")
    made = tokens(folder), {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert prepare(cfg) == folder == ensure(cfg)
    assert capsys.readouterr().out == f"{ds.describe()}: already there\n"
    assert made == (tokens(folder), {p: p.stat().st_mtime_ns for p in folder.iterdir()})
    (folder / "extra").write_text("x")
    assert tokens(prepare(dataclasses.replace(cfg, overwrite=True))) == made[0]


def test_the_standard_library_needs_no_network(settings, stdlib, tmp_path):
    data = tmp_path / "data"
    (data / "python_stdlib").mkdir(parents=True)
    (data / "python_stdlib" / "notes.txt").write_text("keep")
    folder = prepare(settings(overwrite=True, dataset="python_stdlib"))
    assert folder.name.startswith("python_stdlib-"), "another's folder is left alone"
    assert os.listdir(data / "python_stdlib") == ["notes.txt"]
    assert ensure(settings(dataset="python_stdlib")) == folder
    shutil.rmtree(data)
    assert ensure(settings(dataset="python_stdlib")) == data / "python_stdlib"
    ds = open_dataset(data / "python_stdlib")
    both = text_of(ds.train, ds.tokenizer) + text_of(ds.val, ds.tokenizer)
    assert both.count("\0") == 67 and "# ü" in both and "no python" not in both


def test_a_folder_is_made_into_a_dataset(settings, tmp_path, capsys):
    root = tmp_path / "in"
    for i in range(50):
        (root / f"d{i % 5}").mkdir(parents=True, exist_ok=True)
        (root / f"d{i % 5}" / f"{i}.md").write_text(f"document {i}")
    for i in range(25):
        (root / f"{i:02d}\n.png").write_bytes(b"\x89PNG")
    ds = open_dataset(prepare(settings(input=str(root))))
    docs = text_of(ds.train, ds.tokenizer).split("\0") + text_of(ds.val, ds.tokenizer).split("\0")
    assert sorted(docs) == sorted([f"document {i}" for i in range(50)] + ["", ""])
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        "skipped 25 files that are no text:",
        r"  00\n.png: invalid start byte at offset 0",
    ]
    assert len(said) == 23 and said[-2] == "  ..."


def test_other_content_gets_another_folder(settings, text):
    cfg = settings(input=str(text))
    folders = [prepare(cfg)]
    text.write_text(WORDS + "more")
    folders.append(prepare(cfg))
    for changes in ({"tokenizer": "char"}, {"val_fraction": 0.2}, {"dataset": "mine"}):
        folders.append(prepare(dataclasses.replace(cfg, **changes)))
    assert len(set(folders)) == 5 and folders[4].name.startswith("mine-byte-")
    contents = [tokens(f) for f in folders]
    moved = text.parent / "elsewhere" / text.name
    moved.parent.mkdir()
    moved.write_text(WORDS)
    assert ensure(settings(input=str(moved))) == folders[0], "only its name counts"
    assert [tokens(f) for f in folders] == contents


def test_a_named_corpus_from_a_file(settings, text, monkeypatch, as_gpt2):
    """--dataset=shakespeare_char --input=FILE: its settings, and its name where it is that text."""
    cfg = settings(dataset="shakespeare_char", input=str(text))
    ours = prepare(cfg)
    assert ours.name.startswith("shakespeare_char-") and open_dataset(ours).tokenizer.name == "char"
    sha256 = hashlib.sha256(WORDS.encode()).hexdigest()
    corpus = dataclasses.replace(corpora.CORPORA["shakespeare_char"], sha256=sha256)
    monkeypatch.setitem(corpora.CORPORA, "shakespeare_char", corpus)
    real = prepare(cfg)
    assert real.name == "shakespeare_char" and ensure(settings(dataset="shakespeare_char")) == real
    web = settings(dataset="openwebtext", input=str(text), vocab_file=str(as_gpt2))
    ds = open_dataset(prepare(web))
    assert ds.tokenizer.name == "gpt2" and 0.05 < len(ds.val) / len(ds.train) < 0.2


def test_token_files_are_used_as_they_are(settings, tmp_path, monkeypatch):
    for name in ("shakespeare_char", "custom"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for split in ("train.bin", "val.bin"):
            np.arange(100, dtype="<u2").tofile(folder / split)
        assert ensure(settings(dataset=name)) == folder == prepare(settings(dataset=name))
    nanogpts = tmp_path / "data" / "shakespeare_char"
    assert ensure(settings(dataset="shakespeare_char", tokenizer="char")) == nanogpts
    assert ensure(settings(dataset=str(folder))) == folder
    monkeypatch.chdir(tmp_path)
    assert ensure(settings(dataset="data/custom")) == Path("data/custom")


def test_a_damaged_dataset_is_made_anew_by_prepare(settings, text, capsys):
    cfg = settings(input=str(text))
    folder = prepare(cfg)
    want = tokens(folder)
    os.truncate(folder / "tokens_train_000000.bin", 2000)
    assert ensure(cfg) == folder  # it is there; opening it says what is wrong
    with pytest.raises(UserError, match="cut off.*prepare"):
        open_dataset(folder)
    assert tokens(prepare(cfg)) == want and "making it anew" in capsys.readouterr().out


# --- what is refused

BAD = {
    "no file": ({"input": "/no/such/file"}, "--input=/no/such/file: there is no such file"),
    "device": ({"input": "/dev/null"}, "there is no such file or folder"),
    "typo": ({"dataset": "shakespere_char"}, "did you mean shakespeare_char?"),
    "unknown": ({"dataset": "zzz"}, "no corpus of this name.*corpora: python_stdlib,"),
    "tokenizer": ({"tokenizer": "bpe:12"}, "257 .. 1000000"),
    "vocab": ({"tokenizer": "bpe", "vocab_file": "/no/file"}, "/no/file: cannot be read: No such"),
    "vocab for bytes": ({"vocab_file": __file__}, "--vocab_file goes with"),
    "no vocab": ({"tokenizer": "gpt2"}, "vocabulary is not on this machine"),
    "no train": ({"input": "a.txt"}, "too little text for a train split: .*--val_fraction"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_settings(settings, stdlib, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a")
    changes, says = BAD[kind]
    cfg = settings(**{"dataset": "python_stdlib", **changes})
    with pytest.raises(UserError, match=says) as e:
        ensure(cfg)
    assert "\n" not in str(e.value) and visible(cfg.data_dir) == []
    assert not list(Path(cfg.data_dir).glob(".*.partial")), "half-written"


PREPARE = """
import resource, signal, sys
from dataclasses import replace
from fastgpt.config.schema import PrepareConfig
from fastgpt.data import prepare as module, token_files
from fastgpt.errors import UserError
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell may have it ignored
_, text, data_dir, vocab_file, limit = sys.argv
module.JOB_CHARS, token_files.SHARD_TOKENS = 4096, 5000
if limit != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
tokenizer = "bpe" if vocab_file else "byte"
try:
    module.prepare(PrepareConfig(input=text, data_dir=data_dir, tokenizer=tokenizer, workers=2,
                                 vocab_file=vocab_file))
except UserError as e:
    sys.exit(f"UserError: {e}")
"""


def test_a_full_disk(text, tmp_path):
    """A limit on the size of files is one that needs no mount; a kill is among the chaos tests."""
    process = python(PREPARE, str(text), str(tmp_path / "data"), "", "8192")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "UserError: cannot write" in err and "no space left" in err
    assert visible(tmp_path / "data") == [] and not list((tmp_path / "data").glob(".*.partial"))


def test_folders_that_cannot_be_written(settings, text, read_only, tmp_path):
    data = tmp_path / "data"
    data.write_text("x")
    with pytest.raises(UserError, match="cannot write.*name another folder"):
        prepare(settings(input=str(text)))
    data.unlink()
    ready = prepare(settings(input=str(text)))
    read_only(data)
    assert ensure(settings(input=str(text))) == ready == prepare(settings(input=str(text)))
    with pytest.raises(UserError, match="cannot write.*--data_dir") as e:
        ensure(settings(input=str(text), tokenizer="char"))
    assert "\n" not in str(e.value)


# --- several at once, and kills


def test_two_at_once_make_one(settings, tmp_path, text, as_gpt2, capsys):
    args = (str(text), str(tmp_path / "data"), str(as_gpt2), "0")
    both = [python(PREPARE, *args) for _ in range(2)]
    results = [(p.communicate(timeout=60), p.returncode) for p in both]
    assert [code for _, code in results] == [0, 0], results
    (name,) = visible(tmp_path / "data")
    cfg = settings(input=str(text), tokenizer="bpe", vocab_file=str(as_gpt2), overwrite=True)
    with open(tmp_path / "data" / ".cache" / f"{name}.lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        again = threading.Thread(target=prepare, args=(cfg,), daemon=True)
        again.start()
        out, deadline = "", time.monotonic() + 20
        while "waiting for another process" not in out and time.monotonic() < deadline:
            time.sleep(0.02)
            out += capsys.readouterr().out
        assert "waiting for another process" in out and again.is_alive()
    again.join(20)
    assert not again.is_alive() and visible(tmp_path / "data") == [name]


def test_interrupt_ends_at_once(tmp_path, as_gpt2):
    path = tmp_path / "big.txt"
    path.write_text(TEXT * 20_000)
    process = python(PREPARE, str(path), str(tmp_path / "data"), str(as_gpt2), "0")
    deadline = time.monotonic() + 30
    while not list((tmp_path / "data").glob(".*.partial/*.bin")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in err, err
    assert visible(tmp_path / "data") == [] and not list((tmp_path / "data").glob(".*.partial"))


def test_memory_is_bounded_in_a_process_of_its_own(tmp_path):
    """Peak resident memory grows by less than the text does."""
    code = """
import resource, sys
from fastgpt.config.schema import PrepareConfig
from fastgpt.data.prepare import prepare
for path in sys.argv[2:]:
    prepare(PrepareConfig(input=path, data_dir=sys.argv[1], tokenizer="byte", workers=2))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
    paths = [tmp_path / "small", tmp_path / "large"]
    for path, n in zip(paths, (8, 72), strict=True):
        path.write_text("a line of text, as there are many\n" * 30_000 * n)
    process = python(code, str(tmp_path / "data"), *map(str, paths))
    out, err = process.communicate(timeout=100)
    small, large = (float(line) for line in out.splitlines()[1::2])
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
        return open_dataset(folder)

    return make


def test_the_tokenizer_that_is_named_goes_with_foreign_ids(settings, foreign, as_gpt2, ranks):
    dataset = foreign(510)
    assert dataset.tokenizer is None
    for spec in ("gpt2", "", "bpe"):
        cfg = settings(dataset="x", tokenizer=spec, vocab_file=str(as_gpt2))
        assert with_tokenizer(dataset, cfg).tokenizer.vocab_size == len(ranks) + 1
    assert with_tokenizer(dataset, settings(dataset="x")).tokenizer is None
    for spec, message in (
        ("char", "--tokenizer=char: .* holds ids without text: it is made from"),
        ("bpe:300", "holds ids without text: name its ranks with --vocab_file"),
        ("byte", "holds ids up to 510, this tokenizer has 256: it is not the one"),
        ("nope", "--tokenizer=nope: choose byte, char"),
    ):
        with pytest.raises(UserError, match=message):
            with_tokenizer(dataset, settings(dataset="x", tokenizer=spec))


def test_gpt2_s_is_taken_where_the_ids_say_so(settings, foreign, as_gpt2, tmp_path):
    """Found in the data folder's cache, as on a machine that has prepared data before."""
    many, few, plain = foreign(50_000), foreign(900), settings(dataset="x")
    assert with_tokenizer(many, plain).tokenizer is None, "it is not here yet"
    cache = tmp_path / "data" / ".cache"
    cache.mkdir(parents=True)
    shutil.copy(as_gpt2, cache / "gpt2.tiktoken")
    assert with_tokenizer(many, plain).tokenizer.name == "gpt2"
    assert with_tokenizer(few, plain).tokenizer is None
    assert with_tokenizer(few, settings(dataset="openwebtext")).tokenizer.name == "gpt2"


def test_a_folder_s_own_tokenizer_is_not_another(settings, text):
    dataset = open_dataset(prepare(settings(input=str(text), tokenizer="byte")))
    assert with_tokenizer(dataset, settings(tokenizer="byte")) == dataset
    with pytest.raises(UserError, match="--tokenizer=gpt2: .* holds ids of byte"):
        with_tokenizer(dataset, settings(dataset=str(dataset.folder), tokenizer="gpt2"))
