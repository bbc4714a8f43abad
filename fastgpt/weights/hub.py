"""OpenAI's GPT-2 weights from the Hugging Face hub, once; later runs take them from its cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path

from fastgpt.errors import UserError
from fastgpt.storage.atomic import sha256_file
from fastgpt.weights.hugging_face import SIZES

REPOSITORIES = {name: f"openai-community/{name}" for name in SIZES}
PATIENCE_S = 4.0
FILES = ("config.json", "vocab.json", "merges.txt", "model.safetensors")


def fetch(size: str) -> Path:
    """The folder of the downloaded files of gpt2, gpt2-medium, gpt2-large or gpt2-xl.

    huggingface_hub shows a progress bar and keeps the files in its cache (HF_HOME). Each is
    verified against the hash that the hub gives. UserError without network or package.
    """
    repository = REPOSITORIES[size]
    elsewhere = f"download {', '.join(FILES)} of {repository} elsewhere and pass --weights FOLDER"
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UserError(
            f"--init_from={size}: needs huggingface_hub to download (pip install "
            f"huggingface_hub); or {elsewhere}"
        ) from None
    with contextlib.suppress(Exception):  # not all of them are in its cache
        paths = [Path(hf_hub_download(repository, n, local_files_only=True)) for n in FILES]
        for path in paths:
            verify(path)
        return paths[0].parent
    if (why := unreachable()) is not None:
        raise UserError(f"--init_from={size}: cannot reach the hub ({why}); {elsewhere}")
    folder = Path()
    for name in FILES:
        try:
            path = Path(hf_hub_download(repository, name))
        # Its errors (HTTP, offline, disk, its own) have no common base in all of its versions.
        except Exception as e:
            why = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
            raise UserError(
                f"--init_from={size}: cannot download {name} from {repository} ({why}); {elsewhere}"
            ) from e
        verify(path)
        folder = path.parent
    return folder


def unreachable() -> str | None:
    """Why the hub does not answer within five seconds; None if it does, whatever it says.

    The hub's own client tries again and again, which takes it most of a minute to give up.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "fastgpt"})
            urllib.request.urlopen(request, timeout=PATIENCE_S).close()
            answers.put(None)
        except urllib.error.HTTPError:
            answers.put(None)
        except Exception as e:
            answers.put(str(getattr(e, "reason", e)) or type(e).__name__)

    # In a thread: finding out the address of a host has no limit of its own.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=PATIENCE_S + 0.5)
    except queue.Empty:
        return f"no answer from {url} in {PATIENCE_S:g} s"


def verify(path: Path) -> None:
    """Raise UserError if a cached file's bytes do not have the hash that it is named by.

    That is sha256 for large files, and git's sha1 of a blob for small ones.
    """
    want = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", want):
        got = sha256_file(path)
    elif re.fullmatch(r"[0-9a-f]{40}", want):
        data = path.read_bytes()
        got = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    else:  # a cache without links (Windows): huggingface_hub has compared the size
        return
    if got != want:
        raise UserError(
            f"{path.resolve()}: its hash is {got[:16]}..., the hub says {want[:16]}...: remove the "
            "file and run again"
        )
