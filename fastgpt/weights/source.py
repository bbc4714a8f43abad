"""Which weights a command works on: a run's checkpoint, OpenAI's GPT-2, or a folder of yours."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgpt.config import settings
from fastgpt.config.schema import Config, SourceConfig
from fastgpt.data.tokenizer import JSON_NAME, Tokenizer, load_tokenizer
from fastgpt.errors import BadWeights, UserError, reading
from fastgpt.model.build import build
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.storage import checkpoint
from fastgpt.storage import run_dir as run
from fastgpt.weights import hf_tokenizer, hub, hugging_face
from fastgpt.weights.hugging_face import expected


@dataclass
class Source:
    """A model's parts on the CPU, in fp32, before a device and a precision are chosen for it."""

    shape: ModelShape
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer | None
    about: str
    """One line for people: its origin, and its loss if that is known."""
    run_dir: Path | None = None

    @property
    def origin(self) -> str:
        return self.about.partition(": ")[0]

    def not_finite(self) -> list[str]:
        """Names of the tensors that hold a NaN or an infinity."""
        return [name for name, t in self.tensors.items() if not bool(torch.isfinite(t).all())]

    def check_finite(self) -> None:
        """Raise BadWeights if a tensor holds a NaN or an infinity."""
        if bad := self.not_finite():
            raise BadWeights(
                f"{self.origin}: {len(bad)} of {len(self.tensors)} tensors hold NaN or infinity, "
                f"{bad[0]} first: nothing can be computed with these weights"
            )

    def need_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer. Raises UserError if it is not known."""
        if self.tokenizer is not None:
            return self.tokenizer
        if self.run_dir is None:
            raise UserError(f"{self.origin}: has no tokenizer that can be read, so no text")
        raise UserError(
            f"{self.run_dir}: its data has no tokenizer, so there is no text; if it is known, "
            f"name it: fastgpt train --init_from=resume --out_dir={self.run_dir} "
            "--tokenizer=gpt2 --vocab_file=FILE"
        )

    def encode(self, text: bytes, name: object) -> np.ndarray:
        """Returns ids (n,) of UTF-8 text `name`. Raises UserError for one that the model lacks."""
        tokenizer = self.need_tokenizer()
        ids = tokenizer.encode_bytes(text)
        if (largest := ids.max(initial=0)) >= self.shape.vocab_size:
            raise UserError(
                f"{name}: has token {largest:,}, the model knows {self.shape.vocab_size:,}: "
                f"this tokenizer ({tokenizer.name}) is not the model's"
            )
        return ids

    def model(self, machine: Machine) -> GPT:
        """The model, ready to evaluate or to generate."""
        config = settings.replace(Config(), **vars(self.shape))
        return build(config, self.shape.vocab_size, machine, self.tensors).eval()


def pretrained(init_from: str, weights: str) -> hugging_face.Weights:
    """The model that --init_from=gpt2... or weights, and --weights, name; downloaded if need be."""
    size = None if init_from == "weights" else init_from
    path = Path(weights) if weights else hub.fetch(init_from)
    return hugging_face.read(path, size)


def open_source(config: SourceConfig) -> Source:
    """What --init_from, --out_dir, --checkpoint and --weights name."""
    if config.init_from != "resume":
        found = pretrained(config.init_from, config.weights)
        tokenizer, about = hf_tokenizer.read(found.folder), f"{found.source}: {found.shape}"
        return Source(found.shape, found.tensors, tokenizer, about)
    run_dir = run.find(config.out_dir)
    warn = partial(print, file=sys.stderr)
    saved = checkpoint.load(run_dir, config.checkpoint, warn=warn)
    state: dict[str, Any] = saved.state
    tokenizer = load_tokenizer(run_dir) if (run_dir / JSON_NAME).exists() else None
    want = state.get("tokenizer")
    if tokenizer is not None and want not in (None, tokenizer.fingerprint):
        raise UserError(
            f"{run_dir / JSON_NAME}: is not the tokenizer that the checkpoint was trained with: "
            "changed, or damaged; `fastgpt train --init_from=resume` writes it anew from the data"
        )
    with reading(saved.folder / "state.json", "is damaged"):
        about = f"{saved.folder}: step {state['step']}, val loss {state['val_loss']:.4f}"
        shape = ModelShape(**state["model"])
        hugging_face.check_layers(saved.folder, saved.model, shape)
        sizes = expected(shape)
        sizes["transformer.wte.weight"] = (shape.padded_vocab_size, shape.n_embd)
    path = saved.folder / "model.safetensors"
    hugging_face.check(path, hugging_face.describe(path, saved.model), sizes, shape.n_layer)
    return Source(shape, saved.model, tokenizer, about, run_dir)
