"""What the layer norms tell the rest of the program."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt_kernels.ops.norm import op
from fastgpt_kernels.registry import (
    Cost,
    ExampleInputs,
    Implementation,
    OpSpec,
    Random,
    Sizes,
    triton_unsupported,
)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, in x's dtype.

    With weights of another dtype (fp32 masters, bf16 activations) all of it is computed in theirs.
    """
    return F.layer_norm(x.to(weight.dtype), x.shape[-1:], weight, bias, eps).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None,
    x_bias: Tensor | None = None, eps: float = 1e-5,
    *, dropout_p: float = 0.0, seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(layer_norm(residual_out), residual_out), residual_out = residual + dropout(x + x_bias).

    Dropout draws from PyTorch's generator; `seed` is for kernels that draw their own.
    """
    branch = x if x_bias is None else x + x_bias.to(x.dtype)
    residual_out = F.dropout(branch, dropout_p) + residual if dropout_p else branch + residual
    return layer_norm(residual_out, weight, bias, eps), residual_out


def _unsupported(s: Sizes, dtype: torch.dtype, arch: str) -> str | None:
    if reason := triton_unsupported(s, dtype, arch):
        return reason
    return None if s.n_embd <= op.MAX_WIDTH else f"width {s.n_embd} is more than {op.MAX_WIDTH}"


def _branches(plain: ExampleInputs, s: Sizes, random: Random) -> list[ExampleInputs]:
    """Training's, with the branch's bias and dropout, evaluation's, and a prompt's."""
    cases = []
    if s.bias:
        cases = [replace(plain, gradients=False)]
        inputs = [*plain.inputs, random(s.n_embd)]
        plain = replace(plain, inputs=inputs, fp32_inputs=range(2, len(inputs)))
    if not s.dropout:
        return [plain, *cases]
    dropout = {"dropout_p": s.dropout, "seed": 1}
    return [
        replace(plain, arguments=dropout),
        replace(plain, gradients=False),
        *cases,
    ]


def _record(name: str, streams: int, tensors: tuple[int, int], often: int) -> OpSpec:
    """`streams` inputs of the activations' size; tensors moved forward and backward."""

    def examples(s: Sizes, random: Random) -> list[ExampleInputs]:
        shapes = [(s.tokens, s.n_embd)] * streams + [(s.n_embd,)] * (1 + s.bias)
        inputs = [random(*shape) for shape in shapes]
        plain = ExampleInputs(inputs, fp32_inputs=range(streams, len(inputs)))
        return [plain] if streams == 1 else _branches(plain, s, random)

    def cost(s: Sizes, itemsize: int) -> dict[str, Cost]:
        moved = 1.0 * s.tokens * s.n_embd * itemsize
        return {"forward": Cost(0, tensors[0] * moved), "backward": Cost(0, tensors[1] * moved)}

    return OpSpec(
        name,
        {
            "eager": Implementation(globals()[name], follows_seed=False),
            "triton": Implementation(getattr(op, name), _unsupported),
        },
        examples, cost,
        kernels=tuple(f"layer_norm_{kernel}_kernel" for kernel in ("forward", "backward")),
        category="memory", label="norms", calls_per_step=often,
    )  # fmt: skip


SPECS = {
    "layer_norm": _record("layer_norm", 1, (2, 3), 1),
    "add_layer_norm": _record("add_layer_norm", 2, (4, 4), 24),
}
