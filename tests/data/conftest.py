"""Settings, small vocabularies and folders that misbehave, for the tests of the data pipeline."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fastgpt.config.schema import PrepareConfig
from fastgpt.data import tokenizer
from fastgpt.data.tokenizer import dump_ranks, train_ranks

ROOT = Path(__file__).parents[2]

TEXT = """\
The pipeline reads text, cuts it, and counts: 1, 22, 333, 4444.  Isn't it so? It's what we'll see.
\tdef cut(chunks, size=1 << 20):    # comments   with   blanks
Größe, naïve façade, 世界、こんにちは。 Привет, мир! 🙂🙂 don't they're I've
"""


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Settings for a fresh data folder; nothing is remembered outside of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    base = PrepareConfig(data_dir=str(tmp_path / "data"), workers=1)
    return lambda **changes: replace(base, **changes)


@pytest.fixture(scope="session")
def ranks() -> dict[bytes, int]:
    """A vocabulary of 511 tokens, trained here."""
    pytest.importorskip("rustbpe")
    return train_ranks([TEXT * 3, Path(tokenizer.__file__).read_text()], 512)


@pytest.fixture
def as_gpt2(ranks, monkeypatch, tmp_path) -> Path:
    """A rank file that counts as GPT-2's own for this test."""
    data = dump_ranks(ranks)
    monkeypatch.setattr(tokenizer, "GPT2_SHA256", hashlib.sha256(data).hexdigest())
    path = tmp_path / "small.tiktoken"
    path.write_bytes(data)
    return path


@pytest.fixture
def read_only(tmp_path):
    """A function that makes a folder unwritable, for root too; undone after the test."""
    undo: list[Callable[[], object]] = []

    def lock(folder: Path) -> None:
        if os.geteuid() != 0:
            folder.chmod(0o555)
            undo.append(lambda: folder.chmod(0o755))
            return
        for command in (
            ["mount", "--bind", str(folder), str(folder)],
            ["mount", "-o", "remount,bind,ro", str(folder)],
        ):
            if subprocess.run(command, capture_output=True).returncode:
                pytest.skip("root ignores permissions, and may not mount here")
            undo.append(lambda: subprocess.run(["umount", str(folder)], capture_output=True))

    yield lock
    for step in reversed(undo):
        step()


@pytest.fixture
def full_disk(tmp_path):
    """A function that mounts a disk of so many bytes; skips where that is not allowed."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            failed = subprocess.run(command, capture_output=True).returncode
        except FileNotFoundError:
            failed = True
        if failed:
            pytest.skip("may not mount a small disk here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def python(code: str, *args: str, **kwargs) -> subprocess.Popen:
    """Start `code` in a Python of its own that finds fastgpt."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **kwargs.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )
