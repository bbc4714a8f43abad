"""`fastgpt export`: a trained model as a Hugging Face GPT-2 folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fastgpt.config.schema import ExportConfig
from fastgpt.errors import UserError
from fastgpt.storage.files import explain_os_error, hold, sweep_unheld
from fastgpt.weights import hf_tokenizer, hugging_face
from fastgpt.weights.source import open_source


def export(config: ExportConfig) -> int:
    """Write --to. Returns the exit code; UserError if it exists and is not empty."""
    folder = Path(config.to)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to={folder}: is not empty; name a new folder")
    source, held = open_source(config), None
    if bad := source.not_finite():
        print(f"warning: {len(bad)} tensors hold NaN or infinity, {bad[0]} first")
    tokenizer = source.tokenizer
    prefix = f".tmp-{folder.name}-"
    aside = folder.with_name(f"{prefix}{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        held = hold(aside)
        sweep_unheld(folder.parent, f"{prefix}*")
        length = source.shape.block_size
        files = hf_tokenizer.write(aside, tokenizer, length) if tokenizer else []
        eot = tokenizer.eot if tokenizer else None
        hugging_face.write(aside, source.shape, source.tensors, eot)
        os.replace(aside, folder)
    except OSError as e:
        raise explain_os_error(e, folder) from e
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if held is not None:
            os.close(held)
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
