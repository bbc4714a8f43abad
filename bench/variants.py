"""Variants of the training step, each an object with `warm_up` and `step`.

fastgpt's variants run its `Trainer`. The peer is nanoGPT's model.py in the loop of its train.py.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import setup
from fastgpt.config import settings
from fastgpt.config.schema import Config
from fastgpt.errors import UserError
from fastgpt.model.build import build as build_model
from fastgpt.model.device import DTYPES, synchronize
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.train import optim
from fastgpt.train.trainer import Trainer

EAGER = {"kernels": "eager", "compile": False}
KERNELS = {"kernels": "auto", "compile": False}
COMPILED = {"kernels": "eager", "compile": True}
FAST = {"kernels": "auto", "compile": True}


class Variant(NamedTuple):
    """Settings by flat name, of fastgpt in another checkout `root`, or of a peer's model.py."""

    name: str
    settings: Mapping[str, Any]
    peer: str = ""
    root: str = ""


def choose(names: str, peer: str, gpu: bool) -> list[Variant]:
    """Returns the variants of these names, or all, with a nanoGPT checkout. Raises UserError."""
    folder = Path(peer).expanduser().resolve()
    if peer and not (folder / "model.py").is_file():
        raise UserError(f"--peer-path={peer}: there is no model.py in it")
    ways = {"eager": EAGER, "compile": COMPILED, "kernels": KERNELS, "kernels+compile": FAST}
    known = {name: Variant(name, values) for name, values in ways.items()}
    known["peer"] = Variant(f"{folder.name}, eager", EAGER, str(folder))
    known["peer+compile"] = Variant(f"{folder.name}, compile", COMPILED, str(folder))
    if not names:
        names = ",".join(ways if gpu else ["eager"]) + f",peer{'+compile' * gpu}" * bool(peer)
    for name in names.split(","):
        if name not in known:
            raise UserError(f"--variants: no {name!r}; there are {', '.join(known)}")
        if name.startswith("kernels") and not gpu:
            raise UserError(f"--variants: {name} needs a GPU")
        if name.startswith("peer") and not peer:
            raise UserError(f"--variants: {name} needs --peer-path")
    return [known[name] for name in names.split(",")]


def swaps(texts: Sequence[str], gpu: bool) -> list[Variant]:
    """Returns the fast path, and a variant per text of assignments. Raises UserError."""
    base = Variant("kernels+compile", FAST) if gpu else Variant("eager", EAGER)
    variants = [base]
    for text in texts:
        flags = dict(a.partition("=")[::2] for a in text.split(","))
        values = settings.to_dict(settings.apply_flags(Config(), flags))
        own = {key: values[key] for key in flags}
        variants.append(Variant(text, {**base.settings, **own}))
    return variants


class Own:
    """Step of fastgpt's trainer. `graphed` if it replays a CUDA graph."""

    def __init__(self, variant: Variant, config: Config, vocab_size: int):
        machine = setup.machine(config)
        self.trainer = Trainer(build_model(config, vocab_size, machine), config, machine)
        self.ops = [f"{c.op}: {c.implementation} ({c.reason})" for c in self.trainer.selected]
        self.graphed, self.step = False, self.trainer.step

    def warm_up(self, tokens: Tensor) -> None:
        micro_batch = tokens[: self.trainer.batch_size]
        self.trainer.warm_up(0, micro_batch)
        if self.trainer.machine.compile:  # as `fastgpt train` does
            self.ops.append(self.trainer.capture(0, micro_batch))
            self.graphed = self.trainer.graph is not None


class Peer:
    """Step of nanoGPT's model from fastgpt's first weights."""

    def __init__(self, variant: Variant, config: Config, vocab_size: int):
        if config.system.dtype == "float16":
            raise UserError("the peer has no gradient scaler for float16: use bfloat16")
        self.config, self.device = config, torch.device(config.system.device)
        self.model = _nanogpt(Path(variant.peer), config, vocab_size).to(self.device).train()
        o = config.optim
        self.optimizer = self.model.configure_optimizers(
            o.weight_decay, o.learning_rate, (o.beta1, o.beta2), self.device.type
        )
        self.forward = torch.compile(self.model) if config.system.compile else self.model
        self.ops, self.graphed = ["its own model and optimizer, autocast"], False

    def _backward(self, tokens: Tensor) -> Tensor:
        micro_batches = tokens.split(self.config.optim.batch_size)
        total = torch.zeros((), device=self.device)
        dtype, exact = DTYPES[self.config.system.dtype], self.config.system.dtype == "float32"
        for micro_batch in micro_batches:
            # It views targets, which have to be contiguous as its loader's are.
            idx, targets = micro_batch[:, :-1].contiguous(), micro_batch[:, 1:].contiguous()
            with torch.autocast(self.device.type, None if exact else dtype, enabled=not exact):
                loss = self.forward(idx, targets)[1] / len(micro_batches)
            loss.backward()
            total += loss.detach()
        return total

    def warm_up(self, tokens: Tensor) -> None:
        self._backward(tokens[: self.config.optim.batch_size])
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.device)

    def step(self, step: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        optim.set_learning_rate(self.optimizer, optim.learning_rate(step, self.config.optim))
        loss = self._backward(tokens)
        clip = self.config.optim.grad_clip or float("inf")
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, grad_norm


def _nanogpt(folder: Path, config: Config, vocab_size: int) -> Any:
    found = importlib.util.spec_from_file_location("bench_peer_model", folder / "model.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    # Its train.py takes 50304 for GPT-2's vocabulary.
    rows = 50304 if vocab_size == 50257 else vocab_size
    same = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    sizes = {name: getattr(config.model, name) for name in same}
    model = module.GPT(module.GPTConfig(vocab_size=rows, **sizes))
    own = GPT(ModelShape.of(config.model, vocab_size)).init_weights(config.run.seed)
    weights = own.state_dict()
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:rows]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    left = [k for k in missing if k != "lm_head.weight" and not k.endswith("attn.bias")]
    if left or unexpected:
        raise UserError(f"{folder}: not nanoGPT's model: {(left + unexpected)[0]}")
    return model


def build(variant: Variant, config: Config, vocab_size: int) -> Own | Peer:
    """Returns the variant's model and optimizer on the config's device. Raises UserError."""
    config = setup.with_values(config, dict(variant.settings))
    exact = config.system.dtype == "float32" and not config.system.tf32
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.manual_seed(config.run.seed)
    return (Peer if variant.peer else Own)(variant, config, vocab_size)
