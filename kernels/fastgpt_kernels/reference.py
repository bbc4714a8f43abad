"""The specification: every op of this package in plain PyTorch, on any device and in any dtype.

In float64 these are the oracle of the tests; on a CPU tensor the public ops run them. They are
written to be read. Statistics, exponentials and losses are computed in float32 or better, results
come back in the dtype of the input, and autograd gives the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 if any of the inputs is."""
    dtype = torch.float32
    for t in tensors:
        if t is not None:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Returns (x - mean) / sqrt(var + eps) * weight + bias over the last dimension, in x's dtype.

    x (..., C), weight (C,), bias (C,) or None. The variance is the biased one (Ba et al., 2016).
    """
    dtype = torch.promote_types(x.dtype, weight.dtype)
    bias = None if bias is None else bias.to(dtype)
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias, eps).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None,
    x_bias: Tensor | None = None, eps: float = 1e-5,
    *, dropout_p: float = 0.0, seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns (layer_norm(residual_out), residual_out): residual_out = residual + Z (x + x_bias).

    Z is 0 where `norm_dropout_mask` of the seed says, else 1 / (1 - p). Without a seed PyTorch's
    generator draws it.
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

    approximate="none" or "erf" is z/2 (1 + erf(z / sqrt 2)), "tanh" is
    z/2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))).
    """
    z = x if bias is None else x + bias.to(x.dtype)
    return F.gelu(z, approximate="none" if approximate == "erf" else approximate)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -1,
    reduction: str = "mean",
    vocab_size: int | None = None,
) -> Tensor:
    """Returns loss_i = log(sum_j exp(z_ij)) - z_i,targets[i] over the columns j < vocab_size.

    logits (..., V), targets (...) int64; float32 or float64, () for reduction "mean" (over the rows
    whose target is not `ignore_index`, -1 unless given; PyTorch's is -100) and "sum", for "none"
    like targets, with 0 for ignored rows.
    """
    z = logits[..., :vocab_size]
    z = z.reshape(targets.numel(), z.shape[-1]).to(torch.promote_types(z.dtype, torch.float32))
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
    `main_grad` (V, C) fp32 takes the gradient in weight's place. `chunk_tokens` changes nothing.
    """
    if main_grad is not None:
        weight = AddsTo.apply(weight, main_grad)
    if weight_bf16 is not None:
        weight = weight + (weight_bf16 - weight).detach()
    logits = F.linear(x, weight[:vocab_size].to(x.dtype))
    return cross_entropy(logits, targets, ignore_index, reduction)


class AddsTo(torch.autograd.Function):
    """x as it is; its gradient is added to `total`, and x has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, total: Tensor) -> Tensor:
        ctx.total = total  # not saved: autograd would refuse what is changed
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:  # type: ignore[override]
        ctx.total.add_(gradient)  # specifications are not compiled
        return None, None


class SumsForBias(torch.autograd.Function):
    """qkv as it is; the bias in it gets the gradient summed over all rows."""

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
    bias: Tensor | None = None,
    causal: bool = True,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    scale: float | None = None,
    deterministic: bool | None = None,
) -> Tensor:
    """y = (Z * softmax(scale * q k^T)) v for every head (Vaswani et al., 2017); any head dim.

    qkv (B, T, 3*C) with q, k, v of head h at columns h*D, C + h*D, 2*C + h*D, D = C / n_head; y
    (B, T, C). Causal: row i sees columns <= i. Z is `attention_dropout_mask` over its keep rate.
    bias (3*C,) is in qkv already: it only gets a gradient. `deterministic` is there for the
    signature's sake: PyTorch's own setting decides here.
    """
    if bias is not None:
        qkv = SumsForBias.apply(qkv, bias)
    batch, T, width = qkv.shape
    head_dim = width // (3 * n_head)
    x = qkv.to(_compute_dtype(qkv)).view(batch, T, 3, n_head, head_dim)
    q, k, v = x.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
    logits = (q @ k.transpose(-2, -1)) * (head_dim**-0.5 if scale is None else scale)
    if causal:
        above = torch.ones(T, T, dtype=torch.bool, device=qkv.device).triu(1)
        logits = logits.masked_fill(above, float("-inf"))
    p = logits.softmax(-1)
    threshold, keep_scale = dropout_threshold(dropout_p)
    if threshold > 0:
        keep = attention_dropout_mask(seed_tensor(seed, qkv.device), batch * n_head, T, dropout_p)
        p = p * keep.view(batch, n_head, T, T) * keep_scale
    return (p @ v).transpose(1, 2).reshape(batch, T, n_head * head_dim).to(qkv.dtype)


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """A dropout seed as one int64 on `device`; None draws it there, without waiting for a GPU."""
    if isinstance(seed, Tensor):
        return seed
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def dropout_threshold(dropout_p: float) -> tuple[int, float]:
    """(t, 1 / (1 - t / 65536)), t = round(p * 65536): an entry whose 16 bits are < t is dropped."""
    threshold = min(round(dropout_p * 65536), 65535)
    return threshold, 65536 / (65536 - threshold)


def attention_dropout_mask(seed: Tensor, heads: int, T: int, dropout_p: float) -> Tensor:
    """(heads, T, T) bool, True where `attention` keeps softmax's entry; heads: b * n_head + h."""
    return attention_dropout_bits(seed, heads, T) >= dropout_threshold(dropout_p)[0]


def norm_dropout_mask(seed: Tensor, M: int, C: int, dropout_p: float) -> Tensor:
    """(M, C) bool, True where `add_layer_norm` keeps an entry of x, seen as M rows.

    Entry (row, column) takes 16 bits of Philox 4x32 with 7 rounds, key `seed`, counter
    (column // 8, row, 0, 1): the low or, if column is odd, the high half of word column // 2 % 4.
    """
    device = seed.device
    columns, rows = torch.arange(-(-C // 8), device=device), torch.arange(M, device=device)
    zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
    words = torch.stack(_philox(seed, columns[None, :], rows[:, None], zero, zero + 1), -1)
    bits = torch.stack([words & 0xFFFF, words >> 16], -1).view(M, -1)[:, :C]
    return bits >= dropout_threshold(dropout_p)[0]


def _philox(seed: Tensor, *counter: Tensor) -> tuple[Tensor, ...]:
    """The four 32-bit words, as int64, of Philox 4x32 with 7 rounds (Salmon et al., 2011)."""
    # 32-bit arithmetic in int64: products wrap modulo 2**64, which leaves both halves right.
    low, words = 0xFFFFFFFF, list(counter)
    key = seed.view(()) & low, (seed.view(()) >> 32) & low
    for i in range(7):
        b, a = 0xCD9E8D57 * words[2], 0xD2511F53 * words[0]
        words = [
            ((b >> 32) & low) ^ words[1] ^ ((key[0] + i * 0x9E3779B9) & low),
            b & low,
            ((a >> 32) & low) ^ words[3] ^ ((key[1] + i * 0xBB67AE85) & low),
            a & low,
        ]
    return torch.broadcast_tensors(*words)


def attention_dropout_bits(seed: Tensor, heads: int, T: int) -> Tensor:
    """(heads, T, T) int64 in [0, 65536): the random bits that decide on dropping an entry.

    Entry (row, column) of a head takes 16 bits of Philox 4x32 with 7 rounds (Salmon et al., 2011),
    key `seed`, counter (8 * (column // 32) + column % 8, 8 * (row // 16) + row % 8, head, 0): of
    its four words number column // 8 % 4, of that the low half if row // 8 % 2 == 0, else the high.
    """
    device = seed.device
    groups_m, groups_n = -(-T // 16), -(-T // 32)
    counter = (
        torch.arange(groups_n * 8, device=device).view(1, 1, -1),
        torch.arange(groups_m * 8, device=device).view(1, -1, 1),
        torch.arange(heads, device=device).view(-1, 1, 1),
        torch.zeros(1, 1, 1, dtype=torch.int64, device=device),
    )
    bits = torch.stack(_philox(seed, *counter), -1)
    bits = torch.stack([bits & 0xFFFF, bits >> 16], -1)  # (heads, T / 2, T / 4, word, half)
    bits = bits.view(heads, groups_m, 8, groups_n, 8, 4, 2).permute(0, 1, 6, 2, 3, 5, 4)
    return bits.reshape(heads, groups_m * 16, groups_n * 32)[:, :T, :T]
