"""The op table: which function computes each of the model's fused ops, and why that one.

Chosen once, when the run starts; the model only ever calls `table.attention(...)` and so on. All
rows of an op have the same signature (that of `fastgpt_kernels`), so a checkpoint never depends on
the choice. This module holds the eager row: plain PyTorch, right on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def attention(
    qkv: Tensor,
    n_head: int,
    *,
    causal: bool = True,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Multi-head attention of a packed projection: qkv (B, T, 3*C) -> (B, T, C).

    Dropout draws from PyTorch's generator; `seed` is for kernels that draw their own.
    """
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // (3 * n_head)).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=causal, scale=scale)
    return y.transpose(1, 2).reshape(B, T, C3 // 3)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, in x's dtype."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """residual_out = x + residual; (layer_norm(residual_out), residual_out)."""
    residual_out = x + residual
    return F.layer_norm(residual_out, x.shape[-1:], weight, bias, eps), residual_out


def bias_gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """gelu(x + bias); approximate: "tanh" (GPT-2) or "none" (erf)."""
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -1,
    reduction: str = "mean",
    vocab_size: int | None = None,
) -> Tensor:
    """Cross entropy of softmax(x @ weight.T) with targets; x (M, C), weight (V, C), targets (M,).

    Rows of weight past vocab_size are padding: they take no part, so they get no probability and no
    gradient. The loss is fp32 whatever x is.
    """
    logits = F.linear(x, weight if vocab_size is None else weight[:vocab_size])
    return F.cross_entropy(logits.float(), targets, ignore_index=ignore_index, reduction=reduction)


@dataclass(frozen=True)
class Choice:
    """One op's row: which implementation runs and the reason, for `doctor` and the run's log."""

    op: str
    implementation: str
    reason: str


@dataclass(frozen=True)
class OpTable:
    """The functions the model calls, and why they were chosen."""

    attention: Callable[..., Tensor]
    layer_norm: Callable[..., Tensor]
    add_layer_norm: Callable[..., tuple[Tensor, Tensor]]
    bias_gelu: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., Tensor]
    choices: tuple[Choice, ...]

    def describe(self) -> str:
        """One line: implementations with the ops that run on them, and the reason."""
        groups: dict[tuple[str, str], list[str]] = {}
        for c in self.choices:
            groups.setdefault((c.implementation, c.reason), []).append(c.op)
        return "; ".join(f"{i} ({r}): {', '.join(ops)}" for (i, r), ops in groups.items())


def choose(device: torch.device) -> OpTable:
    """The op table for a device."""
    rows = (attention, layer_norm, add_layer_norm, bias_gelu, linear_cross_entropy)
    reason = "no GPU" if device.type == "cpu" else "the only row so far"
    return OpTable(*rows, choices=tuple(Choice(f.__name__, "eager", reason) for f in rows))
