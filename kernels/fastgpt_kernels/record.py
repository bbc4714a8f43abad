"""What an op tells the rest of the program about itself, so that nobody else knows it by name.

Each op's room has a `record.py` with its records; `record(name)` finds one. The
op table, the self-check, benchmarks and traces are written in terms of these.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import OPS, reference


@dataclass(frozen=True)
class Sizes:
    """A model and its micro-batch, as ops see them; GPT-2 124M's but for the rows."""

    batch_size: int = 2
    block_size: int = 256
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50257
    padded_vocab_size: int = 50304
    dropout: float = 0.0

    @property
    def tokens(self) -> int:
        return self.batch_size * self.block_size

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


@dataclass(frozen=True)
class Case:
    """Inputs of one call: the differentiable ones in fp32, and the other arguments by name."""

    inputs: list[Tensor]
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """FLOPs (0: bound by memory) and bytes of one pass, each tensor moved once."""

    flops: float = 0.0
    bytes: float = 0.0


Random = Callable[..., Tensor]  # (*shape) -> N(0, 1) in fp32


def normal(device: torch.device, seed: int = 0) -> Random:
    """Random numbers on a device, the same for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, device=device)


def differentiate(function: Callable[..., Any], case: Case) -> list[Tensor]:
    """Results and gradients in fp32; all results are weighed by fixed random numbers."""
    leaves = [x.clone().requires_grad_() for x in case.inputs]
    out = function(*leaves, **case.arguments)
    outs = list(out) if isinstance(out, tuple) else [out]
    weights = [normal(o.device, seed=1 + i)(*o.shape).to(o.dtype) for i, o in enumerate(outs)]
    torch.autograd.backward(outs, weights)
    return [t.detach().float() for t in (*outs, *(x.grad for x in leaves if x.grad is not None))]


@dataclass(frozen=True)
class Record:
    """One op.

    name             as in flags, `--op.NAME`, and in `fastgpt_kernels`
    implementations  by the name that a flag gives them. "eager" is plain PyTorch with the signature
                     of ours: it runs on every device, and is what the others are held against.
                     "triton" is ours
    case             inputs at a model's sizes
    work             FLOPs and bytes of each pass ("forward", "backward", or "both" if the gradient
                     is computed with the result), from sizes and bytes an element
    kernels          names of its Triton kernels, as a profile shows them
    part             of a training step that it belongs to, as traces group it: attention, head,
                     linear, memory or optimizer
    item             what a trace calls it inside of that part
    limits           why ours cannot take these sizes and this dtype on this architecture ("sm_90";
                     "cpu" is Triton's interpreter); empty if it can
    library          whose fused kernel "eager" is already, if it is one: such an op is left only on
                     architectures on which ours was measured faster
    measured_faster  these architectures
    made_of          other ops that "eager" takes as keyword arguments
    masters          it works on fp32 masters, whatever the activations' dtype is
    run              (implementation, case) -> all that has to agree between implementations
    """

    name: str
    implementations: Mapping[str, Callable[..., Any]]
    case: Callable[[Sizes, Random], Case]
    work: Callable[[Sizes, int], dict[str, Work]]
    kernels: tuple[str, ...]
    part: str
    item: str = ""
    limits: Callable[[Sizes, torch.dtype, str], str] = lambda sizes, dtype, arch: ""
    library: str = ""
    measured_faster: tuple[str, ...] = ()
    made_of: tuple[str, ...] = ()
    masters: bool = False
    run: Callable[[Callable[..., Any], Case], list[Tensor]] = differentiate

    @property
    def eager(self) -> Callable[..., Any]:
        return self.implementations["eager"]

    @property
    def twin(self) -> Callable[..., Any]:
        """The specification: the function in `reference`, or eager if there is none."""
        return getattr(reference, self.name, self.eager)

    @property
    def ours(self) -> Callable[..., Any]:
        return self.implementations["triton"]


def record(name: str) -> Record:
    """An op's record; loads its room."""
    return importlib.import_module(f"{OPS[name].room}.record").RECORDS[name]


def records(chosen_by: str | None = None) -> list[Record]:
    """All records, or those of the ops that one part of the program chooses."""
    return [record(n) for n, e in OPS.items() if chosen_by is None or e.chosen_by == chosen_by]
