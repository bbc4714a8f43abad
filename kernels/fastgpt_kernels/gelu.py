"""GELU of x + bias, the bias gradient included (Hendrycks & Gimpel, 2016).

    z = x + bias (not rounded)
    approximate="none"   y = z Phi(z)                Phi(z) = (1 + erf(z / sqrt 2)) / 2
    approximate="tanh"   y = z sigmoid(2u)           u = sqrt(2 / pi) (z + 0.044715 z^3)

since (1 + tanh u) / 2 = sigmoid(2u): one exponential, and no cancellation for negative z. The
derivatives are

    none   Phi(z) + z phi(z)                         phi(z) = exp(-z^2 / 2) / sqrt(2 pi)
    tanh   s + z s (1 - s) 2u'                       s = sigmoid(2u), u' = du/dz

x, y (..., C) in one dtype, bias (C,) in any; the arithmetic is fp32.
Bytes an element, 2-byte dtype: forward 4, backward 6; dbias has no pass of its own. The kernels and
their launchers are in gelu_kernels.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgpt_kernels import reference
from fastgpt_kernels._host import FLOAT_DTYPES, call_directly, check_tensor, use_kernel
from fastgpt_kernels.gelu_kernels import launch_backward, launch_forward

# --------------------------------------------------------------------------------- registered ops


@torch.library.custom_op("fastgpt::bias_gelu", mutates_args=())
def _op(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    return launch_forward(x, bias, tanh)


@_op.register_fake
def _(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("fastgpt::bias_gelu_backward", mutates_args=())
def _backward_op(dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    dx, dbias = launch_backward(dy, x, bias, tanh)
    return dx, x.new_empty(0) if dbias is None else dbias


@_backward_op.register_fake
def _(dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.tanh = inputs
    ctx.save_for_backward(x, bias)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients for (x, bias, tanh), from the registered op or straight from the launcher."""
    x, bias = ctx.saved_tensors
    backward = launch_backward if call_directly(dy, x) else _backward_op
    dx, dbias = backward(dy, x, bias, ctx.tanh)
    return dx, None if bias is None else dbias, None


_op.register_autograd(_gradients, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The same as the registered op, without its cost a call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        y = launch_forward(*inputs)
        _setup_context(ctx, inputs, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _gradients(ctx, dy)


# --------------------------------------------------------------------------------- public function


def bias_gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """GELU of x + bias: x (..., C) in bf16, fp16 or fp32, bias (C,) in any of them or None.

    approximate is "tanh" (GPT-2's) or "none" (by erf), as in `torch.nn.functional.gelu`. The result
    has x's shape and dtype, contiguous; bias's gradient comes in bias's dtype. Leave the bias out
    of the linear layer before: `bias_gelu(F.linear(x, weight), bias)`.
    Raises TypeError or ValueError for arguments that do not fit.
    """
    check_tensor("bias_gelu", "x", x, dtypes=FLOAT_DTYPES)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"bias_gelu: x must have shape (..., C) with C >= 1, got {tuple(x.shape)}")
    if bias is not None:
        check_tensor(
            "bias_gelu", "bias", bias, shape=x.shape[-1:], dtypes=FLOAT_DTYPES, device=x.device
        )
    if approximate not in ("tanh", "none"):
        raise ValueError(f"bias_gelu: approximate must be 'tanh' or 'none', got {approximate!r}")
    if not use_kernel(x):
        return reference.bias_gelu(x, bias, approximate)
    if call_directly(x, bias):
        return _Direct.apply(x, bias, approximate == "tanh")
    return _op(x, bias, approximate == "tanh")
