"""Attention, backward kernels: the gradient of packed qkv, written straight into one tensor.

With P = softmax(scale * q k^T) recomputed from the saved log-sum-exp, dO the gradient of y and Z
the dropout mask over its keep rate (1 without dropout), per head (Dao et al. 2022, appendix B.4):

    dv = (Z * P)^T dO          dP = Z * (dO v^T)        delta = rowsum(dO * y) = rowsum(P * dP)
    dS = P * (dP - delta)      dk = scale * dS^T q      dq = scale * dS k

Five products of T x T x D against two in the forward pass: most of attention's time.

- `prepare` computes delta and lays it beside lse, a pair a row, so that one copy fetches both.
- `key_value` owns BLOCK_N keys of a head and walks the query rows. Scores are computed transposed
  (keys x rows), so that P^T and dS^T, fresh in registers, are the left operands of dv and dk as
  they stand; only dq needs dS through shared memory. Its addends go to an fp32 sum in memory by
  TMA reduction (one instruction a tile, added in the L2) or by vectorised atomics: one pass, five
  products, and a dq whose last bits depend on the order of arrival.
- Two passes: `key_value` without dq, and `query`, which owns BLOCK_M rows and walks the keys: seven
  products, every sum in a fixed order. It costs traffic too: 1.3 GB a layer instead of 0.9 at 124M
  and 65,536 tokens, since q, k, v and dO are read twice. That is how gradients are deterministic,
  and where it was measured to be faster (`configs.TWO_PASSES`) how they are computed anyway.

dq's sum. A whole one would be written, fetched, written back and read again, at fp32: most of what
this pass moves. Instead there is a ring of slots, one a head, for four programs an SM: 17 MB at
T = 1024 and D = 64, which stays in the L2. `prepare` clears it. Every program counts itself when
all its addends are in memory; the one that finds itself the last of its head scales and rounds the
slot into dqkv, clears it, and counts once more: the slot is free. A head's programs wait for the
head that had their slot before, which is in a group of programs before theirs. That cannot lock up:
the unfinished program of the lowest id waits for none, and GPUs start programs in the order of
their ids, so it is always among those that run. Order in memory: addends, then a barrier, then an
atomic add with release and acquire by one thread, then a barrier (`_fence`). Nothing outlives the
call, so a CUDA graph may replay it.

The gradient of the projection's bias is dqkv summed over all rows. Every program adds what it has
of that in registers, C / H addends an output; after two passes a pass over dqkv does it.

Registers (16-bit, D = 64, sm_90, 64 rows x 128 keys, 8 warps): dk and dv take 32 a thread each, the
scores and dP 32 each, dq's addend 16, lse and delta 16 each (a thread holds every fourth row), the
16-bit operands made of P and dS 16 each: 192, and 240 in all with addresses. 4 warps would need
twice that. D = 128 doubles dk, dv and dq, so a tile has 32 rows. Dropout's mask is worth some 30
more, hence smaller tiles again in the tables with dropout.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt_kernels.launch import Config, arch_of, lookup, multiprocessors, on_device
from fastgpt_kernels.ops.attention import configs
from fastgpt_kernels.ops.attention.forward import (
    EVEN_T,
    LOG2_E,
    heads_together,
    pick,
    read_in_place,
)
from fastgpt_kernels.ops.attention.tiles import head_offset, kept, load_tile, locate, store_tile
from fastgpt_kernels.reference import dropout_threshold

PAIR_ROWS = tl.constexpr(EVEN_T)  # a kernel reads no other globals
SCALARS = ["T", "n_head", "head_count", "group", "ring", "threshold"]


@triton.jit
def _pairs_of_head(lse_delta, batch_head, T):
    """Where the (lse, delta) of a head's rows begin."""
    offset = batch_head.to(tl.int64) * (tl.cdiv(T, PAIR_ROWS) * (2 * PAIR_ROWS))
    return lse_delta + tl.multiple_of(offset, 2 * PAIR_ROWS)


@triton.jit(do_not_specialize=["T", "n_head", "ring"])
def attention_prepare_kernel(
    y,  # (B, T, C) contiguous
    grad_y,  # (B, T, C), strides (stride_gb, stride_gt, 1)
    lse,  # (B * H, T) fp32
    lse_delta,  # (B * H, T up to a multiple of EVEN_T, 2) fp32, out: past T inf and 0
    dq_sum,  # (ring, T, HEAD) fp32, out: zeros; or None
    arrived,  # (B * H,) int32, out: zeros; or None
    row_sums,  # (3 * C,) fp32, out: zeros; or None
    stride_gb, stride_gt, T, n_head, ring,
    HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    CHECK_HEAD: tl.constexpr = HEAD if HEAD_PAD != HEAD else 0
    row = tl.program_id(1) * BLOCK_T
    batch_head = tl.program_id(0)
    C = n_head * HEAD
    rows = row + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, HEAD_PAD)
    local = tl.arange(0, BLOCK_T)[:, None]
    start = row.to(tl.int64)
    y_base = y + head_offset(batch_head, n_head, T.to(tl.int64) * C, HEAD) + start * C
    grad_base = grad_y + head_offset(batch_head, n_head, stride_gb, HEAD) + start * stride_gt
    out = load_tile(y_base + local * C + columns[None, :], rows, columns, T, True, CHECK_HEAD)
    grad = load_tile(
        grad_base + local * stride_gt + columns[None, :], rows, columns, T, True, CHECK_HEAD
    )
    if row_sums is not None:  # noqa: SIM102 (`and` compiles its right side too)
        if batch_head < n_head and tl.program_id(1) == 0:
            for part in tl.static_range(3):
                pointers = row_sums + part * C + batch_head * HEAD + columns
                tl.store(pointers, tl.zeros([HEAD_PAD], tl.float32), mask=columns < HEAD)
    dot = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    head_row = batch_head.to(tl.int64) * T
    row_lse = tl.load(lse + head_row + rows, mask=rows < T, other=float("inf"))
    pairs = tl.join(row_lse, dot).reshape(2 * BLOCK_T)
    tl.store(_pairs_of_head(lse_delta, batch_head, T) + 2 * row + tl.arange(0, 2 * BLOCK_T), pairs)
    if dq_sum is not None:
        tl.store(arrived + batch_head, 0)
        if batch_head < ring:
            dq_pointers = dq_sum + (head_row + start) * HEAD + local * HEAD + columns[None, :]
            zero = tl.zeros([BLOCK_T, HEAD_PAD], tl.float32)
            store_tile(dq_pointers, zero, rows, columns, T, True, CHECK_HEAD)


@triton.jit
def _operand(x, TARGET: tl.constexpr):
    """x, 16 bits wide, in registers before the product that reads it begins.

    LLVM would compute it between the wgmma instructions of that product, which ptxas mends by
    starting anew before each, or by waiting after each.
    """
    if TARGET == "wgmma":
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
        )
    else:
        return x


@triton.jit
def _end_products(TARGET: tl.constexpr):
    """Waits for all products in flight; at the end of a loop's body.

    Sums that are in flight over the back edge are copied there, as ptxas sees it, and then it waits
    after every wgmma instruction of the kernel (C7515).
    """
    if TARGET == "wgmma":
        tl.inline_asm_elementwise(
            "wgmma.wait_group.sync.aligned 0; mov.u32 $0, 0;",
            "=r", [], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _fence(TMA_REDUCE: tl.constexpr, TARGET: tl.constexpr):
    """What any thread of the program did to dq's sum comes before what any does after this.

    A TMA reduction is over when the thread that issued it has waited for it, and reaches memory by
    another way than loads and stores ("async proxy" in the PTX ISA): between both, a proxy fence.
    AMD: a barrier waits for threads, not for their atomics.
    """
    if TMA_REDUCE:
        tl.inline_asm_elementwise(
            "cp.async.bulk.wait_group 0; fence.proxy.async; mov.u32 $0, 0;",
            "=r", [], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    elif TARGET == "amd":
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\n v_mov_b32 $0, 0",
            "=v", [], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def _finish_dq(
    dq_sum, q_base, arrived, row_sums, batch_head, slot, tile_count, scale, T, row_stride,
    HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, CHECK_T: tl.constexpr, TMA_REDUCE: tl.constexpr,
    TARGET: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The last of a head's programs writes its dq [T, HEAD] and clears the slot for the next."""
    CHECK_HEAD: tl.constexpr = HEAD if HEAD_PAD != HEAD else 0
    _fence(TMA_REDUCE, TARGET)
    if tl.atomic_add(arrived + batch_head, 1, sem="acq_rel") == tile_count - 1:
        columns = tl.arange(0, HEAD_PAD)
        local = tl.arange(0, ROWS)
        sum_offsets = local[:, None] * HEAD + columns[None, :]
        out_offsets = local[:, None] * row_stride + columns[None, :]
        sum_base = dq_sum + slot.to(tl.int64) * T * HEAD
        zero = tl.zeros([ROWS, HEAD_PAD], tl.float32)
        total = zero
        for row in range(0, T, ROWS):
            rows = row + local
            dq = load_tile(sum_base + sum_offsets, rows, columns, T, CHECK_T, CHECK_HEAD)
            tl.debug_barrier()  # the zeros' layout may be another
            store_tile(sum_base + sum_offsets, zero, rows, columns, T, CHECK_T, CHECK_HEAD)
            dq *= scale
            if row_sums is not None:
                total += dq
            store_tile(q_base + out_offsets, dq, rows, columns, T, CHECK_T, CHECK_HEAD, True)
            sum_base += ROWS * HEAD
            q_base += ROWS * row_stride
        _fence(TMA_REDUCE, TARGET)
        tl.atomic_add(arrived + batch_head, 1, sem="release")
        if row_sums is not None:
            _add_row_sums(row_sums, total, columns, HEAD)


@triton.jit
def _add_row_sums(out, x, columns, HEAD: tl.constexpr):
    """Adds the sum of x [N, HEAD_PAD] over its rows to out [HEAD], as others do."""
    tl.atomic_add(out + columns, tl.sum(x, 0), mask=columns < HEAD, sem="relaxed")


@triton.jit
def _walk_rows(
    dk, dv, k, v, q_base, grad_base, lse_delta, dq_tiles, slot, stride_t, stride_gt,
    lo, hi, key, T, scale_log2, keep_scale, seed, batch_head, threshold,
    HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    MASK: tl.constexpr, CHECK_T: tl.constexpr, PRECISION: tl.constexpr,
    TMA_REDUCE: tl.constexpr, TARGET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add what rows [lo, hi) give to dk and dv [N, D] of the keys from `key` on, and to dq."""
    CHECK_HEAD: tl.constexpr = HEAD if HEAD_PAD != HEAD else 0
    columns = tl.arange(0, HEAD_PAD)
    local = tl.arange(0, BLOCK_M)
    keys = key + tl.arange(0, BLOCK_N)
    q_offsets = local[:, None] * stride_t + columns[None, :]
    grad_offsets = local[:, None] * stride_gt + columns[None, :]
    dq_offsets = local[:, None] * HEAD + columns[None, :]
    q_base += lo.to(tl.int64) * stride_t
    grad_base += lo.to(tl.int64) * stride_gt
    for m in range(lo, hi, BLOCK_M):
        m = tl.multiple_of(m, BLOCK_M)
        rows = m + local
        q = load_tile(q_base + q_offsets, rows, columns, T, CHECK_T, CHECK_HEAD)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [N, M]
        # One copy for both; Triton 3.6 would copy either again for each of a thread's rows.
        pairs = tl.load(lse_delta + tl.multiple_of(2 * m, 2 * BLOCK_M) + tl.arange(0, 2 * BLOCK_M))
        row_lse, row_delta = tl.split(pairs.reshape(BLOCK_M, 2))
        p = tl.exp2(scores * scale_log2 - row_lse[None, :])
        if MASK:
            visible = rows[None, :] - keys[:, None] >= 0 if CAUSAL else (keys < T)[:, None]
            p = tl.where(visible, p, 0.0)
        grad = load_tile(grad_base + grad_offsets, rows, columns, T, CHECK_T, CHECK_HEAD)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)  # [N, M]
        if DROPOUT:
            keep = tl.trans(kept(seed, batch_head, m, key, threshold, BLOCK_M, BLOCK_N))
            p_kept = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        else:
            p_kept = p
        p_kept = _operand(p_kept.to(grad.dtype), TARGET)
        dv = tl.dot(p_kept, grad, dv, input_precision=PRECISION)
        ds = _operand((p * (dp - row_delta[None, :])).to(q.dtype), TARGET)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        if dq_tiles is not None:
            dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION)  # [M, D]
            if TMA_REDUCE:  # the descriptor leaves out what lies past T and HEAD
                dq_tiles.atomic_add([slot, m, 0], dq.reshape(1, BLOCK_M, HEAD_PAD))
            else:
                pointers = dq_tiles + (slot.to(tl.int64) * T + m) * HEAD + dq_offsets
                if CHECK_T or CHECK_HEAD:
                    inside = (rows < T)[:, None] & (columns < HEAD)[None, :]
                    tl.atomic_add(pointers, dq, mask=inside, sem="relaxed")
                else:
                    tl.atomic_add(pointers, dq, sem="relaxed")
        q_base += BLOCK_M * stride_t
        grad_base += BLOCK_M * stride_gt
        _end_products(TARGET)
    return dk, dv


@triton.jit(do_not_specialize=SCALARS)
def attention_key_value_kernel(
    qkv,  # (B, T, 3 * C), strides (stride_b, stride_t, 1)
    grad_y,  # (B, T, C), strides (stride_gb, stride_gt, 1)
    lse_delta,  # (B * H, T up to a multiple of EVEN_T, 2) fp32
    dq_tiles,  # (ring, T, HEAD) fp32, added to: a pointer, with TMA_REDUCE a descriptor; or None
    dq_sum,  # the same memory, a pointer; or None
    arrived,  # (B * H,) int32, zeros: how many of a head's programs are done; or None
    dqkv,  # (B, T, 3 * C) contiguous, out: its k and v columns, and those of q unless dq is None
    row_sums,  # (3 * C,) fp32, added to: dqkv summed over all rows; or None
    seed_pointer,  # one int64; read only with DROPOUT
    stride_b, stride_t, stride_gb, stride_gt, T, n_head, head_count, group, ring,
    scale, scale_log2, keep_scale, threshold,
    HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, TMA_REDUCE: tl.constexpr, TARGET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    CHECK_HEAD: tl.constexpr = HEAD if HEAD_PAD != HEAD else 0
    tile_count = tl.cdiv(T, BLOCK_N)
    rank, batch_head = locate(tile_count, head_count, group)
    key = tl.multiple_of(rank * BLOCK_N, BLOCK_N)  # the first keys are seen by the most rows
    C = n_head * HEAD
    keys = key + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, HEAD_PAD)
    local = tl.arange(0, BLOCK_N)[:, None]
    start = key.to(tl.int64)

    q_base = qkv + head_offset(batch_head, n_head, stride_b, HEAD)
    grad_base = grad_y + head_offset(batch_head, n_head, stride_gb, HEAD)
    k_pointers = q_base + C + start * stride_t + local * stride_t + columns[None, :]
    k = load_tile(k_pointers, keys, columns, T, not EVEN, CHECK_HEAD, True)
    v = load_tile(k_pointers + C, keys, columns, T, not EVEN, CHECK_HEAD, True)
    seed = tl.load(seed_pointer) if DROPOUT else 0
    lse_delta = _pairs_of_head(lse_delta, batch_head, T)
    slot = batch_head % ring
    if dq_tiles is not None and batch_head >= ring:
        # Until the slot's last head is finished. Its programs have lower ids and so started before.
        while tl.atomic_add(arrived + batch_head - ring, 0, sem="acquire") <= tile_count:
            pass
        _fence(TMA_REDUCE, TARGET)

    dk = tl.zeros([BLOCK_N, HEAD_PAD], tl.float32)
    dv = tl.zeros([BLOCK_N, HEAD_PAD], tl.float32)
    lo = key * 0
    if CAUSAL:  # rows on the diagonal, from the tile with row = key to the one past the last key
        lo = key // BLOCK_M * BLOCK_M
        diagonal_end = min(tl.cdiv(key + BLOCK_N, BLOCK_M) * BLOCK_M, T)
        dk, dv = _walk_rows(
            dk, dv, k, v, q_base, grad_base, lse_delta, dq_tiles, slot, stride_t, stride_gt,
            lo, diagonal_end, key, T, scale_log2, keep_scale, seed, batch_head, threshold,
            HEAD, HEAD_PAD, CAUSAL, DROPOUT, True, not EVEN, PRECISION, TMA_REDUCE, TARGET,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
        lo = diagonal_end
    # Causal tiles below the diagonal hold no key past T; full ones may, and must not add it to dq.
    dk, dv = _walk_rows(
        dk, dv, k, v, q_base, grad_base, lse_delta, dq_tiles, slot, stride_t, stride_gt,
        lo, T, key, T, scale_log2, keep_scale, seed, batch_head, threshold,
        HEAD, HEAD_PAD, CAUSAL, DROPOUT, not CAUSAL and not EVEN, not EVEN, PRECISION, TMA_REDUCE,
        TARGET, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    out_base = dqkv + head_offset(batch_head, n_head, T.to(tl.int64) * (3 * C), HEAD)
    dk_pointers = out_base + C + start * (3 * C) + local * (3 * C) + columns[None, :]
    store_tile(dk_pointers, dk * scale, keys, columns, T, not EVEN, CHECK_HEAD, True)
    store_tile(dk_pointers + C, dv * keep_scale, keys, columns, T, not EVEN, CHECK_HEAD, True)
    if row_sums is not None:
        row_sums += batch_head % n_head * HEAD
        _add_row_sums(row_sums + C, dk * scale, columns, HEAD)
        _add_row_sums(row_sums + 2 * C, dv * keep_scale, columns, HEAD)
    if dq_tiles is not None:
        _finish_dq(
            dq_sum, out_base, arrived, row_sums, batch_head, slot, tile_count, scale, T, 3 * C,
            HEAD, HEAD_PAD, not EVEN, TMA_REDUCE, TARGET, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _walk_keys(
    dq, q, grad, row_lse, row_delta, k_base, C, stride_t, rows, columns, lo, hi, T,
    scale_log2, keep_scale, seed, batch_head, row, threshold,
    HEAD: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, MASK: tl.constexpr,
    CHECK_T: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add what keys [lo, hi) give to dq [M, D]."""
    CHECK_HEAD: tl.constexpr = HEAD if columns.shape[0] != HEAD else 0
    offsets = tl.arange(0, BLOCK_N)[:, None] * stride_t + columns[None, :]
    k_base += lo.to(tl.int64) * stride_t
    for n in range(lo, hi, BLOCK_N):
        n = tl.multiple_of(n, BLOCK_N)
        keys = n + tl.arange(0, BLOCK_N)
        k = load_tile(k_base + offsets, keys, columns, T, CHECK_T, CHECK_HEAD)
        v = load_tile(k_base + C + offsets, keys, columns, T, CHECK_T, CHECK_HEAD)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
        p = tl.exp2(scores * scale_log2 - row_lse[:, None])
        if MASK:
            visible = rows[:, None] >= keys[None, :] if CAUSAL else (keys < T)[None, :]
            p = tl.where(visible, p, 0.0)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            keep = kept(seed, batch_head, row, n, threshold, BLOCK_M, BLOCK_N)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = (p * (dp - row_delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        k_base += BLOCK_N * stride_t
    return dq


@triton.jit(do_not_specialize=["T", "n_head", "head_count", "group", "threshold"])
def attention_query_kernel(
    qkv,  # (B, T, 3 * C), strides (stride_b, stride_t, 1)
    grad_y,  # (B, T, C), strides (stride_gb, stride_gt, 1)
    lse_delta,  # (B * H, T up to a multiple of EVEN_T, 2) fp32
    dqkv,  # (B, T, 3 * C) contiguous, out: its q columns
    seed_pointer,  # one int64; read only with DROPOUT
    stride_b, stride_t, stride_gb, stride_gt, T, n_head, head_count, group,
    scale, scale_log2, keep_scale, threshold,
    HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    CHECK_HEAD: tl.constexpr = HEAD if HEAD_PAD != HEAD else 0
    tile_count = tl.cdiv(T, BLOCK_M)
    rank, batch_head = locate(tile_count, head_count, group)
    row = tl.multiple_of((tile_count - 1 - rank) * BLOCK_M, BLOCK_M)
    C = n_head * HEAD
    rows = row + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, HEAD_PAD)
    local = tl.arange(0, BLOCK_M)[:, None]
    start = row.to(tl.int64)

    q_base = qkv + head_offset(batch_head, n_head, stride_b, HEAD)
    q_pointers = q_base + start * stride_t + local * stride_t + columns[None, :]
    q = load_tile(q_pointers, rows, columns, T, not EVEN, CHECK_HEAD)
    grad_base = grad_y + head_offset(batch_head, n_head, stride_gb, HEAD) + start * stride_gt
    grad_pointers = grad_base + local * stride_gt + columns[None, :]
    grad = load_tile(grad_pointers, rows, columns, T, not EVEN, CHECK_HEAD)
    lse_delta = _pairs_of_head(lse_delta, batch_head, T)
    pairs = tl.load(lse_delta + 2 * row + tl.arange(0, 2 * BLOCK_M))
    row_lse, row_delta = tl.split(pairs.reshape(BLOCK_M, 2))
    seed = tl.load(seed_pointer) if DROPOUT else 0

    dq = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
    full = row // BLOCK_N * BLOCK_N if CAUSAL else T // BLOCK_N * BLOCK_N
    if not CAUSAL and not EVEN and DROPOUT:  # as in the forward kernel
        full = row * 0
    else:
        dq = _walk_keys(
            dq, q, grad, row_lse, row_delta, q_base + C, C, stride_t, rows, columns, full * 0, full,
            T, scale_log2, keep_scale, seed, batch_head, row, threshold,
            HEAD, CAUSAL, DROPOUT, False, False, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if CAUSAL or not EVEN:
        end = min(row + BLOCK_M, T) if CAUSAL else T
        dq = _walk_keys(
            dq, q, grad, row_lse, row_delta, q_base + C, C, stride_t, rows, columns, full, end, T,
            scale_log2, keep_scale, seed, batch_head, row, threshold,
            HEAD, CAUSAL, DROPOUT, True, not EVEN, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    out_base = dqkv + head_offset(batch_head, n_head, T.to(tl.int64) * (3 * C), HEAD)
    dq_pointers = out_base + start * (3 * C) + local * (3 * C) + columns[None, :]
    store_tile(dq_pointers, dq * scale, rows, columns, T, not EVEN, CHECK_HEAD)


def ring_size(head_count: int, group: int, tile_count: int, sm_count: int) -> int:
    """How many heads' fp32 sums of dq there are at a time.

    At least a group, so that the programs that a program waits for come before it; and four
    programs an SM: with fewer, the first programs, which walk all rows, are still at work when
    their slots are wanted again (simulated: three lose 5 % at T = 8192, two half of the speed).
    """
    return min(head_count, max(group, triton.cdiv(4 * sm_count, tile_count)))


def launch_backward(
    grad_y: torch.Tensor, qkv: torch.Tensor, y: torch.Tensor, lse: torch.Tensor,
    seed: torch.Tensor | None, n_head: int, causal: bool, dropout_p: float, scale: float,
    deterministic: bool, biased: bool,
    config: Config | None = None, query_config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """grad_y (B, T, C) and what the forward pass saved -> dqkv (B, T, 3*C), contiguous, and, if a
    bias is in qkv, its gradient (3*C,), fp32.

    `config` is for the key_value kernel, `query_config` for the query kernel (of two passes only).
    """
    qkv, grad_y = read_in_place(qkv), read_in_place(grad_y)
    batch, T, width = qkv.shape
    head_dim, head_count = width // (3 * n_head), batch * n_head
    dqkv = torch.empty((batch, T, width), dtype=qkv.dtype, device=qkv.device)
    if dqkv.numel() == 0:
        return dqkv, sum_rows(dqkv) if biased else None
    threshold, keep_scale = dropout_threshold(dropout_p)
    dropout = threshold > 0
    two_passes = deterministic or (
        (arch_of(qkv), head_dim) in configs.TWO_PASSES and qkv.itemsize == 2 and not dropout
    )
    kernel = "KEY_VALUE" if two_passes else "BACKWARD"
    config = config or pick(kernel, qkv, head_dim, dropout)
    rows = lookup(configs.ROWS, arch_of(qkv), head_dim)
    row_grid = (head_count, triton.cdiv(T, EVEN_T) * (EVEN_T // rows.blocks["BLOCK_T"]))

    # What the programs of a head share: q, k, v, dO, and dq's fp32 sum.
    shared_bytes = T * head_dim * (4 * qkv.element_size() + (0 if two_passes else 4))
    group, tile_count = heads_together(shared_bytes), triton.cdiv(T, config.blocks["BLOCK_N"])
    ring = ring_size(head_count, group, tile_count, multiprocessors(qkv))
    head_pad = triton.next_power_of_2(head_dim)
    fp32 = partial(torch.empty, dtype=torch.float32, device=qkv.device)
    lse_delta = fp32((head_count, triton.cdiv(T, EVEN_T) * EVEN_T, 2))
    dq_sum = dq_tiles = arrived = sums = None
    if not two_passes:
        dq_sum = dq_tiles = fp32((ring, T, head_dim))
        arrived = torch.empty(head_count, dtype=torch.int32, device=qkv.device)
        sums = fp32(width) if biased else None
        if config.blocks["TMA_REDUCE"]:
            box = [1, config.blocks["BLOCK_M"], head_pad]
            dq_tiles = TensorDescriptor.from_tensor(dq_sum, box)
    strides = (qkv.stride(0), qkv.stride(1), grad_y.stride(0), grad_y.stride(1))
    scales = (scale, scale * LOG2_E, keep_scale, threshold)
    sizes = (T, n_head, head_count, group)
    seed_or_any = lse if seed is None else seed
    arch = arch_of(qkv)
    wgmma = arch == "sm_90" and qkv.dtype != torch.float32
    target = "amd" if arch.startswith("gfx") else "wgmma" if wgmma else ""
    head = {"HEAD": head_dim, "HEAD_PAD": head_pad}
    flags = dict(head, CAUSAL=causal, DROPOUT=dropout, EVEN=T % EVEN_T == 0, PRECISION="ieee")
    with on_device(qkv):
        attention_prepare_kernel[row_grid](
            y, grad_y, lse, lse_delta, dq_sum, arrived, sums, *strides[2:], T, n_head, ring,
            **head, **rows.kwargs(),
        )  # fmt: skip
        attention_key_value_kernel[(tile_count * head_count,)](
            qkv, grad_y, lse_delta, dq_tiles, dq_sum, arrived, dqkv, sums, seed_or_any,
            *strides, *sizes, ring, *scales, **flags, TARGET=target, **config.kwargs(),
        )  # fmt: skip
        if two_passes:
            config = query_config or pick("QUERY", qkv, head_dim, dropout)
            grid = (triton.cdiv(T, config.blocks["BLOCK_M"]) * head_count,)
            attention_query_kernel[grid](
                qkv, grad_y, lse_delta, dqkv, seed_or_any,
                *strides, *sizes, *scales, **flags, **config.kwargs(),
            )  # fmt: skip
            sums = sum_rows(dqkv) if biased else None  # in a fixed order, in a pass of its own
    return dqkv, sums


def sum_rows(dqkv: torch.Tensor) -> torch.Tensor:
    """(B, T, 3*C) -> (3*C,), fp32."""
    return dqkv.sum((0, 1), dtype=torch.float32)
