"""Downloads from the hub: verified by what its cache calls them; no network, one line."""

from __future__ import annotations

import hashlib
import http.server
import socket
import sys
import threading
from pathlib import Path

import pytest

from fastgpt.errors import UserError
from fastgpt.weights import hub
from tests.process import fastgpt


def cached(folder: Path, name: str, data: bytes, blob: str) -> Path:
    """A file as huggingface_hub's cache has it: a link to a blob that is named by its hash."""
    (folder / "blobs").mkdir(exist_ok=True)
    (folder / "snapshots").mkdir(exist_ok=True)
    (folder / "blobs" / blob).write_bytes(data)
    path = folder / "snapshots" / name
    path.symlink_to(Path("..") / "blobs" / blob)
    return path


def test_hashes_of_both_kinds(tmp_path: Path):
    data = b"weights"
    sha256 = hashlib.sha256(data).hexdigest()
    git = hashlib.sha1(b"blob 7\0" + data).hexdigest()
    hub.verify(cached(tmp_path, "model.safetensors", data, sha256))
    hub.verify(cached(tmp_path, "config.json", data, git))
    for name, blob in (("a", sha256), ("b", git)):
        with pytest.raises(UserError, match="its hash is .* remove the file and run again"):
            hub.verify(cached(tmp_path, name, b"other!!", blob))


@pytest.mark.parametrize("in_cache", [True, False])
def test_what_is_fetched_and_from_where(in_cache: bool, tmp_path: Path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repository: str, name: str, local_files_only: bool = False) -> str:
        if local_files_only != in_cache:
            raise FileNotFoundError("not in the cache")
        asked.append((repository, name))
        data = name.encode()
        return str(cached(tmp_path, name, data, hashlib.sha256(data).hexdigest()))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    asks = (lambda: pytest.fail("asked the network")) if in_cache else lambda: None
    monkeypatch.setattr(hub, "unreachable", asks)
    assert hub.fetch("gpt2-large") == tmp_path / "snapshots"
    assert asked == [("openai-community/gpt2-large", name) for name in hub.FILES]


def test_a_hub_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch):
    """One that is silent, one that refuses, one that answers with an error: reachable."""
    for name in ("HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent, monkeypatch.context() as patch:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        patch.setattr(hub, "PATIENCE_S", 0.05)
        assert "timed out" in str(hub.unreachable())
    monkeypatch.setattr(hub, "PATIENCE_S", 30.0)
    assert "refused" in str(hub.unreachable()), "closed now"
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub.unreachable() is None


@pytest.mark.quick("eval")
@pytest.mark.parametrize(
    ("command", "args"),
    [
        ("train", ["laptop", "--input=text.txt", "--device=cpu", "--out_dir=out"]),
        ("export", ["--to=folder"]),
        ("sample", []),
        ("eval", []),
    ],
    ids=["train", "export", "sample", "eval"],
)
def test_without_network_one_line_says_what_to_do(command: str, args, tmp_path: Path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    (tmp_path / "text.txt").write_text("some text " * 400)
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    said = fastgpt(tmp_path, command, "--init_from=gpt2", *args, code=2, environment=environment)
    last = said.splitlines()[-1]
    assert last.startswith("fastgpt: --init_from=gpt2: cannot reach the hub (HF_HUB_OFFLINE")
    assert "pass --weights FOLDER" in last and "Traceback" not in said
    assert not (tmp_path / "out").exists() and not (tmp_path / "folder").exists()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="needs huggingface_hub to download"):
        hub.fetch("gpt2")
