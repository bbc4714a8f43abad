"""The MLP of a block, with GELU either between two linear layers or inside their matmuls.

    z = x W1^T        h = gelu(z + b1)         y = h W2^T + b2      x (M, C), W1 (H, C), W2 (C, H)
    dz = (dy W2) * gelu'(z + b1)               db1 = the sum of dz's rows
    dx = dz W1        dW1 = dz^T x             dW2 = dy^T h         db2 = the sum of dy's rows

By default this is `linear`, `bias_gelu` and `linear`. mlp_hopper.py computes z with h, and dz with
db1, in one kernel each, so that no pass over (M, H) is left besides the matmuls. All others are
cuBLAS's in both. Both save z and h. Weight gradients are fp32 sums, as in linear.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt_kernels import launch, reference
from fastgpt_kernels.bias_gelu import bias_gelu
from fastgpt_kernels.checks import check_tensor
from fastgpt_kernels.library import define_op, matmul_flops, refuse_second_derivative, tensors_only
from fastgpt_kernels.linear import weight_gradient
from fastgpt_kernels.registry import (
    Cost,
    ExampleInputs,
    Implementation,
    OpSpec,
    Random,
    Sizes,
    gluon_unsupported,
)

TILE_ROWS = 128  # of the kernels; cuBLAS has tiles for fewer
ALIGNMENT = 8  # elements of 16 bits that TMA addresses: both widths are multiples

# --- Registration of the fused halves ---------------------------------------------------------

# Gluon is imported where a call needs it: it refuses where kernels are interpreted. The ops' second
# argument has the shape of a matmul's right factor, by which a trace knows their FLOPs. Without
# TMA, and for fewer rows than a tile has, they are a matmul and bias_gelu.


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    """Returns z and h: x (M, C), weight W1^T (C, H), bias (H,)."""
    if not _hopper_applies(x, weight, tanh):
        z = x @ weight
        return z, torch.ops.fastgpt.bias_gelu(z, bias, tanh)
    from fastgpt_kernels import mlp_hopper

    return mlp_hopper.forward(x, weight.t(), bias)


def _backward(
    dy: Tensor, weight: Tensor, z: Tensor, bias: Tensor | None, tanh: bool
) -> tuple[Tensor, Tensor]:
    """Returns dz and db1, empty without a bias: dy (M, C), weight W2 (C, H), z (M, H)."""
    if not _hopper_applies(dy, weight, tanh):
        return torch.ops.fastgpt.bias_gelu_backward(dy @ weight, z, bias, tanh)
    from fastgpt_kernels import mlp_hopper

    return tensors_only(*mlp_hopper.backward(dy, weight, z, bias))  # type: ignore[return-value]


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool) -> Any:
    z = x.new_empty(x.shape[0], weight.shape[1])
    return z, torch.empty_like(z)


def _fake_backward(dy: Tensor, weight: Tensor, z: Tensor, bias: Tensor | None, tanh: bool) -> Any:
    return tensors_only(torch.empty_like(z), None if bias is None else torch.empty_like(bias))


def _hopper_applies(x: Tensor, weight: Tensor, tanh: bool) -> bool:
    """Returns True if the kernels for Hopper take x (M, K) and weight (K, N)."""
    reason = gluon_unsupported(Sizes(), x.dtype, launch.arch_of(x))
    aligned = not any(n % ALIGNMENT for n in weight.shape)
    return reason is None and tanh and aligned and x.shape[0] >= TILE_ROWS


_forward_op = define_op(
    "mlp_hopper", _forward, _fake_forward,
    flops=lambda x, weight, *_, **__: matmul_flops(x, weight, 1),
)  # fmt: skip
_backward_op = define_op(
    "mlp_hopper_backward", _backward, _fake_backward,
    flops=lambda dy, weight, *_, **__: matmul_flops(dy, weight, 1),
)  # fmt: skip


class _HopperMLP(torch.autograd.Function):
    """y of rows x (M, C), with 16-bit copies of fp32 weights, which get the fp32 gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, fc_weight: Tensor, fc_bias: Tensor | None, proj_weight: Tensor,
        proj_bias: Tensor | None, fc: Tensor, proj: Tensor,
        fc_main_grad: Tensor | None, proj_main_grad: Tensor | None, tanh: bool,
    ) -> Tensor:  # fmt: skip
        z, h = _forward_op(x, fc.t(), fc_bias, tanh)
        ctx.save_for_backward(x, fc, fc_bias, z, h, proj)
        ctx.main_grads = fc_main_grad, proj_main_grad  # not saved: autograd would refuse changes
        ctx.tanh = tanh
        return F.linear(h, proj, proj_bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative("mlp")
        x, fc, fc_bias, z, h, proj = ctx.saved_tensors
        for_x, for_fc, for_fc_bias, for_proj, for_proj_bias, *rest = ctx.needs_input_grad
        dz, fc_sums = _backward_op(dy, proj, z, fc_bias, ctx.tanh)
        return (
            dz @ fc if for_x else None,
            weight_gradient(dz, x, ctx.main_grads[0]) if for_fc else None,
            fc_sums if for_fc_bias else None,
            weight_gradient(dy, h, ctx.main_grads[1]) if for_proj else None,
            dy.sum(0) if for_proj_bias else None,
            *(None for _ in rest),
        )


# --- Public functions -------------------------------------------------------------------------


def mlp(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor | None, proj_weight: Tensor,
    proj_bias: Tensor | None = None, approximate: str = "tanh", **options: Any,
) -> Tensor:  # fmt: skip
    """Returns gelu(x W1^T + b1) W2^T + b2: `linear`, `bias_gelu`, `linear`.

    x            (..., C) in bf16, fp16 or fp32
    fc_weight    W1 (H, C) and b1 (H,), like x or fp32; either bias may be None
    proj_weight  W2 (C, H) and b2 (C,), likewise
    approximate  GELU's form, as in `bias_gelu`
    options      weights_bf16 and main_grads, both for W1 and W2 and as in `linear`; bias_gelu, the
                 function between the layers

    Raises TypeError or ValueError for arguments that do not fit.
    """
    _check(x, fc_weight, fc_bias, proj_weight, proj_bias)
    options = {"bias_gelu": bias_gelu, **options}
    return reference.mlp(x, fc_weight, fc_bias, proj_weight, proj_bias, approximate, **options)


def hopper_mlp(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor | None, proj_weight: Tensor,
    proj_bias: Tensor | None = None, approximate: str = "tanh", **options: Any,
) -> Tensor:  # fmt: skip
    """Returns `mlp`, with its options, by the kernels for Hopper where they apply.

    They apply to x in bf16 and fp16, on sm_90, with fp32 weights whose dimensions are multiples of
    8, and to at least as many rows as a tile has.
    """
    _check(x, fc_weight, fc_bias, proj_weight, proj_bias)
    weights = fc_weight, proj_weight
    fp32 = all(weight.dtype == torch.float32 for weight in weights)
    if not (launch.use_kernel(x) and x.dtype.itemsize == 2 and fp32):
        return mlp(x, fc_weight, fc_bias, proj_weight, proj_bias, approximate, **options)
    copies = options.get("weights_bf16", (None, None))
    copies = [w.to(x.dtype) if c is None else c for w, c in zip(weights, copies, strict=True)]
    y = _HopperMLP.apply(
        x.reshape(-1, x.shape[-1]), fc_weight, fc_bias, proj_weight,
        None if proj_bias is None else proj_bias.to(x.dtype),
        *copies, *options.get("main_grads", (None, None)), approximate == "tanh",
    )  # fmt: skip
    return y.view(*x.shape[:-1], -1)


def _check(x, fc_weight, fc_bias, proj_weight, proj_bias) -> None:
    check_tensor("mlp", "x", x)
    C = x.shape[-1] if x.ndim else 0
    check_tensor("mlp", "fc_weight", fc_weight, shape=(None, C), like=x)
    H = fc_weight.shape[0]
    check_tensor("mlp", "fc_bias", fc_bias, shape=(H,), like=x, optional=True)
    check_tensor("mlp", "proj_weight", proj_weight, shape=(None, H), like=x)
    out = proj_weight.shape[:1]
    check_tensor("mlp", "proj_bias", proj_bias, shape=out, like=x, optional=True)


# --- Specification ----------------------------------------------------------------------------


def hopper_unsupported(s: Sizes, dtype: torch.dtype, arch: str) -> str | None:
    """Returns why the kernels for Hopper cannot run, or None if they can."""
    if s.gelu == "erf":
        return "hopper has GELU by tanh only: by erf it spills registers"
    if s.n_embd % ALIGNMENT:
        return f"hopper has widths divisible by {ALIGNMENT}, not {s.n_embd}"
    return gluon_unsupported(s, dtype, arch)


def _example_inputs(s: Sizes, random: Random) -> list[ExampleInputs]:
    """Returns the call without b2, which `add_layer_norm` then adds, and with it."""
    C, H = s.n_embd, 4 * s.n_embd
    x, fc_weight, proj_weight = random(s.tokens, C), random(H, C), random(C, H)
    fc_bias, proj_bias = (random(H), random(C)) if s.bias else (None, None)
    weights = [fc_weight * C**-0.5, fc_bias, proj_weight * H**-0.5]
    return [
        ExampleInputs([x, *weights, bias], {"approximate": s.approximate}, fp32_inputs=(1, 2, 3, 4))
        for bias in ((None, proj_bias) if s.bias else (None,))
    ]


def _cost(s: Sizes, itemsize: int) -> dict[str, Cost]:
    """Two matmuls forward, four backward; each tensor of M rows or 4 C^2 weights moved once."""
    M, C = s.tokens, s.n_embd
    matmul, weight = 8.0 * M * C**2, 4.0 * C**2
    return {
        "forward": Cost(2 * matmul, itemsize * (2 * weight + 14.0 * M * C)),
        "backward": Cost(4 * matmul, itemsize * (2 * weight + 19.0 * M * C) + 8 * weight),
    }


SPECS = {
    "mlp": OpSpec(
        "mlp",
        {
            "eager": Implementation(reference.mlp),
            "hopper": Implementation(hopper_mlp, hopper_unsupported),
        },
        _example_inputs, _cost,
        kernels=("mlp_hopper_fwd_kernel", "mlp_hopper_bwd_kernel"),
        category="linear", calls_per_step=12,
    )
}  # fmt: skip
