"""The specification: every op of this package in plain PyTorch, on any device and in any dtype.

In float64 these are the oracle of the tests; on a CPU tensor the public ops run them. They are
written to be read. Statistics, exponentials and losses are computed in float32 or better, results
come back in the dtype of the input, and autograd gives the gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 where any of the inputs is."""
    dtype = torch.float32
    for t in tensors:
        if t is not None:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimension (Ba et al., 2016).

    x (..., C), weight (C,), bias (C,) or None; y like x. The variance is the biased one (1/C).
    """
    dtype = _compute_dtype(x, weight, bias)
    y = F.layer_norm(
        x.to(dtype), weight.shape, weight.to(dtype), None if bias is None else bias.to(dtype), eps
    )
    return y.to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """residual_out = x + residual (rounded to x's dtype), y = layer_norm(residual_out)."""
    residual_out = x + residual
    return layer_norm(residual_out, weight, bias, eps), residual_out


def bias_gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """y = gelu(x + bias), the sum not rounded before the GELU (Hendrycks & Gimpel, 2016).

    x (..., C), bias (C,) or None. approximate="none" is z/2 (1 + erf(z / sqrt 2)); "tanh" is
    z/2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))).
    """
    dtype = _compute_dtype(x, bias)
    z = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    return F.gelu(z, approximate=approximate).to(x.dtype)
