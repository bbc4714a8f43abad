"""Attention of one new token a row against a cache of keys and values, for generation.

For row b with its new q, k, v (D) a head, at position t = positions[b] of a cache of S positions:

    k_cache[b, :, t] = k,  v_cache[b, :, t] = v
    y = sum over j <= t of p_j v_cache[b, :, j],   p = softmax over j <= t of scale * q k_cache[j]

Each key and value is used once, so this is bound by memory: 4*D*(t+1) bytes a head in a 2-byte
dtype, without tensor cores. One row has few heads (12 in GPT-2 124M, for the 132 SMs of a GPU), so
the cache is cut into chunks that programs work on side by side ("flash-decoding", Dao et al. 2023):
each leaves a running maximum m, a sum l and an unnormalised fp32 y, which the last one of a head to
finish puts together, in the chunks' order. The number of chunks follows from the cache's size S and
not from what it holds, so that every step is the same launch and fits into a CUDA graph; chunks
past t end at once.

The new key and value are stored by the one program whose chunk holds t, which takes them from qkv:
no program reads what another writes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt_kernels import reference
from fastgpt_kernels.host import (
    FLOAT_DTYPES,
    HAS_TRITON,
    check_tensor,
    refuse_interpreted_bf16,
    use_kernel,
)
from fastgpt_kernels.register import Op

MAX_HEAD_DIM = 256

if HAS_TRITON:
    from fastgpt_kernels.ops.decode.kernels import launch_attention

    _op = Op(
        "decode_attention",
        launch_attention,
        lambda qkv, *_: qkv.new_empty((qkv.shape[0], qkv.shape[1] // 3)),
        mutates=("k_cache", "v_cache"),
    )


def decode_attention(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attention of each row's new token to its cache, which takes up that token's key and value.

    qkv               (B, 3*C), bf16, fp16 or fp32, straight from the projection of one token a row
    k_cache, v_cache  (B, H, S, D) of qkv's dtype, C = H * D, D up to 256, changed in place; with
                      the same strides, the last of which is 1
    positions         (B,) int64: the place of each row's new token, 0 to S - 1; row b attends to
                      positions 0 to positions[b] of its own cache
    scale             of the logits, > 0; default 1 / sqrt(D)

    Returns y (B, C), contiguous, dtype of qkv. For inference: not differentiable. Positions are
    read on the device only, so a replayed CUDA graph follows them. On a CPU tensor
    `reference.decode_attention` runs. Raises TypeError/ValueError naming the argument.
    """
    _check(qkv, k_cache, v_cache, positions, scale)
    if not use_kernel(qkv):
        return reference.decode_attention(qkv, k_cache, v_cache, positions, scale=scale)
    refuse_interpreted_bf16("decode_attention", qkv)
    scale = k_cache.shape[3] ** -0.5 if scale is None else scale
    return _op(qkv, k_cache, v_cache, positions, scale)


def _check(qkv, k_cache, v_cache, positions, scale) -> None:
    op = "decode_attention"
    dtypes = FLOAT_DTYPES if use_kernel(qkv) else (*FLOAT_DTYPES, torch.float64)
    check_tensor(op, "qkv", qkv, ndim=2, dtypes=dtypes)
    check_tensor(op, "k_cache", k_cache, ndim=4, like=qkv)
    B, H, _, D = k_cache.shape
    check_caches(op, qkv, (B, H * D), k_cache, v_cache, positions, scale)
    check_tensor(op, "qkv", qkv, shape=(B, 3 * H * D))


def check_caches(
    op: str, x: Tensor, shape: tuple[int, int], k_cache: Tensor, v_cache: Tensor,
    positions: Tensor, scale: float | None,
) -> None:  # fmt: skip
    """TypeError/ValueError unless these are the caches and positions of rows (B, C), like x."""
    check_tensor(op, "k_cache", k_cache, ndim=4, like=x)
    B, H, S, D = k_cache.shape
    if not 1 <= D <= MAX_HEAD_DIM or S < 1 or shape != (B, H * D):
        raise ValueError(
            f"{op}: k_cache must have shape (B={shape[0]}, H, S >= 1, D in 1 .. {MAX_HEAD_DIM}) "
            f"with H * D = {shape[1]}, got {tuple(k_cache.shape)}"
        )
    check_tensor(op, "v_cache", v_cache, shape=k_cache.shape, like=x)
    check_tensor(op, "positions", positions, shape=(B,), dtypes=(torch.int64,), like=x)
    if k_cache.stride() != v_cache.stride() or k_cache.stride(3) != 1:
        raise ValueError(
            f"{op}: k_cache and v_cache must have the same strides, the last 1, "
            f"got {k_cache.stride()} and {v_cache.stride()}"
        )
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"{op}: scale must be finite and > 0, got {scale}")
