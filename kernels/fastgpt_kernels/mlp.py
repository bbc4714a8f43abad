"""The MLP of a block, with GELU either between two linear layers or inside their matmuls.

    z = x W1^T        h = gelu(z + b1)         y = h W2^T + b2      x (M, C), W1 (H, C), W2 (C, H)
    dz = (dy W2) * gelu'(z + b1)               db1 = the sum of dz's rows
    dx = dz W1        dW1 = dz^T x             dW2 = dy^T h         db2 = the sum of dy's rows

By default this is `linear`, `bias_gelu` and `linear`. mlp_hopper.py and mlp_cublaslt.py compute z
with h, and dz with db1, in one kernel each, so that no pass over (M, H) is left besides the
matmuls. The other matmuls are cuBLAS's. All save z and h, and sum weight gradients in fp32.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn import functional as F

from fastgpt_kernels import launch, mlp_cublaslt, reference
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
    triton_unsupported,
)

TILE_ROWS = 128  # of the kernels for Hopper; cuBLAS has tiles for fewer
ALIGNMENT = 8  # elements of 16 bits: of both widths for TMA, and of cuBLASLt's AUX

# --- Registration of the fused halves ---------------------------------------------------------

# An implementation is a module mlp_NAME with `forward` and `backward`, which is loaded where a call
# needs it: Gluon refuses to be imported where kernels are interpreted. The ops' second argument has
# the shape of a matmul's right factor, by which a trace knows their FLOPs.


def _define(name: str, takes: Callable[[Tensor], bool]) -> tuple[OpOverload, OpOverload]:
    """Registers mlp_NAME's forward and backward pass, both with GELU by tanh.

    For rows that it does not take they are a matmul and bias_gelu.
    """

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns z and h: x (M, C), weight W1^T (C, H), bias (H,)."""
        if takes(x):
            return load().forward(x, weight.t(), bias)
        z = x @ weight
        return z, torch.ops.fastgpt.bias_gelu(z, bias, True)

    def backward(
        dy: Tensor, weight: Tensor, z: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns dz and db1, empty without a bias: dy (M, C), weight W2 (C, H), z (M, H)."""
        if takes(dy):
            return tensors_only(*load().backward(dy, weight, z, bias))
        return torch.ops.fastgpt.bias_gelu_backward(dy @ weight, z, bias, True)

    def fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        z = x.new_empty(x.shape[0], weight.shape[1])
        return z, torch.empty_like(z)

    def fake_backward(dy: Tensor, weight: Tensor, z: Tensor, bias: Tensor | None) -> Any:
        return tensors_only(torch.empty_like(z), None if bias is None else torch.empty_like(bias))

    def load() -> Any:
        return importlib.import_module(f"fastgpt_kernels.mlp_{name}")

    def flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
        return matmul_flops(x, weight, 1)

    return (
        define_op(f"mlp_{name}", forward, fake_forward, flops=flops),
        define_op(f"mlp_{name}_backward", backward, fake_backward, flops=flops),
    )


def _hopper_takes(x: Tensor) -> bool:
    reason = gluon_unsupported(Sizes(), x.dtype, launch.arch_of(x))
    return reason is None and x.shape[0] >= TILE_ROWS


def _cublaslt_takes(x: Tensor) -> bool:
    reason = mlp_cublaslt.unsupported_reason(launch.arch_of(x))
    return reason is None and not x.is_meta and x.shape[0] > 0


_TAKES = {"hopper": _hopper_takes, "cublaslt": _cublaslt_takes}
_OPS = {name: _define(name, takes) for name, takes in _TAKES.items()}


class _FusedMLP(torch.autograd.Function):
    """y of rows x (M, C), with 16-bit copies of fp32 weights, which get the fp32 gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, fc_weight: Tensor, fc_bias: Tensor | None, proj_weight: Tensor,
        proj_bias: Tensor | None, fc: Tensor, proj: Tensor,
        fc_main_grad: Tensor | None, proj_main_grad: Tensor | None, name: str,
    ) -> Tensor:  # fmt: skip
        z, h = _OPS[name][0](x, fc.t(), fc_bias)
        ctx.save_for_backward(x, fc, fc_bias, z, h, proj)
        ctx.main_grads = fc_main_grad, proj_main_grad  # not saved: autograd would refuse changes
        ctx.name = name
        return F.linear(h, proj, proj_bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_second_derivative("mlp")
        x, fc, fc_bias, z, h, proj = ctx.saved_tensors
        for_x, for_fc, for_fc_bias, for_proj, for_proj_bias, *rest = ctx.needs_input_grad
        dz, fc_sums = _OPS[ctx.name][1](dy, proj, z, fc_bias)
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


def hopper_mlp(x: Tensor, *weights: Any, **options: Any) -> Tensor:
    """Returns `mlp` of the same arguments, on sm_90 by kernels in Gluon where they apply.

    Like cuBLASLt's epilogues they apply to x in bf16 and fp16, fp32 weights whose dimensions are
    multiples of 8, and GELU by tanh; besides to at least as many rows as a tile has.
    """
    return _fused_mlp("hopper", x, *weights, **options)


def cublaslt_mlp(x: Tensor, *weights: Any, **options: Any) -> Tensor:
    """Returns `mlp` of the same arguments, on NVIDIA GPUs by cuBLASLt's epilogues."""
    return _fused_mlp("cublaslt", x, *weights, **options)


def _fused_mlp(
    name: str, x: Tensor, fc_weight: Tensor, fc_bias: Tensor | None, proj_weight: Tensor,
    proj_bias: Tensor | None = None, approximate: str = "tanh", **options: Any,
) -> Tensor:  # fmt: skip
    _check(x, fc_weight, fc_bias, proj_weight, proj_bias)
    weights = fc_weight, proj_weight
    fp32 = all(w.dtype == torch.float32 for w in weights)
    aligned = not any(n % ALIGNMENT for w in weights for n in w.shape)
    fits = x.dtype.itemsize == 2 and fp32 and aligned and approximate == "tanh"
    if not (fits and launch.use_kernel(x)):
        return mlp(x, fc_weight, fc_bias, proj_weight, proj_bias, approximate, **options)
    copies = options.get("weights_bf16", (None, None))
    copies = [w.to(x.dtype) if c is None else c for w, c in zip(weights, copies, strict=True)]
    y = _FusedMLP.apply(
        x.reshape(-1, x.shape[-1]), fc_weight, fc_bias, proj_weight,
        None if proj_bias is None else proj_bias.to(x.dtype),
        *copies, *options.get("main_grads", (None, None)), name,
    )  # fmt: skip
    return y.view(*x.shape[:-1], proj_weight.shape[0])


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
    return gluon_unsupported(s, dtype, arch) or _fused_unsupported("hopper", s, dtype)


def cublaslt_unsupported(s: Sizes, dtype: torch.dtype, arch: str) -> str | None:
    """Returns why cuBLASLt's epilogues cannot run, or None if they can."""
    reason = triton_unsupported(s, dtype, arch) or mlp_cublaslt.unsupported_reason(arch)
    return reason or _fused_unsupported("cublaslt", s, dtype)


def _fused_unsupported(name: str, s: Sizes, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{name} is for bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if s.gelu == "erf":
        return f"{name} has GELU by tanh only"
    if s.n_embd % ALIGNMENT:
        return f"{name} has widths divisible by {ALIGNMENT}, not {s.n_embd}"
    return None


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
    """Returns the cost of two matmuls forward and four backward, each tensor moved once."""
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
            "cublaslt": Implementation(cublaslt_mlp, cublaslt_unsupported),
        },
        _example_inputs, _cost,
        kernels=("mlp_hopper_fwd_kernel", "mlp_hopper_bwd_kernel"),
        category="linear", calls_per_step=12,
    )
}  # fmt: skip
