"""Errors in one line, and reading of files that may hold anything.

`reading` turns errors in a file's content into a UserError. `open_regular` refuses FIFOs, sockets,
devices and folders. `explained` gives the command line a line for errors of the system. Any other
exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import cast

_LONGEST = 1000


def one_line(text: str) -> str:
    """Returns `text`, shortened if long, with characters that are not printable escaped."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 300]} ... {text[-300:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UserError(Exception):
    """Mistake of the user, or a file that cannot be used.

    The message is one line: the given value, the wanted one, and advice. The command line prints
    it to stderr without a traceback and exits with `code`. Nothing may be half-written by then.
    """

    def __init__(self, message: str, code: int = 2):
        super().__init__(one_line(message))
        self.code = code


class SharedError(UserError):
    """UserError that all ranks raise together. Rank 0 prints it."""


class RankError(UserError):
    """UserError of one rank only, which it names. Every rank prints its own."""


# Exceptions that damaged or hostile content raises in readers.
_CONTENT: tuple[type[Exception], ...] = (ValueError, LookupError, TypeError, AttributeError)
_CONTENT += (ArithmeticError, RecursionError, EOFError)


@contextmanager
def reading(name: object, wrong: str, *others: type[Exception]) -> Iterator[None]:
    """Turns errors while `name` is read into one line that begins with it.

    An OSError becomes "cannot be read". An error in the content, or one of `others`, becomes
    `wrong` and the error's repr, which has no line breaks.
    """
    try:
        yield
    except OSError as e:
        raise UserError(f"{name}: cannot be read: {e.strerror or e}") from e
    except _CONTENT + others as e:
        raise UserError(f"{name}: {wrong} ({repr(e)[:200]})") from e


# By the first letter of `ls -l`.
_KINDS = {"d": "a folder", "p": "a FIFO", "s": "a socket", "c": "a device", "b": "a device"}


def open_regular(path: Path | str) -> BufferedReader:
    """Opens a regular file for reading, without ever waiting.

    Raises UserError for a FIFO, socket, device or folder, and OSError as `open` does.
    """
    try:
        # Without O_NONBLOCK opening a FIFO waits for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except OSError as e:
        if e.errno == errno.ENXIO:
            raise UserError(f"{path}: is a socket or a device, a file is wanted") from None
        raise
    except ValueError:  # a NUL byte in its name
        raise OSError(errno.EINVAL, "no name of a file", str(path)) from None
    kind = stat.filemode(os.fstat(fd).st_mode)[0]
    if kind != "-":
        os.close(fd)
        raise UserError(f"{path}: is {_KINDS[kind]}, a file is wanted")
    return cast(BufferedReader, os.fdopen(fd, "rb"))


def read_bytes(path: Path | str, limit: int | None = None) -> bytes:
    """Returns a regular file's content. UserError if it is longer than `limit` bytes."""
    with open_regular(path) as f:
        data = f.read() if limit is None else f.read(limit + 1)
    if limit is not None and len(data) > limit:
        raise UserError(f"{path}: is over {limit:,} bytes: not what it should be")
    return data


def read_text(path: Path | str, limit: int | None = None) -> str:
    """Returns `read_bytes` as UTF-8. Raises UnicodeDecodeError, a ValueError, if it is none."""
    return read_bytes(path, limit).decode()


def explained(e: BaseException) -> str | None:
    """Returns one line for an error of the system or the machine; None for a bug."""
    if isinstance(e, OSError):
        names = [os.fsdecode(n) for n in (e.filename, e.filename2) if isinstance(n, str | bytes)]
        if not names:
            return f"standard output, or a file: {e.strerror or str(e) or type(e).__name__}"
        why = e.strerror or type(e).__name__
        return f"{' -> '.join(names)}: {why}; a file or folder that can be used is wanted"
    # RuntimeErrors of PyTorch, and one of Python, whose new thread's stack has no room.
    words = "CPUAllocator|not enough memory|out of memory|t allocate memory|t start new thread"
    known = isinstance(e, RuntimeError) and re.search(words, str(e))
    if known or isinstance(e, MemoryError):
        why = f" ({str(e).strip().splitlines()[0][:200]})" if str(e) else ""
        return f"out of memory{why}; a smaller model or --batch_size needs less"
    if isinstance(e, UnicodeEncodeError):
        return f"{e.object[e.start : e.end]!r}: cannot be written as {e.encoding}"
    return None
