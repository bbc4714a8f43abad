"""Atomic files: the old content or the new, and errors that say what to do."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from fastgpt.errors import UserError
from fastgpt.storage import atomic


def test_a_file_has_its_old_content_or_the_new(tmp_path: Path):
    path = tmp_path / "a" / "b.txt"
    for text in ("one", "zwei ü"):
        atomic.write_text(path, text)
        with pytest.raises(RuntimeError), atomic.atomic_file(path) as f:
            f.write(b"half")
            raise RuntimeError
        assert path.read_text() == text
        assert [p.name for p in path.parent.iterdir()] == ["b.txt"]
        assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "no space left; free some disk"),
        (errno.EDQUOT, "no space left"),
        (errno.EFBIG, "no space left"),
        (errno.EACCES, "make .* writable"),
        (errno.EROFS, "make .* writable"),
        (errno.ENOTDIR, "name another folder"),
        (errno.EIO, "system's words"),
    ],
)
def test_system_errors_become_advice(code, words, tmp_path: Path):
    kind = OSError if code == errno.EIO else UserError
    with pytest.raises(kind, match=words) as e, atomic.atomic_file(tmp_path / "x") as f:
        f.write(b"half")
        raise OSError(code, "system's words")
    assert kind is OSError or str(tmp_path / "x") in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def folder_with(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "x").write_text(text)
    return path


def test_a_folder_takes_the_place_of_another_or_it_comes_back(tmp_path: Path):
    target, old = tmp_path / "data", tmp_path / ".data.old"
    for text in ("one", "two"):
        folder_with(old, "in the way")  # a kill's leftover
        atomic.replace_folder(folder_with(tmp_path / "new", text), target)
        assert (target / "x").read_text() == text
        assert [p.name for p in tmp_path.iterdir()] == ["data"]
    target.rename(old)
    for _ in range(2):
        atomic.recover_folder(target)
        assert (target / "x").read_text() == "two" and not old.exists()
        folder_with(old, "one")
