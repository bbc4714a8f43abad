"""GELU of x + bias, the bias gradient included (Hendrycks & Gimpel, 2016).

    z = x + bias (not rounded)
    approximate="none"   y = z Phi(z)                Phi(z) = (1 + erf(z / sqrt 2)) / 2
    approximate="tanh"   y = z sigmoid(2u)           u = sqrt(2 / pi) (z + 0.044715 z^3)

since (1 + tanh u) / 2 = sigmoid(2u): one exponential, and no cancellation for negative z. The
derivatives are

    none   Phi(z) + z phi(z)                         phi(z) = exp(-z^2 / 2) / sqrt(2 pi)
    tanh   s + z s (1 - s) 2u'                       s = sigmoid(2u), u' = du/dz

The arithmetic is fp32; in bf16 tanh u is the GPU's approximation, one instruction for exponential
and division (`gelu_and_slope`). Bytes an element, 2-byte dtype: forward 4, backward 6; dbias has no
pass of its own.
"""

from __future__ import annotations

from torch import Tensor

from fastgpt_kernels import reference
from fastgpt_kernels.checks import FLOAT_DTYPES, check_approximate, check_tensor
from fastgpt_kernels.launch import HAS_TRITON, use_kernel
from fastgpt_kernels.register import Op

if HAS_TRITON:
    from fastgpt_kernels.ops.gelu.kernels import launch_backward, launch_forward

    _op = Op(
        "bias_gelu",
        launch_forward,
        lambda x, bias, tanh: x.new_empty(x.shape),
        saves=lambda inputs, y: (inputs[:2], inputs[2:]),
        backward=Op(
            "bias_gelu_backward",
            launch_backward,
            lambda dy, x, bias, tanh: (
                x.new_empty(x.shape), None if bias is None else bias.new_empty(bias.shape)
            ),
        ),
        gradients=(0, 1),
    )  # fmt: skip


def bias_gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """GELU of x + bias: x (..., C) in bf16, fp16 or fp32, bias (C,) in any of them or None.

    approximate is "tanh" (GPT-2's) or "none" (by erf, and may be called so), as in
    `torch.nn.functional.gelu`. The result has x's shape and dtype, contiguous; bias's gradient
    comes in bias's dtype. Leave the bias out of the linear layer before:
    `bias_gelu(F.linear(x, weight), bias)`.
    Raises TypeError or ValueError for arguments that do not fit.
    """
    check_tensor("bias_gelu", "x", x, dtypes=FLOAT_DTYPES)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"bias_gelu: x must have shape (..., C) with C >= 1, got {tuple(x.shape)}")
    C = x.shape[-1:]
    check_tensor("bias_gelu", "bias", bias, shape=C, dtypes=FLOAT_DTYPES, like=x, optional=True)
    approximate = check_approximate("bias_gelu", approximate)
    if not use_kernel(x):
        return reference.bias_gelu(x, bias, approximate)
    return _op(x, bias, approximate == "tanh")
