import dataclasses
import fcntl
import os
import shutil
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import regex  # tiktoken needs it too
from hypothesis import given
from hypothesis import settings as hyp
from hypothesis import strategies as st

from fastgpt.data import corpora, token_files
from fastgpt.data import prepare as module
from fastgpt.data.prepare import cut, ensure, prepare, with_tokenizer
from fastgpt.data.token_files import TokenFile, open_dataset
from fastgpt.data.tokenizer import BPETokenizer, ByteTokenizer
from fastgpt.errors import UserError

from .conftest import TEXT, python, texts_of, tokens, tree

WORDS = TEXT * 30


def visible(data_dir) -> list[str]:
    folder = Path(data_dir)
    return sorted(n for n in os.listdir(folder) if not n.startswith(".")) if folder.exists() else []


@pytest.fixture
def text(tmp_path):
    return tree(tmp_path, {"my text.txt": WORDS}) / "my text.txt"


@pytest.fixture
def stdlib(tmp_path, monkeypatch):
    """Makes a small standard library."""
    root = tmp_path / "lib"
    names = (f"{folder}/m{i}.py" for folder in ("pkg", "test") for i in range(60))
    files: dict = {name: f"# {name}\n" * 10 for name in names}
    files |= {"latin.py": "# coding: latin-1\n# ü\n".encode("latin-1"), "data.txt": "no python"}
    tree(root, files)
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(root))
    return root


# --- cutting text into jobs

# Every kind of character the pretokenizer or the cutter tells apart, with all of Unicode behind.
KINDS = "aZé9٣世🙂'\"!.-_ \n\t\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u2028\u202f\u205f\u3000\u200b"
SUFFIXES = ["'s", "'ll", " 't", "  ", "\n\n ", " a", "\u3000\n"]
ANY = st.sampled_from([*KINDS, *SUFFIXES]) | st.characters(exclude_categories=["Cs"])


@hyp(max_examples=500, deadline=None)
@given(st.lists(ANY, max_size=40), st.integers(1, 12), st.integers(1, 9))
def test_tokens_of_pieces_are_the_tokens_of_the_whole(ranks, parts, size, chunk):
    bpe, text = BPETokenizer("small", ranks), "".join(parts)
    parts = list(cut((text[i : i + chunk] for i in range(0, len(text), chunk)), size, 1000))
    assert "".join(parts) == text
    ids = [i for piece in parts for i in bpe.encode(piece).tolist()]
    assert ids == bpe.encode(text).tolist(), parts
    for tokenizer in (bpe, ByteTokenizer()):
        assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


def test_every_whitespace_of_the_pretokenizer_is_whitespace_to_python():
    """Tests the assumption of the cutter, which asks Python."""
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]))
    assert all(char.isspace() for char in regex.findall(r"\s", every))


def test_pieces_have_about_the_size_asked_for(monkeypatch):
    lines = ["some words and more\n" * 50] * 100
    assert all(4096 - 20 <= len(p) <= 4096 + 1000 for p in list(cut(lines, 4096, 10**6))[:-1])
    words = ["世界" * 50] * 20  # without a safe place: anywhere, if it must be
    parts = list(cut(words, 64, 500))
    assert "".join(parts) == "".join(words) and all(len(piece) <= 600 for piece in parts)
    looked: list[int] = []
    counting = types.SimpleNamespace(match=lambda text: looked.append(len(text)))
    monkeypatch.setattr(module, "_SAFE", counting)
    assert "".join(cut(["x" * 100] * 1000, 100, 20_000)) == "x" * 100_000
    assert sum(looked) < 4 * 100_000, "searched in linear time"


# --- tokenizing


class Texts:
    """A source of documents given as (split, text)."""

    identity: dict = {}

    def __init__(self, documents, n_chars=1):
        self._documents, self.n_chars = documents, n_chars

    sizes = [0]

    def documents(self, part=0):
        for split, text in self._documents:
            yield from ((split, text[i : i + 300]) for i in range(0, len(text), 300))
            yield split, None


def test_files_hold_the_documents_tokens(tmp_path, monkeypatch, ranks):
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
        splits: dict = {"train": [], "val": []}
        made = Texts(documents).documents()
        module._write_shards(folder, made, bpe, threads, splits, lambda n: None)
        for split, shards in splits.items():
            texts = [text for where, text in documents if where == split]
            ids = np.concatenate([TokenFile(folder / s["file"])[:] for s in shards])
            assert ids.tolist() == [i for t in texts for i in (*bpe.encode(t).tolist(), bpe.eot)]
            assert {s["tokens"] for s in shards[:-1]} == {700} and len(shards) > 1
        assert tokens(folder) == tokens(tmp_path / "1")


def test_bpe_is_trained_on_evenly_spread_text(monkeypatch):
    source = Texts([("train", f"text {i}") for i in range(100)], n_chars=100 * 7)
    monkeypatch.setattr(module, "BPE_TRAIN_CHARS", 70)
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
    both = "".join(texts_of(ds))
    assert both.count("\0") == 61 and "# ü" in both and "no python" not in both


def test_a_folder_is_made_into_a_dataset(settings, tmp_path, capsys):
    files: dict = {f"d{i % 5}/{i}.md": f"document {i}" for i in range(50)}
    root = tree(tmp_path / "in", files | {f"{i:02d}\n.png": b"\x89PNG" for i in range(25)})
    ds = open_dataset(prepare(settings(input=str(root))))
    assert sorted("".join(texts_of(ds)).split("\0")) == sorted([*files.values(), ""])
    said = capsys.readouterr().out.splitlines()
    first = ["skipped 25 files that are no text:", r"  00\n.png: invalid start byte at offset 0"]
    assert said[:2] == first and len(said) == 23 and said[-2] == "  ..."


def test_other_content_gets_another_folder(settings, text):
    cfg = settings(input=str(text))
    folders = [prepare(cfg)]
    text.write_text(WORDS + "more")
    folders.append(prepare(cfg))
    for changes in ({"tokenizer": "char"}, {"val_fraction": 0.2}, {"dataset": "mine"}):
        folders.append(prepare(settings(input=str(text), **changes)))
    assert len(set(folders)) == 5 and folders[4].name.startswith("mine-byte-")
    moved = text.parent / "elsewhere" / text.name
    moved.parent.mkdir()
    moved.write_text(WORDS)
    assert ensure(settings(input=str(moved))) == folders[0], "only its name counts"


def test_a_corpus_gives_its_tokenizer_to_an_input(settings, text, as_gpt2):
    for name, tokenizer in (("shakespeare_char", "char"), ("openwebtext", "gpt2")):
        vocab_file = str(as_gpt2) if tokenizer == "gpt2" else ""
        ds = open_dataset(prepare(settings(dataset=name, input=str(text), vocab_file=vocab_file)))
        assert ds.tokenizer.name == tokenizer and 0.05 < len(ds.val) / len(ds.train) < 0.2


def test_token_files_are_used_as_they_are(settings, tmp_path, monkeypatch):
    for name in ("shakespeare_char", "custom"):
        folder = tree(tmp_path / "data" / name, {"train.bin": bytes(200), "val.bin": bytes(200)})
        assert ensure(settings(dataset=name)) == folder == prepare(settings(dataset=name))
    nanogpts = tmp_path / "data" / "shakespeare_char"
    assert ensure(settings(dataset="shakespeare_char", tokenizer="char")) == nanogpts
    assert ensure(settings(dataset=str(folder))) == folder
    monkeypatch.chdir(tmp_path)
    assert ensure(settings(dataset="data/custom")) == Path("data/custom")
    assert ensure(settings(dataset="custom", vocab_file="x", tokenizer="bpe")) == folder
    anywhere, to_prepare = ["val_fraction", "shards"], ["tokenizer", "vocab_file", "overwrite"]
    for name in (*anywhere, *to_prepare):
        cfg = settings(dataset="custom", **{name: "x"})
        for call in (prepare, ensure)[: 2 if name in anywhere else 1]:
            with pytest.raises(UserError, match=f"--{name}=x: .*custom holds tokens.*leave the"):
                call(cfg)


def test_a_damaged_dataset_is_made_anew_by_prepare(settings, text, capsys):
    cfg = settings(input=str(text))
    folder = prepare(cfg)
    want = tokens(folder)
    os.truncate(folder / "tokens_train_000000.bin", 2000)
    assert ensure(cfg) == folder  # it is there; opening it says what is wrong
    assert tokens(prepare(cfg)) == want and "making it anew" in capsys.readouterr().out


# --- what is refused

BAD = {
    "no file": ({"input": "/no/such/file"}, "--input=/no/such/file: there is no such file"),
    "typo": ({"dataset": "shakespere_char"}, "did you mean shakespeare_char?"),
    "unknown": ({"dataset": "zzz"}, "no corpus of this name.*corpora: python_stdlib,"),
    "tokenizer": ({"tokenizer": "bpe:12"}, "257 .. 1000000"),
    "vocab": ({"tokenizer": "bpe", "vocab_file": "/no/file"}, "/no/file: cannot be read: No such"),
    "no vocab": ({"tokenizer": "gpt2"}, "vocabulary is not on this machine"),
    "shards": ({"shards": 3}, "--shards=3: goes with fineweb10B only"),
    "val": ({"dataset": "fineweb10B", "val_fraction": 0.2}, "val_fraction=0.2: fineweb10B has a"),
    "no train": ({"input": "a.txt"}, "too little text for a train split: .*--val_fraction"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_settings(settings, stdlib, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tree(tmp_path, {"a.txt": "a"}))
    changes, says = BAD[kind]
    cfg = settings(**{"dataset": "python_stdlib", **changes})
    with pytest.raises(UserError, match=says):
        ensure(cfg)
    assert visible(cfg.data_dir) == []
    assert not list(Path(cfg.data_dir).glob(".*.partial")), "half-written"


def test_folders_that_cannot_be_written(settings, text, tmp_path):
    (tmp_path / "data").write_text("x")
    with pytest.raises(UserError, match="cannot write.*name another folder.*--data_dir"):
        prepare(settings(input=str(text)))


# --- several at once


def test_two_at_once_make_one(settings, tmp_path, text):
    code = """
import sys
from fastgpt.config.schema import PrepareConfig
from fastgpt.data.prepare import prepare
prepare(PrepareConfig(input=sys.argv[1], data_dir=sys.argv[2], tokenizer="byte"))
"""
    both = [python(code, str(text), str(tmp_path / "data")) for _ in range(2)]
    assert [p.wait(60) for p in both] == [0, 0], [p.communicate() for p in both]
    (name,) = visible(tmp_path / "data")
    with open(tmp_path / "data" / ".cache" / f"{name}.lock") as held, ThreadPoolExecutor() as pool:
        fcntl.flock(held, fcntl.LOCK_EX)
        again = pool.submit(prepare, settings(input=str(text), tokenizer="byte", overwrite=True))
        with pytest.raises(TimeoutError):
            again.result(0.1)
        fcntl.flock(held, fcntl.LOCK_UN)
        assert visible(tmp_path / "data") == [again.result(20).name]


def test_memory_is_bounded_in_a_process_of_its_own(tmp_path):
    code = """
import resource, sys
from fastgpt.config.schema import PrepareConfig
from fastgpt.data.prepare import prepare
for path in sys.argv[2:]:
    prepare(PrepareConfig(input=path, data_dir=sys.argv[1], tokenizer="byte", workers=2))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
    lines = "a line of text, as there are many\n" * 30_000
    tree(tmp_path, {"small": lines * 8, "large": lines * 72})
    names = ("data", "small", "large")
    process = python(code, *(str(tmp_path / name) for name in names))
    out, err = process.communicate(timeout=100)
    small, large = (float(line) for line in out.splitlines()[1::2])
    assert large - small < 40, (small, large, err)  # MiB, for 73 MB of text, 147 MB of tokens


# --- token files without a tokenizer


def foreign(tmp_path, max_id):
    """Opens a folder like nanoGPT's, with ids up to the given one and no vocabulary."""
    ids = np.array([*range(40), max_id] * 5, np.uint16).tobytes()
    return open_dataset(tree(tmp_path / f"ids{max_id}", {"train.bin": ids, "val.bin": ids}))


def test_the_tokenizer_that_is_named_goes_with_foreign_ids(settings, tmp_path, as_gpt2, ranks):
    dataset = foreign(tmp_path, 510)
    assert dataset.tokenizer is None
    for spec in ("gpt2", "", "bpe"):
        cfg = settings(dataset="x", tokenizer=spec, vocab_file=str(as_gpt2))
        assert with_tokenizer(dataset, cfg).tokenizer.vocab_size == len(ranks) + 1
    assert with_tokenizer(dataset, settings(dataset="x")).tokenizer is None
    for spec, message in (
        ("char", "--tokenizer=char: .* holds ids and no text to make it from"),
        ("bpe:300", "holds ids and no text to make it from: --vocab_file can name"),
        ("byte", "holds ids up to 510, this tokenizer has 256: it is not the one"),
        ("nope", "--tokenizer=nope: choose byte, char"),
    ):
        with pytest.raises(UserError, match=message):
            with_tokenizer(dataset, settings(dataset="x", tokenizer=spec))
    ByteTokenizer().save(tree(tmp_path / "own", {"train.bin": bytes(80), "val.bin": bytes(80)}))
    own = open_dataset(tmp_path / "own")
    assert with_tokenizer(own, settings(tokenizer="byte")) == own
    with pytest.raises(UserError, match="--tokenizer=gpt2: .* holds ids of byte"):
        with_tokenizer(own, settings(dataset="x", tokenizer="gpt2"))


def test_gpt2_s_is_taken_where_the_ids_say_so(settings, as_gpt2, tmp_path):
    many, few, plain = foreign(tmp_path, 50_000), foreign(tmp_path, 900), settings(dataset="x")
    assert with_tokenizer(many, plain).tokenizer is None, "it is not here yet"
    tree(tmp_path / "data" / ".cache", {"gpt2.tiktoken": as_gpt2.read_bytes()})
    assert with_tokenizer(many, plain).tokenizer.name == "gpt2"
    assert with_tokenizer(few, plain).tokenizer is None
    assert with_tokenizer(few, settings(dataset="openwebtext")).tokenizer.name == "gpt2"
