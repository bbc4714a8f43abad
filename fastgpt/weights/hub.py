"""OpenAI's GPT-2 weights from the Hugging Face hub, once; later runs take them from its cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import urllib.error
import urllib.request
from pathlib import Path

from fastgpt.errors import UserError
from fastgpt.storage.atomic import sha256_file

PATIENCE_S = 4.0
FILES = ("config.json", "vocab.json", "merges.txt", "model.safetensors")


def fetch(size: str) -> Path:
    """Returns the folder of the downloaded files of gpt2, gpt2-medium, gpt2-large or gpt2-xl.

    huggingface_hub shows a progress bar and keeps the files in its cache (HF_HOME). Each is
    verified against the hash that the hub gives. Raises UserError without network or package.
    """
    name, repository = FILES[0], f"openai-community/{size}"
    elsewhere = f"download {', '.join(FILES)} of {repository} elsewhere and pass --weights FOLDER"
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UserError(
            f"--init_from={size}: needs huggingface_hub to download (pip install "
            f"huggingface_hub); or {elsewhere}"
        ) from None
    paths: list[Path] = []
    with contextlib.suppress(Exception):  # not all of them are in its cache
        paths = [Path(hf_hub_download(repository, n, local_files_only=True)) for n in FILES]
    if not paths and (why := unreachable()):
        raise UserError(f"--init_from={size}: cannot reach the hub ({why}); {elsewhere}")
    try:
        paths = paths or [Path(hf_hub_download(repository, name := n)) for n in FILES]
    # Its errors (HTTP, offline, disk, its own) have no common base in all of its versions.
    except Exception as e:
        why = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        raise UserError(
            f"--init_from={size}: cannot download {name} from {repository} ({why}); {elsewhere}"
        ) from e
    for path in paths:
        verify(path)
    return paths[0].parent


def unreachable() -> str | None:
    """Returns the reason if the hub gives no answer at all within a few seconds, else None.

    The hub's own client tries again and again, which takes it most of a minute to give up.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "fastgpt"})
        urllib.request.urlopen(request, timeout=PATIENCE_S).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as e:
        return str(getattr(e, "reason", e)) or type(e).__name__
    return None


def verify(path: Path) -> None:
    """Raises UserError if a cached file's bytes do not have the hash that it is named by.

    That is sha256 for large files, and git's sha1 of a blob for small ones.
    """
    want, got = path.resolve().name, ""
    if re.fullmatch(r"[0-9a-f]{64}", want):
        got = sha256_file(path)
    elif re.fullmatch(r"[0-9a-f]{40}", want):
        data = path.read_bytes()
        got = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    # A cache without links (Windows) has other names: huggingface_hub has compared the size.
    if got and got != want:
        raise UserError(
            f"{path.resolve()}: its hash is {got[:16]}..., the hub says {want[:16]}...: remove the "
            "file and run again"
        )
