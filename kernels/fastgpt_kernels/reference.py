"""Reference of every op in plain PyTorch, on any device and in any dtype.

These functions are the specification, and in float64 the oracle of the tests. They are also the
eager implementation, which the public ops run on a CPU tensor. Results have the dtype of the input,
and autograd gives the gradients. Without a seed PyTorch's generator draws the dropout masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels.dropout import (
    attention_dropout_mask,
    dropout_threshold,
    norm_dropout_mask,
    seed_tensor,
)
from fastgpt_kernels.linear import linear


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Returns (x - mean) / sqrt(var + eps) * weight + bias over the last dimension, in x's dtype.

    x (..., C), weight (C,), bias (C,) or None. The variance is the biased one (Ba et al., 2016).
    """
    dtype = max(weight.dtype, x.dtype, key=lambda dtype: dtype.itemsize)
    bias = None if bias is None else bias.to(dtype)
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias, eps).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None,
    x_bias: Tensor | None = None, eps: float = 1e-5,
    *, dropout_p: float = 0.0, seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns (layer_norm(residual_out), residual_out): residual_out = residual + Z (x + x_bias).

    Z is 1 / (1 - p) where `norm_dropout_mask` of the seed is True, else 0.
    """
    branch = x if x_bias is None else x + x_bias.to(x.dtype)
    if dropout_p and seed is None:
        branch = F.dropout(branch, dropout_p)
    elif dropout_p:
        rows, C = x.numel() // max(x.shape[-1], 1), x.shape[-1]
        kept = norm_dropout_mask(seed_tensor(seed, x.device), rows, C, dropout_p).view(x.shape)
        branch = torch.where(kept, branch * dropout_threshold(dropout_p)[1], 0.0)
    residual_out = branch + residual
    return layer_norm(residual_out, weight, bias, eps), residual_out


def bias_gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """Returns gelu(z), z = x + bias: x (..., C), bias (C,) or None (Hendrycks and Gimpel, 2016).

    approximate="none" is z/2 (1 + erf(z / sqrt 2)), "tanh" is
    z/2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))).
    """
    z = x if bias is None else x + bias.to(x.dtype)
    return F.gelu(z, approximate=approximate)


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None = None,
    approximate: str = "tanh",
    *,
    weights_bf16: tuple[Tensor | None, Tensor | None] = (None, None),
    main_grads: tuple[Tensor | None, Tensor | None] = (None, None),
    bias_gelu: Callable[..., Tensor] = bias_gelu,
) -> Tensor:
    """Returns gelu(x W1^T + b1) W2^T + b2: x (..., C), fc_weight (H, C), proj_weight (C, H).

    `weights_bf16` and `main_grads` are those of `linear`, for both weights.
    """
    h = bias_gelu(linear(x, fc_weight, None, weights_bf16[0], main_grads[0]), fc_bias, approximate)
    return linear(h, proj_weight, proj_bias, weights_bf16[1], main_grads[1])


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -1,
    reduction: str = "mean",
    vocab_size: int | None = None,
) -> Tensor:
    """Returns loss_i = log(sum_j exp(z_ij)) - z_i,targets[i] over the columns j < vocab_size.

    logits (..., V), targets (...) int64. The loss is float32 or float64: () for "sum" and for
    "mean", over the rows whose target is not `ignore_index`; like targets for "none", with 0 for
    ignored rows.
    """
    z = logits[..., :vocab_size]
    dtype = z.dtype if z.dtype == torch.float64 else torch.float32
    z = z.reshape(targets.numel(), z.shape[-1]).to(dtype)
    loss = F.cross_entropy(z, targets.reshape(-1), ignore_index=ignore_index, reduction=reduction)
    return loss.view(targets.shape) if reduction == "none" else loss


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -1,
    reduction: str = "mean",
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    weight_bf16: Tensor | None = None,
    main_grad: Tensor | None = None,
) -> Tensor:
    """Returns cross_entropy of the logits x @ weight.T: x (..., C), weight (V, C).

    The matmul takes weight in x's dtype, rounded here or by the caller, without rows of padding.
    `main_grad` (V, C) fp32 takes the weight's gradient. `chunk_tokens` changes nothing.
    """
    if main_grad is not None:
        weight = AddsTo.apply(weight, main_grad)
    if weight_bf16 is not None:
        weight = weight + (weight_bf16 - weight).detach()
    logits = F.linear(x, weight[:vocab_size].to(x.dtype))
    return cross_entropy(logits, targets, ignore_index, reduction)


class AddsTo(torch.autograd.Function):
    """Identity of x whose gradient is added to `total` instead of being returned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, total: Tensor) -> Tensor:
        ctx.total = total  # autograd refuses changed saved tensors
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:  # type: ignore[override]
        ctx.total.add_(gradient)  # references are not compiled
        return None, None


class SumsForBias(torch.autograd.Function):
    """Identity of qkv. The bias in it gets the gradient summed over all rows."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        return qkv.view_as(qkv)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return gradient, gradient.sum((0, 1)).to(ctx.dtype)


def attention(
    qkv: Tensor,
    n_head: int,
    *,
    causal: bool = True,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Returns (Z * softmax(scale * q k^T)) v of every head (Vaswani et al., 2017); any head dim.

    qkv (B, T, 3*C) with q, k, v of head h at columns h*D, C + h*D, 2*C + h*D, D = C / n_head; y
    (B, T, C). Causal: row i sees columns <= i. Z is 1 / (1 - p) where `attention_dropout_mask` of
    the seed is True, else 0. bias (3*C,) is already in qkv and only gets a gradient.
    """
    if bias is not None:
        qkv = SumsForBias.apply(qkv, bias)
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // (3 * n_head)).permute(2, 0, 3, 1, 4).unbind(0)
    if dropout_p == 0 or seed is None:
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout_p, is_causal=causal, scale=scale
        )
    else:
        logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if causal:
            above = torch.ones(T, T, dtype=torch.bool, device=qkv.device).triu(1)
            logits = logits.masked_fill(above, float("-inf"))
        keep = attention_dropout_mask(seed_tensor(seed, qkv.device), B * n_head, T, dropout_p)
        y = logits.softmax(-1) * keep.view(B, n_head, T, T) * dropout_threshold(dropout_p)[1] @ v
    return y.transpose(1, 2).reshape(B, T, C3 // 3)
