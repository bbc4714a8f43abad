"""What the layer norms tell the rest of the program."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt_kernels.ops.norm import op
from fastgpt_kernels.record import Case, Random, Record, Sizes, Work


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


def _limits(s: Sizes, dtype: torch.dtype, arch: str) -> str:
    return "" if s.n_embd <= op.MAX_WIDTH else f"width {s.n_embd} is more than {op.MAX_WIDTH}"


def _branches(plain: Case, s: Sizes, random: Random) -> list[Case]:
    """Training's, with the branch's bias and dropout, evaluation's, and a prompt's, with neither.

    Each implementation draws masks of its own.
    """
    cases = []
    if s.bias:
        cases = [replace(plain, gradients=False)]
        inputs = [*plain.inputs, random(s.n_embd)]
        plain = replace(plain, inputs=inputs, masters=range(2, len(inputs)))
    if not s.dropout:
        return [plain, *cases]
    dropout = {"dropout_p": s.dropout, "seed": 1}
    return [
        replace(plain, ours=True, arguments=dropout),
        replace(plain, ours=False),
        replace(plain, ours=True, gradients=False),
        *cases,
    ]


def _record(name: str, streams: int, tensors: tuple[int, int], often: int) -> Record:
    """`streams` inputs of the activations' size; tensors moved forward and backward."""

    def case(s: Sizes, random: Random) -> Case:
        shapes = [(s.tokens, s.n_embd)] * streams + [(s.n_embd,)] * 2
        return Case([random(*shape) for shape in shapes])

    def calls(s: Sizes, random: Random) -> list[Case]:
        *inputs, bias = case(s, random).inputs
        inputs += [bias] if s.bias else []
        plain = Case(inputs, masters=range(streams, len(inputs)))
        return [plain] if streams == 1 else _branches(plain, s, random)

    def work(s: Sizes, itemsize: int) -> dict[str, Work]:
        moved = 1.0 * s.tokens * s.n_embd * itemsize
        return {"forward": Work(0, tensors[0] * moved), "backward": Work(0, tensors[1] * moved)}

    return Record(
        name, {"eager": globals()[name], "triton": getattr(op, name)}, case, work,
        kernels=tuple(f"layer_norm_{kernel}_kernel" for kernel in ("forward", "backward")),
        part="memory", item="norms", limits=_limits, calls=calls, often=often,
    )  # fmt: skip


RECORDS = {
    "layer_norm": _record("layer_norm", 1, (2, 3), 1),
    "add_layer_norm": _record("add_layer_norm", 2, (4, 4), 24),
}
