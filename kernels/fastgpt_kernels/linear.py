"""A linear layer whose three products are ours: y = x W^T + bias.

    dx = dy W          dW = dy^T x          dbias = sum of dy over the rows

x and y in 16 bits, the weight in fp32 (a master, rounded on the way in) or like x. dW and dbias
come straight from fp32 sums in the dtype of the weight and the bias; dbias is added up while dW's
product reads dy, and has no pass of its own. The kernel is in matmul_kernels.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from fastgpt_kernels import reference
from fastgpt_kernels._host import FLOAT_DTYPES, arch_of, call_directly, check_tensor, use_kernel
from fastgpt_kernels._matmul_specs import aot_specs, tunables
from fastgpt_kernels.matmul_kernels import ALIGNMENT, launch_matmul, runs_on

__all__ = ["aot_specs", "linear", "tunables"]


def check_layer(op: str, prefix: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise where weight (N, x's last size) and bias (N,) do not make a layer for x."""
    check_tensor(
        op,
        f"{prefix}weight",
        weight,
        shape=(None, x.shape[-1]),
        dtypes=(x.dtype, torch.float32),
        device=x.device,
    )
    if bias is not None:
        check_tensor(
            op,
            f"{prefix}bias",
            bias,
            shape=weight.shape[:1],
            dtypes=(x.dtype, torch.float32),
            device=x.device,
        )


def use_matmul(op: str, x: Tensor, *sizes: int) -> bool:
    """Whether the kernel computes layers of these sizes for x; False: PyTorch does.

    fp32 on a GPU is left to cuBLAS, since tensor cores have no products of it. Raises ValueError
    where the kernel cannot: rows that TMA does not take, a GPU that has no TMA.
    """
    if not use_kernel(x) or x.numel() == 0 or (x.is_cuda and x.dtype == torch.float32):
        return False
    if not runs_on(arch := arch_of(x)):
        raise ValueError(f"{op}: needs a GPU with TMA (sm_90 or later), this is {arch}")
    step = ALIGNMENT // x.element_size()
    for size in sizes:
        if size % step:
            raise ValueError(f"{op}: features must be a multiple of {step}, got {size}")
    return True


def in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight rounded to dtype; empty where it is of that dtype, since an op may not return it."""
    return weight.new_empty(0) if weight.dtype == dtype else weight.to(dtype)


def weight_gradients(
    dy: Tensor, x: Tensor, weight_dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """(dW (N, K), dbias (N,)) of dy (M, N) and x (M, K); dbias empty where bias_dtype is None."""
    dw, db = launch_matmul(
        dy,
        x,
        a_transposed=True,
        b_transposed=True,
        dtype=weight_dtype,
        column_sums=bias_dtype is not None,
    )
    return dw, dy.new_empty(0) if db is None else db.to(bias_dtype)


# --------------------------------------------------------------------------------- registered ops


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(y (M, N), the weight in x's dtype where it was not)."""
    rounded = in_dtype(weight, x.dtype)
    return launch_matmul(x, rounded if rounded.numel() else weight, bias=bias)[0], rounded


_op = torch.library.custom_op("fastgpt::linear", _forward, mutates_args=())


@_op.register_fake
def _(x, weight, bias):
    shape = (0,) if weight.dtype == x.dtype else weight.shape
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(shape)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dW, dbias), each empty where it is not wanted."""
    empty = dy.new_empty(0)
    dx = launch_matmul(dy, weight, b_transposed=True)[0] if need_dx else empty
    if not need_dw:
        return dx, dy.new_empty(0), dy.new_empty(0)
    return dx, *weight_gradients(dy, x, weight_dtype, bias_dtype)


_backward_op = torch.library.custom_op("fastgpt::linear_backward", _backward, mutates_args=())


@_backward_op.register_fake
def _(dy, x, weight, weight_dtype, bias_dtype, need_dx, need_dw):
    has_db = need_dw and bias_dtype is not None
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        weight.new_empty(weight.shape, dtype=weight_dtype) if need_dw else dy.new_empty(0),
        dy.new_empty(weight.shape[0], dtype=bias_dtype) if has_db else dy.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias = inputs
    rounded = output[1]
    ctx.save_for_backward(x, rounded if rounded.numel() else weight)
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    x, weight = ctx.saved_tensors
    need_dx, *need = ctx.needs_input_grad
    dy = dy.contiguous()
    backward = _backward if call_directly(dy, x, weight) else _backward_op
    dx, dw, db = backward(*(dy, x, weight, *ctx.dtypes, need_dx, any(need)))
    has_db = any(need) and ctx.dtypes[1] is not None
    return dx if need_dx else None, dw if any(need) else None, db if has_db else None


_op.register_autograd(_gradients, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The same as the registered op, without its cost a call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        outputs = _forward(*inputs)
        _setup_context(ctx, inputs, outputs)
        return outputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _gradients(ctx, dy)


@register_flop_formula(torch.ops.fastgpt.linear)
def _flops(x_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.fastgpt.linear_backward)
def _backward_flops(dy_shape, x_shape, weight_shape, *args, **kwargs) -> int:
    need_dx, need_dw = args[2:4]
    return _flops(x_shape, weight_shape) * (need_dx + need_dw)


# --------------------------------------------------------------------------------- public function


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias: x (..., K) in bf16, fp16 or fp32, weight (N, K) and bias (N,) like x or fp32.

    K and N are multiples of 8 (of 4 in fp32). y (..., N) has x's dtype; the gradients of weight and
    bias come in theirs, from fp32 sums. fp32 on a GPU is computed by cuBLAS. Raises TypeError or
    ValueError for arguments that do not fit, and on a GPU without TMA (before sm_90).
    """
    check_tensor("linear", "x", x, dtypes=FLOAT_DTYPES)
    if x.ndim == 0:
        raise ValueError("linear: x must have shape (..., K), got ()")
    check_layer("linear", "", x, weight, bias)
    if not use_matmul("linear", x, *weight.shape):
        return reference.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if call_directly(x, weight, bias):
        y = _Direct.apply(rows, weight, bias)
    else:
        y = _op(rows, weight, bias)[0]
    return y.view(*x.shape[:-1], weight.shape[0])
