"""What the ops of decoding tell the rest of the program."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt_kernels import reference
from fastgpt_kernels.ops.decode.attention import MAX_HEAD_DIM, decode_attention
from fastgpt_kernels.ops.decode.linear import MAX_ROWS, decode_linear
from fastgpt_kernels.record import Case, Random, Record, Sizes, Work


def cached_attention(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, *, scale: float | None = None
) -> Tensor:
    """One new token a row against its cache, by PyTorch's own attention.

    qkv (B, 3*C); caches (B, H, S, D), row b's new key and value are written to positions[b]
    (int64, (B,)), and positions up to that one are attended to. Returns (B, C).
    """
    B, H, S, D = k_cache.shape
    q, k, v = qkv.view(B, 3, H, 1, D).unbind(1)
    at = positions.view(B, 1, 1, 1).expand(B, H, 1, D)
    k_cache.scatter_(2, at, k)
    v_cache.scatter_(2, at, v)
    hidden = torch.arange(S, device=qkv.device) > positions.view(B, 1, 1, 1)
    mask = torch.zeros(B, 1, 1, S, dtype=qkv.dtype, device=qkv.device)
    mask.masked_fill_(hidden, -torch.inf)
    y = F.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=mask, scale=scale)
    return y.reshape(B, H * D)


def _attention_limits(s: Sizes, dtype: torch.dtype, arch: str) -> str:
    return "" if s.head_dim <= MAX_HEAD_DIM else f"head dim {s.head_dim} is over {MAX_HEAD_DIM}"


def _linear_limits(s: Sizes, dtype: torch.dtype, arch: str) -> str:
    return "" if s.batch_size <= MAX_ROWS else f"{s.batch_size} rows are more than {MAX_ROWS}"


def _attention_case(s: Sizes, random: Random) -> Case:
    B, S = s.batch_size, s.block_size
    qkv = random(B, 3 * s.n_embd)
    k, v = (random(B, s.n_head, S, s.head_dim) for _ in range(2))
    positions = torch.linspace(0, S - 1, B, device=qkv.device).long()
    return Case([qkv, k, v], {"positions": positions}, gradients=False)


def _run_attention(function: Callable[..., Tensor], case: Case) -> list[Tensor]:
    """The result, and both caches with what was added to them."""
    qkv, k, v = (x.clone() for x in case.inputs)
    return [function(qkv, k, v, **case.arguments).float(), k.float(), v.float()]


def _linear_case(s: Sizes, random: Random) -> Case:
    """x, weight, bias, norm and residual of the MLP's first layer."""
    K, N = s.n_embd, 4 * s.n_embd
    x, weight, bias = random(s.batch_size, K), random(N, K) / K**0.5, random(N)
    inputs = [x, weight, bias, random(K), random(K), random(s.batch_size, N)]
    return Case(inputs, {"activation": "tanh"}, masters=(3, 4), gradients=False)


def _linear_calls(s: Sizes, random: Random) -> list[Case]:
    """A block's four layers and the head, as `fastgpt.inference.decode` calls them."""
    B, C, H = s.batch_size, s.n_embd, 4 * s.n_embd

    def layer(K: int, N: int, norm: bool, bias: bool, activation: str = "none") -> Case:
        x, weight = random(B, K), random(N, K) / K**0.5
        gain, shift = random(K) if norm else None, random(K) if norm and s.bias else None
        residual = None if norm else random(B, N)
        inputs = [x, weight, random(N) if bias else None, gain, shift, residual]
        return Case(inputs, {"activation": activation}, masters=(3, 4), gradients=False)

    return [
        layer(C, 3 * C, True, s.bias),
        layer(C, C, False, s.bias),
        layer(C, H, True, s.bias, s.gelu),
        layer(H, C, False, s.bias),
        layer(C, s.vocab_size, True, False),
    ]


def _run_linear(function: Callable[..., Tensor], case: Case) -> list[Tensor]:
    x, weight, bias, gain, shift, residual = case.inputs
    others = {"norm_weight": gain, "norm_bias": shift, "residual": residual}
    return [function(x, weight, bias, **others, **case.arguments).float()]


def _attention_work(s: Sizes, itemsize: int) -> dict[str, Work]:
    return {"forward": Work(0, 2.0 * s.tokens * s.n_embd * itemsize)}


def _linear_work(s: Sizes, itemsize: int) -> dict[str, Work]:
    return {"forward": Work(0, 4.0 * s.n_embd**2 * itemsize)}


RECORDS = {
    "decode_attention": Record(
        "decode_attention", {"eager": cached_attention, "triton": decode_attention},
        _attention_case, _attention_work,
        kernels=("decode_attention_kernel", "decode_attention_combine_kernel"), part="attention",
        limits=_attention_limits, few_tokens=0, run=_run_attention,
    ),
    "decode_linear": Record(
        "decode_linear", {"eager": reference.decode_linear, "triton": decode_linear}, _linear_case,
        _linear_work,
        kernels=("decode_linear_kernel",), part="linear", limits=_linear_limits,
        calls=_linear_calls, few_tokens=0, run=_run_linear,
    ),
}  # fmt: skip
