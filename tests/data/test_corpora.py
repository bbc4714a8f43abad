import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hyp
from hypothesis import strategies as st

from fastgpt.data import corpora, tokenizer
from fastgpt.data import prepare as module
from fastgpt.data.corpora import CORPORA, NotText, TextFiles, text_of_file
from fastgpt.data.prepare import ensure, prepare
from fastgpt.data.token_files import header, open_dataset
from fastgpt.errors import UserError

from .conftest import texts_of, tree


def contents(source):
    """[(split, text, ends)] of all documents, or parts of them that are in one split."""
    found = []
    for (split, end), parts in itertools.groupby(
        source.documents(), key=lambda part: (part[0], part[1] is None)
    ):
        if end:
            assert len(list(parts)) == 1 and found[-1][0] == split
            found[-1] = (*found[-1][:2], True)
        else:
            found.append((split, "".join(text for _, text in parts), False))
    return found


# --- one file

CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")


@hyp(max_examples=200, deadline=None)
@given(st.lists(st.text(CHARACTERS, min_size=1), min_size=1), st.floats(0, 0.99), st.integers(1, 7))
def test_the_last_characters_are_the_val_split(texts, fraction, chunk):
    """As nanoGPT does it; of one file or several, read in chunks that end within a character."""
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "_CHUNK", chunk)
        folder = tree(Path(root), {f"{i:09d}": text for i, text in enumerate(texts)})
        source = TextFiles(folder if len(texts) > 1 else folder / "000000000", fraction)
        source.by_document = False
        docs = contents(source)
    whole = "".join(texts)
    n = int(len(whole) * (1 - fraction))
    parts = ["".join(text for split, text, _ in docs if split == s) for s in ("train", "val")]
    assert parts == [whole[:n], whole[n:]]
    assert sum(ends for _, _, ends in docs) == (len(texts) if len(texts) > 1 else 0)
    if len(texts) == 1:
        assert source.sha256 == hashlib.sha256(whole.encode()).hexdigest()


LATIN = "# coding: latin-1\n# ü\n".encode("latin-1")


@pytest.mark.parametrize("chunk", [1, 2, 1 << 20])
@pytest.mark.parametrize(
    ("name", "data", "want"),
    [
        ("a.txt", "\ufeffa\r\nb\n".encode(), "\ufeffa\r\nb\n"),
        ("a.txt", "Größe 🙂\r\n".encode("utf-16"), "Größe 🙂\r\n"),
        ("a.txt", b"\xfe\xff" + "世界".encode("utf-16-be"), "世界"),
        ("a.py", LATIN, LATIN.decode("latin-1")),
        ("a.py", "\ufeff# ü".encode(), "\ufeff# ü"),
        ("a.py", b"# coding: no-such-codec\n", "# coding: no-such-codec\n"),
        ("a.py", b"# coding: no-such-codec\n\xff", NotText("invalid start byte at offset 24")),
        ("a.py", b"# coding: hex\n", NotText("'hex' is not a text encoding.*")),
        ("a.py", b"# coding: raw_unicode_escape\n\\ud800", NotText("surrogates not allowed")),
        ("a.py", b"# coding: latin-1\n\0\xff", NotText("holds a NUL character")),
        ("a.txt", LATIN, NotText("invalid start byte at offset 20")),
        ("a.txt", b"abc\0def", NotText("holds a NUL character")),
        ("a.txt", b"ab\xe4\xb8", NotText("unexpected end of data at offset 2")),
        ("a.txt", b"\xff\xfea", NotText("truncated data at offset 2")),
    ],
)
def test_encodings(tmp_path, monkeypatch, chunk, name, data, want):
    monkeypatch.setattr(corpora, "_CHUNK", chunk)
    path = tree(tmp_path, {name: data}) / name
    if isinstance(want, str):
        assert "".join(text_of_file(path)) == want
        return
    with pytest.raises(UserError, match=f"a.* is no UTF-8 text \\(.*{want}\\): convert") as e:
        TextFiles(path, 0.1)
    assert "\n" not in str(e.value)


# --- folders


@pytest.fixture
def folder(tmp_path):
    texts = {f"sub{i % 7}/file{i:03d}.txt": f"text of {i}\n" * (i % 5 + 1) for i in range(200)}
    root = tree(tmp_path / "root", texts)
    tree(root, {"latin.txt": b"f\xfcr", ".git/config": "x", "empty.txt": "", ".hide": "x"})
    (root / "link.txt").symlink_to(root / "sub1" / "file001.txt")
    (root / "outside").symlink_to("/etc")
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe")
    return root


def test_a_folder_by_whole_documents(folder):
    source = TextFiles(folder, 0.1)
    docs = contents(source)
    names = sorted(p for p in folder.glob("sub*/*.txt"))
    assert [text for _, text, _ in docs] == [p.read_text() for p in names]
    assert all(ends for _, _, ends in docs) and source.identity["files"] == 200
    assert 0.05 <= sum(split == "val" for split, _, _ in docs) / len(docs) <= 0.2
    assert source.skipped == {"latin.txt": "invalid start byte at offset 1"}
    before = {text: split for split, text, _ in docs}
    shutil.rmtree(folder / "sub3")
    tree(folder, {"aaa/new.txt": "new", "zzz/new.txt": "new 2"})
    after = {text: split for split, text, _ in contents(TextFiles(folder, 0.1))}
    both = before.keys() & after.keys()
    assert len(both) > 150 and all(before[t] == after[t] for t in both), "depends on others"


@pytest.mark.parametrize("texts", [["0123456789" * 10], ["x" * 89, "y", "z" * 10], ["é" * 99, "y"]])
def test_few_files_are_split_by_characters(tmp_path, texts):
    docs = contents(TextFiles(tree(tmp_path / "r", dict(zip("abc", texts, strict=False))), 0.1))
    parts = ["".join(t for split, t, _ in docs if split == s) for s in ("train", "val")]
    assert parts == ["".join(texts)[:90], "".join(texts)[90:]]
    # every file's end is the end of a document, a file cut in two does not end there
    assert sum(ends for _, _, ends in docs) == len(texts)


def test_listing_hash_is_that_of_sha256sum(tmp_path):
    root = tree(tmp_path / "r", {"b/x.txt": "1", "a.txt": "22"})
    sums = [hashlib.sha256(data).hexdigest() for data in (b"22", b"1")]
    listing = f"{sums[0]}  a.txt\n{sums[1]}  b/x.txt\n"
    assert TextFiles(root, 0.1).sha256 == hashlib.sha256(listing.encode()).hexdigest()


def test_nothing_to_read(tmp_path):
    tree(tmp_path, {"empty/x": "", "binary/x.bin": b"\0", "hidden/.x": "text", "t.txt": ""})
    for folder in ("empty", "binary", "hidden"):
        with pytest.raises(UserError, match=f"{folder} is a folder without any text file"):
            TextFiles(tmp_path / folder, 0.1)
    with pytest.raises(UserError, match="t.txt is an empty file"):
        TextFiles(tmp_path / "t.txt", 0.1)


@pytest.mark.parametrize("data", [b"changed", b"\xff", None])
def test_what_changes_while_it_is_read_is_noticed(folder, data):
    source, path = TextFiles(folder, 0.1), folder / "sub1" / "file001.txt"
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(UserError, match="changed while it was read"):
        contents(source)


def test_the_standard_library_is_there(tmp_path):
    source = CORPORA["python_stdlib"].text(tmp_path, 0.05)
    assert source.by_document and source.n_chars > 3_000_000
    assert source.n_chars == sum(len(text or "") for _, text in source.documents())


# --- downloads

PLAY = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 50


@pytest.fixture
def shakespeare(server, monkeypatch):
    """A small text in the place of tiny shakespeare."""
    server.files["/input.txt"] = PLAY.encode()
    monkeypatch.setattr(corpora, "SHAKESPEARE_URL", f"{server.url}/input.txt")
    sha256 = hashlib.sha256(PLAY.encode()).hexdigest()
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", sha256)
    return server


def test_shakespeare_is_downloaded_once(shakespeare, settings, as_gpt2, tmp_path):
    cfg = settings(dataset="shakespeare_char")
    command = "`fastgpt prepare shakespeare_char --data_dir=.*`"
    with pytest.raises(UserError, match=f"run {command} once"):
        ensure(cfg)
    good, folder = shakespeare.files["/input.txt"], tmp_path / "data" / "shakespeare_char"
    shakespeare.files["/input.txt"] = b"something else\n" * 100
    with pytest.raises(UserError, match="sha256.*own text works without network: --input=FILE"):
        prepare(cfg)
    assert shakespeare.asked == ["/input.txt"] and not folder.exists()
    shakespeare.files["/input.txt"] = good
    assert folder == prepare(cfg) == ensure(cfg) == prepare(cfg)
    ds, n = open_dataset(folder), int(len(PLAY) * 0.9)
    assert ds.tokenizer.chars == sorted(set(PLAY)) and texts_of(ds) == [PLAY[:n], PLAY[n:]]
    other = open_dataset(prepare(settings(dataset="shakespeare", vocab_file=str(as_gpt2))))
    assert other.tokenizer.name == "gpt2" and other.folder.name == "shakespeare"
    assert shakespeare.asked == ["/input.txt"] * 2, "one text for both"


@pytest.mark.parametrize("name", [name for name, corpus in CORPORA.items() if corpus.network])
def test_without_network_there_is_one_clear_line(name, settings, server, monkeypatch, tmp_path):
    monkeypatch.setattr(corpora, "SHAKESPEARE_URL", "http://127.0.0.1:9/x")
    monkeypatch.setattr(tokenizer, "GPT2_URL", "http://127.0.0.1:9/x")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="--input=FILE") as e:
        prepare(settings(dataset=name))
    assert "\n" not in str(e.value)
    assert not [p for p in (tmp_path / "data").iterdir() if not p.name.startswith(".")]


class Rows(list):
    """The rows of the datasets library."""

    def train_test_split(self, *, test_size, seed, shuffle):
        assert (test_size, seed, shuffle) == (0.0005, 2357, True)
        return {"train": Rows(self[5:]), "test": Rows(self[:5])}

    def iter(self, batch_size):
        for i in range(0, len(self), batch_size):
            yield {"text": self[i : i + batch_size]}


def test_openwebtext(settings, as_gpt2, monkeypatch):
    rows, errors = Rows(f"web page {i}\n" for i in range(3000)), []

    def load_dataset(name, split):
        assert (name, split) == ("Skylion007/openwebtext", "train")
        if errors:
            raise errors[0]
        return rows

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    cfg = settings(dataset="openwebtext", vocab_file=str(as_gpt2), workers=2)
    ds = open_dataset(prepare(cfg))
    want = ["".join(row + "<|endoftext|>" for row in part) for part in (rows[5:], rows[:5])]
    assert texts_of(ds) == want
    for error in (ConnectionError("no\nroute"), ValueError("x"), OSError("y")):
        errors[:] = [error]
        with pytest.raises(UserError, match="cannot download openwebtext.*--input=FILE") as e:
            CORPORA["openwebtext"].text(Path(cfg.data_dir), 0.0005)
        assert "\n" not in str(e.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"\[hf\]: pip install 'datasets>=2.20'.*--input"):
        CORPORA["openwebtext"].text(Path(cfg.data_dir), 0.0005)


@pytest.fixture
def hub(server, monkeypatch, as_gpt2):
    """A hub on this machine with shards of FineWeb."""
    server.files["/ranks"] = as_gpt2.read_bytes()
    monkeypatch.setattr(tokenizer, "GPT2_URL", f"{server.url}/ranks")
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    index = [{"type": "file", "path": "README.md", "size": 5}]
    for i, name in enumerate(["val_000000", *(f"train_{i:06d}" for i in range(1, 6))]):
        ids = np.arange(200, dtype="<u2") + i
        data = header(len(ids), ids.dtype) + ids.tobytes()
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        index.append({"type": "file", "path": f"fineweb_{name}.bin", "lfs": lfs})
        server.files[shard_url(f"fineweb_{name}.bin")] = data
    server.index = f"/api/datasets/{corpora.FINEWEB_REPO}/tree/main"
    server.files[server.index] = json.dumps(index).encode()
    return server


def shard_url(name):
    return f"/datasets/{corpora.FINEWEB_REPO}/resolve/main/{name}"


def shards_asked(hub):
    return sorted(p.rpartition("fineweb_")[2] for p in hub.asked if p.endswith(".bin"))


def test_fineweb_shards(hub, settings):
    cfg = settings(dataset="fineweb10B", shards=3)
    with pytest.raises(UserError, match="`fastgpt prepare fineweb10B --shards=3 --data_dir=.*`"):
        ensure(cfg)
    assert hub.asked == []
    folder = prepare(cfg)
    assert folder.name == "fineweb10B-3shards" and ensure(cfg) == folder
    ds = open_dataset(folder)
    assert (len(ds.train), len(ds.val), len(ds.train.shards)) == (600, 200, 3)
    assert ds.tokenizer.name == "gpt2" and not list(folder.glob("*.part"))
    assert shards_asked(hub) == [f"train_{i:06d}.bin" for i in (1, 2, 3)] + ["val_000000.bin"]
    hub.asked.clear()
    assert prepare(cfg) == folder and hub.asked == []
    more = prepare(settings(dataset="fineweb10B", shards=5))
    assert shards_asked(hub) == ["train_000004.bin", "train_000005.bin"], "others are linked"
    assert len(open_dataset(more).train) == 1000
    with pytest.raises(UserError, match="fineweb10B is made of gpt2"):
        prepare(settings(dataset="fineweb10B", tokenizer="char"))


def test_fineweb_goes_on_after_a_failure(hub, settings, tmp_path, monkeypatch):
    cfg, url = settings(dataset="fineweb10B", shards=2), shard_url("fineweb_train_000002.bin")
    with monkeypatch.context() as patch:
        usage = types.SimpleNamespace(free=1000)
        patch.setattr(module.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match="needs 0.0 GB more in .*choose fewer --shards"):
            prepare(cfg)
    assert not shards_asked(hub)
    good = hub.files[url]
    hub.files[url] = good[:-2] + b"\0\0"
    with pytest.raises(UserError, match="fineweb_train_000002.bin: sha256"):
        prepare(cfg)
    assert not (tmp_path / "data" / "fineweb10B-2shards").exists()
    hub.files[url] = good
    hub.asked.clear()
    assert len(open_dataset(prepare(cfg)).train) == 400
    assert shards_asked(hub) == ["train_000002.bin"]


@pytest.mark.parametrize("answer", [b"", b"{}", b"[1]", b'[{"path": "x"}]', b"<", b"[" * 100_000])
def test_an_odd_index_is_refused(hub, settings, answer):
    hub.files[hub.index] = answer
    with pytest.raises(UserError, match="not the expected list of files") as e:
        prepare(settings(dataset="fineweb10B"))
    assert "\n" not in str(e.value)
