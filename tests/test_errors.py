"""Errors in one line, and files that are none."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest

from fastgpt.errors import UserError, explained, one_line, open_regular, read_bytes, reading


def test_a_line_has_its_length_and_is_printable():
    for code in (*range(32), *range(0x7F, 0xA0), 0x2028, 0x202E, 0x2069, 0xD800, 0xDFFF):
        shown = one_line(f"a{chr(code)}b")
        assert shown.isascii() and shown.isprintable() and shown.startswith("a\\"), hex(code)
    assert one_line("Größe 東京 ~") == "Größe 東京 ~"
    assert str(UserError("x\n\x1b[31m")) == r"x\n\x1b[31m"
    assert one_line("x" * 1000) == "x" * 1000
    assert one_line("a" * 700 + "b" * 500 + "c" * 300) == "a" * 700 + " ... " + "c" * 300


def test_what_fails_while_something_is_read_is_one_line():
    with pytest.raises(RuntimeError), reading("x.toml", "is no TOML"):
        raise RuntimeError
    for error, line in (
        (OSError(errno.ENOENT, "No such file"), "x.toml: cannot be read: No such file"),
        (OSError("some words"), "x.toml: cannot be read: some words"),
        (ValueError("y" * 300), f"x.toml: is no TOML (ValueError('{'y' * 188})"),
        (RuntimeError("z"), "x.toml: is no TOML (RuntimeError('z'))"),
    ):
        with pytest.raises(UserError) as e, reading("x.toml", "is no TOML", RuntimeError):
            raise error
        assert str(e.value) == line


def test_only_files_are_opened(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    with open_regular(path) as f:
        assert f.read() == b"abc"
    with pytest.raises(UserError, match=r"is a folder, a file is wanted$"):
        open_regular(tmp_path)
    with pytest.raises(UserError, match=r"/dev/null: is a device, a file is wanted$"):
        open_regular("/dev/null")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "s"))
        with pytest.raises(UserError, match=r"s: is a socket or a device, a file is wanted$"):
            open_regular(tmp_path / "s")
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
    with pytest.raises(OSError, match="no name of a file") as e:
        open_regular("a\0b")
    assert e.value.errno == errno.EINVAL


def test_a_file_may_have_as_many_bytes_as_its_limit(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert read_bytes(path) == read_bytes(path, limit=3) == b"abc"
    with pytest.raises(UserError, match=r"file: is over 2 bytes: not what it should be"):
        read_bytes(path, limit=2)


LESS = "a smaller model or --batch_size needs less"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.EIO, "Bad disk"), "standard output, or a file: Bad disk"),
        (OSError("some words"), "standard output, or a file: some words"),
        (OSError(), "standard output, or a file: OSError"),
        (
            OSError(errno.EXDEV, "Cross-device link", "a", None, "b"),
            "a -> b: Cross-device link; a file or folder that can be used is wanted",
        ),
        (MemoryError(), f"out of memory; {LESS}"),
        (
            RuntimeError("\nDefaultCPUAllocator: can't allocate memory: 8 bytes\nmore"),
            f"out of memory (DefaultCPUAllocator: can't allocate memory: 8 bytes); {LESS}",
        ),
        (RuntimeError("can't start new thread"), f"out of memory (can't start new thread); {LESS}"),
        (UnicodeEncodeError("ascii", "aéb", 1, 2, "no"), "'é': cannot be written as ascii"),
        *((error, None) for error in (RuntimeError("shapes"), ValueError("out of memory"))),
    ],
    ids=str,
)
def test_errors_of_the_machine_are_explained_and_bugs_are_not(error, line):
    assert explained(error) == line
