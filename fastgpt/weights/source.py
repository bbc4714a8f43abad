"""Models that commands work on, of a run's checkpoint, OpenAI's GPT-2, or any folder."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgpt.config import settings
from fastgpt.config.schema import Config, ExportConfig, SourceConfig
from fastgpt.data.tokenizer import JSON_NAME, Tokenizer, load_tokenizer
from fastgpt.errors import UserError, reading
from fastgpt.model.build import build
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.storage import checkpoint
from fastgpt.storage import run_dir as run
from fastgpt.storage.atomic import explain_os_error, lock, sweep
from fastgpt.weights import hf_tokenizer, hub, hugging_face


@dataclass
class Source:
    """Parts of a model on the CPU, in fp32, before a device and a precision are chosen.

    about  a line to print, with the origin and, if known, the loss
    """

    shape: ModelShape
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer | None
    about: str
    run_dir: Path | None = None

    @property
    def origin(self) -> str:
        return self.about.partition(": ")[0]

    def not_finite(self) -> list[str]:
        """Returns the names of the tensors that hold a NaN or an infinity."""
        return [name for name, t in self.tensors.items() if not bool(torch.isfinite(t).all())]

    def check_finite(self) -> None:
        """Raises UserError if a tensor holds a NaN or an infinity."""
        if bad := self.not_finite():
            raise UserError(
                f"{self.origin}: {len(bad)} of {len(self.tensors)} tensors hold NaN or infinity, "
                f"{bad[0]} first: nothing can be computed with these weights",
                code=1,
            )

    def need_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer. Raises UserError if it is not known."""
        if self.tokenizer is not None:
            return self.tokenizer
        if self.run_dir is None:
            wrong = f"{self.origin}: has no tokenizer that can be read, so there is no text"
            raise UserError(f"{wrong}; wanted {hf_tokenizer.WANTED}")
        raise UserError(
            f"{self.run_dir}: its data has no tokenizer, so there is no text; if it is known, "
            f"name it: fastgpt train --init_from=resume --out_dir={self.run_dir} "
            "--tokenizer=gpt2 --vocab_file=FILE"
        )

    def encode(self, text: str, name: object) -> np.ndarray:
        """Returns ids (n,) of the text `name`. Raises UserError for one that the model lacks."""
        tokenizer = self.need_tokenizer()
        ids = tokenizer.encode(text)
        if (largest := ids.max(initial=0)) >= self.shape.vocab_size:
            raise UserError(
                f"{name}: has token {largest:,}, the model knows {self.shape.vocab_size:,}: "
                f"this tokenizer ({tokenizer.name}) is not the model's"
            )
        return ids

    def model(self, machine: Machine) -> GPT:
        """Returns the model, ready to evaluate or to generate."""
        config = settings.replace(Config(), **vars(self.shape))
        return build(config, self.shape.vocab_size, machine, self.tensors).eval()


def pretrained(init_from: str, weights: str) -> hugging_face.Weights:
    """Returns the model that --init_from and --weights name, downloaded if need be."""
    size = None if init_from == "weights" else init_from
    path = Path(weights) if weights else hub.fetch(init_from)
    return hugging_face.read(path, size)


def open_source(config: SourceConfig) -> Source:
    """Returns the model that --init_from, --out_dir, --checkpoint and --weights name."""
    if config.init_from != "resume":
        found = pretrained(config.init_from, config.weights)
        tokenizer, about = hf_tokenizer.read(found.folder), f"{found.source}: {found.shape}"
        return Source(found.shape, found.tensors, tokenizer, about)
    run_dir = run.find(config.out_dir)
    saved = checkpoint.load(run_dir, config.checkpoint, warn=partial(print, file=sys.stderr))
    tokenizer = load_tokenizer(run_dir) if (run_dir / JSON_NAME).exists() else None
    if tokenizer is not None and saved.state.get("tokenizer") not in (None, tokenizer.fingerprint):
        raise UserError(
            f"{run_dir / JSON_NAME}: is not the tokenizer that the checkpoint was trained with: "
            "changed, or damaged; `fastgpt train --init_from=resume` writes it anew from the data"
        )
    with reading(saved.folder / "state.json", "is damaged"):
        about = f"{saved.folder}: step {saved.state['step']}, "
        about += f"val loss {saved.state['val_loss']:.4f}"
        shape = ModelShape(**saved.state["model"])
        sizes = hugging_face.expected(shape)
        sizes["transformer.wte.weight"] = (shape.padded_vocab_size, shape.n_embd)
    path = saved.folder / "model.safetensors"
    hugging_face.check(path, hugging_face.kinds(saved.model), sizes, shape.n_layer)
    return Source(shape, saved.model, tokenizer, about, run_dir)


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
        kind = f"{tokenizer.name} is no byte-level BPE" if tokenizer else "no tokenizer is known"
        print(f"without tokenizer files for Hugging Face: {kind}")
    return 0
