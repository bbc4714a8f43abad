import hashlib
import itertools
import json
import os
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


def tree(folder, files: dict[str, str | bytes]):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


# --- one file


@hyp(max_examples=200, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
    ).filter(bool),
    st.floats(0, 0.99),
    st.integers(1, 7),
)
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


NO_TEXT = {
    b"abc\0def": "holds a NUL character",
    b"abc\xffdef": "invalid start byte at offset 3",
    b"ab\xe4\xb8": "unexpected end of data at offset 2",
    "für".encode("latin-1"): "invalid .* at offset 1",
    b"\xff\xfea": "truncated data at offset 2",
}


@pytest.mark.parametrize("data", NO_TEXT)
@pytest.mark.parametrize("chunk", [1, 2, 1 << 20])
def test_a_file_that_is_no_text(tmp_path, monkeypatch, data, chunk):
    monkeypatch.setattr(corpora, "_CHUNK", chunk)
    path = tmp_path / "t.txt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"t.txt is no UTF-8 text \\(.*{NO_TEXT[data]}") as e:
        TextFiles(path, 0.1)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("a.txt", "\ufeffa\r\nb\n".encode(), "\ufeffa\r\nb\n"),
        ("a.txt", "Größe 🙂\r\n".encode("utf-16"), "Größe 🙂\r\n"),
        ("a.txt", b"\xfe\xff" + "世界".encode("utf-16-be"), "世界"),
        ("a.py", "# coding: latin-1\n# ü\n".encode("latin-1"), "# coding: latin-1\n# ü\n"),
        ("a.py", "# vim: fileencoding=koi8-r :\n# я".encode("koi8-r"), None),
        ("a.py", "\ufeff# ü".encode(), "\ufeff# ü"),
        ("a.py", b"# coding: no-such-codec\n", "# coding: no-such-codec\n"),
        ("a.py", b"# coding: no-such-codec\n\xff", NotText),
        ("a.py", b"# coding: hex\n", NotText),
        ("a.py", b"# coding: raw_unicode_escape\n\\ud800", NotText),
        ("a.py", b"s = '\xff'", NotText),
        ("a.py", b"# coding: latin-1\n\0\xff", NotText),
        ("a.txt", "# coding: latin-1\n# ü\n".encode("latin-1"), NotText),
    ],
)
def test_declared_encodings(tmp_path, name, data, text):
    (tmp_path / name).write_bytes(data)
    if text is NotText:
        with pytest.raises(NotText):
            list(text_of_file(tmp_path / name))
    else:
        assert "".join(text_of_file(tmp_path / name)) == (text or data.decode("koi8-r"))


# --- folders


@pytest.fixture
def folder(tmp_path):
    root = tree(
        tmp_path / "root",
        {f"sub{i % 7}/file{i:03d}.txt": f"text of {i}\n" * (i % 5 + 1) for i in range(200)},
    )
    tree(root, {"image.png": b"\x89PNG\0", "latin.txt": b"f\xfcr", ".git/config": "x"})
    tree(root, {"empty.txt": "", ".hide": "x"})
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
    assert source.skipped == {
        "image.png": "invalid start byte at offset 0",
        "latin.txt": "invalid start byte at offset 1",
    }
    before = {text: split for split, text, _ in docs}
    for path in sorted(folder.glob("sub3/*.txt")):
        path.unlink()
    tree(folder, {"aaa/new.txt": "new", "zzz/new.txt": "new 2"})
    after = {text: split for split, text, _ in contents(TextFiles(folder, 0.1))}
    both = before.keys() & after.keys()
    assert len(both) > 150 and all(before[t] == after[t] for t in both), "depends on others"


@pytest.mark.parametrize(
    "files",
    [
        {"a": "0123456789" * 10},
        {"a": "x" * 50, "b": "y" * 50},
        {"a": "x" * 89, "b": "y" * 1, "c": "z" * 10},
        {"a": "é" * 99, "b": "y"},
    ],
)
def test_few_files_are_split_by_characters(tmp_path, files):
    docs = contents(TextFiles(tree(tmp_path / "r", files), 0.1))
    whole = "".join(files.values())
    parts = {s: "".join(t for split, t, _ in docs if split == s) for s in ("train", "val")}
    assert (parts["train"], parts["val"]) == (whole[:90], whole[90:])
    # every file's end is the end of a document, a file cut in two does not end there
    assert sum(ends for _, _, ends in docs) == len(files)


def test_listing_hash_is_that_of_sha256sum(tmp_path):
    root = tree(tmp_path / "r", {"b/x.txt": "1", "a.txt": "22"})
    sums = {
        name: hashlib.sha256(t).hexdigest() for name, t in (("a.txt", b"22"), ("b/x.txt", b"1"))
    }
    want = hashlib.sha256("".join(f"{sums[n]}  {n}\n" for n in sorted(sums)).encode()).hexdigest()
    assert TextFiles(root, 0.1).sha256 == want
    os.rename(root / "a.txt", root / "aa.txt")
    assert TextFiles(root, 0.1).sha256 != want


@pytest.mark.parametrize("files", [{}, {"x.bin": b"\0"}, {".hidden": "text"}])
def test_nothing_to_read(tmp_path, files):
    (tmp_path / "r").mkdir()
    with pytest.raises(UserError, match="r is a folder without any text file"):
        TextFiles(tree(tmp_path / "r", files), 0.1)
    (tmp_path / "t.txt").touch()
    with pytest.raises(UserError, match="t.txt is an empty file"):
        TextFiles(tmp_path / "t.txt", 0.1)


@pytest.mark.parametrize("data", ["changed", b"\xff", None])
def test_what_changes_while_it_is_read_is_noticed(folder, data):
    source = TextFiles(folder, 0.1)
    path = folder / "sub1" / "file001.txt"
    path.unlink() if data is None else tree(folder, {"sub1/file001.txt": data})
    with pytest.raises(UserError, match="changed while it was read"):
        contents(source)


def test_the_standard_library_is_there(tmp_path, monkeypatch):
    source = CORPORA["python_stdlib"].text(tmp_path, 0.05)
    assert source.by_document and source.n_bytes > 3_000_000
    assert source.n_bytes == sum(len((text or "").encode()) for _, text in source.documents())
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="without any text file"):
        CORPORA["python_stdlib"].text(tmp_path, 0.05)


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
    assert shakespeare.asked == []
    folder = prepare(cfg)
    assert folder == tmp_path / "data" / "shakespeare_char" == ensure(cfg) == prepare(cfg)
    ds, n = open_dataset(folder), int(len(PLAY) * 0.9)
    assert (len(ds.train), len(ds.val)) == (n, len(PLAY) - n)
    assert ds.tokenizer.chars == sorted(set(PLAY))
    assert ds.tokenizer.decode(ds.val.gather(np.array([0]), len(ds.val))[0]) == PLAY[n:]
    other = open_dataset(prepare(settings(dataset="shakespeare", vocab_file=str(as_gpt2))))
    assert other.tokenizer.name == "gpt2" and other.folder.name == "shakespeare"
    assert shakespeare.asked == ["/input.txt"], "one text for both"


def test_a_changed_text_is_refused(shakespeare, settings, tmp_path):
    shakespeare.files["/input.txt"] = b"something else\n" * 100
    with pytest.raises(UserError, match="sha256.*own text works without network: --input=FILE"):
        prepare(settings(dataset="shakespeare_char"))
    assert not (tmp_path / "data" / "shakespeare_char").exists()


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
    for split, part in ((ds.train, rows[5:]), (ds.val, rows[:5])):
        text = ds.tokenizer.decode(split.gather(np.array([0]), len(split))[0])
        assert text == "".join(row + "<|endoftext|>" for row in part)
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
    prepare(cfg)
    assert hub.asked == []
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
    assert shards_asked(hub) == []
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
