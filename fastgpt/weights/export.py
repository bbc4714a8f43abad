"""`fastgpt export`: a trained model as a Hugging Face GPT-2 folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fastgpt.config.schema import ExportConfig
from fastgpt.errors import UserError
from fastgpt.storage.atomic import explain_os_error, lock, sweep
from fastgpt.weights import hf_tokenizer, hugging_face
from fastgpt.weights.source import open_source


def export(config: ExportConfig) -> int:
    """Writes --to. Returns the exit code. Raises UserError if the folder is not empty."""
    folder = Path(config.to)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to={folder}: is not empty; name a new folder")
    source = open_source(config)
    if bad := source.not_finite():
        print(f"warning: {len(bad)} tensors hold NaN or infinity, {bad[0]} first")
    tokenizer, files = source.tokenizer, []
    aside = folder.with_name(f".tmp-{folder.name}")
    try:
        aside.mkdir(parents=True, exist_ok=True)
        with lock(aside, f"--to={folder}: another process is exporting to it"):
            try:
                sweep(aside, "*")  # leftovers of an export that was killed
                if tokenizer:
                    files = hf_tokenizer.write(aside, tokenizer, source.shape.block_size)
                eot = tokenizer.eot if tokenizer else None
                hugging_face.write(aside, source.shape, source.tensors, eot)
                os.replace(aside, folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except OSError as e:
        raise explain_os_error(e, folder) from e
    written = [hugging_face.WEIGHTS, "config.json", "generation_config.json", *files]
    print(f"{source.about}\nexported to {folder}: {', '.join(written)}")
    if not files:
        kind = "no tokenizer is known"
        if tokenizer:
            kind = f"the {tokenizer.name} tokenizer has none"
            if tokenizer.name == "char":
                kind += ", as its alphabet has characters of several bytes"
        print(f"without tokenizer files for Hugging Face: {kind}")
    return 0
