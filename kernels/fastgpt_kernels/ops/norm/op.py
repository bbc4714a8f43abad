"""Layer normalisation, alone or with the residual addition before it (Ba et al., 2016).

    s = residual + Z * (x + x_bias)     (add_layer_norm only; rounded to x's dtype, returned)
    y = (s - mean(s)) * rstd * weight + bias          rstd = 1 / sqrt(var(s) + eps), var over 1/C

x, residual, y, s (..., C) in one dtype; weight, bias (C,) in any; mean and rstd in fp32.
With xhat = (s - mean) * rstd and g = dy * weight the gradients are

    ds = rstd * (g - mean(g) - xhat * mean(g * xhat)) + d_residual_out        for the residual
    dx = Z * ds, dweight = sum over rows of dy * xhat, dbias = that of dy, dx_bias = that of dx

Z is the dropout of the branch that x comes from, all ones without; x_bias is the bias of the layer
that ends the branch: here its gradient costs no pass over dx of its own.
Bytes an element, 2-byte dtype: forward 4, with the addition 8; backward 6, with the addition 8, and
with dropout, when dx and the residual's gradient differ, 10.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt_kernels import reference
from fastgpt_kernels.checks import FLOAT_DTYPES, check_dropout, check_tensor
from fastgpt_kernels.launch import HAS_TRITON, use_kernel
from fastgpt_kernels.register import Op

MAX_WIDTH = 8192  # a row, and in the backward pass dweight and dbias, have to fit in registers


def _shapes(x, residual, *_):
    stats = x.new_empty(2 * (x.numel() // x.shape[-1]) + COUNTERS, dtype=torch.float32)
    return x.new_empty(x.shape), None if residual is None else x.new_empty(x.shape), stats


def _gradient_shapes(dy, d_residual_out, s, weight, bias, x_bias, seed, *_):
    dx, d_residual = s.new_empty(s.shape), None if seed is None else s.new_empty(s.shape)
    sums = (None if t is None else t.new_empty(t.shape) for t in (weight, bias, x_bias))
    return dx, d_residual, *sums


def _save(inputs, results):
    x, residual, weight, bias, x_bias, _, dropout_p, seed = inputs
    _, residual_out, stats = results
    s = x if residual is None else residual_out
    return (s, weight, bias, x_bias, seed, stats), (dropout_p,)


if HAS_TRITON:
    from fastgpt_kernels.ops.norm.kernels import launch_backward, launch_forward
    from fastgpt_kernels.partial_sums import COUNTERS

    _backward_op = Op("layer_norm_backward", launch_backward, _gradient_shapes)

    def _backward(dy, d_residual_out, s, weight, bias, x_bias, seed, stats, dropout_p):
        found = _backward_op(dy, d_residual_out, s, weight, bias, x_bias, seed, stats, dropout_p)
        # Without dropout x and residual get the same tensor.
        return (found[0], *found[:1], *found[2:]) if seed is None else found

    _op = Op(
        "layer_norm", launch_forward, _shapes,
        public=2, saves=_save, backward=_backward,
        gradients=(0, 1, 2, 3, 4),
    )  # fmt: skip


def _check(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None,
    x_bias: Tensor | None = None,
) -> None:  # fmt: skip
    check_tensor(op, "x", x, dtypes=FLOAT_DTYPES)
    if x.ndim == 0 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(
            f"{op}: x must have shape (..., C) with 1 <= C <= {MAX_WIDTH}, got {tuple(x.shape)}"
        )
    check_tensor(op, "residual", residual, shape=x.shape, like=x, optional=True)
    C = x.shape[-1:]
    check_tensor(op, "weight", weight, shape=C, dtypes=FLOAT_DTYPES, like=x)
    check_tensor(op, "bias", bias, shape=C, dtypes=FLOAT_DTYPES, like=x, optional=True)
    check_tensor(op, "x_bias", x_bias, shape=C, dtypes=FLOAT_DTYPES, like=x, optional=True)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Normalise the last dimension of x (..., C), then scale by weight and shift by bias (C,).

    y has x's shape and dtype (bf16, fp16, fp32), contiguous; statistics are fp32. weight and bias
    may be in another dtype than x, such as fp32 masters; their gradients come in their own dtype.
    C is 1 to 8192. Raises TypeError or ValueError for arguments that do not fit.
    """
    _check("layer_norm", x, None, weight, bias)
    if not use_kernel(x):
        return reference.layer_norm(x, weight, bias, eps)
    return _op(x, None, weight, bias, None, eps, 0.0, None)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None,
    x_bias: Tensor | None = None, eps: float = 1e-5,
    *, dropout_p: float = 0.0, seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, residual_out): residual_out = residual + dropout(x + x_bias), y = layer_norm of it.

    One pass; residual_out is rounded once. x and residual (..., C) are of one dtype, which both
    results have. x_bias (C,) in any dtype is that of the linear layer which x comes from: its
    gradient is summed up where dx is written. dropout_p, seed as in `attention`; the mask depends
    on seed, row and column alone, as specified by `reference.norm_dropout_mask`. The backward pass
    adds the gradients of y and residual_out in the same kernel; without dropout x and residual get
    the same tensor as their gradient. All else is as in `layer_norm`.
    """
    op = "add_layer_norm"
    check_tensor(op, "residual", residual)
    _check(op, x, residual, weight, bias, x_bias)
    if dropout_p or seed is not None:
        check_dropout(op, dropout_p, seed, x)
    if not use_kernel(x):
        return reference.add_layer_norm(
            x, residual, weight, bias, x_bias, eps, dropout_p=dropout_p, seed=seed
        )
    seed = reference.seed_tensor(seed, x.device) if dropout_p > 0 else None
    return _op(x, residual, weight, bias, x_bias, eps, dropout_p, seed)
