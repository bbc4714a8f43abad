"""Attention, forward kernel: y = dropout(softmax(scale * q k^T)) v in one pass over the keys.

One program owns BLOCK_M query rows of one head and walks the keys BLOCK_N at a time with the online
softmax (Milakov and Gimelshein 2018; Dao et al. 2022, "FlashAttention"): a running row maximum m
and row sum l rescale what was summed before, so that no T x T matrix ever exists in memory.

- q, k and v are read in place from the packed projection, y is written in the (B, T, C) order of
  the next projection: no transposes, no copies.
- Powers are of two: scale * log2(e) is folded into one fused multiply-add before exp2, and the
  log-sum-exp kept for the backward pass is in base 2 as well, lse = m + log2(l), fp32.
- Keys that every row of the tile sees need no mask: a first loop runs over them, a second one over
  the tiles on the diagonal (and over the ragged end, if T is no multiple of the tile).

What a tile costs (16-bit, head dim D): the accumulator takes BLOCK_M * D fp32 registers and the
scores BLOCK_M * BLOCK_N, spread over 32 * num_warps threads; shared memory holds q and num_stages
tiles of k and v, (BLOCK_M + 2 * num_stages * BLOCK_N) * D * 2 bytes. D = 64 on sm_90 with 128 x 64,
4 warps, 3 stages: 64 + 64 registers a thread of 245 in all and 64 KB, so that two programs share a
multiprocessor and one's exponentials overlap the other's products. Ampere's matrix instructions
read q, k and v from registers too, which is why 4 warps do not hold such a tile there and 8 do.
Addresses are a scalar that moves and offsets that do not: whole moving pointers spilled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgpt_kernels.launch import Config, arch_of, lookup, on_device
from fastgpt_kernels.ops.attention import configs
from fastgpt_kernels.ops.attention.tiles import head_offset, kept, load_tile, locate, store_tile
from fastgpt_kernels.reference import dropout_threshold

# What the heads of one group may read in common: a third of the L2 of an H200 or A100 (50, 40 MB).
L2_BUDGET = 16 << 20
# Every tile size divides it: if it divides T too, no load or store needs a row mask.
EVEN_T = 128
LOG2_E = 1.4426950408889634


@triton.jit
def _attend(
    acc, row_sum, row_max, q, k_base, C, stride_t, rows, columns, lo, hi, T,
    scale_log2, seed, batch_head, row, threshold,
    HEAD: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, MASK: tl.constexpr,
    CHECK_T: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Fold keys [lo, hi) into acc [M, D], row_sum and row_max [M]; MASK: not all are visible."""
    CHECK_HEAD: tl.constexpr = HEAD if columns.shape[0] != HEAD else 0
    offsets = tl.arange(0, BLOCK_N)[:, None] * stride_t + columns[None, :]
    k_base += lo.to(tl.int64) * stride_t
    # The ragged end is one or two tiles: fewer stages there spare registers (128 x 64, 4 warps).
    stages: tl.constexpr = 2 if MASK and CHECK_T else None
    for n in tl.range(lo, hi, BLOCK_N, num_stages=stages):
        n = tl.multiple_of(n, BLOCK_N)
        keys = n + tl.arange(0, BLOCK_N)
        k = load_tile(k_base + offsets, keys, columns, T, CHECK_T, CHECK_HEAD)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
        if MASK:
            visible = rows[:, None] >= keys[None, :] if CAUSAL else (keys < T)[None, :]
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        p = tl.exp2(scores * scale_log2 - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(p, 1)
        row_max = new_max
        if DROPOUT:  # after the sum: softmax is normalised over all keys, dropped or not
            keep = kept(seed, batch_head, row, n, threshold, BLOCK_M, BLOCK_N)
            p = tl.where(keep, p, 0.0)
        v = load_tile(k_base + C + offsets, keys, columns, T, CHECK_T, CHECK_HEAD)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        k_base += BLOCK_N * stride_t
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=["T", "n_head", "head_count", "group", "threshold"])
def attention_forward_kernel(
    qkv,  # (B, T, 3 * C), strides (stride_b, stride_t, 1)
    y,  # (B, T, C) contiguous, out
    lse,  # (B * H, T) fp32, out: base-2 log of the sum of exp(scale * q k^T), rows' softmax divisor
    seed_pointer,  # one int64; read only with DROPOUT
    stride_b, stride_t, T, n_head, head_count, group,
    scale_log2, keep_scale, threshold,
    HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile_count = tl.cdiv(T, BLOCK_M)
    rank, batch_head = locate(tile_count, head_count, group)
    row = (tile_count - 1 - rank) * BLOCK_M  # the last rows see the most keys
    row = tl.multiple_of(row, BLOCK_M)
    C = n_head * HEAD
    rows = row + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, HEAD_PAD)
    CHECK_HEAD: tl.constexpr = HEAD if HEAD_PAD != HEAD else 0

    q_base = qkv + head_offset(batch_head, n_head, stride_b, HEAD)
    q_offsets = tl.arange(0, BLOCK_M)[:, None] * stride_t + columns[None, :]
    q_pointers = q_base + row.to(tl.int64) * stride_t + q_offsets
    q = load_tile(q_pointers, rows, columns, T, not EVEN, CHECK_HEAD)
    seed = tl.load(seed_pointer) if DROPOUT else 0

    acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    full = row // BLOCK_N * BLOCK_N if CAUSAL else T // BLOCK_N * BLOCK_N
    if not CAUSAL and not EVEN and DROPOUT:  # in two loops ptxas serialises wgmma (Triton 3.9)
        full = row * 0
    else:
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, q, q_base + C, C, stride_t, rows, columns, full * 0, full, T,
            scale_log2, seed, batch_head, row, threshold,
            HEAD, CAUSAL, DROPOUT, False, False, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if CAUSAL or not EVEN:
        end = min(row + BLOCK_M, T) if CAUSAL else T
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, q, q_base + C, C, stride_t, rows, columns, full, end, T,
            scale_log2, seed, batch_head, row, threshold,
            HEAD, CAUSAL, DROPOUT, True, not EVEN, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip

    lse_pointers = lse + batch_head.to(tl.int64) * T + rows
    tl.store(lse_pointers, row_max + tl.log2(row_sum), mask=rows < T)
    acc = acc * (keep_scale / row_sum)[:, None]
    y_base = y + head_offset(batch_head, n_head, T.to(tl.int64) * C, HEAD) + row.to(tl.int64) * C
    y_pointers = y_base + tl.arange(0, BLOCK_M)[:, None] * C + columns[None, :]
    store_tile(y_pointers, acc, rows, columns, T, not EVEN, CHECK_HEAD)


def pick(kernel: str, x: torch.Tensor, head_dim: int, dropout: bool) -> Config:
    """Launch config of "FORWARD", "BACKWARD", "KEY_VALUE" or "QUERY".

    fp32 products are exact (no TF32) and dropout takes registers: both have tables of their own.
    """
    variant = "_FP32" if x.dtype == torch.float32 else "_DROPOUT" if dropout else ""
    table = getattr(configs, f"{kernel}{variant}")
    return lookup(table, arch_of(x), head_dim)


def heads_together(bytes_per_head: int) -> int:
    """How many heads a group of programs spans (see `tiles.locate`)."""
    return max(1, L2_BUDGET // bytes_per_head)


def read_in_place(x: torch.Tensor) -> torch.Tensor:
    """x (B, T, columns) if the kernels can address it, else a contiguous copy.

    They need a unit last stride, and 32 bits for offsets within a tile.
    """
    reachable = x.stride(2) == 1 and x.stride(1) * EVEN_T < 2**31
    return x if reachable else x.contiguous()


def launch_forward(
    qkv: torch.Tensor, n_head: int, causal: bool, dropout_p: float, seed: torch.Tensor | None,
    scale: float, config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """qkv (B, T, 3*C) -> y (B, T, C), lse (B*H, T) fp32."""
    qkv = read_in_place(qkv)
    batch, T, width = qkv.shape
    head_dim = width // (3 * n_head)
    y = torch.empty((batch, T, width // 3), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((batch * n_head, T), dtype=torch.float32, device=qkv.device)
    if y.numel() == 0:
        return y, lse
    threshold, keep_scale = dropout_threshold(dropout_p)
    config = config or pick("FORWARD", qkv, head_dim, threshold > 0)
    grid = (triton.cdiv(T, config.blocks["BLOCK_M"]) * batch * n_head,)
    with on_device(qkv):
        attention_forward_kernel[grid](
            qkv, y, lse, lse if seed is None else seed,
            qkv.stride(0), qkv.stride(1), T, n_head, batch * n_head,
            heads_together(2 * T * head_dim * qkv.element_size()),
            scale * LOG2_E, keep_scale, threshold,
            HEAD=head_dim, HEAD_PAD=triton.next_power_of_2(head_dim), CAUSAL=causal,
            DROPOUT=threshold > 0, EVEN=T % EVEN_T == 0, PRECISION="ieee", **config.kwargs(),
        )  # fmt: skip
    return y, lse
