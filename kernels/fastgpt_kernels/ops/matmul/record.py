"""What the matrix products tell the rest of the program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt_kernels.accumulate import adds_product
from fastgpt_kernels.launch import adds_in_place
from fastgpt_kernels.ops.matmul.configs import ALIGNMENT, runs_on
from fastgpt_kernels.ops.matmul.linear import linear
from fastgpt_kernels.ops.matmul.mlp import mlp
from fastgpt_kernels.reference import bias_gelu as eager_bias_gelu
from fastgpt_kernels.registry import (
    Cost,
    ExampleInputs,
    Implementation,
    OpSpec,
    Random,
    Sizes,
    triton_unsupported,
)


class _MasterLinear(torch.autograd.Function):
    """x R^T + bias, R being W rounded; the gradient of W is the product's fp32 sums, as they are.

    (Autograd would round them to the dtype of R, and widen them again in a pass of its own.) If
    there is an `add_to` they are added there.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rounded: Tensor, bias: Tensor | None,
        add_to: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, rounded)
        ctx.add_to = add_to  # not saved: autograd would refuse what is changed
        return F.linear(x, rounded, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, rounded = ctx.saved_tensors
        for_x, for_weight, _, for_bias, _ = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = dy @ rounded if for_x else None
        dw = None
        if for_weight:
            factors = rows.t(), x.reshape(-1, x.shape[-1])
            if ctx.add_to is None:
                dw = _fp32_product(*factors)
            else:
                adds_product(ctx.add_to, *factors)
        return dx, dw, None, rows.sum(0) if for_bias else None, None


def _fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """a b of 16 bits, fp32; rounded in between where no library has that."""
    if adds_in_place(a.device):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float()


def eager_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, rounded: Tensor | None = None,
    add_to: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x (..., K), weight (N, K), bias (N,) or None -> x W^T + bias (..., N), in x's dtype.

    fp32 masters are rounded on the way in, unless somebody has: `rounded` is the weight in x's
    dtype. Their gradients come back fp32, or are added to `add_to` (N, K) fp32 in place.
    """
    bias = None if bias is None else bias.to(x.dtype)
    if weight.dtype != torch.float32 or x.dtype.itemsize != 2:
        return F.linear(x, weight.to(x.dtype), bias)
    if rounded is None:
        rounded = weight.to(x.dtype)
    return _MasterLinear.apply(x, weight, rounded, bias, add_to)


def eager_mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    approximate: str = "tanh",
    *,
    rounded: tuple[Tensor, Tensor] | None = None,
    add_to: tuple[Tensor, Tensor] | None = None,
    linear: Callable[..., Tensor] = eager_linear,
    bias_gelu: Callable[..., Tensor] = eager_bias_gelu,
) -> Tensor:
    """gelu(x fc_weight^T + fc_bias) proj_weight^T + proj_bias, made of two other ops.

    The first bias is left to the GELU op, which reads the activation anyway. `rounded` are the
    weights in x's dtype, if somebody has rounded them; `add_to` takes their gradients, if it is
    there.
    """
    fc, proj = ({"rounded": copy} for copy in rounded) if rounded else ({}, {})
    if add_to:
        fc["add_to"], proj["add_to"] = add_to
    h = bias_gelu(linear(x, fc_weight, **fc), fc_bias, approximate)
    return linear(h, proj_weight, proj_bias, **proj)


def _unsupported(s: Sizes, dtype: torch.dtype, arch: str) -> str | None:
    if reason := triton_unsupported(s, dtype, arch):
        return reason
    if s.n_embd * dtype.itemsize % ALIGNMENT:
        return f"width {s.n_embd} is not a multiple of {ALIGNMENT // dtype.itemsize}"
    if arch != "cpu" and dtype == torch.float32:
        return "float32 has no tensor-core products"
    return None if runs_on(arch) else f"{arch} has no TMA, sm_90 and later have"


def _linear_examples(s: Sizes, random: Random) -> list[ExampleInputs]:
    """Attention's two products, and those of an MLP that is made of them.

    What ends a branch leaves its bias to our add_layer_norm.
    """
    C, H = s.n_embd, 4 * s.n_embd

    def layer(K: int, N: int, bias: bool) -> ExampleInputs:
        inputs = [random(s.tokens, K), random(N, K) / K**0.5, random(N) if bias else None]
        return ExampleInputs(inputs, fp32_inputs=(1, 2))

    inner = [layer(C, 3 * C, s.bias), layer(C, H, False), layer(C, C, False), layer(H, C, False)]
    return inner + ([layer(C, C, True), layer(H, C, True)] if s.bias else [])


def _mlp_examples(s: Sizes, random: Random) -> list[ExampleInputs]:
    C, H = s.n_embd, 4 * s.n_embd
    x, fc_bias, proj_bias = random(s.tokens, C), random(H), random(C)
    fc, proj = random(H, C) / C**0.5, random(C, H) / H**0.5
    # Our add_layer_norm takes the second bias.
    biases = [(fc_bias, proj_bias), (fc_bias, None)] if s.bias else [(None, None)]
    arguments = {"approximate": s.approximate}
    return [
        ExampleInputs([x, fc, a, proj, b], arguments, fp32_inputs=(1, 2, 3, 4)) for a, b in biases
    ]


def _cost(layers: int) -> Callable[[Sizes, int], dict[str, Cost]]:
    """Of a product of `layers` times C x C weights."""

    def cost(s: Sizes, itemsize: int) -> dict[str, Cost]:
        flops = 2.0 * s.tokens * layers * s.n_embd**2
        moved = itemsize * (s.tokens * (1 + layers) * s.n_embd + layers * s.n_embd**2)
        return {"forward": Cost(flops, moved), "backward": Cost(2 * flops, 2.0 * moved)}

    return cost


KERNELS = ("matmul_kernel", "matmul_sum_kernel")
SPECS = {
    "linear": OpSpec(
        "linear",
        {
            "eager": Implementation(eager_linear),
            "triton": Implementation(linear, _unsupported),
        },
        _linear_examples, _cost(3),
        kernels=KERNELS, category="linear", library="cuBLAS", calls_per_step=12,
    ),
    "mlp": OpSpec(
        "mlp",
        {
            "eager": Implementation(eager_mlp),
            "triton": Implementation(mlp, _unsupported),
        },
        _mlp_examples, _cost(8),
        kernels=KERNELS, category="linear", library="cuBLAS",
        made_of=("linear", "bias_gelu"), calls_per_step=12,
    ),
}  # fmt: skip
