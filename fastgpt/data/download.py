"""Downloads that resume, are verified, and either are there whole or not at all."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path

from fastgpt.data.progress import progress
from fastgpt.errors import UserError
from fastgpt.storage.atomic import explain_os_error, fsync_dir, sha256_file

_CHUNK = 1 << 20
TIMEOUT_S = 30.0
PAUSE_S = 1.0  # before trying again; doubled each time
TRIES = 4


def fetch(url: str, path: Path, *, sha256: str, size: int | None = None, hint: str = "") -> Path:
    """Download `url` to `path` unless a file with this sha256 is there already; return `path`.

    Bytes gather in `path` + ".part"; a download that was cut off goes on from there, now or in a
    later run. UserError (ending in `hint`) without network, on a wrong checksum, or a full disk.
    """
    if path.is_file() and sha256_file(path) == sha256:
        return path
    part = path.with_name(path.name + ".part")
    hint = f"; {hint}" if hint else ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if size is not None and size > free:
            raise UserError(
                f"cannot write {path}: it needs {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are "
                "free; name another folder with --data_dir"
            )
        for fresh_start in (False, True):
            if fresh_start:  # a resumed file may have begun with another version's bytes
                part.unlink(missing_ok=True)
            resumed = part.is_file() and part.stat().st_size > 0
            _download(url, part, size, hint)
            found = sha256_file(part)
            if found == sha256:
                break
            if fresh_start or not resumed:
                part.unlink()
                raise UserError(
                    f"{url}: sha256 is {found[:16]}..., expected {sha256[:16]}...: the file "
                    f"changed or was damaged on the way; nothing was kept{hint}"
                )
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
        fsync_dir(path.parent)
    except OSError as e:
        raise explain_os_error(e, path) from e
    return path


def get(url: str, hint: str = "") -> bytes:
    """A small document (an index), whole. UserError without network."""
    hint = f"; {hint}" if hint else ""
    try:
        with _open(url) as reply:
            return reply.read()
    except (OSError, http.client.HTTPException) as e:
        raise UserError(f"cannot download {url} ({_reason(e)}){hint}") from None


def _download(url: str, part: Path, size: int | None, hint: str) -> None:
    """Bring `part` to its full length, trying again from where the connection broke."""
    for attempt in range(TRIES):
        try:
            if _continue(url, part, size):
                return
            error = "connection cut off"
        except (
            urllib.error.URLError,
            TimeoutError,
            ConnectionError,
            http.client.HTTPException,
        ) as e:
            error = _reason(e)
            code = e.code if isinstance(e, urllib.error.HTTPError) else 0
            if 0 < code < 500 and code not in (408, 429):
                raise UserError(f"cannot download {url} ({error}){hint}") from None
        if attempt + 1 < TRIES:
            time.sleep(PAUSE_S * 2**attempt)
    have = part.stat().st_size if part.exists() else 0
    kept = f" after {have:,} bytes, which are kept: run again to go on" if have else ""
    raise UserError(f"cannot download {url} ({error}){kept}{hint}")


def _continue(url: str, part: Path, size: int | None) -> bool:
    """One connection; append what it brings to `part`. True when the file is complete."""
    have = part.stat().st_size if part.exists() else 0
    if size is not None and have >= size:
        return True
    try:
        reply = _open(url, have)
    except urllib.error.HTTPError as e:
        if e.code != 416:
            raise
        # Nothing beyond what we have: complete, or not the same file. The checksum will tell.
        return True
    with contextlib.closing(reply):
        content_range = reply.headers.get("Content-Range", "")
        resumed = reply.status == 206 and content_range.startswith(f"bytes {have}-")
        have = have if resumed else 0
        length = reply.headers.get("Content-Length")
        total = have + int(length) if length is not None else size
        with (
            open(part, "ab" if resumed else "wb") as f,
            progress(part.stem, total, have) as advance,
        ):
            try:
                while chunk := reply.read(_CHUNK):
                    have += f.write(chunk)
                    advance(len(chunk))
            except http.client.IncompleteRead as e:
                have += f.write(e.partial)
    return total is None or have >= total


def _open(url: str, have: int = 0) -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers={"User-Agent": "fastgpt"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    return urllib.request.urlopen(request, timeout=TIMEOUT_S)


def _reason(e: Exception) -> str:
    if isinstance(e, urllib.error.HTTPError):
        return f"HTTP {e.code} {e.reason}"
    reason = getattr(e, "reason", e)
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return text.strip("<>")
