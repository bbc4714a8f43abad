"""Fused multi-head attention on packed projections (Dao et al. 2022, "FlashAttention").

For every batch entry and head, with q, k, v (T, D) its columns of qkv (B, T, 3*C), D = C / H:

    S = scale q k^T  (causal: -inf where column > row)     P = softmax(S)     y = (Z P) v
    dv = (Z P)^T dy      dP = Z (dy v^T)      delta = rowsum(dy y) = rowsum(P dP)
    dS = P (dP - delta)      dk = scale dS^T q      dq = scale dS k

q of head h is at columns h*D, k at C + h*D, v at 2*C + h*D. Z is the dropout mask over its keep
rate, all ones without. Matmuls take qkv's dtype and sum in fp32. Softmax is fp32.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt_kernels import launch, reference
from fastgpt_kernels.checks import (
    FLOAT_DTYPES,
    check_dropout,
    check_int,
    check_tensor,
    refuse_interpreted_bf16,
)
from fastgpt_kernels.dropout import dropout_threshold, keep_attention, seed_tensor
from fastgpt_kernels.launch import Config, Table, lookup, tl, triton
from fastgpt_kernels.library import define_op, tensors_only
from fastgpt_kernels.registry import (
    Cost,
    ExampleInputs,
    Implementation,
    OpSpec,
    Random,
    Sizes,
    gluon_unsupported,
    implementations,
)

HEAD_DIMS = (32, 64, 80, 96, 128)  # 80 and 96 are worked on as 128 wide, with zeros not loaded

# --- Launch configs ---------------------------------------------------------------------------


def _tile(m: int, n: int, warps: int, stages: int = 1) -> Config:
    """Returns the config of BLOCK_M query rows by BLOCK_N keys."""
    return Config({"BLOCK_M": m, "BLOCK_N": n}, warps, stages)


# Key: the head dim. Measured 2026-11-26 on an H200, Triton 3.6, 384 causal heads of 1,024 x 64 in
# bf16 (bench/results/nvidia-h200/20261126-kernels.csv): on sm_90 and head dim 64 without dropout,
# FORWARD 174 µs, DKV 342 µs (64 x 128 tiles with 8 warps: 401), DQ 227 µs. No other row is
# measured: they are the largest tiles that spill no registers with Triton 3.6, 3.7 and 3.9.
# "default" fits 99 KB of shared memory.
FORWARD: Table = {
    "default": {64: _tile(128, 64, 8, 3), 128: _tile(128, 32, 8, 3)},
    "sm_90": {64: _tile(128, 64, 4, 3), 128: _tile(128, 64, 8, 3)},
    "sm_100": {32: _tile(64, 64, 4, 3), 64: _tile(128, 64, 8, 3), 128: _tile(128, 64, 8, 2)},
}
FORWARD_DROPOUT = FORWARD | {"sm_90": {64: _tile(128, 64, 8, 3), 128: _tile(128, 64, 8, 3)}}
DKV: Table = {
    "default": {64: _tile(32, 128, 8, 2), 128: _tile(32, 64, 8, 2)},
    "sm_90": {64: _tile(64, 64, 4, 2), 128: _tile(32, 128, 8, 2)},
    "sm_100": {64: _tile(64, 128, 8, 2), 128: _tile(32, 128, 8, 2)},
}
DKV_DROPOUT: Table = {
    "default": {64: _tile(32, 64, 4, 2), 128: _tile(32, 64, 8, 2)},
    "sm_90": {64: _tile(32, 128, 8, 2), 128: _tile(32, 64, 8, 2)},
    "sm_100": {64: _tile(64, 128, 8, 2), 128: _tile(32, 128, 8, 2)},
}
DQ: Table = {
    "default": {64: _tile(128, 64, 8, 2), 128: _tile(128, 32, 8, 2)},
    "sm_90": {64: _tile(128, 64, 8, 2), 128: _tile(128, 64, 8, 2)},
    "sm_100": {64: _tile(128, 64, 8, 2), 128: _tile(128, 64, 8, 2)},
}
DQ_DROPOUT = DQ | {"default": {64: _tile(128, 32, 8, 2), 128: _tile(128, 32, 8, 2)}}
# True fp32 matmuls do not run on tensor cores: Triton loads whole rows of both operands into
# registers. At 64 nothing spills; at 128 the backward kernels do, by a few hundred bytes a thread.
FP32: Table = {"default": {64: _tile(32, 32, 8), 128: _tile(16, 32, 8)}}
# The preprocessing of the backward pass, bound by memory.
ROWS: Table = {"default": {64: Config({"BLOCK_T": 64}, 4), 128: Config({"BLOCK_T": 32}, 4)}}

# Bytes that the heads of one group read: a third of the L2 of an H200 or A100 (50 and 40 MB).
L2_BUDGET = 16 << 20
# Bytes of dq's fp32 sums that stay in an L2 of 50 MB, in Hopper's backward kernels.
DQ_BUDGET = 36 << 20
# False goes back to the backward kernel for Hopper with a tile of keys to a program (measured).
HOPPER_BY_HEAD = True
# Every tile size divides it: if it divides T too, no load or store needs a row mask.
EVEN_T = 128
LOG2_E = 1.4426950408889634

# --- Kernels: shared --------------------------------------------------------------------------

# A kernel reads no other globals.
PAIR_ROWS = tl.constexpr(EVEN_T)
PRECISION = tl.constexpr("ieee")  # of fp32 matmuls


@triton.jit
def locate(tile_count, head_count, group):
    """Returns (rank of this program's tile in its head, longest first; batch * n_head + head).

    `group` heads go together, few enough that what they read stays in the L2 cache. A group begins
    with the longest tile of every head, so that the grid's last wave has short programs.
    """
    pid = tl.program_id(0)
    first = pid // (group * tile_count) * group
    heads = min(group, head_count - first)
    rest = pid - first * tile_count
    return rest // heads, first + rest % heads


@triton.jit
def head_offset(batch_head, n_head, stride_batch, HEAD: tl.constexpr):
    """Returns the offset (int64) of a head's position 0 in a (B, T, n * H * HEAD) tensor."""
    batch = batch_head // n_head
    return batch.to(tl.int64) * stride_batch + (batch_head % n_head) * HEAD


@triton.jit
def tile_pointers(base, row, stride, ROWS: tl.constexpr, HEAD_PAD: tl.constexpr):
    """Returns the addresses [ROWS, HEAD_PAD] of rows from `row` on, for the base of a head."""
    offsets = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, HEAD_PAD)[None, :]
    return base + row.to(tl.int64) * stride + offsets


@triton.jit
def _inside(rows, columns, T, CHECK_T: tl.constexpr, HEAD: tl.constexpr):
    """Returns the mask of a tile's elements before T (if CHECK_T) and before HEAD, or None."""
    if CHECK_T and columns.shape[0] != HEAD:
        return (rows < T)[:, None] & (columns < HEAD)[None, :]
    elif CHECK_T:
        return (rows < T)[:, None]
    elif columns.shape[0] != HEAD:
        return (columns < HEAD)[None, :]


@triton.jit
def load_tile(
    pointers, rows, columns, T, CHECK_T: tl.constexpr, HEAD: tl.constexpr,
    EVICT_FIRST: tl.constexpr = False,
):  # fmt: skip
    """Returns a tile, zero outside. EVICT_FIRST: the L2 may drop it, no other program reads it."""
    policy: tl.constexpr = "evict_first" if EVICT_FIRST else ""
    mask = _inside(rows, columns, T, CHECK_T, HEAD)
    other: tl.constexpr = None if mask is None else 0.0
    return tl.load(pointers, mask=mask, other=other, eviction_policy=policy)


@triton.jit
def store_tile(
    pointers, tile, rows, columns, T, CHECK_T: tl.constexpr, HEAD: tl.constexpr,
    EVICT_FIRST: tl.constexpr = False,
):  # fmt: skip
    """Stores a tile, rounded to the dtype in memory."""
    policy: tl.constexpr = "evict_first" if EVICT_FIRST else ""
    mask = _inside(rows, columns, T, CHECK_T, HEAD)
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=mask, eviction_policy=policy)


# --- Kernels: forward -------------------------------------------------------------------------

# One program owns BLOCK_M query rows of a head and walks the keys BLOCK_N at a time with the online
# softmax (Milakov and Gimelshein 2018). Powers are of two: scale * log2(e) is folded into one FMA
# before exp2. A first loop has the keys that every row sees, and a second one those of the diagonal
# and the ragged end. Addresses are a scalar that moves and offsets that do not, as whole moving
# pointers spilled. On sm_90, D = 64, two programs share an SM: one's exponentials overlap the
# other's matmuls.


@triton.jit
def _attend(
    acc, row_sum, row_max, q, k_base, C, stride_t, rows, columns, lo, hi, T,
    scale_log2, seed, batch_head, row, threshold,
    HEAD: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, MASK: tl.constexpr,
    CHECK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Folds keys [lo, hi) into acc [M, D], row_sum and row_max [M]. MASK: not all are visible."""
    offsets = tl.arange(0, BLOCK_N)[:, None] * stride_t + columns[None, :]
    k_base += lo.to(tl.int64) * stride_t
    # The ragged end is one or two tiles: fewer stages there spare registers (128 x 64, 4 warps).
    stages: tl.constexpr = 2 if MASK and CHECK_T else None
    for n in tl.range(lo, hi, BLOCK_N, num_stages=stages):
        n = tl.multiple_of(n, BLOCK_N)
        keys = n + tl.arange(0, BLOCK_N)
        k = load_tile(k_base + offsets, keys, columns, T, CHECK_T, HEAD)  # [N, D]
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
            keep = keep_attention(seed, batch_head, row, n, threshold, BLOCK_M, BLOCK_N)
            p = tl.where(keep, p, 0.0)
        v = load_tile(k_base + C + offsets, keys, columns, T, CHECK_T, HEAD)  # [N, D]
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        k_base += BLOCK_N * stride_t
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=["T", "n_head", "head_count", "group", "threshold"])
def attention_fwd_kernel(
    qkv,  # (B, T, 3 * C), strides (stride_b, stride_t, 1)
    y,  # (B, T, C) contiguous, out
    lse,  # (B * H, T) fp32, out: base-2 log of the sum of exp(scale * q k^T), rows' softmax divisor
    seed_pointer,  # one int64; read only with DROPOUT
    stride_b, stride_t, T, n_head, head_count, group,
    scale_log2, keep_scale, threshold,
    HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile_count = tl.cdiv(T, BLOCK_M)
    rank, batch_head = locate(tile_count, head_count, group)
    # The last rows see the most keys.
    row = tl.multiple_of((tile_count - 1 - rank) * BLOCK_M, BLOCK_M)
    C = n_head * HEAD
    rows = row + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, HEAD_PAD)

    q_base = qkv + head_offset(batch_head, n_head, stride_b, HEAD)
    pointers = tile_pointers(q_base, row, stride_t, BLOCK_M, HEAD_PAD)
    q = load_tile(pointers, rows, columns, T, not EVEN, HEAD)  # [M, D]
    seed = tl.load(seed_pointer) if DROPOUT else 0

    acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    # In two loops ptxas serialises wgmma of full attention with dropout (Triton 3.9).
    FIRST: tl.constexpr = 1 if not CAUSAL and not EVEN and DROPOUT else 0
    full = (row * 0 if FIRST else row if CAUSAL else T) // BLOCK_N * BLOCK_N
    end = min(row + BLOCK_M, T) if CAUSAL else T
    for MASK in tl.static_range(FIRST, 2 if CAUSAL or not EVEN else 1):
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, q, q_base + C, C, stride_t, rows, columns,
            full * MASK, end if MASK else full, T, scale_log2, seed, batch_head, row, threshold,
            HEAD, CAUSAL, DROPOUT, MASK, MASK and not EVEN, BLOCK_M, BLOCK_N,
        )  # fmt: skip

    lse_pointers = lse + batch_head.to(tl.int64) * T + rows
    tl.store(lse_pointers, row_max + tl.log2(row_sum), mask=rows < T)
    acc = acc * (keep_scale / row_sum)[:, None]
    y_base = y + head_offset(batch_head, n_head, T.to(tl.int64) * C, HEAD)
    pointers = tile_pointers(y_base, row, C, BLOCK_M, HEAD_PAD)
    store_tile(pointers, acc, rows, columns, T, not EVEN, HEAD)


# --- Kernels: backward ------------------------------------------------------------------------

# Every sum has a fixed order, so gradients are the same to the bit in every run. The first pass
# owns BLOCK_N keys and walks the rows: scores are transposed, so that P^T and dS^T, fresh in
# registers, are the left operands of dv and dk. The second one owns BLOCK_M rows and walks the
# keys for dq. Seven matmuls in all. One pass has five, but adding up dq in
# memory cost more: 722 µs for 602 (H200, the calls above). Registers of the first pass (16 bits,
# D = 64, 64 rows x 64 keys, 4 warps): dk and dv 32 a thread each, scores and dP 32 each, lse and
# delta 16 each, 16-bit operands made of P and dS 16 each. Dropout takes some 30 more.


@triton.jit
def _pairs_of_head(lse_delta, batch_head, T):
    """Returns the address of the (lse, delta) of a head's rows."""
    offset = batch_head.to(tl.int64) * (tl.cdiv(T, PAIR_ROWS) * (2 * PAIR_ROWS))
    return lse_delta + tl.multiple_of(offset, 2 * PAIR_ROWS)


@triton.jit(do_not_specialize=["T", "n_head"])
def attention_bwd_preprocess_kernel(
    y,  # (B, T, C) contiguous
    grad_y,  # (B, T, C), strides (stride_gb, stride_gt, 1)
    lse,  # (B * H, T) fp32
    lse_delta,  # (B * H, T up to a multiple of EVEN_T, 2) fp32, out: past T inf and 0
    stride_gb, stride_gt, T, n_head,
    HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Lays delta beside lse, a pair per row, so that one copy fetches both."""
    row = tl.program_id(1) * BLOCK_T
    batch_head = tl.program_id(0)
    C = n_head * HEAD
    rows = row + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, HEAD_PAD)
    y_base = y + head_offset(batch_head, n_head, T.to(tl.int64) * C, HEAD)
    pointers = tile_pointers(y_base, row, C, BLOCK_T, HEAD_PAD)
    out = load_tile(pointers, rows, columns, T, True, HEAD)
    grad_base = grad_y + head_offset(batch_head, n_head, stride_gb, HEAD)
    pointers = tile_pointers(grad_base, row, stride_gt, BLOCK_T, HEAD_PAD)
    grad = load_tile(pointers, rows, columns, T, True, HEAD)
    dot = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)  # [T]
    head_row = batch_head.to(tl.int64) * T
    row_lse = tl.load(lse + head_row + rows, mask=rows < T, other=float("inf"))
    pairs = tl.join(row_lse, dot).reshape(2 * BLOCK_T)
    tl.store(_pairs_of_head(lse_delta, batch_head, T) + 2 * row + tl.arange(0, 2 * BLOCK_T), pairs)


@triton.jit
def _operand(x, WGMMA: tl.constexpr):
    """Returns x, 16 bits wide, in registers before the matmul that reads it begins.

    LLVM would compute it between the wgmma instructions of that matmul, which ptxas mends by
    starting anew before each, or by waiting after each.
    """
    if WGMMA:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
        )
    else:
        return x


@triton.jit
def _end_matmuls(WGMMA: tl.constexpr):
    """Waits for all matmuls in flight, at the end of a loop's body.

    Sums that are in flight over the back edge are copied there, as ptxas sees it, and then it waits
    after every wgmma instruction of the kernel (C7515).
    """
    if WGMMA:
        tl.inline_asm_elementwise(
            "wgmma.wait_group.sync.aligned 0; mov.u32 $0, 0;",
            "=r", [], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _walk_rows(
    dk, dv, k, v, q_base, grad_base, lse_delta, stride_t, stride_gt,
    lo, hi, key, T, scale_log2, keep_scale, seed, batch_head, threshold,
    HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    MASK: tl.constexpr, CHECK_T: tl.constexpr, WGMMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds what rows [lo, hi) give to dk and dv [N, D] of the keys from `key` on."""
    columns = tl.arange(0, HEAD_PAD)
    local = tl.arange(0, BLOCK_M)
    keys = key + tl.arange(0, BLOCK_N)
    q_offsets = local[:, None] * stride_t + columns[None, :]
    grad_offsets = local[:, None] * stride_gt + columns[None, :]
    q_base += lo.to(tl.int64) * stride_t
    grad_base += lo.to(tl.int64) * stride_gt
    for m in range(lo, hi, BLOCK_M):
        m = tl.multiple_of(m, BLOCK_M)
        rows = m + local
        q = load_tile(q_base + q_offsets, rows, columns, T, CHECK_T, HEAD)  # [M, D]
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [N, M]
        # One copy for both; Triton 3.6 would copy either again for each of a thread's rows.
        pairs = tl.load(lse_delta + tl.multiple_of(2 * m, 2 * BLOCK_M) + tl.arange(0, 2 * BLOCK_M))
        row_lse, row_delta = tl.split(pairs.reshape(BLOCK_M, 2))
        p = tl.exp2(scores * scale_log2 - row_lse[None, :])
        if MASK:
            visible = rows[None, :] - keys[:, None] >= 0 if CAUSAL else (keys < T)[:, None]
            p = tl.where(visible, p, 0.0)
        grad = load_tile(grad_base + grad_offsets, rows, columns, T, CHECK_T, HEAD)  # [M, D]
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)  # [N, M]
        if DROPOUT:
            keep = keep_attention(seed, batch_head, m, key, threshold, BLOCK_M, BLOCK_N)
            keep = tl.trans(keep)
            p_kept = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        else:
            p_kept = p
        p_kept = _operand(p_kept.to(grad.dtype), WGMMA)
        dv = tl.dot(p_kept, grad, dv, input_precision=PRECISION)
        ds = _operand((p * (dp - row_delta[None, :])).to(q.dtype), WGMMA)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        q_base += BLOCK_M * stride_t
        grad_base += BLOCK_M * stride_gt
        _end_matmuls(WGMMA)
    return dk, dv


@triton.jit(do_not_specialize=["T", "n_head", "head_count", "group", "threshold"])
def attention_bwd_dkv_kernel(
    qkv,  # (B, T, 3 * C), strides (stride_b, stride_t, 1)
    grad_y,  # (B, T, C), strides (stride_gb, stride_gt, 1)
    lse_delta,  # (B * H, T up to a multiple of EVEN_T, 2) fp32
    dqkv,  # (B, T, 3 * C) contiguous, out: its k and v columns
    seed_pointer,  # one int64; read only with DROPOUT
    stride_b, stride_t, stride_gb, stride_gt, T, n_head, head_count, group,
    scale, scale_log2, keep_scale, threshold,
    HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    EVEN: tl.constexpr, WGMMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile_count = tl.cdiv(T, BLOCK_N)
    rank, batch_head = locate(tile_count, head_count, group)
    key = tl.multiple_of(rank * BLOCK_N, BLOCK_N)  # the first keys are seen by the most rows
    C = n_head * HEAD
    keys = key + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, HEAD_PAD)

    q_base = qkv + head_offset(batch_head, n_head, stride_b, HEAD)
    grad_base = grad_y + head_offset(batch_head, n_head, stride_gb, HEAD)
    pointers = tile_pointers(q_base + C, key, stride_t, BLOCK_N, HEAD_PAD)
    k = load_tile(pointers, keys, columns, T, not EVEN, HEAD, True)  # [N, D]
    v = load_tile(pointers + C, keys, columns, T, not EVEN, HEAD, True)  # [N, D]
    seed = tl.load(seed_pointer) if DROPOUT else 0
    lse_delta = _pairs_of_head(lse_delta, batch_head, T)

    dk = tl.zeros([BLOCK_N, HEAD_PAD], tl.float32)
    dv = tl.zeros([BLOCK_N, HEAD_PAD], tl.float32)
    # Rows on the diagonal, from the tile with row = key to that past the last key, and the others.
    # Keys past T need no mask: their dk and dv are not stored.
    first = key // BLOCK_M * BLOCK_M if CAUSAL else key * 0
    diagonal_end = min(tl.cdiv(key + BLOCK_N, BLOCK_M) * BLOCK_M, T) if CAUSAL else first
    for REST in tl.static_range(0 if CAUSAL else 1, 2):
        dk, dv = _walk_rows(
            dk, dv, k, v, q_base, grad_base, lse_delta, stride_t, stride_gt,
            diagonal_end if REST else first, T if REST else diagonal_end,
            key, T, scale_log2, keep_scale, seed, batch_head, threshold, HEAD, HEAD_PAD, CAUSAL,
            DROPOUT, not EVEN and not CAUSAL if REST else True, not EVEN, WGMMA, BLOCK_M, BLOCK_N,
        )  # fmt: skip

    out_base = dqkv + head_offset(batch_head, n_head, T.to(tl.int64) * (3 * C), HEAD)
    pointers = tile_pointers(out_base + C, key, 3 * C, BLOCK_N, HEAD_PAD)
    store_tile(pointers, dk * scale, keys, columns, T, not EVEN, HEAD, True)
    store_tile(pointers + C, dv * keep_scale, keys, columns, T, not EVEN, HEAD, True)


@triton.jit
def _walk_keys(
    dq, q, grad, row_lse, row_delta, k_base, C, stride_t, rows, columns, lo, hi, T,
    scale_log2, keep_scale, seed, batch_head, row, threshold,
    HEAD: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, MASK: tl.constexpr,
    CHECK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds what keys [lo, hi) give to dq [M, D]."""
    offsets = tl.arange(0, BLOCK_N)[:, None] * stride_t + columns[None, :]
    k_base += lo.to(tl.int64) * stride_t
    for n in range(lo, hi, BLOCK_N):
        n = tl.multiple_of(n, BLOCK_N)
        keys = n + tl.arange(0, BLOCK_N)
        k = load_tile(k_base + offsets, keys, columns, T, CHECK_T, HEAD)  # [N, D]
        v = load_tile(k_base + C + offsets, keys, columns, T, CHECK_T, HEAD)  # [N, D]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
        p = tl.exp2(scores * scale_log2 - row_lse[:, None])
        if MASK:
            visible = rows[:, None] >= keys[None, :] if CAUSAL else (keys < T)[None, :]
            p = tl.where(visible, p, 0.0)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)  # [M, N]
        if DROPOUT:
            keep = keep_attention(seed, batch_head, row, n, threshold, BLOCK_M, BLOCK_N)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = (p * (dp - row_delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        k_base += BLOCK_N * stride_t
    return dq


@triton.jit(do_not_specialize=["T", "n_head", "head_count", "group", "threshold"])
def attention_bwd_dq_kernel(
    qkv, grad_y, lse_delta, dqkv, seed_pointer,  # as above; out: dqkv's q columns
    stride_b, stride_t, stride_gb, stride_gt, T, n_head, head_count, group,
    scale, scale_log2, keep_scale, threshold,
    HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile_count = tl.cdiv(T, BLOCK_M)
    rank, batch_head = locate(tile_count, head_count, group)
    row = tl.multiple_of((tile_count - 1 - rank) * BLOCK_M, BLOCK_M)
    C = n_head * HEAD
    rows = row + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, HEAD_PAD)

    q_base = qkv + head_offset(batch_head, n_head, stride_b, HEAD)
    pointers = tile_pointers(q_base, row, stride_t, BLOCK_M, HEAD_PAD)
    q = load_tile(pointers, rows, columns, T, not EVEN, HEAD)  # [M, D]
    grad_base = grad_y + head_offset(batch_head, n_head, stride_gb, HEAD)
    pointers = tile_pointers(grad_base, row, stride_gt, BLOCK_M, HEAD_PAD)
    grad = load_tile(pointers, rows, columns, T, not EVEN, HEAD)  # [M, D]
    lse_delta = _pairs_of_head(lse_delta, batch_head, T)
    pairs = tl.load(lse_delta + 2 * row + tl.arange(0, 2 * BLOCK_M))
    row_lse, row_delta = tl.split(pairs.reshape(BLOCK_M, 2))
    seed = tl.load(seed_pointer) if DROPOUT else 0

    dq = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
    FIRST: tl.constexpr = 1 if not CAUSAL and not EVEN and DROPOUT else 0  # as forward
    full = (row * 0 if FIRST else row if CAUSAL else T) // BLOCK_N * BLOCK_N
    end = min(row + BLOCK_M, T) if CAUSAL else T
    for MASK in tl.static_range(FIRST, 2 if CAUSAL or not EVEN else 1):
        dq = _walk_keys(
            dq, q, grad, row_lse, row_delta, q_base + C, C, stride_t, rows, columns,
            full * MASK, end if MASK else full, T,
            scale_log2, keep_scale, seed, batch_head, row, threshold,
            HEAD, CAUSAL, DROPOUT, MASK, MASK and not EVEN, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    out_base = dqkv + head_offset(batch_head, n_head, T.to(tl.int64) * (3 * C), HEAD)
    pointers = tile_pointers(out_base, row, 3 * C, BLOCK_M, HEAD_PAD)
    store_tile(pointers, dq * scale, rows, columns, T, not EVEN, HEAD)


# --- Launchers --------------------------------------------------------------------------------

# Where `hopper` is true the kernels of attention_hopper.py take the calls that they can. A call
# imports it, since Gluon takes a second and refuses to be interpreted.


def _config(name: str, x: Tensor, head_dim: int, dropout: bool) -> Config:
    """Returns the config of "FORWARD", "DKV" or "DQ"; dropout and fp32 have tables of their own."""
    table = FP32 if x.dtype == torch.float32 else globals()[f"{name}{'_DROPOUT' * dropout}"]
    return lookup(table, launch.arch_of(x), head_dim)


def _addressable(x: Tensor) -> Tensor:
    """Returns x (B, T, columns), or a contiguous copy if kernels cannot address it.

    They need a unit last stride, and 32 bits for offsets within a tile.
    """
    reachable = x.stride(2) == 1 and x.stride(1) * EVEN_T < 2**31
    return x if reachable else x.contiguous()


def forward(
    qkv: Tensor, bias: Tensor | None, n_head: int, causal: bool, dropout_p: float,
    seed: Tensor | None, scale: float, hopper: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the forward kernel; returns y and lse. `bias` is for the backward pass."""
    if hopper and _hopper_applies(qkv, n_head, causal, dropout_p):
        from fastgpt_kernels import attention_hopper

        return attention_hopper.forward(qkv, n_head, causal, scale)
    refuse_interpreted_bf16("attention", qkv)
    qkv = _addressable(qkv)
    batch, T, width = qkv.shape
    head_dim = width // (3 * n_head)
    y = torch.empty((batch, T, width // 3), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((batch * n_head, T), dtype=torch.float32, device=qkv.device)
    if y.numel() == 0:
        return y, lse
    threshold, keep_scale = dropout_threshold(dropout_p)
    config = _config("FORWARD", qkv, head_dim, threshold > 0)
    grid = (triton.cdiv(T, config.blocks["BLOCK_M"]) * batch * n_head,)
    with launch.on_device(qkv):
        attention_fwd_kernel[grid](
            qkv, y, lse, lse if seed is None else seed,
            qkv.stride(0), qkv.stride(1), T, n_head, batch * n_head,
            max(1, L2_BUDGET // (2 * T * head_dim * qkv.element_size())),
            scale * LOG2_E, keep_scale, threshold,
            HEAD=head_dim, HEAD_PAD=triton.next_power_of_2(head_dim), CAUSAL=causal,
            DROPOUT=threshold > 0, EVEN=T % EVEN_T == 0, **config.kwargs(),
        )  # fmt: skip
    return y, lse


def backward(
    grad_y: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, seed: Tensor | None, n_head: int,
    causal: bool, dropout_p: float, scale: float, hopper: bool, biased: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the backward kernels; returns dqkv and, if `biased`, its fp32 sum over all rows."""
    batch, T, width = qkv.shape
    head_dim, head_count = width // (3 * n_head), batch * n_head
    if hopper and _hopper_applies(qkv, n_head, causal, dropout_p):
        by_head = heads_per_program(Sizes(batch, T, n_head, width // 3), causal) > 0
        # Otherwise dq is summed in any order.
        if by_head or not torch.are_deterministic_algorithms_enabled():
            from fastgpt_kernels import attention_hopper

            given = grad_y, qkv, y, lse, n_head, causal, scale, by_head
            return _with_row_sums(attention_hopper.backward(*given), biased)
    qkv, grad_y = _addressable(qkv), _addressable(grad_y)
    dqkv = torch.empty((batch, T, width), dtype=qkv.dtype, device=qkv.device)
    if dqkv.numel() == 0:
        return _with_row_sums(dqkv, biased)
    threshold, keep_scale = dropout_threshold(dropout_p)
    dropout = threshold > 0
    rows = lookup(ROWS, launch.arch_of(qkv), head_dim)
    padded = triton.cdiv(T, EVEN_T) * EVEN_T
    lse_delta = torch.empty((head_count, padded, 2), dtype=torch.float32, device=qkv.device)
    strides = (qkv.stride(0), qkv.stride(1), grad_y.stride(0), grad_y.stride(1))
    group = max(1, L2_BUDGET // (4 * T * head_dim * qkv.element_size()))
    arguments = (
        qkv, grad_y, lse_delta, dqkv, lse if seed is None else seed,
        *strides, T, n_head, head_count, group, scale, scale * LOG2_E, keep_scale, threshold,
    )  # fmt: skip
    head = {"HEAD": head_dim, "HEAD_PAD": triton.next_power_of_2(head_dim)}
    flags = dict(head, CAUSAL=causal, DROPOUT=dropout, EVEN=T % EVEN_T == 0)
    wgmma = launch.arch_of(qkv) == "sm_90" and qkv.dtype != torch.float32
    dkv, dq = (_config(name, qkv, head_dim, dropout) for name in ("DKV", "DQ"))
    with launch.on_device(qkv):
        attention_bwd_preprocess_kernel[(head_count, padded // rows.blocks["BLOCK_T"])](
            y, grad_y, lse, lse_delta, *strides[2:], T, n_head, **head, **rows.kwargs()
        )
        attention_bwd_dkv_kernel[(triton.cdiv(T, dkv.blocks["BLOCK_N"]) * head_count,)](
            *arguments, **flags, WGMMA=wgmma, **dkv.kwargs()
        )
        attention_bwd_dq_kernel[(triton.cdiv(T, dq.blocks["BLOCK_M"]) * head_count,)](
            *arguments, **flags, **dq.kwargs()
        )
    return _with_row_sums(dqkv, biased)


def _with_row_sums(dqkv: Tensor, biased: bool) -> tuple[Tensor, Tensor]:
    """Returns dqkv and its fp32 sum over all rows (3*C,), or an empty tensor."""
    return tensors_only(dqkv, dqkv.sum((0, 1), dtype=torch.float32) if biased else None)  # type: ignore[return-value]


def _hopper_applies(qkv: Tensor, n_head: int, causal: bool, dropout_p: float) -> bool:
    """Returns True if the kernels for Hopper take this call."""
    sizes = Sizes(n_head=n_head, n_embd=qkv.shape[2] // 3, dropout=dropout_p)
    if hopper_unsupported(sizes, qkv.dtype, launch.arch_of(qkv)):
        return False
    # With Triton 3.9 the forward kernel of full attention spills at head dim 128.
    return causal or sizes.head_dim == 64


def heads_per_program(s: Sizes, causal: bool = True) -> int:
    """Returns the heads of a program in Hopper's backward pass by head: 1, 2 for more, 0 if none.

    All SMs of an H200 need a head, with at most a fifth of them idle in the last round, and the L2
    cache has to hold dq's sums of as many heads.
    """
    heads, sms = s.batch_size * s.n_head, launch.SMS["sm_90"]
    rounds = -(-heads // sms)
    busy = heads >= sms and heads >= 0.8 * rounds * sms
    fits = 4 * s.block_size * s.head_dim * sms <= DQ_BUDGET
    applies = HOPPER_BY_HEAD and causal and s.head_dim == 64 and fits and busy
    return min(2, rounds) if applies else 0


# --- Registration -----------------------------------------------------------------------------


def _fake(qkv, bias, n_head, *_):
    (batch, T, width), fp32 = qkv.shape, torch.float32
    return qkv.new_empty((batch, T, width // 3)), qkv.new_empty((batch * n_head, T), dtype=fp32)


def _fake_backward(grad_y, qkv, *rest):
    sums = qkv.new_empty(qkv.shape[2], dtype=torch.float32) if rest[-1] else None
    return tensors_only(qkv.new_empty(qkv.shape), sums)


def _setup_context(ctx, inputs, output):
    qkv, bias, n_head, causal, dropout_p, seed, scale, hopper = inputs
    ctx.save_for_backward(qkv, *output, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.options = n_head, causal, dropout_p, scale, hopper, bias is not None


def _gradients(ctx, grad_y, _):
    return _backward_op(grad_y, *ctx.saved_tensors, *ctx.options)


def _flops(qkv, products):
    """Returns FLOPs that count causal attention in full, as torch counts its own."""
    return products * 2 * qkv[0] * qkv[1] ** 2 * (qkv[2] // 3)


_backward_op = define_op(
    "attention_backward", backward, _fake_backward, flops=lambda dy, qkv, *_, **__: _flops(qkv, 5)
)
_op = define_op(
    "attention", forward, _fake, setup_context=_setup_context, backward=_gradients,
    flops=lambda qkv, *_, **__: _flops(qkv, 2),
)  # fmt: skip

# --- Public functions -------------------------------------------------------------------------


def attention(
    qkv: Tensor, n_head: int, *, causal: bool = True, dropout_p: float = 0.0,
    seed: int | Tensor | None = None, scale: float | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Returns multi-head self-attention of packed q, k and v (Vaswani et al., 2017): y (B, T, C).

    qkv        (B, T, 3*C) in bf16, fp16 or fp32, straight from the projection; read in place when
               its last dimension is contiguous, whatever the other strides
    n_head     H; the head dim C / H is 32, 64, 80, 96 or 128
    causal     position t sees positions <= t, else all
    dropout_p  probability in [0, 1) with which softmax's entries are dropped, to 2**-16
    seed       of the dropout mask: an int, or one int64 on qkv's device that the kernels read, so
               that a replayed CUDA graph drops anew when the tensor changes. The mask depends on
               seed, b * H + h, row and column alone (`dropout.attention_dropout_mask`). None draws
               a seed from torch's generator of the device, without a wait for it
    scale      of the logits, > 0; default 1 / sqrt(C / H)
    bias       (3*C,), fp32 or like qkv: the projection's bias, which is in qkv already. It changes
               no result; its gradient, fp32 sums of qkv's over all rows, comes with that of qkv

    y is contiguous and like qkv. Differentiable once, in qkv and bias, and gradients are the same
    to the bit in every run. Saves qkv, y and one fp32 per row and head; nothing of size T x T.

    Raises TypeError/ValueError naming the argument, what it got and what it wants.
    """
    return _attention(False, qkv, n_head, causal, dropout_p, seed, scale, bias)


def hopper_attention(qkv: Tensor, n_head: int, **options: Any) -> Tensor:
    """Returns `attention`, with its options, by the kernels for Hopper where they apply.

    They apply to bf16 and fp16 with head dim 64 or 128 and without dropout, on sm_90, with a Triton
    that they are known to compile with, but not to full attention of head dim 128. Where not every
    program of the backward pass takes whole heads (`heads_per_program`), the last bits of dq differ
    between runs, and `torch.use_deterministic_algorithms` leaves that pass to the others.
    """
    return _attention(True, qkv, n_head, **options)


def _attention(
    hopper, qkv, n_head, causal=True, dropout_p=0.0, seed=None, scale=None, bias=None
) -> Tensor:
    _check(qkv, n_head, causal, dropout_p, seed, scale, bias)
    if not launch.use_kernel(qkv):
        return reference.attention(
            qkv, n_head, causal=causal, dropout_p=dropout_p, seed=seed, scale=scale, bias=bias
        )
    if scale is None:
        scale = 1.0 / math.sqrt(qkv.shape[2] // (3 * n_head))
    seed = seed_tensor(seed, qkv.device) if dropout_p > 0 else None
    return _op(qkv, bias, n_head, causal, dropout_p, seed, scale, hopper)[0]


def _check(qkv, n_head, causal, dropout_p, seed, scale, bias) -> None:
    op = "attention"
    check_tensor(op, "qkv", qkv, ndim=3, dtypes=FLOAT_DTYPES)
    check_int(op, "n_head", n_head, least=1)
    T, width = qkv.shape[1:]
    if bias is not None:
        dtypes = (torch.float32, qkv.dtype)
        check_tensor(op, "bias", bias, shape=(width,), dtypes=dtypes, like=qkv)
    if T < 1:
        raise ValueError(f"{op}: qkv must have at least one position, got {tuple(qkv.shape)}")
    head_dim = width // (3 * n_head)
    if width % (3 * n_head):
        raise ValueError(
            f"{op}: n_head must divide qkv's last dimension into 3 * n_head equal parts, "
            f"got n_head={n_head} and {width} columns"
        )
    if head_dim not in HEAD_DIMS:
        raise ValueError(
            f"{op}: head dim must be one of {', '.join(map(str, HEAD_DIMS))}, "
            f"got {head_dim} ({width} columns of qkv / 3 / n_head={n_head})"
        )
    if not isinstance(causal, bool):
        raise TypeError(f"{op}: causal must be a bool, got {type(causal).__name__}")
    if isinstance(scale, bool) or not isinstance(scale, int | float | None):
        raise TypeError(f"{op}: scale must be a float or None, got {type(scale).__name__}")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"{op}: scale must be finite and > 0, got {scale}")
    check_dropout(op, dropout_p, seed, qkv)


# --- Implementations and their limits ---------------------------------------------------------


def _sdpa(backend: SDPBackend, *args: Any, **kwargs: Any) -> Tensor:
    """Returns the reference by a backend of PyTorch's, which draws a dropout mask of its own."""
    with sdpa_kernel([backend]):
        return reference.attention(*args, **kwargs | {"seed": None})


def _unsupported(s: Sizes, dtype: torch.dtype, arch: str) -> str | None:
    known = ", ".join(map(str, HEAD_DIMS))
    return None if s.head_dim in HEAD_DIMS else f"head dim {s.head_dim} is none of {known}"


def hopper_unsupported(s: Sizes, dtype: torch.dtype, arch: str) -> str | None:
    """Returns why the kernels for Hopper cannot run, or None if they can."""
    if reason := gluon_unsupported(s, dtype, arch):
        return reason
    if s.head_dim not in (64, 128):
        return f"hopper has head dims 64 and 128, not {s.head_dim}"
    if s.dropout:
        return "hopper has no dropout: its mask takes registers that consumers do not have to spare"
    return None


def _needs_gpu(s: Sizes, dtype: torch.dtype, arch: str) -> str | None:
    return None if launch.is_gpu(arch) else "no GPU"


def _flash_unsupported(s: Sizes, dtype: torch.dtype, arch: str) -> str | None:
    if arch == "cpu":
        return "on a CPU it has no dropout" if s.dropout else None
    return _needs_gpu(s, dtype, arch)


def _example_inputs(s: Sizes, random: Random) -> list[ExampleInputs]:
    """Returns training's and evaluation's, which drops nothing."""
    example = ExampleInputs(
        [random(s.batch_size, s.block_size, 3 * s.n_embd)], {"n_head": s.n_head}
    )
    if s.bias:
        inputs = [*example.inputs, random(3 * s.n_embd)]
        example = replace(example, inputs=inputs, fp32_inputs=(1,), keywords=("bias",))
    if not s.dropout:
        return [example]
    dropout = {**example.arguments, "dropout_p": s.dropout, "seed": 1}
    return [replace(example, arguments=dropout), replace(example, gradients=False)]


def _cost(s: Sizes, itemsize: int) -> dict[str, Cost]:
    """Counts half of two matmuls of T x T x D per head forward and five backward, as if causal."""
    product = 1.0 * s.batch_size * s.block_size**2 * s.n_embd
    moved = 1.0 * s.tokens * s.n_embd * itemsize
    return {"forward": Cost(2 * product, 4 * moved), "backward": Cost(5 * product, 8 * moved)}


_other = partial(Implementation, follows_seed=False)
_KERNELS = [
    "fwd", "bwd_preprocess", "bwd_dkv", "bwd_dq", "hopper_fwd", "hopper_bwd_preprocess",
    "hopper_bwd", "hopper_bwd_postprocess", "hopper_bwd_head",
]  # fmt: skip
SPECS = {
    "attention": OpSpec(
        "attention",
        {
            **implementations(reference.attention, attention, _unsupported),
            "hopper": Implementation(hopper_attention, hopper_unsupported),
            "cudnn": _other(partial(_sdpa, SDPBackend.CUDNN_ATTENTION), _needs_gpu),
            "flash": _other(partial(_sdpa, SDPBackend.FLASH_ATTENTION), _flash_unsupported),
        },
        _example_inputs, _cost,
        kernels=tuple(f"attention_{kernel}_kernel" for kernel in _KERNELS),
        category="attention", few_tokens=512, calls_per_step=12,
        variant=heads_per_program, preferred={"sm_90": "hopper"},
    )
}  # fmt: skip
