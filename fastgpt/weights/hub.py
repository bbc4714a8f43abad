"""OpenAI's GPT-2 weights from the Hugging Face hub, once; later runs take them from its cache."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from fastgpt.errors import UserError
from fastgpt.storage.files import sha256_file
from fastgpt.weights.hugging_face import SIZES

REPOSITORIES = {name: f"openai-community/{name}" for name in SIZES}
FILES = ("config.json", "vocab.json", "merges.txt", "model.safetensors")


def fetch(size: str) -> Path:
    """The folder of the downloaded files of gpt2, gpt2-medium, gpt2-large or gpt2-xl.

    huggingface_hub shows a progress bar and keeps the files in its cache (HF_HOME). Each is
    verified against the hash that the hub gives. UserError, one line, without network or package.
    """
    elsewhere = (
        f"download {', '.join(FILES)} of {REPOSITORIES[size]} elsewhere and pass --weights FOLDER"
    )
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UserError(
            f"--init_from={size}: needs huggingface_hub to download (pip install "
            f"huggingface_hub); or {elsewhere}"
        ) from None
    folder = Path()
    for name in FILES:
        try:
            path = Path(hf_hub_download(REPOSITORIES[size], name))
        # Its errors have no base in common over its versions: HTTP, offline, disk, its own.
        except Exception as e:
            why = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
            raise UserError(
                f"--init_from={size}: cannot download {name} from {REPOSITORIES[size]} ({why}); "
                f"{elsewhere}"
            ) from e
        verify(path)
        folder = path.parent
    return folder


def verify(path: Path) -> None:
    """Compare a cached file with its hash: large files are stored under their sha256, small ones
    under git's sha1 of a blob. UserError if it is another."""
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
