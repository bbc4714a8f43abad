import hashlib
import http.server
import json
import os
import sys
import threading
import types

import numpy as np
import pytest

from fastgpt.data import corpora, download, vocabulary
from fastgpt.data.corpora import CORPORA
from fastgpt.data.prepare import ensure, prepare
from fastgpt.data.token_files import header
from fastgpt.data.tokens import open_dataset
from fastgpt.errors import UserError

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
    monkeypatch.setattr(vocabulary, "GPT2_URL", "http://127.0.0.1:9/x")
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
    server.files[f"/{vocabulary.GPT2_NAME}"] = as_gpt2.read_bytes()
    monkeypatch.setattr(vocabulary, "GPT2_URL", f"{base(server)}/{vocabulary.GPT2_NAME}")
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
    from fastgpt.data import build

    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(build.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="no|free"):
        prepare(settings(dataset="fineweb10B", shards=2))
    assert shards_asked(hub) == []
