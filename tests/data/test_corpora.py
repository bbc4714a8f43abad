import hashlib
import itertools
import json
import os
import re
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

from fastgpt.data import corpora, token_files, tokenizer
from fastgpt.data import prepare as module
from fastgpt.data.corpora import CORPORA, NotText, TextFiles, text_of_file
from fastgpt.data.prepare import ensure, prepare
from fastgpt.data.token_files import header, open_dataset
from fastgpt.errors import UserError

from .conftest import COMMIT, texts_of, tokens, tree


def contents(source):
    """Returns [(split, text, ends)] of all documents, or of their parts in one split."""
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
    """Splits one file or several, read in chunks that end within a character."""
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
    with pytest.raises(UserError, match=f"a.* is no UTF-8 text \\(.*{want}\\): convert"):
        TextFiles(path, 0.1)


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


def test_nothing_to_read(tmp_path):
    tree(tmp_path, {"empty/x": "", "binary/x.bin": b"\0", "hidden/.x": "text", "t.txt": ""})
    for folder, why in {"empty": "", "binary": "; x.bin: it holds a NUL", "hidden": ""}.items():
        with pytest.raises(UserError, match=f"{folder} is a folder without any text file{why}"):
            TextFiles(tmp_path / folder, 0.1)
    with pytest.raises(UserError, match="t.txt is an empty file"):
        TextFiles(tmp_path / "t.txt", 0.1)


@pytest.mark.parametrize("data", [b"changed", b"\xff", None])
def test_what_changes_while_it_is_read_is_noticed(folder, data):
    source, path = TextFiles(folder, 0.1), folder / "sub1" / "file001.txt"
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(UserError, match="changed while it was read"):
        contents(source)


# --- downloads

PLAY = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 50


@pytest.fixture
def shakespeare(server, monkeypatch):
    """Serves a small text in the place of tiny shakespeare."""
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
    with pytest.raises(UserError, match="its hash is.*works without network: --input=FILE"):
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
    with pytest.raises(UserError, match="--input=FILE"):
        prepare(settings(dataset=name))
    assert not [p for p in (tmp_path / "data").iterdir() if not p.name.startswith(".")]


# --- the hub


@pytest.fixture
def hub(hub, monkeypatch, as_gpt2):
    """Serves GPT-2's ranks beside the hub."""
    hub.files["/ranks"] = as_gpt2.read_bytes()
    monkeypatch.setattr(tokenizer, "GPT2_URL", f"{hub.url}/ranks")
    return hub


def asked(hub):
    """Returns the names of the data files that were asked for."""
    return sorted(p.rpartition("/")[2] for p in hub.asked if p.endswith((".parquet", ".bin")))


OWT = (corpora.OPENWEBTEXT_REPO, "refs%2Fconvert%2Fparquet")
PAGES = [[f"page {i} of file {k}\n" for i in range(300)] + [None, ""] for k in range(4)]


@pytest.fixture
def openwebtext(hub, settings, as_gpt2, monkeypatch):
    """Publishes four parquet files of 300 pages. Returns the settings that prepare them."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pip install pyarrow")
    import pyarrow

    monkeypatch.setattr(token_files, "SHARD_TOKENS", 2000)
    files = {}
    for k, pages in enumerate(PAGES):
        table = pyarrow.table({"text": pyarrow.array(pages, pyarrow.string())})
        parquet.write_table(table, sink := pyarrow.BufferOutputStream(), row_group_size=70)
        files[f"plain_text/train/{k:04d}.parquet"] = sink.getvalue().to_pybytes()
    hub.publish(*OWT, files)
    own = dict(dataset="openwebtext", vocab_file=str(as_gpt2), val_fraction=0.1)
    return lambda **changes: settings(**own | changes)


def test_openwebtext(hub, openwebtext, tmp_path, capsys):
    folder = prepare(openwebtext(workers=2))
    ds, (train, val) = open_dataset(folder), texts_of(open_dataset(folder))
    texts = [text.split("<|endoftext|>") for text in (train, val)]
    wanted = [page for pages in PAGES for page in pages if page]
    assert sorted(texts[0] + texts[1]) == sorted([*wanted, "", ""])
    assert 0.05 < len(texts[1]) / len(wanted) < 0.2 and len(ds.train.shards) > 4
    assert [page for page in wanted if page in texts[0]] == texts[0][:-1], "in their order"
    assert not list((tmp_path / "data").rglob("*.parquet*")), "removed when they are tokenized"
    assert not (folder / module.PARTS_JSON).exists()
    says = r"openwebtext: 0 of 4 files are done, 0.0 GB to download; needs 0.0 GB more in .*/data, "
    assert re.match(says + r"[\d.]+ GB are free\n", capsys.readouterr().out)
    info = json.loads((folder / "dataset.json").read_text())
    assert (info["source"]["commit"], info["source"]["files"]) == (COMMIT, 4)
    hub.asked.clear()
    assert prepare(openwebtext()) == folder == ensure(openwebtext()) and hub.asked == []
    own = open_dataset(prepare(openwebtext(tokenizer="bpe:300", vocab_file="")))
    assert own.tokenizer.name == "bpe:300" and len(asked(hub)) == 4, "each file once"
    with pytest.raises(UserError, match="--tokenizer=char: openwebtext is too large: choose byte"):
        prepare(openwebtext(tokenizer="char", vocab_file=""))


@pytest.mark.parametrize("how", ["network", "interrupt"])
def test_openwebtext_goes_on_where_it_stopped(hub, openwebtext, tmp_path, monkeypatch, capsys, how):
    whole, calls = prepare(openwebtext(data_dir=str(tmp_path / "whole"))), itertools.count()
    url = f"/{OWT[0]}/resolve/{COMMIT}/plain_text/train/0002.parquet"
    with monkeypatch.context() as patch:
        if how == "network":
            patch.delitem(hub.files, url)
        else:
            write = module.TokenWriter.write

            def interrupted(writer, ids):
                if next(calls) == 2 * 600 + 100:  # each page has its text and its end
                    raise KeyboardInterrupt
                write(writer, ids)

            patch.setattr(module.TokenWriter, "write", interrupted)
        with pytest.raises((UserError, KeyboardInterrupt), match="HTTP Error 404|^$"):
            prepare(openwebtext())
    hub.asked.clear()
    capsys.readouterr()
    folder = prepare(openwebtext())
    assert asked(hub) == ["0002.parquet", "0003.parquet"]
    assert capsys.readouterr().out.startswith("openwebtext: 2 of 4 files are done, ")
    assert tokens(folder) == tokens(whole)


def test_openwebtext_is_another_one(hub, openwebtext, monkeypatch):
    """Tests that files of two versions are not mixed, and that odd ones are refused."""
    good = dict(hub.files)
    hub.files.pop(next(path for path in good if path.endswith("0001.parquet")))
    with pytest.raises(UserError, match="0001.parquet"):
        prepare(openwebtext())
    hub.files |= good
    data = hub.files[next(path for path in good if path.endswith("0003.parquet"))]
    hub.publish(*OWT, {f"plain_text/train/{k:04d}.parquet": data for k in range(2)}, "d" * 40)
    ds = open_dataset(prepare(openwebtext()))
    assert sum(text.count("of file 3") for text in texts_of(ds)) == 600
    again = openwebtext(overwrite=True)
    hub.publish(*OWT, {"plain_text/train/0000.parquet": b"no parquet"})
    with pytest.raises(UserError, match="0000.parquet: is no parquet file of texts"):
        prepare(again)
    hub.publish(*OWT, {"plain_text/train/0000.txt": b""})
    with pytest.raises(UserError, match="has no parquet files.*--input=FILE"):
        prepare(again)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install .*\[data\]\); your own text"):
        prepare(again)


FINEWEB = (corpora.FINEWEB_REPO, "main")


@pytest.fixture
def fineweb(hub):
    """Publishes six shards of FineWeb."""
    files = {}
    for i, name in enumerate(["val_000000", *(f"train_{i:06d}" for i in range(1, 6))]):
        ids = np.arange(200, dtype="<u2") + i
        files[f"fineweb_{name}.bin"] = header(len(ids), ids.dtype) + ids.tobytes()
    hub.publish(*FINEWEB, files)
    return hub


def test_fineweb_shards(fineweb, settings):
    cfg = settings(dataset="fineweb10B", shards=3)
    with pytest.raises(UserError, match="`fastgpt prepare fineweb10B --shards=3 --data_dir=.*`"):
        ensure(cfg)
    assert fineweb.asked == []
    folder = prepare(cfg)
    assert folder.name == "fineweb10B-3shards" and ensure(cfg) == folder
    ds = open_dataset(folder)
    assert (len(ds.train), len(ds.val), len(ds.train.shards)) == (600, 200, 3)
    assert ds.tokenizer.name == "gpt2" and not list(folder.glob("*.part"))
    shards = [f"fineweb_train_{i:06d}.bin" for i in range(1, 6)]
    assert asked(fineweb) == [*shards[:3], "fineweb_val_000000.bin"]
    fineweb.asked.clear()
    assert prepare(cfg) == folder and fineweb.asked == []
    more = prepare(settings(dataset="fineweb10B", shards=5))
    assert asked(fineweb) == shards[3:], "others are linked"
    assert len(open_dataset(more).train) == 1000
    with pytest.raises(UserError, match="fineweb10B is made of gpt2"):
        prepare(settings(dataset="fineweb10B", tokenizer="char"))


def test_fineweb_goes_on_after_a_failure(fineweb, settings, tmp_path, monkeypatch):
    cfg = settings(dataset="fineweb10B", shards=2)
    url = f"/{corpora.FINEWEB_REPO}/resolve/{COMMIT}/fineweb_train_000002.bin"
    with monkeypatch.context() as patch:
        usage = types.SimpleNamespace(free=1000)
        patch.setattr(module.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match="needs 0.0 GB more in .*choose fewer --shards"):
            prepare(cfg)
    assert not asked(fineweb)
    good = fineweb.files[url]
    fineweb.files[url] = good[:-2] + b"\0\0"
    with pytest.raises(UserError, match="fineweb_train_000002.bin: its hash is"):
        prepare(cfg)
    assert not (tmp_path / "data" / "fineweb10B-2shards").exists()
    fineweb.files[url] = good
    fineweb.asked.clear()
    assert len(open_dataset(prepare(cfg)).train) == 400
    assert asked(fineweb) == ["fineweb_train_000002.bin"]


@pytest.mark.parametrize("answer", [b"", b"{}", b"[1]", b'[{"path": "x"}]', b"<", b"[" * 100_000])
def test_an_odd_index_is_refused(fineweb, settings, answer):
    fineweb.files[fineweb.index] = answer
    with pytest.raises(UserError, match="not the expected list of files"):
        prepare(settings(dataset="fineweb10B"))
    fineweb.files[f"/api/{corpora.FINEWEB_REPO}/revision/main"] = answer
    with pytest.raises(UserError, match="revision/main: does not name a commit"):
        prepare(settings(dataset="fineweb10B"))
