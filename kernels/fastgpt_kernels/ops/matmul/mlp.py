"""The MLP of a transformer block, GELU inside the products: y = gelu(x W1^T + b1) W2^T + b2.

    forward    a = gelu(z) of z = x W1^T + b1 and s = gelu'(z) in one kernel;  y = a W2^T + b2
    backward   dz = (dy W2) s in one kernel;  dx = dz W1
               dW2 = dy^T a, db2;  dW1 = dz^T x, db1

x, y, s, a in 16 bits; weights and biases fp32 (rounded on the way in) or the same. z is not stored.
With H hidden features a GELU of its own moves 4 H bytes a token forward and 6 H backward beyond the
products, here it is 2 H and 2 H: s written, s read. The products' epilogues take longer instead: by
1,534 and 355 instructions a thread and tile (sm_90, Triton 3.7.1), which is 0.10 ms a layer of 124M
at 65,536 tokens, where the bytes saved take 0.40 on an H100.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt_kernels import reference
from fastgpt_kernels.checks import FLOAT_DTYPES, check_approximate, check_tensor
from fastgpt_kernels.launch import HAS_TRITON
from fastgpt_kernels.ops.matmul.linear import (
    check_layer,
    dtype_of,
    gradient_shapes,
    in_dtype,
    rounded_or,
    use_matmul,
    weight_gradients,
)
from fastgpt_kernels.register import Op


def _forward(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor | None, proj_weight: Tensor,
    proj_bias: Tensor | None, tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(y, gelu'(z), gelu(z), and both weights in x's dtype if they were not)."""
    fc, proj = in_dtype(fc_weight, x.dtype), in_dtype(proj_weight, x.dtype)
    slope = torch.empty(x.shape[0], fc_weight.shape[0], dtype=x.dtype, device=x.device)
    a, _ = launch_matmul(x, rounded_or(fc, fc_weight), bias=fc_bias, slope=slope, tanh=tanh)
    y, _ = launch_matmul(a, rounded_or(proj, proj_weight), bias=proj_bias)
    return y, slope, a, fc, proj


def _shapes(x, fc_weight, fc_bias, proj_weight, proj_bias, tanh):
    slope = x.new_empty(x.shape[0], fc_weight.shape[0])
    casts = [None if w.dtype == x.dtype else x.new_empty(w.shape) for w in (fc_weight, proj_weight)]
    y = x.new_empty(x.shape[0], proj_weight.shape[0])
    return y, slope, torch.empty_like(slope), *casts


def _backward(
    dy: Tensor, x: Tensor, slope: Tensor, a: Tensor, fc_weight: Tensor, proj_weight: Tensor,
    fc_dtype: torch.dtype, fc_bias_dtype: torch.dtype | None, proj_dtype: torch.dtype,
    proj_bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """(dx, dW1, db1, dW2, db2); no gradient of a bias that is not there."""
    dy = dy.contiguous()
    dw2, db2 = weight_gradients(dy, a, proj_dtype, proj_bias_dtype)
    dz, _ = launch_matmul(dy, proj_weight, b_transposed=True, factor=slope)
    dx, _ = launch_matmul(dz, fc_weight, b_transposed=True)
    return dx, *weight_gradients(dz, x, fc_dtype, fc_bias_dtype), dw2, db2


def _gradient_shapes(dy, x, slope, a, fc_weight, proj_weight, *dtypes):
    fc_dtype, fc_bias_dtype, proj_dtype, proj_bias_dtype = dtypes
    fc = gradient_shapes(fc_weight, fc_dtype, fc_bias_dtype)
    return torch.empty_like(x), *fc, *gradient_shapes(proj_weight, proj_dtype, proj_bias_dtype)


def _save(inputs, results):
    x, fc_weight, fc_bias, proj_weight, proj_bias, _ = inputs
    _, slope, a, fc, proj = results
    weights = rounded_or(fc, fc_weight), rounded_or(proj, proj_weight)
    dtypes = map(dtype_of, (fc_weight, fc_bias, proj_weight, proj_bias))
    return (x, slope, a, *weights), tuple(dtypes)


def _flops(x_shape, fc_shape, proj_shape, passes: int) -> int:
    return passes * 2 * x_shape[0] * (fc_shape[0] * fc_shape[1] + proj_shape[0] * proj_shape[1])


if HAS_TRITON:
    from fastgpt_kernels.ops.matmul.kernels import launch_matmul

    _op = Op(
        "mlp", _forward, _shapes,
        saves=_save,
        backward=Op(
            "mlp_backward", _backward, _gradient_shapes,
            flops=lambda dy, x, slope, a, fc, proj, *_, **__: _flops(x, fc, proj, 2),
        ),
        gradients=(0, 1, 2, 3, 4),
        flops=lambda x, fc, fc_bias, proj, *_, **__: _flops(x, fc, proj, 1),
    )  # fmt: skip


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    approximate: str = "tanh",
) -> Tensor:
    """gelu(x fc_weight^T + fc_bias) proj_weight^T + proj_bias, both products ours.

    x (..., C) in bf16, fp16 or fp32; fc_weight (H, C), fc_bias (H,), proj_weight (C', H) and
    proj_bias (C',) like x or fp32; biases may be None; approximate is "tanh" (GPT-2's) or "none"
    (by erf, and may be called so). C, H and C' are multiples of 8 (of 4 in fp32). y (..., C') has
    x's dtype; gradients of parameters come in theirs, from fp32 sums. fp32 on a GPU is computed by
    PyTorch. Raises TypeError or ValueError for arguments that do not fit, and on a GPU without TMA
    (before sm_90).
    """
    check_tensor("mlp", "x", x, dtypes=FLOAT_DTYPES)
    if x.ndim == 0:
        raise ValueError("mlp: x must have shape (..., C), got ()")
    check_layer("mlp", "fc_", x, fc_weight, fc_bias)
    hidden = x.new_empty(0, fc_weight.shape[0])  # for its size
    check_layer("mlp", "proj_", hidden, proj_weight, proj_bias)
    approximate = check_approximate("mlp", approximate)
    parameters = (fc_weight, fc_bias, proj_weight, proj_bias)
    if not use_matmul("mlp", x, *fc_weight.shape, proj_weight.shape[0]):
        return reference.mlp(x, *parameters, approximate)
    rows = x.reshape(-1, x.shape[-1])
    return _op(rows, *parameters, approximate == "tanh").view(*x.shape[:-1], proj_weight.shape[0])
