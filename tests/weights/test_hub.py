"""Downloads from the hub: verified, once, and one line without network."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastgpt.errors import UserError
from fastgpt.weights.hub import FILES, fetch


def test_the_files_are_fetched_once_and_verified(hub, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    files = {name: name.encode() for name in FILES}
    hub.publish("models/openai-community/gpt2-large", "main", {"README.txt": b"", **files})
    wrong = next(path for path in hub.files if path.endswith("model.safetensors"))
    hub.files[wrong] = b"damaged"
    with pytest.raises(UserError, match=f"{wrong}: its hash is .* --weights FOLDER"):
        fetch("gpt2-large")
    hub.files[wrong] = b"model.safetensors"
    folder = fetch("gpt2-large")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == files
    hub.asked.clear()
    assert fetch("gpt2-large") == folder == tmp_path / "fastgpt" / "gpt2-large"
    assert hub.asked == []


def test_without_network_one_line_says_what_to_do(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    offline = "cannot download http://127.0.0.1:9/api/models/openai-c"
    for cache, says in (str(tmp_path), offline), ("~nobody/x", "~nobody/x: no absolute path"):
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        with pytest.raises(UserError, match=f"^{says}.*pass --weights FOLDER"):
            fetch("gpt2")
