from __future__ import annotations

import hashlib
import http.server
import itertools
import json
import os
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data import corpora, download, tokenizer
from fastgpt.data.corpora import CORPORA, TextFiles, check_text, decode_python, open_input
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
            found.append((split, b"".join(text for _, text in parts).decode(), False))
    return found


def tree(folder, files: dict[str, str | bytes]):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


# --- one file


@pytest.mark.parametrize(
    "text", ["abcdefghij" * 10, "世界🙂é" * 33, "a\r\nb\n" * 21, "\ufeffx" * 9]
)
@pytest.mark.parametrize("fraction", [0.1, 0.05, 0.5])
def test_a_file_is_split_as_nanogpt_splits_it(tmp_path, text, fraction):
    path = tmp_path / "t.txt"
    path.write_bytes(text.encode())
    source = TextFiles(path, fraction)
    n = int(len(text) * (1 - fraction))
    assert contents(source) == [("train", text[:n], False), ("val", text[n:], False)]
    assert source.identity["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert source.look.n_chars == len(text)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
    ).filter(bool),
    st.floats(0, 0.99),
    st.integers(1, 7),
)
def test_cutting_at_a_character(texts, fraction, chunk):
    """Of one file or several, whose chunks may end within a character."""
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "_SMALL", -1)
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


NO_TEXT = {
    b"abc\0def": "NUL byte at offset 3",
    b"\0": "NUL byte at offset 0",
    b"abc\xffdef": "invalid start byte at offset 3",
    b"ab\xe4\xb8": "ends within a character",
    "für".encode("latin-1"): "invalid .* at offset 1",
    b"\x89PNG\r\n\x1a\n": "invalid start byte at offset 0",
}


@pytest.mark.parametrize("data", NO_TEXT)
@pytest.mark.parametrize("before", [0, 3 << 20])
def test_a_file_that_is_no_text(tmp_path, data, before):
    path = tmp_path / "t.txt"
    path.write_bytes(b"x" * before + data)
    says = NO_TEXT[data]
    if before and " offset " in says:
        says = says[:-1] + f"{before + int(says[-1]):,}"
    with pytest.raises(UserError, match=f"t.txt is no UTF-8 text \\(.*{says}") as e:
        TextFiles(path, 0.1)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_offsets_count_from_the_start(chunk):
    data = "é世🙂".encode() + b"\xff"
    with pytest.raises(corpora.NotText, match="offset 9$"):
        check_text(data[i : i + chunk] for i in range(0, len(data), chunk))
    check_text(data[:-1][i : i + chunk] for i in range(0, 9, chunk))


def test_an_empty_file(tmp_path):
    (tmp_path / "t.txt").touch()
    with pytest.raises(UserError, match="t.txt is an empty file"):
        TextFiles(tmp_path / "t.txt", 0.1)


# --- folders


@pytest.fixture
def folder(tmp_path):
    root = tree(
        tmp_path / "root",
        {f"sub{i % 7}/file{i:03d}.txt": f"text of {i}\n" * (i % 5 + 1) for i in range(200)},
    )
    tree(
        root, {"image.png": b"\x89PNG\0", "latin.txt": b"f\xfcr", ".git/config": "x", ".hide": "x"}
    )
    tree(root, {"empty.txt": ""})
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
    assert all(ends for _, _, ends in docs)
    share = sum(split == "val" for split, _, _ in docs) / len(docs)
    assert 0.05 <= share <= 0.2
    assert source.look.n_files == 200
    assert contents(TextFiles(folder, 0.1)) == docs


def test_a_files_split_does_not_depend_on_the_others(folder):
    before = {text: split for split, text, _ in contents(TextFiles(folder, 0.1))}
    for path in sorted(folder.glob("sub3/*.txt")):
        path.unlink()
    tree(folder, {"aaa/new.txt": "new", "zzz/new.txt": "new 2"})
    after = {text: split for split, text, _ in contents(TextFiles(folder, 0.1))}
    assert {t: s for t, s in after.items() if t in before} == {
        t: s for t, s in before.items() if t in after
    }


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
    lines = [
        f"{hashlib.sha256(t).hexdigest()}  {n}\n" for n, t in (("a.txt", b"22"), ("b/x.txt", b"1"))
    ]
    want = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert TextFiles(root, 0.1).look.sha256 == want
    os.rename(root / "a.txt", root / "aa.txt")
    assert TextFiles(root, 0.1).look.sha256 != want


@pytest.mark.parametrize("files", [{}, {"x.bin": b"\0"}, {".hidden": "text"}])
def test_folders_without_text(tmp_path, files):
    (tmp_path / "r").mkdir()
    with pytest.raises(UserError, match="r is a folder without any text file"):
        TextFiles(tree(tmp_path / "r", files), 0.1)


def test_what_changes_while_it_is_read_is_noticed(folder):
    source = TextFiles(folder, 0.1)
    tree(folder, {"sub1/file001.txt": "changed"})
    with pytest.raises(UserError, match="changed while it was read"):
        contents(source)


def test_what_vanishes_while_it_is_read_is_noticed(folder):
    documents = TextFiles(folder, 0.1).documents()
    for path in folder.glob("sub0/*"):
        path.unlink()
    with pytest.raises(UserError, match="vanished|changed"):
        list(documents)


def test_large_files_are_streamed(folder, monkeypatch):
    want = contents(TextFiles(folder, 0.1))
    monkeypatch.setattr(corpora, "_SMALL", 20)
    monkeypatch.setattr(corpora, "_CHUNK", 7)
    assert contents(TextFiles(folder, 0.1)) == want


# --- Python sources


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            "# -*- coding: latin-1 -*-\ns = 'ü'\n".encode("latin-1"),
            "# -*- coding: latin-1 -*-\ns = 'ü'\n",
        ),
        (
            "# vim: set fileencoding=koi8-r :\n# я".encode("koi8-r"),
            "# vim: set fileencoding=koi8-r :\n# я",
        ),
        (b"# coding: no-such-codec\n\xff", None),
        (b"s = '\xff'", None),
        (b"# coding: latin-1\n\0\xff", None),
    ],
)
def test_python_files_that_declare_an_encoding(data, text):
    assert decode_python(data) == (None if text is None else text.encode())


def test_the_standard_library_is_there(tmp_path):
    from fastgpt.data.corpora import CORPORA

    source = CORPORA["python_stdlib"].text(tmp_path, 0.05)
    assert source.by_document and source.look.n_bytes > 3_000_000
    text = {"train": 0, "val": 0}
    for split, chunk in source.documents():
        text[split] += len(chunk or b"")
    assert text["val"] == source.look.val_bytes
    assert text["train"] + text["val"] == source.look.n_bytes


def test_no_standard_library(tmp_path, monkeypatch):
    from fastgpt.data import corpora

    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="--input=FILE"):
        corpora.CORPORA["python_stdlib"].text(tmp_path, 0.05)


# --- remembering what was looked through


@pytest.fixture
def looked(monkeypatch):
    monkeypatch.setattr(corpora, "_REMEMBER", 0)
    count = []
    look = TextFiles._look
    monkeypatch.setattr(TextFiles, "_look", lambda self: count.append(1) or look(self))
    return count


def age(root):
    for path in [root, *root.rglob("*")]:
        os.utime(path, ns=(1, time.time_ns() - 10 * 10**9), follow_symlinks=False)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_unchanged_input_is_looked_through_once(folder, tmp_path, looked, kind):
    root, memory = folder if kind == "folder" else folder / "sub1" / "file001.txt", tmp_path / "m"
    age(root)
    first = open_input(root, 0.1, memory)
    again = open_input(root, 0.1, memory)
    assert len(looked) == 1 and again.look == first.look and again.identity == first.identity
    assert contents(again) == contents(first)
    open_input(root, 0.2, memory)
    assert len(looked) == 2
    changed = root if kind == "file" else folder / "sub1" / "file001.txt"
    changed.write_text("new text")
    assert open_input(root, 0.1, memory).look.sha256 != first.look.sha256


def test_input_changed_just_now_is_not_remembered(folder, tmp_path, looked):
    for _ in range(2):
        open_input(folder, 0.1, tmp_path / "m")
    assert len(looked) == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", "\xff", json.dumps({"x": 1})])
def test_a_damaged_memory_is_no_trouble(folder, tmp_path, looked, text):
    age(folder)
    (tmp_path / "m").write_text(text)
    for _ in range(2):
        open_input(folder, 0.1, tmp_path / "m")
    assert len(looked) == 1


def test_memory_that_cannot_be_written(folder, tmp_path, looked, read_only):
    age(folder)
    (tmp_path / "ro").mkdir()
    read_only(tmp_path / "ro")
    open_input(folder, 0.1, tmp_path / "ro" / "m")
    assert len(looked) == 1


TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 50


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        data = self.server.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.files, s.asked = {}, []
    thread = threading.Thread(target=s.serve_forever, args=(0.01,))
    thread.start()
    yield s
    s.shutdown()
    s.server_close()
    thread.join()


def base(server):
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def shakespeare(server, monkeypatch):
    """A small text in the place of tiny shakespeare."""
    server.files["/input.txt"] = TEXT.encode()
    monkeypatch.setattr(corpora, "SHAKESPEARE_URL", f"{base(server)}/input.txt")
    sha256 = hashlib.sha256(TEXT.encode()).hexdigest()
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", sha256)
    return server


def test_shakespeare_char_is_downloaded_once(shakespeare, settings, tmp_path):
    cfg = settings(dataset="shakespeare_char")
    with pytest.raises(
        UserError, match="run `fastgpt prepare shakespeare_char --data_dir=.*` once"
    ):
        ensure(cfg)
    assert shakespeare.asked == []
    folder = prepare(cfg)
    assert folder == tmp_path / "data" / "shakespeare_char" == ensure(cfg) == prepare(cfg)
    assert shakespeare.asked == ["/input.txt"]
    ds = open_dataset(folder)
    n = int(len(TEXT) * 0.9)
    assert (len(ds.train), len(ds.val)) == (n, len(TEXT) - n)
    assert ds.tokenizer.chars == sorted(set(TEXT))
    assert ds.tokenizer.decode(ds.val.gather(np.array([0]), len(ds.val))[0]) == TEXT[n:]


def test_two_corpora_share_the_text(shakespeare, settings, as_gpt2):
    prepare(settings(dataset="shakespeare_char"))
    folder = prepare(settings(dataset="shakespeare", vocab_file=str(as_gpt2)))
    assert shakespeare.asked == ["/input.txt"] and folder.name == "shakespeare"
    ds = open_dataset(folder)
    assert ds.tokenizer.name == "gpt2"
    assert ds.train.gather(np.array([0]), 20)[0].tolist() == ds.tokenizer.encode(TEXT)[:20].tolist()


def test_a_changed_text_is_refused(shakespeare, settings, tmp_path):
    shakespeare.files["/input.txt"] = b"something else\n" * 100
    with pytest.raises(
        UserError, match="sha256.*your own text works without network: --input=FILE"
    ):
        prepare(settings(dataset="shakespeare_char"))
    assert not (tmp_path / "data" / "shakespeare_char").exists()


@pytest.mark.parametrize("name", [name for name, corpus in CORPORA.items() if corpus.network])
def test_without_network_there_is_one_clear_line(name, settings, monkeypatch, tmp_path):
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    monkeypatch.setattr(corpora, "SHAKESPEARE_URL", "http://127.0.0.1:9/x")
    monkeypatch.setattr(tokenizer, "GPT2_URL", "http://127.0.0.1:9/x")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="--input=FILE") as e:
        prepare(settings(dataset=name))
    assert "\n" not in str(e.value)
    assert not [p for p in (tmp_path / "data").iterdir() if not p.name.startswith(".")]


# --- openwebtext, by a stand-in for the datasets library


class Rows(list):
    def train_test_split(self, *, test_size, seed, shuffle):
        assert (test_size, seed, shuffle) == (0.0005, 2357, True)
        return {"train": Rows(self[5:]), "test": Rows(self[:5])}

    def iter(self, batch_size):
        for i in range(0, len(self), batch_size):
            yield {"text": self[i : i + batch_size]}


def test_openwebtext(settings, as_gpt2, monkeypatch, tmp_path):
    rows = Rows(f"web page {i}\n" for i in range(3000))
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, split: (
        (name, split) == ("Skylion007/openwebtext", "train") and rows
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    cfg = settings(dataset="openwebtext", vocab_file=str(as_gpt2), workers=2)
    ds = open_dataset(prepare(cfg))
    tok = ds.tokenizer

    def text(split):
        return tok.decode(split.gather(np.array([0]), len(split))[0])

    assert text(ds.train) == "".join(row + "<|endoftext|>" for row in rows[5:])
    assert text(ds.val) == "".join(row + "<|endoftext|>" for row in rows[:5])


@pytest.mark.parametrize("error", [ConnectionError("no\nroute"), ValueError("x"), OSError("y")])
def test_openwebtext_cannot_be_downloaded(settings, as_gpt2, monkeypatch, error):
    def load_dataset(*args, **kwargs):
        raise error

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(UserError, match="cannot download openwebtext.*--input=FILE") as e:
        prepare(settings(dataset="openwebtext", vocab_file=str(as_gpt2)))
    assert "\n" not in str(e.value)


def test_openwebtext_names_the_extra(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'datasets>=2.20' \(the extra \[hf\]\)"):
        prepare(settings(dataset="openwebtext"))


# --- fineweb10B, from a hub on this machine


@pytest.fixture
def hub(server, monkeypatch, as_gpt2):
    server.files[f"/{tokenizer.GPT2_NAME}"] = as_gpt2.read_bytes()
    monkeypatch.setattr(tokenizer, "GPT2_URL", f"{base(server)}/{tokenizer.GPT2_NAME}")
    monkeypatch.setenv("HF_ENDPOINT", base(server) + "/")
    index = [{"type": "file", "path": "README.md", "size": 5}]
    for i, name in enumerate(["val_000000", *(f"train_{i:06d}" for i in range(1, 6))]):
        ids = np.arange(200, dtype="<u2") + i
        data = header(len(ids), ids.dtype) + ids.tobytes()
        path = f"fineweb_{name}.bin"
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        index.append({"type": "file", "path": path, "size": len(data), "lfs": lfs})
        server.files[f"/datasets/{corpora.FINEWEB_REPO}/resolve/main/{path}"] = data
    server.index = f"/api/datasets/{corpora.FINEWEB_REPO}/tree/main"
    server.files[server.index] = json.dumps(index).encode()
    return server


def shards_asked(hub):
    return sorted(os.path.basename(p) for p in hub.asked if p.endswith(".bin"))


def test_fineweb_shards(hub, settings, tmp_path):
    cfg = settings(dataset="fineweb10B", shards=3)
    with pytest.raises(UserError, match="`fastgpt prepare fineweb10B --shards=3 --data_dir=.*`"):
        ensure(cfg)
    assert hub.asked == []
    folder = prepare(cfg)
    assert folder.name == "fineweb10B-3shards" and ensure(cfg) == folder
    ds = open_dataset(folder, verify=True)
    assert (len(ds.train), len(ds.val), len(ds.train.shards)) == (600, 200, 3)
    assert ds.tokenizer.name == "gpt2" and not list(folder.glob("*.part"))
    wanted = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in (1, 2, 3)]
    assert shards_asked(hub) == sorted(wanted)
    hub.asked.clear()
    prepare(cfg)
    assert hub.asked == []
    more = prepare(settings(dataset="fineweb10B", shards=5))
    assert shards_asked(hub) == ["fineweb_train_000004.bin", "fineweb_train_000005.bin"]
    assert len(open_dataset(more).train) == 1000


def test_fineweb_goes_on_after_a_failure(hub, settings, tmp_path):
    path = f"/datasets/{corpora.FINEWEB_REPO}/resolve/main/fineweb_train_000002.bin"
    good = hub.files[path]
    hub.files[path] = good[:-2] + b"\0\0"
    cfg = settings(dataset="fineweb10B", shards=2)
    with pytest.raises(UserError, match="fineweb_train_000002.bin: sha256"):
        prepare(cfg)
    assert not (tmp_path / "data" / "fineweb10B-2shards").exists()
    hub.files[path] = good
    hub.asked.clear()
    assert len(open_dataset(prepare(cfg)).train) == 400
    assert shards_asked(hub) == ["fineweb_train_000002.bin"]


@pytest.mark.parametrize("answer", [b"", b"{}", b"[1]", b'[{"path": "x"}]', b"<html>"])
def test_an_odd_index_is_refused(hub, settings, answer):
    hub.files[hub.index] = answer
    with pytest.raises(UserError, match="not the expected list of files"):
        prepare(settings(dataset="fineweb10B"))


@pytest.mark.parametrize("changes", [{"shards": 0}, {"shards": 104}, {"tokenizer": "char"}])
def test_fineweb_is_what_it_is(hub, settings, changes):
    with pytest.raises(UserError, match="fineweb10B (has 1 .. 103|is made of gpt2)"):
        prepare(settings(dataset="fineweb10B", **changes))


def test_too_little_space_for_the_shards(hub, settings, monkeypatch):
    from fastgpt.data import prepare as module

    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="no|free"):
        prepare(settings(dataset="fineweb10B", shards=2))
    assert shards_asked(hub) == []
