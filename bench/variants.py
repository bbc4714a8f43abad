"""Ways to compute the same training step, each behind one face: `warm_up` and `step`.

Ours go through `fastgpt.train.step.Trainer`, with model and op table as `fastgpt train` makes them.
The others get the training loop that their own users write: autocast, clipping, fused AdamW.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import setup
from fastgpt.config import settings
from fastgpt.config.schema import Config
from fastgpt.errors import UserError
from fastgpt.model.build import build as build_model
from fastgpt.model.device import DTYPES, synchronize
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.train import graph, optim
from fastgpt.train.step import Trainer

PEER, HF = "peer", "hf"


@dataclass(frozen=True)
class Variant:
    """One contender. `kind` is ours, peer or hf; `overrides` as --op.NAME; `path` is the peer's."""

    name: str
    kind: str = "ours"
    compile: bool = False
    kernels: str = "eager"
    graph: bool = False  # one CUDA graph a micro-step, where `fastgpt train` would make one
    overrides: dict[str, str] = field(default_factory=dict)
    path: str = ""
    root: str = ""  # another checkout, whose fastgpt and kernels are measured; empty: this one


class Stepper(Protocol):
    """A model in training. Tokens are (rows, T + 1) on the device."""

    choices: list[str]
    graphed: bool  # whether steps replay a CUDA graph, whose memory no allocator counts

    def warm_up(self, tokens: Tensor) -> None: ...

    def step(self, step: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """One update; loss and gradient norm, on the device."""
        ...

    def evaluate(self, tokens: Tensor) -> Tensor: ...


def first_weights(config: Config, vocab_size: int) -> dict[str, Tensor]:
    """What our model starts with, on the CPU."""
    model = GPT(ModelShape.of(config.model, vocab_size))
    return model.init_weights(config.run.seed).state_dict()


def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    """Mixed precision for the forward pass; nothing for float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[dtype])


class Ours:
    """fastgpt.train.step.Trainer."""

    def __init__(self, variant: Variant, config: Config, vocab_size: int):
        overrides = {f"op.{op}": to for op, to in variant.overrides.items()}
        config = settings.replace(
            config, kernels=variant.kernels, compile=variant.compile, **overrides
        )
        machine = setup.machine_of(config)
        model = build_model(config, vocab_size, machine)
        self.trainer = Trainer(model, config, machine)
        self.choices = [f"{c.op}: {c.implementation} ({c.reason})" for c in self.trainer.choices]
        self.may_graph, self.graphed = variant.graph, False

    def warm_up(self, tokens: Tensor) -> None:
        micro_batch = tokens[: self.trainer.config.optim.batch_size]
        self.trainer.warm_up(0, micro_batch)
        if self.may_graph:
            self._capture(micro_batch)

    def _capture(self, micro_batch: Tensor) -> None:
        """As fastgpt.train.loop: a graph if that pays; without one if it cannot be had."""
        t = self.trainer
        wanted, why = graph.wanted(t.config.system, t.model, t.machine, t.batch_size)
        if wanted:
            try:
                t.capture(0, micro_batch)
                self.graphed = True
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as e:
                why = f"not captured: {e}".splitlines()[0]
        self.choices.append(f"CUDA graph: {'yes' if self.graphed else 'no'} ({why})")

    def step(self, step: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.trainer.step(step, tokens)

    def evaluate(self, tokens: Tensor) -> Tensor:
        return self.trainer.losses(tokens)


class Peer:
    """Another project's model in the loop that its own users run."""

    def __init__(self, model: nn.Module, variant: Variant, config: Config):
        self.config, self.device = config, torch.device(config.system.device)
        self.model = model.to(self.device).train()
        params = [p for p in self.model.parameters() if p.requires_grad]
        o = config.optim
        groups = [
            {"params": [p for p in params if p.ndim >= 2], "weight_decay": o.weight_decay},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=o.learning_rate, betas=(o.beta1, o.beta2), fused=True
        )
        self.params = params
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=config.system.dtype == "float16"
        )
        self.forward = torch.compile(self.loss) if variant.compile else self.loss
        self.choices, self.graphed = ["its own model, autocast, fused AdamW"], False

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def _backward(self, tokens: Tensor) -> Tensor:
        micro_batches = tokens.split(self.config.optim.batch_size)
        total = torch.zeros((), device=self.device)
        for micro_batch in micro_batches:
            with autocast(self.device, self.config.system.dtype):
                loss = self.forward(micro_batch[:, :-1], micro_batch[:, 1:]) / len(micro_batches)
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def warm_up(self, tokens: Tensor) -> None:
        self._backward(tokens[: self.config.optim.batch_size])
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.device)

    def step(self, step: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        optim.set_learning_rate(self.optimizer, optim.learning_rate(step, self.config.optim))
        loss = self._backward(tokens)
        self.scaler.unscale_(self.optimizer)
        clip = self.config.optim.grad_clip or float("inf")
        grad_norm = nn.utils.clip_grad_norm_(self.params, clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, grad_norm

    @torch.no_grad()
    def evaluate(self, tokens: Tensor) -> Tensor:
        self.model.eval()
        with autocast(self.device, self.config.system.dtype):
            loss = self.forward(tokens[:, :-1], tokens[:, 1:])
        self.model.train()
        return loss


class NanoGPT(Peer):
    """The model.py of a nanoGPT checkout, imported from there; weights start as ours do."""

    def __init__(self, variant: Variant, config: Config, vocab_size: int):
        module = _import_model(Path(variant.path))
        m, weights = config.model, first_weights(config, vocab_size)
        # Its train.py takes 50304 for GPT-2's vocabulary and a data set's own otherwise.
        rows = 50304 if vocab_size == 50257 else vocab_size
        with_sizes = module.GPTConfig(
            block_size=m.block_size,
            vocab_size=rows,
            n_layer=m.n_layer,
            n_head=m.n_head,
            n_embd=m.n_embd,
            dropout=m.dropout,
            bias=m.bias,
        )
        model = module.GPT(with_sizes)
        weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:rows]
        missing, unexpected = model.load_state_dict(weights, strict=False)
        left = [k for k in missing if k != "lm_head.weight" and not k.endswith("attn.bias")]
        if left or unexpected:
            raise UserError(f"{variant.path}: not nanoGPT's model: {(left + unexpected)[0]}")
        super().__init__(model, variant, config)

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        # Its targets are viewed, not reshaped: they have to be contiguous, as its loader's are.
        return self.model(idx.contiguous(), targets.contiguous())[1]


class HuggingFace(Peer):
    """transformers' GPT2LMHeadModel with our weights; where we have no biases, its are frozen."""

    def __init__(self, variant: Variant, config: Config, vocab_size: int):
        from transformers import GPT2Config, GPT2LMHeadModel

        m, weights = config.model, first_weights(config, vocab_size)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab_size,
                n_positions=m.block_size,
                n_embd=m.n_embd,
                n_layer=m.n_layer,
                n_head=m.n_head,
                activation_function="gelu" if m.gelu == "erf" else "gelu_new",
                resid_pdrop=m.dropout,
                embd_pdrop=m.dropout,
                attn_pdrop=m.dropout,
                use_cache=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:vocab_size]
        for name, p in model.named_parameters():
            if name in weights:
                w = weights[name]
                p.data.copy_(w.T if _is_conv1d(name) else w)
            else:
                p.data.zero_()
                p.requires_grad_(False)
        super().__init__(model, variant, config)

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(input_ids=idx).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _is_conv1d(name: str) -> bool:
    """transformers keeps these (in, out), as GPT-2's first code did."""
    return name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def _import_model(folder: Path) -> Any:
    path = folder / "model.py"
    spec = importlib.util.spec_from_file_location("bench_peer_model", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"--peer-path={folder}: there is no model.py in it")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def build(variant: Variant, config: Config, vocab_size: int) -> Stepper:
    """The variant's model and optimizer on the config's device. Raises UserError."""
    exact = config.system.dtype == "float32" and not getattr(config.system, "tf32", True)
    torch.set_float32_matmul_precision("highest" if exact else "high")  # peers' too
    torch.manual_seed(config.run.seed)
    kinds: dict[str, Callable[..., Stepper]] = {"ours": Ours, PEER: NanoGPT, HF: HuggingFace}
    return kinds[variant.kind](variant, config, vocab_size)
