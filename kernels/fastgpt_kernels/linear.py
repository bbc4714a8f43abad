"""Linear layers of fp32 weights that matmuls read in 16 bits, with fp32 weight gradients.

    y = x W^T + bias        dx = dy W        dW = dy^T x        dbias = the sum of dy's rows

x (..., K), W (N, K), y (..., N). `weight_bf16` is a copy of W in x's dtype, which is rounded once
per step instead of once per pass. dW is the matmul's fp32 sum, never rounded. Given `main_grad`,
(N, K) fp32, cuBLAS adds dW to it as the matmul ends: 8 bytes per weight move, where autograd moves
16 to write a new gradient and to add it to `.grad`. W then has no gradient of its own: the caller
makes `main_grad` its `.grad`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt_kernels.library import define_op, refuse_second_derivative

WIDENED_ROWS = 4096  # of a factor that is widened to fp32 at a time


def accumulates_in_fp32(device: torch.device) -> bool:
    """Returns True where a matmul of 16-bit factors can add to fp32 as it ends: with cuBLAS."""
    return device.type == "cuda" and torch.version.hip is None


def add_matmul(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """Computes total += a @ b, or total = a @ b if it is the first, in fp32.

    total (N, K) fp32; a (N, M) and b (M, K) of one dtype.
    """
    wide: dict[str, torch.dtype] = {}
    parts = [(total, a)]
    if a.dtype != torch.float32 and accumulates_in_fp32(a.device):
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


# The functions below are ops, which torch.compile calls as they are: of in-place additions that it
# knows it would copy the sum.


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    add_matmul(total, a, b)


def _add_scaled(total: Tensor, x: Tensor, scale: Tensor) -> None:
    total.addcmul_(x, scale)


def _add_rows(total: Tensor, rows: Tensor, x: Tensor) -> None:
    total.index_add_(0, rows, x)


def _no_result(*_: Any) -> None:
    pass


accumulate_matmul = define_op(
    "accumulate_matmul", _add_matmul, _no_result, mutates=("total",),
    flops=lambda total, a, b, **_: 2 * a[0] * a[1] * b[1],
)  # fmt: skip
# total += scale x, scale () fp32
accumulate_scaled = define_op("accumulate_scaled", _add_scaled, _no_result, mutates=("total",))
# total[rows[i]] += x[i], rows (M,) int64, x (M, C) like total (V, C)
accumulate_rows = define_op("accumulate_rows", _add_rows, _no_result, mutates=("total",))


def weight_gradient(dy: Tensor, x: Tensor, main_grad: Tensor | None) -> Tensor | None:
    """Returns dy^T x in fp32: dy (M, N), x (M, K). Given `main_grad`, adds it there instead."""
    if main_grad is not None:
        return accumulate_matmul(main_grad, dy.t(), x)
    if accumulates_in_fp32(x.device):
        return torch.mm(dy.t(), x, out_dtype=torch.float32)
    return torch.mm(dy.t(), x).float()


class _LinearWithCopy(torch.autograd.Function):
    """x R^T + bias with a copy R of the weight, which gets the gradient of R, in fp32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, copy: Tensor, bias: Tensor | None,
        main_grad: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, copy)
        ctx.main_grad = main_grad  # not saved: autograd would refuse what is changed
        return F.linear(x, copy, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative("linear")
        x, copy = ctx.saved_tensors
        for_x, for_weight, _, for_bias, _ = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = dy @ copy if for_x else None
        dw = None
        if for_weight:
            dw = weight_gradient(rows, x.reshape(-1, x.shape[-1]), ctx.main_grad)
        return dx, dw, None, rows.sum(0) if for_bias else None, None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    weight_bf16: Tensor | None = None,
    main_grad: Tensor | None = None,
) -> Tensor:
    """Returns x W^T + bias (..., N) in x's dtype.

    x (..., K); weight (N, K) and bias (N,) like x or fp32. `weight_bf16` (N, K) is the weight in
    x's dtype. The gradient of an fp32 weight is fp32; given `main_grad` (N, K) fp32 the backward
    pass adds it there, and the weight has none.
    """
    bias = None if bias is None else bias.to(x.dtype)
    if weight.dtype != torch.float32 or x.dtype.itemsize != 2:
        return F.linear(x, weight.to(x.dtype), bias)
    copy = weight.to(x.dtype) if weight_bf16 is None else weight_bf16
    return _LinearWithCopy.apply(x, weight, copy, bias, main_grad)


class _TiedEmbedding(torch.autograd.Function):
    """Rows of a weight, and the weight for the head, to whose gradient those of the rows add."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(idx)
        return F.embedding(idx, weight), weight.view_as(weight)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, rows: Tensor, head: Tensor
    ) -> tuple[Tensor, None]:
        refuse_second_derivative("tied_embedding")
        (idx,) = ctx.saved_tensors
        if rows.device.type != "cpu":
            return head.index_put((idx,), rows, accumulate=True), None
        # There threads of index_put, and of what Inductor makes of it or of index_add, add to a row
        # in the order in which they come: no two runs would be the same to the bit.
        total = head.clone()
        accumulate_rows(total, idx.flatten(), rows.flatten(0, 1))
        return total, None


class _EmbeddingToMainGrad(torch.autograd.Function):
    """Rows of a weight, whose gradients are added to those of `main_grad`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, idx: Tensor, main_grad: Tensor) -> Tensor:
        ctx.save_for_backward(idx)
        ctx.main_grad = main_grad  # not saved: autograd would refuse what is changed
        return F.embedding(idx, weight)

    @staticmethod
    def backward(ctx: Any, rows: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        refuse_second_derivative("tied_embedding")
        (idx,) = ctx.saved_tensors
        accumulate_rows(ctx.main_grad, idx.flatten(), rows.flatten(0, 1))
        return None, None, None


def tied_embedding(
    weight: Tensor, idx: Tensor, main_grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the rows idx (B, T) of a weight (V, C), and the weight for the head to read.

    The two share one gradient: no zeros are filled in for the rows, and no two gradients of the
    weight's size are summed. Given `main_grad` (V, C) fp32 the rows' gradients are added there.
    """
    if main_grad is None:
        return _TiedEmbedding.apply(weight, idx)
    return _EmbeddingToMainGrad.apply(weight, idx, main_grad), weight
