"""Layer normalisation, alone or with the residual addition before it (Ba et al., 2016).

    s = x + residual                    (add_layer_norm only; rounded to x's dtype, returned)
    y = (s - mean(s)) * rstd * weight + bias          rstd = 1 / sqrt(var(s) + eps), var over 1/C

x, residual, y, s (..., C) in one dtype; weight, bias (C,) in any; mean and rstd in fp32.
With xhat = (s - mean) * rstd and g = dy * weight the gradients are

    ds = rstd * (g - mean(g) - xhat * mean(g * xhat)) + d_residual_out        for x and residual
    dweight = sum over rows of dy * xhat, dbias = sum over rows of dy

Bytes an element, 2-byte dtype: forward 4, with the addition 8; backward 6, with the addition 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt_kernels import reference
from fastgpt_kernels.host import FLOAT_DTYPES, HAS_TRITON, check_tensor, use_kernel
from fastgpt_kernels.register import Op

MAX_WIDTH = 8192  # a row, and in the backward pass dweight and dbias, have to fit in registers


def _shapes(x, residual, *_):
    stats = x.new_empty(2 * (x.numel() // x.shape[-1]) + COUNTERS, dtype=torch.float32)
    return x.new_empty(x.shape), None if residual is None else x.new_empty(x.shape), stats


def _gradient_shapes(dy, d_residual_out, s, weight, bias, stats):
    dbias = None if bias is None else bias.new_empty(bias.shape)
    return s.new_empty(s.shape), weight.new_empty(weight.shape), dbias


def _save(inputs, results):
    x, residual, weight, bias, _ = inputs
    _, residual_out, stats = results
    return (x if residual is None else residual_out, weight, bias, stats), ()


if HAS_TRITON:
    from fastgpt_kernels.ops.norm.kernels import launch_backward, launch_forward
    from fastgpt_kernels.partials import COUNTERS

    _op = Op(
        "layer_norm", launch_forward, _shapes,
        public=2, saves=_save,
        backward=Op("layer_norm_backward", launch_backward, _gradient_shapes),
        gradients=(0, 0, 1, 2),  # x and residual get the same tensor
    )  # fmt: skip


def _check(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None
) -> None:
    check_tensor(op, "x", x, dtypes=FLOAT_DTYPES)
    if x.ndim == 0 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(
            f"{op}: x must have shape (..., C) with 1 <= C <= {MAX_WIDTH}, got {tuple(x.shape)}"
        )
    check_tensor(op, "residual", residual, shape=x.shape, like=x, optional=True)
    C = x.shape[-1:]
    check_tensor(op, "weight", weight, shape=C, dtypes=FLOAT_DTYPES, like=x)
    check_tensor(op, "bias", bias, shape=C, dtypes=FLOAT_DTYPES, like=x, optional=True)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Normalise the last dimension of x (..., C), then scale by weight and shift by bias (C,).

    y has x's shape and dtype (bf16, fp16, fp32), contiguous; statistics are fp32. weight and bias
    may be in another dtype than x, such as fp32 masters; their gradients come in their own dtype.
    C is 1 to 8192. Raises TypeError or ValueError for arguments that do not fit.
    """
    _check("layer_norm", x, None, weight, bias)
    if not use_kernel(x):
        return reference.layer_norm(x, weight, bias, eps)
    return _op(x, None, weight, bias, eps)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(y, residual_out): residual_out = x + residual, y = layer_norm(residual_out), in one pass.

    x and residual (..., C) are of one dtype, which both results have. The backward pass adds the
    gradients of y and residual_out in the same kernel; x and residual get the same tensor as their
    gradient. All else is as in `layer_norm`.
    """
    check_tensor("add_layer_norm", "residual", residual)
    _check("add_layer_norm", x, residual, weight, bias)
    if not use_kernel(x):
        return reference.add_layer_norm(x, residual, weight, bias, eps)
    return _op(x, residual, weight, bias, eps)
