"""The MLP of a transformer block, GELU inside the products: y = gelu(x W1^T + b1) W2^T + b2.

    forward    z = x W1^T + b1, a = gelu(z) in one kernel;  y = a W2^T + b2
    backward   dz = (dy W2) gelu'(z), db1 its sum over the rows, in one kernel
               dW2 = dy^T a, db2;  dx = dz W1;  dW1 = dz^T x

x, y, z, a in 16 bits; weights and biases fp32 (rounded on the way in) or the same. With H hidden
features a GELU of its own moves 4 H bytes a token forward and 6 H backward beyond the products,
here it is 2 H and 2 H: z written, z read. The products' epilogues take longer for that; whether it
pays is for `python -m bench gemms` to say. The kernel is in matmul_kernels.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from fastgpt_kernels import reference
from fastgpt_kernels._host import FLOAT_DTYPES, call_directly, check_tensor
from fastgpt_kernels.linear import check_layer, in_dtype, use_matmul, weight_gradients
from fastgpt_kernels.matmul_kernels import launch_matmul

# --------------------------------------------------------------------------------- registered ops


def _forward(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, z, gelu(z), and both weights in x's dtype where they were not)."""
    fc, proj = in_dtype(fc_weight, x.dtype), in_dtype(proj_weight, x.dtype)
    z = torch.empty(x.shape[0], fc_weight.shape[0], dtype=x.dtype, device=x.device)
    a, _ = launch_matmul(
        x, fc if fc.numel() else fc_weight, bias=fc_bias, z=z, gelu=True, tanh=tanh
    )
    y, _ = launch_matmul(a, proj if proj.numel() else proj_weight, bias=proj_bias)
    return y, z, a, fc, proj


_op = torch.library.custom_op("fastgpt::mlp", _forward, mutates_args=())


@_op.register_fake
def _(x, fc_weight, fc_bias, proj_weight, proj_bias, tanh):
    z = x.new_empty(x.shape[0], fc_weight.shape[0])
    casts = [x.new_empty((0,) if w.dtype == x.dtype else w.shape) for w in (fc_weight, proj_weight)]
    return x.new_empty(x.shape[0], proj_weight.shape[0]), z, torch.empty_like(z), *casts


def _backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    a: Tensor,
    fc_weight: Tensor,
    proj_weight: Tensor,
    fc_dtype: torch.dtype,
    fc_bias_dtype: torch.dtype | None,
    proj_dtype: torch.dtype,
    proj_bias_dtype: torch.dtype | None,
    tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dW1, db1, dW2, db2); biases' are empty where there is none."""
    dw2, db2 = weight_gradients(dy, a, proj_dtype, proj_bias_dtype)
    has_bias = fc_bias_dtype is not None
    dz, db1 = launch_matmul(
        dy, proj_weight, b_transposed=True, z=z, slope=True, tanh=tanh, row_sums=has_bias
    )
    dx, _ = launch_matmul(dz, fc_weight, b_transposed=True)
    dw1, _ = weight_gradients(dz, x, fc_dtype, None)
    return dx, dw1, dy.new_empty(0) if db1 is None else db1.to(fc_bias_dtype), dw2, db2


_backward_op = torch.library.custom_op("fastgpt::mlp_backward", _backward, mutates_args=())


@_backward_op.register_fake
def _(
    dy, x, z, a, fc_weight, proj_weight,
    fc_dtype, fc_bias_dtype, proj_dtype, proj_bias_dtype, tanh,
):  # fmt: skip
    def gradients(w: Tensor, dtype: torch.dtype, bias_dtype: torch.dtype | None) -> list[Tensor]:
        size = 0 if bias_dtype is None else w.shape[0]
        return [torch.empty_like(w, dtype=dtype), dy.new_empty(size, dtype=bias_dtype)]

    fc = gradients(fc_weight, fc_dtype, fc_bias_dtype)
    return torch.empty_like(x), *fc, *gradients(proj_weight, proj_dtype, proj_bias_dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, fc_weight, fc_bias, proj_weight, proj_bias, ctx.tanh = inputs
    _, z, a, fc, proj = output
    ctx.save_for_backward(
        x, z, a, fc if fc.numel() else fc_weight, proj if proj.numel() else proj_weight
    )
    ctx.dtypes = [None if p is None else p.dtype for p in inputs[1:5]]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    dy = dy.contiguous()
    saved = ctx.saved_tensors
    backward = _backward if call_directly(dy, *saved) else _backward_op
    dx, *found = backward(*(dy, *saved, *ctx.dtypes, ctx.tanh))
    return dx, *(None if d is None else g for g, d in zip(found, ctx.dtypes, strict=True)), None


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


@register_flop_formula(torch.ops.fastgpt.mlp)
def _flops(x_shape, fc_shape, fc_bias_shape, proj_shape, *args, **kwargs) -> int:
    return 2 * x_shape[0] * (fc_shape[0] * fc_shape[1] + proj_shape[0] * proj_shape[1])


@register_flop_formula(torch.ops.fastgpt.mlp_backward)
def _backward_flops(
    dy_shape, x_shape, z_shape, a_shape, fc_shape, proj_shape, *args, **kwargs
) -> int:
    return 2 * _flops(x_shape, fc_shape, None, proj_shape)


# --------------------------------------------------------------------------------- public function


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
    (by erf). C, H and C' are multiples of 8 (of 4 in fp32). y (..., C') has x's dtype; gradients of
    parameters come in theirs, from fp32 sums. fp32 on a GPU is computed by PyTorch. Raises
    TypeError or ValueError for arguments that do not fit, and on a GPU without TMA (before sm_90).
    """
    check_tensor("mlp", "x", x, dtypes=FLOAT_DTYPES)
    if x.ndim == 0:
        raise ValueError("mlp: x must have shape (..., C), got ()")
    check_layer("mlp", "fc_", x, fc_weight, fc_bias)
    hidden = x.new_empty(0, fc_weight.shape[0])  # for its size
    check_layer("mlp", "proj_", hidden, proj_weight, proj_bias)
    if approximate not in ("tanh", "none"):
        raise ValueError(f"mlp: approximate must be 'tanh' or 'none', got {approximate!r}")
    parameters = (fc_weight, fc_bias, proj_weight, proj_bias)
    if not use_matmul("mlp", x, *fc_weight.shape, proj_weight.shape[0]):
        return reference.mlp(x, *parameters, approximate)
    rows = x.reshape(-1, x.shape[-1])
    if call_directly(x, *parameters):
        y = _Direct.apply(rows, *parameters, approximate == "tanh")
    else:
        y = _op(rows, *parameters, approximate == "tanh")[0]
    return y.view(*x.shape[:-1], proj_weight.shape[0])
