"""Writing files so that a reader sees the old content or the new one, never a mixture."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
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
    """Returns `text` with its own sha256 as a last line, so that any change of it shows."""
    return f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n"


def unsealed(data: bytes) -> str | None:
    """Returns the text that `sealed` was given, or None if a byte of it has changed."""
    body, _, digest = data.removesuffix(b"\n").rpartition(b"\n")
    return body.decode() if hashlib.sha256(body).hexdigest().encode() == digest else None


def fsync_dir(path: Path) -> None:
    """Makes renames and new entries inside the folder survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def replace_folder(new: Path, folder: Path) -> None:
    """Renames `new` to `folder`; the old one is removed once the new one has its name."""
    fsync_dir(new)
    if folder.exists():
        shutil.rmtree(_old(folder), ignore_errors=True)
        os.rename(folder, _old(folder))
    os.rename(new, folder)
    fsync_dir(folder.parent)
    shutil.rmtree(_old(folder), ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Ends a `replace_folder` that a kill interrupted."""
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
    """Returns the bits that new files' modes lack. The system tells them only when they are set."""
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
    """Removes leftovers of killed writers from `folder`, which this process has for itself."""
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        with contextlib.suppress(OSError):
            remove(path)


class Held(UserError):
    """The message that another process has a file or folder for itself."""


@contextlib.contextmanager
def lock(path: Path, busy: str) -> Iterator[None]:
    """Holds a file, made if need be, or a folder; the system releases it however the process ends.

    Raises Held with the text `busy` if another process holds it.
    """
    kind = os.O_DIRECTORY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_NONBLOCK
    try:
        fd = os.open(path, kind | os.O_CLOEXEC, 0o666)
    except OSError as e:
        raise explain_os_error(e, path) from e
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            busy = ""
        if busy:
            raise Held(busy)
        yield
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Atomically replaces `path` by `text` (UTF-8)."""
    with atomic_file(path) as f:
        f.write(text.encode())


def explain_os_error(e: Exception, path: Path) -> Exception:
    """Returns a UserError with advice on a failed write to `path`, or the error itself.

    `e` is an OSError, or safetensors's own, which has the system's as text: "... (os error 28)".
    """
    if not isinstance(e, OSError):
        code = re.search(r"os error (\d+)", str(e))
        e = OSError(int(code[1]) if code else errno.EIO, str(e))
    other = "name another folder (--out_dir for runs, --data_dir for data)"
    if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"cannot write {path}: no space left; free some disk or {other}")
    if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        why = os.strerror(e.errno)
        return UserError(f"cannot write {path}: {why}; make {folder} writable or {other}")
    if e.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return UserError(f"cannot write {path}: {os.strerror(e.errno)}; name another folder")
    return e
