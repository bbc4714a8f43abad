"""The head for bench.kernels: projection to the vocabulary and loss in one op, by several hands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgpt_kernels as ours
from bench.kernel_cases import Case, Provider, Tensors, compiled, installed


def linear_cross_entropy(device: torch.device, size: int = 0) -> Case:
    """Loss and both gradients together; `size` is the vocabulary."""
    M, C, V = (32768, 768, size or 50304) if device.type == "cuda" else (64, 32, size or 500)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(M, C, device=device).to(dtype)
    weight = (torch.randn(V, C, device=device) / C**0.5).to(dtype)
    targets = torch.randint(V, (M,), device=device)

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), targets)

    def oracle() -> Tensors:
        """Chunk by chunk: fp64 logits do not fit."""
        w = weight.double()
        total, dw = torch.zeros((), dtype=torch.float64, device=device), torch.zeros_like(w)
        dx = torch.empty(M, C, dtype=torch.float64, device=device)
        for i in range(0, M, 2048):
            rows = slice(i, i + 2048)
            logits, e = x[rows].double() @ w.T, x[rows].double()
            total += F.cross_entropy(logits, targets[rows], reduction="sum")
            p = logits.softmax(1)
            p[torch.arange(len(p), device=device), targets[rows]] -= 1
            dx[rows], dw = p @ w / M, dw + p.T @ e / M
        return [total / M, dx, dw]

    def liger() -> Callable[..., Any]:
        from liger_kernel.transformers import (  # type: ignore[import-not-found]
            LigerFusedLinearCrossEntropyLoss,
        )

        loss = LigerFusedLinearCrossEntropyLoss()
        return lambda x, weight: loss(weight, x, targets)

    def cut() -> Callable[..., Any]:
        from cut_cross_entropy import (  # type: ignore[import-not-found]
            linear_cross_entropy,
        )

        return lambda x, weight: linear_cross_entropy(x, weight, targets)

    case = Case(
        "linear_cross_entropy",
        f"{M} x {C} -> {V} {str(dtype)[6:]}",
        [x, weight],
        [torch.ones((), device=device)],
        [
            Provider("fastgpt", lambda x, w: ours.linear_cross_entropy(x, w, targets)),
            Provider("eager", eager),
        ],
        oracle,
        "TFLOP/s",
        {"both": 6.0 * M * C * V},
    )
    compiled(case, eager, device)
    installed(case, "liger-kernel", "liger_kernel", device, liger)
    installed(case, "cut-cross-entropy", "cut_cross_entropy", device, cut)
    return case
