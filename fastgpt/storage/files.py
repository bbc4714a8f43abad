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
    """Hex sha256 of a file's bytes."""
    with open_regular(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sealed(text: str) -> str:
    """`text` with its own sha256 as a last line, so that any change of it shows."""
    return f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n"


def unsealed(data: bytes) -> str | None:
    """The text that `sealed` was given, or None if a byte of it is not as it was."""
    body, _, digest = data.removesuffix(b"\n").rpartition(b"\n")
    return body.decode() if hashlib.sha256(body).hexdigest().encode() == digest else None


def fsync_dir(path: Path) -> None:
    """Make renames and new entries inside the folder survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; what stood there is removed once the new one has its name."""
    fsync_dir(new)
    if folder.exists():
        shutil.rmtree(_old(folder), ignore_errors=True)
        os.rename(folder, _old(folder))
    os.rename(new, folder)
    fsync_dir(folder.parent)
    shutil.rmtree(_old(folder), ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Finish a `replace_folder` that a kill interrupted."""
    old = _old(folder)
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    elif old.exists():
        shutil.rmtree(old)


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside `path`; on success fsync it and rename it onto `path`.

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
    """What this process takes from the modes of new files. Can only be asked for by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def sweep(folder: Path, *patterns: str) -> None:
    """Remove what killed writers left in `folder`; the caller holds what keeps others out."""
    for pattern in patterns or (".*.tmp",):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def hold(folder: Path) -> int:
    """A descriptor that marks a temporary folder as in use, until it or its process is closed."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def sweep_unheld(folder: Path, pattern: str) -> None:
    """Remove temporary folders that no process holds: their writers were killed."""
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):
            os.close(hold(path))
            shutil.rmtree(path)


def write_text(path: Path, text: str) -> None:
    """Atomically replace `path` by `text` (UTF-8)."""
    with atomic_file(path) as f:
        f.write(text.encode())


def explain_os_error(e: Exception, path: Path) -> Exception:
    """The UserError that says what a failed write to `path` means for the user, or the error.

    It is an OSError, or safetensors's own, which has the system's as text: "... (os error 28)".
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
