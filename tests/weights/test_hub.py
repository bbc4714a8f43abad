"""Downloads from the hub: verified, once, and one line without network."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from fastgpt.errors import UserError
from fastgpt.weights import hub


def test_the_files_are_fetched_once_and_verified(server, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    api, index = "/api/models/openai-community/gpt2-large", []
    for name in (*hub.FILES, "README.md"):
        data = name.encode()
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        index.append({"type": "file", "path": name, "oid": oid, "size": len(data)})
        server.files[f"/openai-community/gpt2-large/resolve/c0ffee/{name}"] = data
    index[3]["lfs"] = {"oid": hashlib.sha256(data := b"weights").hexdigest(), "size": len(data)}
    server.files[f"{api}/revision/main"] = json.dumps({"sha": "c0ffee"}).encode()
    server.files[f"{api}/tree/c0ffee"] = json.dumps(index).encode()
    wrong = f"{server.url}/openai-community/gpt2-large/resolve/c0ffee/model.safetensors"
    server.files[wrong.removeprefix(server.url)] = b"damaged"
    with pytest.raises(UserError, match=f"{wrong}: its hash is .* --weights FOLDER"):
        hub.fetch("gpt2-large")
    server.files[wrong.removeprefix(server.url)] = data
    folder = hub.fetch("gpt2-large")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        **{name: name.encode() for name in hub.FILES},
        "model.safetensors": data,
    }
    server.asked.clear()
    assert hub.fetch("gpt2-large") == folder == tmp_path / "fastgpt" / "gpt2-large"
    assert server.asked == []


def test_without_network_one_line_says_what_to_do(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    says = "^cannot download http://127.0.0.1:9/api/models/openai-c.*pass --weights FOLDER"
    with pytest.raises(UserError, match=says):
        hub.fetch("gpt2")
