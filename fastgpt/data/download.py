"""Downloads that resume, are bounded and verified, and appear whole or not at all."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from fastgpt.data.progress import progress
from fastgpt.errors import UserError, reading
from fastgpt.storage.atomic import explain_os_error, fsync_dir, sha256_file

_CHUNK = 1 << 20
TIMEOUT_S = 30.0
TRIES = 4
PAUSE_S = 1.0  # before the second try; doubled each time
WINDOW_S = 30.0
MIN_RATE = 1000  # bytes per second, the least in each window
LIMIT = 64 << 20  # bytes of a file of unknown size, such as an index


class _Failed(Exception):
    """Error of a connection, with the server's status in `code`, or 0."""

    def __init__(self, e: Exception | str):
        self.code = e.code if isinstance(e, urllib.error.HTTPError) else 0
        super().__init__(str(e).strip("<>") or type(e).__name__)


class Remote(NamedTuple):
    """A file on the network. `sha256` is as in `fetch`."""

    file: str
    url: str
    bytes: int
    sha256: str

    def fetch(self, folder: Path, hint: str = "") -> Path:
        """Downloads the file into `folder` unless it is there; returns its path."""
        return fetch(self.url, folder / self.file, sha256=self.sha256, size=self.bytes, hint=hint)


def hub_files(
    repo: str, hint: str, revision: str = "main", folder: str = ""
) -> tuple[str, dict[str, Remote]]:
    """Returns (commit, files by name) of a folder on the Hugging Face hub.

    `repo` is models/OWNER/NAME or datasets/OWNER/NAME.
    """
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    url = f"{hub}/api/{repo}/revision/{quote(revision, safe='')}"
    with reading(url, "does not name a commit"):
        commit = str(json.loads(get(url, hint))["sha"])
    url, files = f"{hub}/api/{repo}/tree/{commit}/{folder}".rstrip("/"), {}
    base = f"{hub}/{repo.removeprefix('models/')}/resolve/{commit}"
    with reading(url, "is not the expected list of files"):
        for entry in json.loads(get(url, hint)):
            if entry["type"] == "file":
                lfs, name = entry.get("lfs") or entry, entry["path"].rpartition("/")[2]
                where = f"{base}/{quote(entry['path'])}"
                files[name] = Remote(name, where, int(lfs["size"]), str(lfs["oid"]))
    return commit, files


def _sum(path: Path, like: str) -> str:
    """Returns the file's sha256, or git's sha1 of a blob if `like` is one."""
    if len(like) == 64:
        return sha256_file(path)
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def fetch(url: str, path: Path, *, sha256: str, size: int = 0, hint: str = "") -> Path:
    """Downloads `url` to `path` unless a file with this sum is there; returns `path`.

    The sum is sha256, or git's sha1, which the hub gives for small files.

    Bytes gather in `path` + ".part", from which a later call goes on. At most `size` bytes are
    taken (0: LIMIT). Raises UserError, ending in `hint`, without network, for a wrong sum, and on
    a full disk.
    """
    if path.is_file() and _sum(path, sha256) == sha256:
        return path
    part = path.with_name(path.name + ".part")
    hint = f"; {hint}" if hint else ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            resumed = part.is_file() and part.stat().st_size > 0
            _download(url, part, size, hint)
            if (found := _sum(part, sha256)) == sha256:
                break
            part.unlink()  # if it was resumed, it may have begun with another version's bytes
            if not resumed:
                raise UserError(
                    f"{url}: its hash is {found[:16]}..., expected {sha256[:16]}...: the file "
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
    """Returns a small document (an index). Raises UserError without network."""
    try:
        with _open(url) as reply:
            return b"".join(_chunks(reply, LIMIT))
    except _Failed as e:
        raise UserError(f"cannot download {url} ({e}){f'; {hint}' if hint else ''}") from None


def _download(url: str, part: Path, size: int, hint: str) -> None:
    """Brings `part` to its full length, and tries again where the connection broke."""
    for attempt in range(TRIES):
        time.sleep(PAUSE_S * (2**attempt // 2))
        have = part.stat().st_size if part.exists() else 0
        error = _Failed("connection cut off")
        try:
            if (size and have >= size) or _append(url, part, have, size):
                return
        except _Failed as e:
            error = e
            if have and e.code == 416:  # nothing beyond what is there; the checksum will tell
                return
            if 0 < e.code < 500 and e.code not in (408, 429):
                break
    have = part.stat().st_size if part.exists() else 0
    kept = f" after {have:,} bytes, which are kept: run again to go on" if have else ""
    raise UserError(f"cannot download {url} ({error}){kept}{hint}")


def _append(url: str, part: Path, have: int, size: int) -> bool:
    """Adds one connection's bytes to `part`. Returns True once the file is complete."""
    with _open(url, have) as reply:
        content_range = reply.headers.get("Content-Range", "")
        resumed = reply.status == 206 and content_range.startswith(f"bytes {have}-")
        have = have if resumed else 0
        total = size or (None if reply.length is None else have + reply.length)
        mode = "ab" if resumed else "wb"
        with open(part, mode) as f, progress(part.stem, total, have) as advance:
            for chunk in _chunks(reply, (size or LIMIT) - have):
                have += f.write(chunk)
                advance(len(chunk))
    return total is None or have >= total


def _open(url: str, have: int = 0) -> http.client.HTTPResponse:
    """Returns the server's reply, from byte `have` on if the server can."""
    try:
        headers = {"User-Agent": "fastgpt"} | ({"Range": f"bytes={have}-"} if have else {})
        request = urllib.request.Request(url, headers=headers)
        return urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except (OSError, http.client.HTTPException, ValueError) as e:
        raise _Failed(e) from None


def _chunks(reply: http.client.HTTPResponse, limit: int) -> Iterator[bytes]:
    """Yields the body as it comes, at most `limit` bytes. Raises _Failed if it is too slow."""
    got, in_window, began = 0, 0, time.monotonic()
    while True:
        try:
            chunk = reply.read1(_CHUNK)
        except (OSError, http.client.HTTPException) as e:
            raise _Failed(e) from None
        if not chunk:
            return
        got, in_window = got + len(chunk), in_window + len(chunk)
        if got > limit:
            raise UserError(f"{reply.url}: is longer than the {limit:,} bytes expected")
        yield chunk
        now = time.monotonic()
        if now - began >= WINDOW_S:
            if in_window < MIN_RATE * WINDOW_S:
                raise _Failed(f"slower than {MIN_RATE:,} bytes per second")
            in_window, began = 0, now
