"""Settings, small vocabularies, a web server, and folders that misbehave."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgpt.config.schema import PrepareConfig
from fastgpt.data import download, tokenizer
from fastgpt.data.token_files import Dataset
from fastgpt.data.tokenizer import dump_ranks, train_ranks

ROOT = Path(__file__).parents[2]

TEXT = """\
The pipeline reads text, cuts it, and counts: 1, 22, 333, 4444.  Isn't it so? It's what we'll see.
\tdef cut(chunks, size=1 << 20):    # comments   with   blanks
Größe, naïve façade, 世界、こんにちは。 Привет, мир! 🙂🙂 don't they're I've
"""


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Returns settings for a fresh data folder; nothing is remembered outside of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    base = PrepareConfig(data_dir=str(tmp_path / "data"), workers=1)
    return lambda **changes: replace(base, **changes)


@pytest.fixture(scope="session")
def ranks() -> dict[bytes, int]:
    """Returns a vocabulary of 511 tokens, trained here."""
    pytest.importorskip("rustbpe")
    return train_ranks([TEXT * 3, Path(tokenizer.__file__).read_text()], 512)


@pytest.fixture
def as_gpt2(ranks, monkeypatch, tmp_path) -> Path:
    """Writes a rank file that counts as GPT-2's own for this test."""
    data = dump_ranks(ranks)
    monkeypatch.setattr(tokenizer, "GPT2_SHA256", hashlib.sha256(data).hexdigest())
    path = tmp_path / "small.tiktoken"
    path.write_bytes(data)
    return path


class Server(http.server.ThreadingHTTPServer):
    """A web server of `files` by path; one that is a function answers by itself.

    `faults` holds, per request, what goes wrong: how many bytes are sent, or a status.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes | Callable[[Handler], Any]] = {}
        self.faults: list[int | str | None] = []
        self.asked: list[str] = []
        self.wanted: list[str | None] = []  # the ranges
        self.ranges = True
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        s, wanted = self.server, self.headers.get("Range")
        s.asked.append(self.path)
        s.wanted.append(wanted)
        fault = s.faults.pop(0) if s.faults else None
        data = s.files.get(self.path)
        start = int(wanted[6:-1]) if wanted and s.ranges else 0
        if callable(data):
            data(self)
        elif isinstance(fault, str) or data is None:
            self.send_error(int(fault or 404))
        elif 0 < len(data) <= start:
            self.send_error(416)
        else:
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start : None if fault is None else start + int(fault)])
            if fault is not None:
                self.connection.close()


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    s = Server()
    thread = threading.Thread(target=s.serve_forever, args=(0.01,))
    thread.start()
    yield s
    s.shutdown()
    s.server_close()
    thread.join()


COMMIT = "c0ffee" * 6 + "abcd"


@pytest.fixture
def hub(server, monkeypatch):
    """Serves a hub, with a method that publishes the files of a repository at a revision."""
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")

    def publish(repo, revision, files, commit=COMMIT):
        index: list[dict] = [{"type": "directory", "path": "other"}]
        for path, data in files.items():
            small = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry = {"type": "file", "path": path, "oid": small, "size": len(data)}
            if not path.endswith((".json", ".txt")):
                lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
                entry |= {"size": 134, "lfs": lfs}
            index.append(entry)
            server.files[f"/{repo.removeprefix('models/')}/resolve/{commit}/{path}"] = data
        api, folder = f"/api/{repo}", os.path.dirname(path)
        server.files[f"{api}/revision/{revision}"] = json.dumps({"sha": commit}).encode()
        server.index = f"{api}/tree/{commit}/{folder}".rstrip("/")
        server.files[server.index] = json.dumps(index).encode()

    server.publish = publish
    return server


def python(code: str, *args: str, env: dict[str, str] | None = None) -> subprocess.Popen:
    """Starts `code` in a Python of its own that finds fastgpt."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", **(env or {})}
    pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", code, *args], env=env, **pipes)


def tree(folder: Path, files: dict[str, str | bytes]) -> Path:
    """Writes `files` by their names below `folder`."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def tokens(folder: Path) -> dict[str, bytes]:
    """Returns the content of all files in a folder, but for the scan, which holds times."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".fastgpt_scan.json"}


def texts_of(ds: Dataset) -> list[str]:
    """Returns the texts of the train and the val split."""
    parts = (np.concatenate([f[:] for f in split.shards]) for split in (ds.train, ds.val))
    return [ds.tokenizer.decode(ids) for ids in parts if ds.tokenizer]
