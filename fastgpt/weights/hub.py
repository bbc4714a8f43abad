"""OpenAI's GPT-2 weights from the Hugging Face hub, downloaded once into the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

from fastgpt.data import download
from fastgpt.errors import UserError, reading
from fastgpt.storage.atomic import explain_os_error, lock_in_turn, replace_folder

FILES = ("config.json", "vocab.json", "merges.txt", "model.safetensors")


def fetch(size: str) -> Path:
    """Returns the folder of the files of gpt2, gpt2-medium, gpt2-large or gpt2-xl.

    Each file is verified by the sum that the hub gives, and the folder gets its name once all are
    whole. Raises UserError without network.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder, repo = Path(cache, "fastgpt", size), f"openai-community/{size}"
    hint = f"download {', '.join(FILES)} of {repo} elsewhere and pass --weights FOLDER"
    if not folder.is_absolute():
        raise UserError(f"{cache}: no absolute path for the user's cache; {hint}")
    if folder.is_dir():
        return folder
    try:
        with lock_in_turn(folder.with_name(f".{size}.lock"), folder):
            if not folder.is_dir():
                partial = folder.with_name(f".{size}.partial")
                _, files = download.hub_files(f"models/{repo}", hint)
                with reading(repo, "has not the expected files"):
                    wanted = [files[name] for name in FILES]
                for remote in wanted:
                    remote.fetch(partial, hint)
                replace_folder(partial, folder)
    except OSError as e:
        raise explain_os_error(e, folder) from e
    return folder
