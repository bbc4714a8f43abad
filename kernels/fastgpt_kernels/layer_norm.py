"""Layer normalisation, alone or with the residual addition before it (Ba et al., 2016).

    s = x + residual                    (add_layer_norm only; rounded to x's dtype, returned)
    y = (s - mean(s)) * rstd * weight + bias          rstd = 1 / sqrt(var(s) + eps), var over 1/C

x, residual, y, s (..., C) in one dtype; weight, bias (C,) in any; mean and rstd in fp32.
With xhat = (s - mean) * rstd and g = dy * weight the gradients are

    ds = rstd * (g - mean(g) - xhat * mean(g * xhat)) + d_residual_out        for x and residual
    dweight = sum over rows of dy * xhat, dbias = sum over rows of dy

Bytes an element, 2-byte dtype: forward 4, with the addition 8; backward 6, with the addition 8.
Every tensor is read once; the kernels and their launchers are in layer_norm_kernels.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgpt_kernels import reference
from fastgpt_kernels._host import FLOAT_DTYPES, call_directly, check_tensor, use_kernel
from fastgpt_kernels.layer_norm_kernels import launch_backward, launch_forward

MAX_WIDTH = 8192  # a row, and in the backward its share of dweight and dbias, live in registers

# --------------------------------------------------------------------------------- registered ops


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """Registered ops return tensors only: an empty one stands for None."""
    return like.new_empty(0) if x is None else x


@torch.library.custom_op("fastgpt::layer_norm", mutates_args=())
def _op(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, residual_out, stats = launch_forward(x, residual, weight, bias, eps)
    return y, _or_empty(residual_out, x), stats


@_op.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    residual_out = x.new_empty(0 if residual is None else x.shape)
    stats = x.new_empty((2, x.numel() // x.shape[-1]), dtype=torch.float32)
    return x.new_empty(x.shape), residual_out, stats


@torch.library.custom_op("fastgpt::layer_norm_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    d_residual_out: Tensor | None,
    s: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    ds, dweight, dbias = launch_backward(dy, d_residual_out, s, weight, bias, stats)
    return ds, dweight, _or_empty(dbias, weight)


@_backward_op.register_fake
def _(
    dy: Tensor,
    d_residual_out: Tensor | None,
    s: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return s.new_empty(s.shape), weight.new_empty(weight.shape), dbias


def _gradients(
    ctx: Any, dy: Tensor | None, d_residual_out: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients for (x, residual, weight, bias, eps), from the registered op or straight."""
    s, weight, bias, stats = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(s)
    backward = launch_backward if call_directly(dy, d_residual_out, s) else _backward_op
    ds, dweight, dbias = backward(dy, d_residual_out, s, weight, bias, stats)
    return ds, ds if ctx.has_residual else None, dweight, None if bias is None else dbias, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, residual, weight, bias, _ = inputs
    _, residual_out, stats = output
    ctx.set_materialize_grads(False)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(residual_out if ctx.has_residual else x, weight, bias, stats)


def _op_backward(
    ctx: Any, dy: Tensor | None, d_residual_out: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, dy, d_residual_out if ctx.has_residual else None)


_op.register_autograd(_op_backward, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The same as the registered op, without its cost a call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        y, residual_out, stats = launch_forward(*inputs)
        _setup_context(ctx, inputs, (y, residual_out, stats))
        return (y, residual_out) if ctx.has_residual else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_residual_out: Tensor | None = None) -> Any:
        return _gradients(ctx, dy, d_residual_out)


# --------------------------------------------------------------------------------- public functions


def _check(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None
) -> None:
    check_tensor(op, "x", x, dtypes=FLOAT_DTYPES)
    if x.ndim == 0 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(
            f"{op}: x must have shape (..., C) with 1 <= C <= {MAX_WIDTH}, got {tuple(x.shape)}"
        )
    if residual is not None:
        check_tensor(op, "residual", residual, shape=x.shape, dtypes=(x.dtype,), device=x.device)
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None or name == "weight":
            check_tensor(op, name, p, shape=x.shape[-1:], dtypes=FLOAT_DTYPES, device=x.device)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Normalise the last dimension of x (..., C), then scale by weight and shift by bias (C,).

    y has x's shape and dtype (bf16, fp16, fp32), contiguous; statistics are fp32. weight and bias
    may be in another dtype than x, such as fp32 masters; their gradients come in their own dtype.
    C from 1 to 8192. Raises TypeError or ValueError for arguments that do not fit.
    """
    _check("layer_norm", x, None, weight, bias)
    if not use_kernel(x):
        return reference.layer_norm(x, weight, bias, eps)
    if call_directly(x, weight, bias):
        return _Direct.apply(x, None, weight, bias, eps)
    return _op(x, None, weight, bias, eps)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(y, residual_out): residual_out = x + residual, y = layer_norm(residual_out), in one pass.

    x and residual (..., C) in the same dtype, which both results have. The backward pass adds the
    gradients that arrive through y and residual_out in one kernel; x and residual get the same
    tensor. Everything else as in `layer_norm`.
    """
    check_tensor("add_layer_norm", "residual", residual)
    _check("add_layer_norm", x, residual, weight, bias)
    if not use_kernel(x):
        return reference.add_layer_norm(x, residual, weight, bias, eps)
    if call_directly(x, residual, weight, bias):
        return _Direct.apply(x, residual, weight, bias, eps)
    y, residual_out, _ = _op(x, residual, weight, bias, eps)
    return y, residual_out
