"""A linear layer on a few rows, with the norm before it and what comes after it, for generation.

    y = act(norm(x) @ weight.T + bias) + residual

    x (B, K), B up to 8; weight (N, K); bias (N,); residual and y (B, N)
    norm is a layer norm over K or nothing, act is GELU (tanh or erf) or nothing

One new token makes every matmul of a model a matrix-vector product: each weight is read once and
used B times, so that the time is that of reading weights and of launches. That is why norm, bias,
GELU and residual are in the same launch. layers.py puts several such products into one.

A warp has one to four rows of weights, which it loads 16 bytes a thread at a time, all at once and
first of all, and multiplies by x in fp32 by plain multiply-adds, since so few rows leave tensor
cores idle. Sums stay within the warp. With a norm each warp
computes the statistics of the B rows for itself: x is a few kilobytes that all programs share in
the L2, and a launch is saved. `python -m bench generate` measures it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import reference
from fastgpt_kernels.host import (
    FLOAT_DTYPES,
    HAS_TRITON,
    check_tensor,
    refuse_interpreted_bf16,
    use_kernel,
)
from fastgpt_kernels.register import Op

MAX_ROWS = 8
ACTIVATIONS = ("none", "tanh", "erf")

if HAS_TRITON:
    from fastgpt_kernels.ops.decode.kernels import launch_linear

    def _shape(x, weight, *_):
        return x.new_empty((x.shape[0], weight.shape[0]))

    _op = Op("decode_linear", launch_linear, _shape)


def decode_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
    early: bool = False,
) -> Tensor:
    """act(norm(x) @ weight.T + bias) + residual for a few rows, as one launch.

    x            (B, K), 1 <= B <= 8, bf16, fp16 or fp32
    weight       (N, K), x's dtype
    bias         (N,), any of these dtypes
    norm_weight  (K,), any of these dtypes: layer-normalise x first, with norm_bias if there is one
    residual     (B, N), x's dtype, added at the end
    activation   "none", or GELU: "tanh" or "erf"
    early        on NVIDIA GPUs from sm_90 on: read the weights before the launches ahead have
                 ended, which must not write them

    Returns y (B, N), contiguous, x's dtype; sums are fp32. For inference: not differentiable. On a
    CPU tensor `reference.decode_linear` runs. Raises TypeError/ValueError naming the argument.
    """
    _check(x, weight, bias, norm_weight, norm_bias, residual, activation)
    arguments: dict[str, Any] = {
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "residual": residual,
    }
    if not use_kernel(x):
        return reference.decode_linear(x, weight, bias, activation=activation, eps=eps, **arguments)
    refuse_interpreted_bf16("decode_linear", x)
    return _op(x, weight, bias, norm_weight, norm_bias, residual, activation, eps, early)


def _check(x, weight, bias, norm_weight, norm_bias, residual, activation) -> None:
    op = "decode_linear"
    dtypes = FLOAT_DTYPES if use_kernel(x) else (*FLOAT_DTYPES, torch.float64)
    check_tensor(op, "x", x, ndim=2, dtypes=dtypes)
    B, K = x.shape
    if not 1 <= B <= MAX_ROWS:
        raise ValueError(f"{op}: x must have 1 to {MAX_ROWS} rows, got {B}")
    check_tensor(op, "weight", weight, ndim=2, like=x)
    N = weight.shape[0]
    check_tensor(op, "weight", weight, shape=(N, K))
    vectors = {"bias": (bias, N), "norm_weight": (norm_weight, K), "norm_bias": (norm_bias, K)}
    for name, (vector, size) in vectors.items():
        check_tensor(op, name, vector, shape=(size,), dtypes=dtypes, like=x, optional=True)
    if norm_bias is not None and norm_weight is None:
        raise ValueError(f"{op}: norm_bias needs norm_weight")
    check_tensor(op, "residual", residual, shape=(B, N), like=x, optional=True)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")
