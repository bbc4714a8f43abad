"""Attention for Hopper in the emulator: problems, what is right, and one run of a pass.

python -m tests.kernels.gluon.cases [SEEDS]      one problem of each pass under 1,000 seeds
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.kernels.gluon.emulator import emulated  # isort: skip - before Gluon is
from tests.kernels.gluon.values import KernelError  # isort: skip
from fastgpt_kernels import attention_hopper, reference
from fastgpt_kernels.launch import lookup

Run = Callable[..., str]  # (problem, seed, module, strict) -> what is wrong with the values


@dataclass(frozen=True)
class Problem:
    """Sizes of packed qkv and what is asked for."""

    T: int
    head_dim: int = 64
    causal: bool = True
    batch: int = 1
    n_head: int = 1
    dtype: torch.dtype = torch.bfloat16
    spread: float = 1.0  # of the inputs' values
    programs: int = 2  # of persistent kernels: with one, rings go round and heads follow each other

    @functools.cached_property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Returns qkv (B, T, 3*C) and the gradient of y (B, T, C)."""
        generator = torch.Generator().manual_seed(self.T)
        C = self.n_head * self.head_dim
        shapes = (self.batch, self.T, 3 * C), (self.batch, self.T, C)
        qkv, grad = (torch.randn(s, generator=generator) * self.spread for s in shapes)
        return qkv.to(self.dtype), grad.to(self.dtype)

    @functools.cached_property
    def truth(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns in fp64 y, the rows' base-2 log-sum-exp (B * H, T), the gradient of qkv."""
        qkv, grad = self.inputs
        exact = qkv.double().requires_grad_()
        y = reference.attention(exact, self.n_head, causal=self.causal)
        y.backward(grad.double())
        q, k, _ = exact.detach().view(self.batch, self.T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        if self.causal:
            hidden = torch.ones(self.T, self.T, dtype=torch.bool).triu(1)
            logits = logits.masked_fill(hidden, -math.inf)
        lse = logits.logsumexp(-1).view(-1, self.T) * attention_hopper.LOG2_E
        assert exact.grad is not None
        return y.detach(), lse, exact.grad


# The slots of the rings are two, so that a few tiles go round them.
def forward_config(head_dim: int) -> Any:
    config = lookup(attention_hopper.FORWARD, "sm_90", head_dim)
    return replace(config, blocks={**config.blocks, "STAGES": 2})


def run_forward(p: Problem, seed: int, module: Any = attention_hopper, strict: bool = True) -> str:
    """Returns what is wrong with the values of an emulated forward pass; empty if nothing is."""
    y, lse, _ = p.truth
    sms = mock.patch.object(module, "multiprocessors", lambda x: p.programs)
    with emulated(seed=seed, strict=strict), sms:
        got = module.forward(
            p.inputs[0], p.n_head, p.causal, p.head_dim**-0.5, forward_config(p.head_dim)
        )
    return _compare(p, {"y": (got[0], y)}) or _off("lse", got[1], lse, 1e-3 * p.spread**2)


def run_backward(p: Problem, seed: int, module: Any = attention_hopper, strict: bool = True) -> str:
    """Returns the same of a backward pass, given exact results of the forward pass."""
    qkv, grad = p.inputs
    y, lse, _ = p.truth
    with emulated(seed=seed, strict=strict):
        got = module.backward(
            grad, qkv, y.to(p.dtype), lse.float(), p.n_head, p.causal, p.head_dim**-0.5, False
        )
    return _compare_gradient(p, got)


def by_head(p: Problem, seed: int, module: Any = attention_hopper, strict: bool = True) -> Tensor:
    """Returns dqkv of an emulated backward pass by head, given exact forward results."""
    qkv, grad = p.inputs
    y, lse, _ = p.truth
    sms = mock.patch.object(module, "multiprocessors", lambda x: p.programs)
    with emulated(seed=seed, strict=strict), sms:
        return module.backward(
            grad, qkv, y.to(p.dtype), lse.float(), p.n_head, True, 0.125, by_head=True
        )


def run_by_head(p: Problem, seed: int, module: Any = attention_hopper, strict: bool = True) -> str:
    """Returns what is wrong with the values of `by_head`."""
    return _compare_gradient(p, by_head(p, seed, module, strict))


def _compare_gradient(p: Problem, dqkv: Tensor) -> str:
    parts = zip(("dq", "dk", "dv"), dqkv.chunk(3, -1), p.truth[2].chunk(3, -1), strict=True)
    return _compare(p, {name: (a, b) for name, a, b in parts})


def _compare(p: Problem, pairs: dict[str, tuple[Tensor, Tensor]]) -> str:
    """Results are rounded once, and so is p, and dS before they are multiplied."""
    eps = torch.finfo(p.dtype).eps
    for name, (got, want) in pairs.items():
        if wrong := _off(name, got, want, eps * want.norm().item() + 1e-6):
            return wrong
    return ""


def _off(name: str, got: Tensor, want: Tensor, allowed: float) -> str:
    off = (got.double() - want).norm().item()
    return "" if off <= allowed else f"{name} is off by {off:.3g}, {allowed:.3g} are allowed"


# Tiles are of 128 keys and 128 rows, backward at head dim 128 of 64 rows: rings of two slots go
# round twice in 512 and 300 positions. A ragged end of one row, of less and more than half a tile.
FORWARD = [
    Problem(512, programs=1),
    Problem(300, causal=False, n_head=2),
    Problem(385, head_dim=128, programs=1),
    Problem(257, head_dim=128, causal=False, dtype=torch.float16),
    Problem(130, batch=2, n_head=2, dtype=torch.float16, spread=4.0),
    Problem(1),
]
BACKWARD = [
    Problem(512),
    Problem(300, causal=False),
    Problem(300, head_dim=128),
    Problem(193, head_dim=128, causal=False, dtype=torch.float16),
    Problem(130, batch=2, dtype=torch.float16),
    Problem(1),
]
# One program has several heads, or a head has one tile, or the programs share the heads unevenly.
BY_HEAD = [
    Problem(512, n_head=2, programs=1),
    Problem(300, n_head=3),
    Problem(384, batch=2, programs=1, dtype=torch.float16),
    Problem(77, batch=2, spread=2.0, programs=1),
    Problem(1),
]


def found(run: Run, p: Any, module: Any, seed: int, strict: bool = True) -> str:
    """Returns what one seed finds; empty for nothing."""
    try:
        return run(p, seed, module, strict)
    except KernelError as error:
        return str(error)


def main(cases: Sequence[tuple[Run, Any, Any]], seeds: int = 1000) -> int:
    """Runs each problem of a module's kernels under many seeds; prints what they find."""
    failures = 0
    for run, problem, module in cases:
        for seed in range(seeds):
            if wrong := found(run, problem, module, seed):
                failures += 1
                print(f"{run.__name__} seed {seed}: {wrong}", flush=True)
        print(f"{run.__name__} of {problem}: {seeds} seeds, {failures} failures so far", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    pairs = (run_forward, FORWARD[0]), (run_backward, BACKWARD[0]), (run_by_head, BY_HEAD[0])
    sys.exit(main([(*pair, attention_hopper) for pair in pairs], *map(int, sys.argv[1:])))
