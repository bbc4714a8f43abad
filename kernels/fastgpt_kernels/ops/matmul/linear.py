"""A linear layer whose three products are ours: y = x W^T + bias.

    dx = dy W          dW = dy^T x          dbias = sum of dy over the rows

x and y in 16 bits, the weight in fp32 (a master, rounded on the way in) or like x. dW and dbias
come straight from fp32 sums in the dtype of the weight and the bias; dbias is added up while dW's
product reads dy, and has no pass of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt_kernels import reference
from fastgpt_kernels.checks import FLOAT_DTYPES, check_tensor
from fastgpt_kernels.launch import HAS_TRITON, arch_of, use_kernel
from fastgpt_kernels.ops.matmul.configs import ALIGNMENT, runs_on
from fastgpt_kernels.register import Op, product_flops


def check_layer(op: str, prefix: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless weight (N, x's last size) and bias (N,) make a layer for x."""
    dtypes = (x.dtype, torch.float32)
    check_tensor(op, f"{prefix}weight", weight, shape=(None, x.shape[-1]), dtypes=dtypes, like=x)
    N = weight.shape[:1]
    check_tensor(op, f"{prefix}bias", bias, shape=N, dtypes=dtypes, like=x, optional=True)


def use_matmul(op: str, x: Tensor, *sizes: int) -> bool:
    """Whether the kernel computes layers of these sizes for x; False: PyTorch does.

    fp32 on a GPU is left to cuBLAS, since tensor cores have no products of it. Raises ValueError
    for rows that TMA does not take, and for a GPU without TMA.
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


def in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """weight rounded to dtype; None if it is of that dtype already."""
    return None if weight.dtype == dtype else weight.to(dtype)


def rounded_or(rounded: Tensor | None, weight: Tensor) -> Tensor:
    """What `in_dtype` gave, or the weight itself if that was nothing."""
    return weight if rounded is None or rounded.numel() == 0 else rounded


def dtype_of(parameter: Tensor | None) -> torch.dtype | None:
    return None if parameter is None else parameter.dtype


def weight_gradients(
    dy: Tensor, x: Tensor, weight_dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """(dW (N, K), dbias (N,)) of dy (M, N) and x (M, K); no dbias if bias_dtype is None."""
    dw, db = launch_matmul(
        dy, x, a_transposed=True, b_transposed=True, dtype=weight_dtype,
        column_sums=bias_dtype is not None,
    )  # fmt: skip
    return dw, None if db is None else db.to(bias_dtype)


def gradient_shapes(
    weight: Tensor, dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """Tensors like what `weight_gradients` returns."""
    db = None if bias_dtype is None else weight.new_empty(weight.shape[0], dtype=bias_dtype)
    return weight.new_empty(weight.shape, dtype=dtype), db


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(y (M, N), the weight in x's dtype if it was not)."""
    rounded = in_dtype(weight, x.dtype)
    return launch_matmul(x, rounded_or(rounded, weight), bias=bias)[0], rounded


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, weight_dtype: torch.dtype,
    bias_dtype: torch.dtype | None, needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dx, dW, dbias), each None unless it is needed."""
    dy = dy.contiguous()
    dx = launch_matmul(dy, weight, b_transposed=True)[0] if needs[0] else None
    dw, db = weight_gradients(dy, x, weight_dtype, bias_dtype) if any(needs[1:]) else (None, None)
    return dx, dw, db


def _save(inputs, results):
    x, weight, bias = inputs
    return (x, rounded_or(results[1], weight)), (weight.dtype, dtype_of(bias))


def _gradient_shapes(dy, x, weight, weight_dtype, bias_dtype, needs):
    parameters = gradient_shapes(weight, weight_dtype, bias_dtype)
    dx = x.new_empty(x.shape) if needs[0] else None
    return dx, *(parameters if any(needs[1:]) else (None, None))


if HAS_TRITON:
    from fastgpt_kernels.ops.matmul.kernels import launch_matmul

    _op = Op(
        "linear", _forward,
        lambda x, weight, bias: (
            x.new_empty(x.shape[0], weight.shape[0]),
            None if weight.dtype == x.dtype else x.new_empty(weight.shape),
        ),
        saves=_save,
        backward=Op(
            "linear_backward", _backward, _gradient_shapes,
            flops=lambda dy, x, w, *rest, **_: product_flops(x, w, rest[2][0] + any(rest[2][1:])),
        ),
        gradients=(0, 1, 2), needs=True,
        flops=lambda x, w, *_, **__: product_flops(x, w, 1),
    )  # fmt: skip


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
    return _op(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])
