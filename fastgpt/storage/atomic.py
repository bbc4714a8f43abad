"""Atomic files and folders: a reader sees the old content or the new one, never a mixture."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fastgpt.errors import UserError, open_regular


def sha256_file(path: Path) -> str:
    """Returns the hex sha256 of a file's bytes."""
    with open_regular(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sealed(text: str) -> str:
    """Returns `text` with its own sha256 as a last line, by which `unsealed` notices any change."""
    return f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n"


def unsealed(data: bytes) -> str | None:
    """Returns the text that `sealed` got, or None if a byte of it has changed."""
    body, _, digest = data.removesuffix(b"\n").rpartition(b"\n")
    return body.decode() if hashlib.sha256(body).hexdigest().encode() == digest else None


def fsync_dir(path: Path) -> None:
    """Syncs a folder, so that renames and new files in it survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def replace_folder(new: Path, folder: Path) -> None:
    """Renames `new` to `folder`, and then removes the old one."""
    fsync_dir(new)
    if folder.exists():
        shutil.rmtree(_old(folder), ignore_errors=True)
        os.rename(folder, _old(folder))
    os.rename(new, folder)
    fsync_dir(folder.parent)
    shutil.rmtree(_old(folder), ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Completes or undoes a `replace_folder` that a kill interrupted."""
    old = _old(folder)
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    elif old.exists():
        shutil.rmtree(old)


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Opens a temporary file beside `path`; on success syncs it and renames it onto `path`.

    On any exception the temporary file is removed and `path` stays as it was.
    Raises UserError if the disk is full or the folder cannot be written.
    """
    tmp = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, tmp = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.fchmod(fd, 0o666 & ~umask())
        with os.fdopen(fd, mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
        fsync_dir(path.parent)
    except OSError as e:
        raise explain_os_error(e, path) from e
    finally:
        if tmp is not None:
            Path(tmp).unlink(missing_ok=True)


def umask() -> int:
    """Returns the mode bits that new files lack. The system tells them only as they are set."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def remove(path: Path) -> None:
    """Removes a file, or a folder with all that it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sweep(folder: Path, *patterns: str) -> None:
    """Removes leftovers of killed writers from `folder`, whose lock this process holds."""
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        with contextlib.suppress(OSError):
            remove(path)


class Held(UserError):
    """Message that another process holds a lock."""


@contextlib.contextmanager
def lock(path: Path, busy: str) -> Iterator[None]:
    """Holds the lock of a folder, or of a file, which is made if need be.

    The system releases it however the process ends. Raises Held with the text `busy` if another
    process has it.
    """
    kind = os.O_DIRECTORY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_NONBLOCK
    try:
        fd = os.open(path, kind | os.O_CLOEXEC, 0o666)
    except OSError as e:
        raise explain_os_error(e, path) from e
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Held(busy) from None
        yield
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Replaces the content of `path` by `text` (UTF-8), atomically."""
    with atomic_file(path) as f:
        f.write(text.encode())


@contextlib.contextmanager
def lock_in_turn(path: Path, folder: Path) -> Iterator[None]:
    """Holds the lock of the file `path`, after the other processes that prepare `folder`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that prepares {folder}", file=sys.stderr)
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def explain_os_error(e: Exception, path: Path) -> Exception:
    """Returns a UserError with advice on a failed write to `path`, or the error itself.

    `e` is an OSError, or a SafetensorError with the system's as text: "... (os error 28)".
    """
    if not isinstance(e, OSError):
        code = re.search(r"os error (\d+)", str(e))
        e = OSError(int(code[1]) if code else errno.EIO, str(e))
    why, advice = os.strerror(e.errno or 0), ""
    if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        why, advice = "no space left", "free some disk or "
    elif e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = f"make {path if path.is_dir() else path.parent} writable or "
    elif e.errno not in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return e
    advice += "name another folder (--out_dir for runs, --data_dir for data)"
    return UserError(f"cannot write {path}: {why}; {advice}")
