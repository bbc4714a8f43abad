"""Gradients that add up where they lie: no pass of its own reads and writes them again.

Autograd gives each backward pass's gradient of a weight a place of its own, and then adds it to
`.grad`, 16 bytes a weight. What adds to a tensor that the caller keeps moves 8. PyTorch is told
that the weight has no gradient; the caller makes that tensor the weight's `.grad`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels.launch import arch_of
from fastgpt_kernels.register import Op, product_flops

WIDENED_ROWS = 4096  # of a factor that is widened to fp32 at a time


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """total += a @ b, or total = a @ b if it is the first: summed in fp32, and never rounded.

    total (N, K) fp32; a (N, M) and b (M, K) of one dtype. On CUDA the product adds in its epilogue.
    """
    wide: dict[str, torch.dtype] = {}
    parts = [(total, a)]
    if a.dtype != torch.float32 and arch_of(a).startswith("sm_"):
        wide = {"out_dtype": torch.float32}
    elif a.dtype != torch.float32:  # elsewhere PyTorch would round the result: widen the factors
        parts = [*zip(total.split(WIDENED_ROWS), a.split(WIDENED_ROWS), strict=True)]
        b = b.float()
    for sums, factor in parts:
        factor = factor if wide else factor.float()
        if first:
            torch.mm(factor, b, out=sums, **wide)  # type: ignore[call-overload]
        else:
            torch.addmm(sums, factor, b, out=sums, **wide)  # type: ignore[call-overload]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    add_product(total, a, b)


def _add_scaled(total: Tensor, x: Tensor, scale: Tensor) -> None:
    total.addcmul_(x, scale)


def _add_rows(total: Tensor, rows: Tensor, x: Tensor) -> None:
    total.index_add_(0, rows, x)


def _nothing(*_: Any) -> None:
    pass


# Ops, which torch.compile calls as they stand: of what it knows itself it would copy the sum.
adds_product = Op(
    "add_product", _add_product, _nothing, mutates=("total",),
    flops=lambda total, a, b, **_: product_flops(a, torch.Size((b[1], a[1])), 1),
)  # fmt: skip
# total += scale x, scale () fp32
adds_scaled = Op("add_scaled", _add_scaled, _nothing, mutates=("total",))
# total[rows[i]] += x[i], rows (M,) int64, x (M, C) like total (V, C)
adds_rows = Op("add_rows", _add_rows, _nothing, mutates=("total",))
