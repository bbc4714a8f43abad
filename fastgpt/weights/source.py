"""Which weights a command works on: a run's checkpoint, OpenAI's GPT-2, or a folder of yours."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.config.schema import Config, SourceConfig
from fastgpt.data.tokenizers import JSON_NAME, Tokenizer, load_tokenizer
from fastgpt.data.tokens import Dataset
from fastgpt.errors import UserError
from fastgpt.model import ops
from fastgpt.model.device import DTYPES
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.storage import checkpoint, run
from fastgpt.weights import hf_tokenizer, hub, hugging_face


@dataclass
class Source:
    """A model's parts on the CPU, in fp32, before a device and a precision are chosen for it."""

    shape: ModelShape
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer | None
    about: str
    """One line for people: where it is from, and how good it is where that is known."""
    run_dir: Path | None = None

    def model(self, device: torch.device, dtype: str) -> GPT:
        """The model, ready to evaluate or to generate."""
        s, kind = self.shape, DTYPES[dtype]
        table = ops.choose(device, kind, s.sizes(1))
        model = GPT(s, table=table, dtype=kind)
        model.load_state_dict(self.tensors)
        return model.to(device).eval()


def pretrained(init_from: str, weights: str) -> hugging_face.Weights:
    """The model that --init_from=gpt2... or weights, and --weights, name; downloaded if need be."""
    if init_from == "weights" and not weights:
        raise UserError("--init_from=weights: which? name a folder with --weights=PATH")
    size = None if init_from == "weights" else init_from
    path = Path(weights) if weights else hub.fetch(init_from)
    return hugging_face.read(path, size)


def open_source(config: SourceConfig) -> Source:
    """What --init_from, --out_dir, --checkpoint and --weights name."""
    if config.init_from != "resume":
        found = pretrained(config.init_from, config.weights)
        return Source(
            found.shape,
            found.tensors,
            hf_tokenizer.read(found.folder),
            f"{found.source}: {found.shape}",
        )
    if config.weights:
        raise UserError("--weights: goes with --init_from=weights or gpt2..., not with resume")
    run_dir = run.find(config.out_dir)
    saved = checkpoint.load(
        run_dir, config.checkpoint, warn=lambda line: print(line, file=sys.stderr)
    )
    state: dict[str, Any] = saved.state
    tokenizer = load_tokenizer(run_dir) if (run_dir / JSON_NAME).exists() else None
    about = f"{saved.folder}: step {state['step']}, val loss {state['val_loss']:.4f}"
    return Source(ModelShape(**state["model"]), saved.model, tokenizer, about, run_dir)


def start_from(config: Config, dataset: Dataset) -> hugging_face.Weights | None:
    """The weights a new training run starts from, or None; `config.model` is set to their shape.

    As in nanoGPT a smaller --block_size drops the last positions. Says so where the data has
    another tokenizer. Raises UserError where the weights have fewer positions than asked for.
    """
    if config.run.init_from in ("scratch", "resume"):
        return None
    found = pretrained(config.run.init_from, config.run.weights)
    shape, m = found.shape, config.model
    if m.block_size > shape.block_size:
        raise UserError(
            f"--block_size={m.block_size}: {found.source} has {shape.block_size} positions; pass "
            f"--block_size={shape.block_size} or less"
        )
    wpe = found.tensors["transformer.wpe.weight"]
    found.tensors["transformer.wpe.weight"] = wpe[: m.block_size].contiguous()
    found.shape = shape = ModelShape(**{**vars(shape), "block_size": m.block_size})
    for key, value in vars(shape).items():
        setattr(m, key, value)
    print(f"weights from {found.source}: {shape}")
    theirs, data = hf_tokenizer.read(found.folder), dataset.tokenizer
    if theirs and data and theirs.fingerprint != data.fingerprint:
        print(
            f"warning: these weights know the ids of {theirs.name}, the data in {dataset.folder} "
            f"is in {data.name}: the text means nothing to them"
        )
    return found


def vocabulary(config: Config, dataset: Dataset) -> int:
    """The model's vocabulary: as given, else the data's. UserError where the data has more ids."""
    given = config.model.vocab_size
    if given and given < dataset.vocab_size:
        raise UserError(
            f"--vocab_size={given}: the data in {dataset.folder} has a vocabulary of "
            f"{dataset.vocab_size:,}; it needs weights made for it, or other data"
        )
    return given or dataset.vocab_size
