"""Attention for Hopper (sm_90) in Gluon, by the formulas of attention.py.

    forward, a tile of q     S = q k^T     P = exp2(c S - max)     y = P v / rowsum(P)
    backward, a tile of k    S^T = k q^T   P^T = exp2(c S^T - lse)   dP^T = v dy^T
                             dS^T = P^T (dP^T - delta)   dv += P^T dy   dk += dS^T q   dq += dS k

The structure is FlashAttention-3's (Shah et al. 2024, arXiv:2407.08608). Two consumer warpgroups
own 64 rows or keys each of a tile of 128. The other operand comes in tiles of 128 (64 rows in the
backward pass of head dim 128), through rings of slots in shared memory. Descriptors are of (B, T,
columns) in blocks of one batch entry, so what lies past T is zeros.

    full (of k, v, q, rows)   TMA arrives with the bytes of a copy       both consumers wait
    empty (of the same)       each consumer, when its matmuls are done   the producer warp waits

What else warps wait for is told before each kernel. Gluon cannot be imported where kernels are
interpreted.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastgpt_kernels.attention import DQ_BUDGET, LOG2_E
from fastgpt_kernels.hopper import (
    addressable,
    arrive_all,
    barrier,
    blocks,
    load,
    mbarriers,
    reduce_add,
    store,
)
from fastgpt_kernels.launch import Config, Table, lookup, multiprocessors, on_device, options

# --- Launch configs ---------------------------------------------------------------------------


def _config(**blocks: int) -> Config:
    return Config(blocks, num_warps=4)


# Key: the head dim. STAGES are slots of a ring, REGISTERS those of a consumer's thread, ROWS those
# of a tile of q and dy, PART those in registers at a time. Chosen so that nothing spills.
FORWARD: Table = {
    "default": {
        64: _config(STAGES=4, REGISTERS=232),  # measured 2026-11-26, H200
        128: _config(STAGES=2, REGISTERS=232),  # not measured
    }
}
BACKWARD: Table = {
    "default": {
        64: _config(ROWS=128, PART=64, STAGES=2, REGISTERS=240),  # measured 2026-11-26, H200
        128: _config(ROWS=64, PART=32, STAGES=2, REGISTERS=240),  # not measured
    }
}
# attention.HOPPER_BY_HEAD = False goes back to BACKWARD.
BY_HEAD: Table = {"default": {64: _config(PART=64, REGISTERS=240)}}  # not measured
TILE = gl.constexpr(128)  # rows or keys of two consumers, 64 each
FLOOR = gl.constexpr(-1e30)  # below any logit
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.constexpr_function
def steps_per_loop(head_dim: Any) -> int:
    """Returns how many steps of the softmax the forward loop's body has.

    Two spare 32 moves. Registers do not suffice for two at head dim 128, nor with Triton 3.9.
    """
    return 2 if head_dim == 64 and triton.__version__ < "3.9" else 1


# --- Forward ----------------------------------------------------------------------------------

# While the tensor cores multiply p by the values of key tile i, a consumer's other units fold the
# scores of tile i + 1 into the softmax. Programs are persistent, one to an SM. Row tile i of a head
# goes together with the last tile but i: such a pair sees the same number of keys whatever i is,
# and where T is no multiple of 256 the last pair is a single tile. Of a row tile's key tiles the
# last one is first: that with the diagonal, or the ragged end, is the only one that needs a mask.
# y leaves through q's slot. What is not obvious:
# - Masked scores are -inf and the maximum starts at a finite floor. If a maximum could be that of
#   masked scores alone, s * c - max would not be 0 or -inf but whatever the rounding of s * c left:
#   contracted to one FMA, the product is not the rounded one.
# - ptxas moves all exponentials below the wait for the second matmul. A store of the row sums to
#   memory that nobody reads, before that wait, holds them where they are.
# - Two steps in a loop's body: with one, p's 32 registers move to where the matmul reads them.


@gluon.jit
def _fold(s, row_max, row_sum, scale_log2):
    """Folds scores [M, N] into the softmax; returns p, maximum, sum, and the factor of old sums."""
    new_max = gl.maximum(row_max, gl.max(s, 1) * scale_log2)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(new_max, 1))
    decay = gl.exp2(row_max - new_max)
    return p, new_max, row_sum * decay + gl.sum(p, 1), decay


@gluon.jit
def _step(
    q, memory, order, zero, o, p, row_max, row_sum, count, scale_log2,
    STAGES: gl.constexpr, ACC: gl.constexpr, LEFT: gl.constexpr,
):  # fmt: skip
    """Multiplies p of key tile `count` by its values, while the next scores become the next p."""
    _, k_s, v_s, _, _, k_full, k_empty, v_full, v_empty = memory
    k_slot = (count + 1) % STAGES
    v_slot = count % STAGES
    mbarrier.wait(k_full.index(k_slot), (count + 1) // STAGES & 1)
    s = warpgroup_mma(q, k_s.index(k_slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(v_slot), count // STAGES & 1)
    o = warpgroup_mma(p, v_s.index(v_slot), o, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    arrive_all(k_empty.index(k_slot))  # its scores are there
    next_p, row_max, row_sum, decay = _fold(s, row_max, row_sum, scale_log2)
    next_p = gl.convert_layout(next_p.to(q.dtype), LEFT)
    order.store(row_sum)
    o, next_p, decay, p = warpgroup_mma_wait(0, deps=[o, next_p, decay, p])
    arrive_all(v_empty.index(v_slot))
    o = o * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, ACC)), 1)
    return o, next_p, row_max, row_sum, count + 1


@gluon.jit
def _fwd_consumer(
    y_tiles, lse, memory, sizes, scale_log2,
    GROUP: gl.constexpr, CAUSAL: gl.constexpr, HEAD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty = memory
    T, n_head, head_count = sizes
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    STEPS: gl.constexpr = steps_per_loop(HEAD)
    KEYS: gl.constexpr = gl.SliceLayout(0, SCORES)
    order = gl.allocate_shared_memory(gl.float32, [64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    zero = gl.zeros([64, TILE], gl.float32, layout=SCORES)
    tiles = gl.cdiv(T, TILE)
    pairs = (tiles + 1) // 2
    count = 0  # key tiles done
    done = 0  # row tiles done
    for item in range(gl.program_id(0), head_count * pairs, gl.num_programs(0)):
        batch_head = item // pairs
        pair = item % pairs
        for half in range(0, gl.minimum(tiles - 2 * pair, 2)):
            tile = pair + (1 - half) * (tiles - 1 - 2 * pair)
            last = tile if CAUSAL else tiles - 1
            row = tile * TILE + GROUP * 64
            rows = row + gl.arange(0, 64, layout=ROWS)

            q_slot = done % 2
            q = q_s.index(q_slot * 2 + GROUP)
            mbarrier.wait(q_full.index(q_slot), done // 2 & 1)
            slot = count % STAGES
            mbarrier.wait(k_full.index(slot), count // STAGES & 1)
            s = warpgroup_mma(
                q, k_s.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            s = warpgroup_mma_wait(0, deps=[s])
            arrive_all(k_empty.index(slot))
            keys = last * TILE + gl.arange(0, TILE, layout=KEYS)
            if CAUSAL:
                visible = gl.expand_dims(rows, 1) >= gl.expand_dims(keys, 0)
            else:
                visible = gl.expand_dims(keys, 0) < T
            s = gl.where(visible, s, float("-inf"))
            row_max = gl.full([64], FLOOR, gl.float32, layout=ROWS)
            row_sum = gl.zeros([64], gl.float32, layout=ROWS)
            p, row_max, row_sum, _ = _fold(s, row_max, row_sum, scale_log2)
            p = gl.convert_layout(p.to(q.dtype), LEFT)
            o = gl.zeros([64, HEAD], gl.float32, layout=ACC)

            for _ in range(0, last // STEPS):
                for _ in gl.static_range(STEPS):
                    o, p, row_max, row_sum, count = _step(
                        q, memory, order, zero, o, p, row_max, row_sum, count, scale_log2,
                        STAGES, ACC, LEFT,
                    )  # fmt: skip
            if last % STEPS == 1:
                o, p, row_max, row_sum, count = _step(
                    q, memory, order, zero, o, p, row_max, row_sum, count, scale_log2,
                    STAGES, ACC, LEFT,
                )  # fmt: skip

            slot = count % STAGES
            mbarrier.wait(v_full.index(slot), count // STAGES & 1)
            o = warpgroup_mma(p, v_s.index(slot), o, is_async=True)
            o = warpgroup_mma_wait(0, deps=[o])
            arrive_all(v_empty.index(slot))
            lse_rows = lse + batch_head.to(gl.int64) * T + rows
            gl.store(lse_rows, row_max + gl.log2(row_sum), mask=rows < T)
            o = o * gl.expand_dims(gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, ACC)), 1)
            q.store(o.to(q.dtype))  # its last reader was the last matmul of scores
            fence_async_shared()
            barrier()
            store(y_tiles, [batch_head // n_head, row, batch_head % n_head * HEAD], q)
            tma.store_wait(pendings=0)
            arrive_all(q_empty.index(q_slot))
            count += 1
            done += 1


@gluon.jit
def _fwd_producer(
    q_tiles, kv_tiles, memory, sizes,
    CAUSAL: gl.constexpr, HEAD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty = memory
    T, n_head, head_count = sizes
    tiles = gl.cdiv(T, TILE)
    pairs = (tiles + 1) // 2
    C = n_head * HEAD
    count = 0
    done = 0
    for item in range(gl.program_id(0), head_count * pairs, gl.num_programs(0)):
        batch_head = item // pairs
        pair = item % pairs
        batch = batch_head // n_head
        column = batch_head % n_head * HEAD
        for half in range(0, gl.minimum(tiles - 2 * pair, 2)):
            tile = pair + (1 - half) * (tiles - 1 - 2 * pair)
            last = tile if CAUSAL else tiles - 1
            q_slot = done % 2
            bar = q_full.index(q_slot)
            mbarrier.wait(q_empty.index(q_slot), done // 2 & 1 ^ 1)
            mbarrier.expect(bar, TILE * HEAD * 2)
            for i in gl.static_range(2):
                load(q_tiles, [batch, tile * TILE + i * 64, column], bar, q_s.index(q_slot * 2 + i))
            for i in range(0, last + 1):
                key = (last - i) * TILE
                slot = count % STAGES
                parity = count // STAGES & 1 ^ 1
                bar = k_full.index(slot)
                mbarrier.wait(k_empty.index(slot), parity)
                mbarrier.expect(bar, TILE * HEAD * 2)
                load(kv_tiles, [batch, key, column + C], bar, k_s.index(slot))
                bar = v_full.index(slot)
                mbarrier.wait(v_empty.index(slot), parity)
                mbarrier.expect(bar, TILE * HEAD * 2)
                load(kv_tiles, [batch, key, column + 2 * C], bar, v_s.index(slot))
                count += 1
            done += 1


@gluon.jit(do_not_specialize=["T", "n_head", "head_count"])
def attention_hopper_fwd_kernel(
    q_tiles,  # of qkv (B, T, 3 * C): blocks (1, 64, HEAD)
    kv_tiles,  # of the same: blocks (1, 128, HEAD)
    y_tiles,  # of y (B, T, C), out: blocks (1, 64, HEAD)
    lse,  # (B * H, T) fp32, out: base-2 log of softmax's divisors
    T, n_head, head_count, scale_log2,
    CAUSAL: gl.constexpr, HEAD: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, HEAD], q_tiles.dtype)
    q_s = gl.allocate_shared_memory(q_tiles.dtype, [4, 64, HEAD], LAYOUT)  # slot * 2 + consumer
    k_s = gl.allocate_shared_memory(q_tiles.dtype, [STAGES, TILE, HEAD], LAYOUT)
    v_s = gl.allocate_shared_memory(q_tiles.dtype, [STAGES, TILE, HEAD], LAYOUT)
    q_full = mbarriers(2, 1)
    q_empty = mbarriers(2, 2)
    k_full = mbarriers(STAGES, 1)
    k_empty = mbarriers(STAGES, 2)
    v_full = mbarriers(STAGES, 1)
    v_empty = mbarriers(STAGES, 2)
    fence_async_shared()
    barrier()
    memory = (q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    sizes = (T, n_head, head_count)
    gl.warp_specialize(
        [
            (_fwd_consumer, (y_tiles, lse, memory, sizes, scale_log2, 0, CAUSAL, HEAD, STAGES)),
            (_fwd_consumer, (y_tiles, lse, memory, sizes, scale_log2, 1, CAUSAL, HEAD, STAGES)),
            (_fwd_producer, (q_tiles, kv_tiles, memory, sizes, CAUSAL, HEAD, STAGES)),
        ],
        [4, 1],
        # Of 65,536 registers, 168 a thread of three warpgroups: what the consumers leave.
        [REGISTERS, 504 - 2 * REGISTERS],
    )  # fmt: skip


# --- Backward ---------------------------------------------------------------------------------

# One pass. The main kernel owns 128 keys of a head, 64 per consumer, and walks the query rows.
# Scores are transposed (keys x rows), so that P^T and dS^T are the left operands of dv and dk as
# they lie in registers; dq needs dS of both consumers, through shared memory, and each multiplies a
# half of it, which TMA adds to an fp32 sum in memory, in any order. That sum would be two thirds as
# large as qkv, so a few batch entries are worked on at a time (`batches_together`): few enough that
# it stays in the L2 cache. Full attention alone has to mask keys past T, whose p is not zero.
# Registers: at head dim 64, dk and dv take 64 of a thread's, scores and dP of 64 rows 64; at 128,
# 128 and, of 32 rows at a time, 32. Besides full and empty, the consumers wait for `ds_full` (both
# have stored dS of a tile) before dq, and for `ds_empty` (both have dq) before the next dS.


@gluon.jit
def _rows_of_head(T, n_head, HEAD: gl.constexpr, LAYOUT: gl.constexpr):
    """Returns (batch, head, first column, rows, rows in 64 bits, columns, mask) of a program.

    It has a tile of rows [TILE, HEAD] of a head.
    """
    batch_head = gl.program_id(0)
    rows = gl.program_id(1) * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.expand_dims(gl.arange(0, HEAD, layout=gl.SliceLayout(0, LAYOUT)), 0)
    row = gl.expand_dims(rows, 1).to(gl.int64)
    batch = (batch_head // n_head).to(gl.int64)
    return batch, batch_head.to(gl.int64), batch_head % n_head * HEAD, rows, row, columns, row < T


@gluon.jit(do_not_specialize=["T", "n_head", "padded"])
def attention_hopper_bwd_preprocess_kernel(
    y,  # (B, T, C) contiguous
    grad_y,  # (B, T, C), strides (stride_b, stride_t, 1)
    lse,  # (B * H, T) fp32
    stats,  # (2, B * H, padded) fp32, out: lse, past T inf, and delta, past T zero
    dq_sum,  # (B * H, T, HEAD) fp32, out: zeros; or None
    stride_b, stride_t, T, n_head, padded, HEAD: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD, HEAD // 8], [4, 1], [1, 0])
    batch, head, column, rows, row, across, inside = _rows_of_head(T, n_head, HEAD, LAYOUT)
    C = n_head * HEAD
    out = gl.load(y + batch * T * C + column + row * C + across, mask=inside, other=0.0)
    grad = gl.load(
        grad_y + batch * stride_b + column + row * stride_t + across, mask=inside, other=0.0
    )
    delta = gl.sum(out.to(gl.float32) * grad.to(gl.float32), 1)
    row_lse = gl.load(lse + head * T + rows, mask=rows < T, other=float("inf"))
    gl.store(stats + head * padded + rows, row_lse)
    gl.store(stats + (gl.num_programs(0) + head) * padded + rows, delta)
    if dq_sum is not None:
        zero = gl.zeros([TILE, HEAD], gl.float32, layout=LAYOUT)
        gl.store(dq_sum + head * T * HEAD + row * HEAD + across, zero, mask=inside)


@gluon.jit(do_not_specialize=["T", "n_head"])
def attention_hopper_bwd_postprocess_kernel(
    dq_sum,  # (B * H, T, HEAD) fp32
    dqkv,  # (B, T, 3 * C) contiguous, out: its q columns
    T, n_head, scale, HEAD: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD, HEAD // 8], [4, 1], [1, 0])
    batch, head, column, _rows, row, across, inside = _rows_of_head(T, n_head, HEAD, LAYOUT)
    C3 = 3 * n_head * HEAD
    dq = gl.load(dq_sum + head * T * HEAD + row * HEAD + across, mask=inside, other=0.0)
    out = dqkv + batch * T * C3 + column + row * C3 + across
    gl.store(out, (dq * scale).to(dqkv.dtype.element_ty), mask=inside)


@gluon.jit
def _bwd_memory(
    q_tiles, HEAD: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, DS_SLOTS: gl.constexpr,
):  # fmt: skip
    """Returns (tiles of keys, values, rings of rows and mbarriers), dS of both consumers, dq."""
    DTYPE: gl.constexpr = q_tiles.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, HEAD], DTYPE)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, ROWS], DTYPE)
    DQ: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.float32)
    STAT: gl.constexpr = gl.NVMMASharedLayout(0, 32, 1)
    k_s = gl.allocate_shared_memory(DTYPE, [2, 64, HEAD], LAYOUT)
    v_s = gl.allocate_shared_memory(DTYPE, [2, 64, HEAD], LAYOUT)
    q_s = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, HEAD], LAYOUT)
    g_s = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, HEAD], LAYOUT)
    stat_s = gl.allocate_shared_memory(gl.float32, [STAGES * 2, ROWS], STAT)
    ds_s = gl.allocate_shared_memory(DTYPE, [DS_SLOTS * 2, 64, ROWS], DS)  # slot * 2 + consumer
    dq_s = gl.allocate_shared_memory(gl.float32, [2, 64, 64], DQ)
    kv_full = mbarriers(1, 1).index(0)
    full = mbarriers(STAGES, 1)
    empty = mbarriers(STAGES, 2)
    return (k_s, v_s, q_s, g_s, stat_s, kv_full, full, empty), ds_s, dq_s


@gluon.jit
def _load_keys(kv_tiles, operands, batch, key, column, C, HEAD: gl.constexpr):
    """Has TMA bring the 128 keys from `key` on, and their values."""
    k_s, v_s, _, _, _, kv_full, _, _ = operands
    mbarrier.expect(kv_full, 2 * TILE * HEAD * 2)
    for i in gl.static_range(2):
        load(kv_tiles, [batch, key + i * 64, column + C], kv_full, k_s.index(i))
        load(kv_tiles, [batch, key + i * 64, column + 2 * C], kv_full, v_s.index(i))


@gluon.jit
def _load_rows(
    given, operands, batch, row, column, batch_head, head_count, count,
    HEAD: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Has TMA bring the rows from `row` on: q, y's gradient, lse and delta."""
    q_tiles, _, grad_tiles, stat_tiles = given
    _, _, q_s, g_s, stat_s, _, full, empty = operands
    slot = count % STAGES
    bar = full.index(slot)
    mbarrier.wait(empty.index(slot), count // STAGES & 1 ^ 1)
    mbarrier.expect(bar, 2 * ROWS * HEAD * 2 + 2 * ROWS * 4)
    load(q_tiles, [batch, row, column], bar, q_s.index(slot))
    load(stat_tiles, [batch_head, row], bar, stat_s.index(slot * 2))
    load(grad_tiles, [batch, row, column], bar, g_s.index(slot))
    load(stat_tiles, [head_count + batch_head, row], bar, stat_s.index(slot * 2 + 1))


@gluon.jit
def _scores(
    operands, slot, key, row, T, scale_log2,
    GROUP: gl.constexpr, MASK: gl.constexpr, CAUSAL: gl.constexpr, HEAD: gl.constexpr,
    PART: gl.constexpr, NUMBER: gl.constexpr,
):  # fmt: skip
    """Returns a part of a tile's q and dy, p and dP [64, PART], p as a left operand, and delta."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD, 16])
    ROW: gl.constexpr = gl.SliceLayout(0, SCORES)
    KEY: gl.constexpr = gl.SliceLayout(1, SCORES)
    k_s, v_s, q_s, g_s, stat_s, _, _, _ = operands
    q = q_s.index(slot).slice(NUMBER * PART, PART)
    g = g_s.index(slot).slice(NUMBER * PART, PART)
    zero = gl.zeros([64, PART], gl.float32, layout=SCORES)
    s = warpgroup_mma(k_s.index(GROUP), q.permute((1, 0)), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(v_s.index(GROUP), g.permute((1, 0)), zero, use_acc=False, is_async=True)
    lse = stat_s.index(slot * 2).slice(NUMBER * PART, PART).load(ROW)
    s = warpgroup_mma_wait(1, deps=[s])
    p = gl.exp2(s * scale_log2 - gl.expand_dims(lse, 0))
    if MASK:
        keys = gl.expand_dims(key + GROUP * 64 + gl.arange(0, 64, layout=KEY), 1)
        rows = gl.expand_dims(row + NUMBER * PART + gl.arange(0, PART, layout=ROW), 0)
        p = gl.where(rows >= keys if CAUSAL else keys < T, p, 0.0)
    p_left = gl.convert_layout(p.to(q_s.dtype), gl.DotOperandLayout(0, ACC, 2))
    delta = stat_s.index(slot * 2 + 1).slice(NUMBER * PART, PART).load(ROW)
    dp = warpgroup_mma_wait(0, deps=[dp])
    return q, g, p, dp, p_left, delta


@gluon.jit
def _begin_dq(k_s, ds_s, slot, ROW: gl.constexpr, COLUMN: gl.constexpr):
    """Begins the matmul of both consumers' dS and keys; returns dq [64, 64] from (ROW, COLUMN)."""
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    dq = gl.zeros([64, 64], gl.float32, layout=DQ)
    for i in gl.static_range(2):
        ds_left = ds_s.index(slot * 2 + i).slice(ROW, 64, dim=1).permute((1, 0))
        keys = k_s.index(i).slice(COLUMN, 64, dim=1)
        dq = warpgroup_mma(ds_left, keys, dq, use_acc=i == 1, is_async=True)
    return dq


# --- Backward: a tile of keys to a program ----------------------------------------------------


@gluon.jit
def _walk_rows(
    dk, dv, dq_tiles, memory, batch_head, key, lo, hi, T, count, scale_log2,
    GROUP: gl.constexpr, MASK: gl.constexpr, CAUSAL: gl.constexpr, HEAD: gl.constexpr,
    ROWS: gl.constexpr, PART: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Adds what row tiles [lo, hi) give to dk and dv [64, HEAD], and to dq."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD, 16])
    # This consumer's half of dq: rows, or columns if a tile has 64 rows.
    HALF_ROW: gl.constexpr = GROUP * 64 if ROWS == 128 else 0
    HALF_COLUMN: gl.constexpr = 0 if ROWS == 128 else GROUP * 64
    operands, ds_s, dq_s, ds_full, ds_empty = memory
    k_s, _, _, _, _, _, full, empty = operands
    for m in range(lo, hi):
        slot = count % STAGES
        mbarrier.wait(full.index(slot), count // STAGES & 1)
        for i in gl.static_range(ROWS // PART):
            q, g, p, dp, p_left, delta = _scores(
                operands, slot, key, m * ROWS, T, scale_log2, GROUP, MASK, CAUSAL, HEAD, PART, i
            )
            dv_sum = warpgroup_mma(p_left, g, dv, is_async=True)
            ds = (p * (dp - gl.expand_dims(delta, 0))).to(q.dtype)
            if i == 0:
                mbarrier.wait(ds_empty, count & 1 ^ 1)
            ds_s.index(GROUP).slice(i * PART, PART, dim=1).store(ds)
            ds_left = gl.convert_layout(ds, gl.DotOperandLayout(0, ACC, 2))
            dk_sum = warpgroup_mma(ds_left, q, dk, is_async=True)
            if i == ROWS // PART - 1:
                # Also for lse and delta, whose memory a copy will take: all of them are loaded.
                fence_async_shared()
                arrive_all(ds_full)
            dv, dk = warpgroup_mma_wait(0, deps=[dv_sum, dk_sum])
        arrive_all(empty.index(slot))  # its matmuls are done
        mbarrier.wait(ds_full, count & 1)
        dq = warpgroup_mma_wait(0, deps=[_begin_dq(k_s, ds_s, 0, HALF_ROW, HALF_COLUMN)])
        tma.store_wait(pendings=0)  # the tile before has left dq_s
        arrive_all(ds_empty)
        dq_s.index(GROUP).store(dq)
        fence_async_shared()
        barrier()
        reduce_add(dq_tiles, [batch_head, m * ROWS + HALF_ROW, HALF_COLUMN], dq_s.index(GROUP))
        count += 1
    return dk, dv, count


@gluon.jit
def _bwd_consumer(
    out, memory, sizes, scale_log2,
    GROUP: gl.constexpr, CAUSAL: gl.constexpr, HEAD: gl.constexpr, ROWS: gl.constexpr,
    PART: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD, 16])
    dq_tiles, out_tiles = out
    operands, _, _, _, _ = memory
    _, v_s, _, _, _, kv_full, _, _ = operands
    T, n_head, head_count = sizes
    batch_head = gl.program_id(0) % head_count
    key = gl.program_id(0) // head_count * TILE
    tiles = gl.cdiv(T, ROWS)
    if CAUSAL:  # the diagonal's tiles need a mask
        lo = key // ROWS
        masked = gl.minimum(lo + TILE // ROWS, tiles)
    else:  # all need one where keys are past T
        lo = 0
        masked = gl.where(key + TILE > T, tiles, 0)
    if HEAD == 128:  # one loop: registers do not suffice for what two have in common
        masked = tiles
    dk = gl.zeros([64, HEAD], gl.float32, layout=ACC)
    dv = gl.zeros([64, HEAD], gl.float32, layout=ACC)
    mbarrier.wait(kv_full, 0)
    count = 0
    dk, dv, count = _walk_rows(
        dk, dv, dq_tiles, memory, batch_head, key, lo, masked, T, count, scale_log2,
        GROUP, True, CAUSAL, HEAD, ROWS, PART, STAGES,
    )  # fmt: skip
    if HEAD == 64:
        dk, dv, count = _walk_rows(
            dk, dv, dq_tiles, memory, batch_head, key, masked, tiles, T, count, scale_log2,
            GROUP, False, CAUSAL, HEAD, ROWS, PART, STAGES,
        )  # fmt: skip
    batch = batch_head // n_head
    column = (n_head + batch_head % n_head) * HEAD
    row = key + GROUP * 64
    tile = v_s.index(GROUP)  # the other consumer does not read it
    tile.store(dv.to(tile.dtype))
    fence_async_shared()
    barrier()
    store(out_tiles, [batch, row, column + n_head * HEAD], tile)
    tma.store_wait(pendings=0)
    barrier()
    tile.store((dk * (scale_log2 * LN_2)).to(tile.dtype))
    fence_async_shared()
    barrier()
    store(out_tiles, [batch, row, column], tile)
    tma.store_wait(pendings=0)


@gluon.jit
def _bwd_producer(
    given, memory, sizes,
    CAUSAL: gl.constexpr, HEAD: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    _, kv_tiles, _, _ = given
    operands, _, _, _, _ = memory
    T, n_head, head_count = sizes
    batch_head = gl.program_id(0) % head_count
    key = gl.program_id(0) // head_count * TILE
    batch = batch_head // n_head
    C = n_head * HEAD
    column = batch_head % n_head * HEAD
    _load_keys(kv_tiles, operands, batch, key, column, C, HEAD)
    lo = key // ROWS if CAUSAL else 0
    count = 0
    for m in range(lo, gl.cdiv(T, ROWS)):  # noqa: SIM113
        _load_rows(
            given, operands, batch, m * ROWS, column, batch_head, head_count, count,
            HEAD, ROWS, STAGES,
        )  # fmt: skip
        count += 1  # noqa: SIM113


@gluon.jit(do_not_specialize=["T", "n_head", "head_count"])
def attention_hopper_bwd_kernel(
    q_tiles,  # of qkv (B, T, 3 * C): blocks (1, ROWS, HEAD)
    kv_tiles,  # of the same: blocks (1, 64, HEAD)
    grad_tiles,  # of grad_y (B, T, C): blocks (1, ROWS, HEAD)
    stat_tiles,  # of stats (2 * B * H, padded) fp32: blocks (1, ROWS)
    dq_tiles,  # of dq's sum (B * H, T, HEAD) fp32, added to: blocks (1, 64, 64)
    out_tiles,  # of dqkv (B, T, 3 * C), out: its k and v columns; blocks (1, 64, HEAD)
    T, n_head, head_count, scale_log2,
    CAUSAL: gl.constexpr, HEAD: gl.constexpr, ROWS: gl.constexpr, PART: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Computes dk and dv of a tile of keys, and adds to dq; the first keys of all heads first."""
    operands, ds_s, dq_s = _bwd_memory(q_tiles, HEAD, ROWS, STAGES, 1)
    ds_full = mbarriers(1, 2).index(0)
    ds_empty = mbarriers(1, 2).index(0)
    fence_async_shared()
    barrier()
    memory = (operands, ds_s, dq_s, ds_full, ds_empty)
    sizes = (T, n_head, head_count)
    given = (q_tiles, kv_tiles, grad_tiles, stat_tiles)
    out = (dq_tiles, out_tiles)
    gl.warp_specialize(
        [
            (_bwd_consumer, (out, memory, sizes, scale_log2, 0, CAUSAL, HEAD, ROWS, PART, STAGES)),
            (_bwd_consumer, (out, memory, sizes, scale_log2, 1, CAUSAL, HEAD, ROWS, PART, STAGES)),
            (_bwd_producer, (given, memory, sizes, CAUSAL, HEAD, ROWS, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 504 - 2 * REGISTERS],  # as in the forward kernel
    )  # fmt: skip


# --- Backward: a head to a program ------------------------------------------------------------

# For causal attention of head dim 64. A program takes the key tiles of a head in turn, so that all
# addends of the head's dq come from one SM, in one order:
# - of each key tile the row tiles go from the last to the diagonal. Key tile n is the last that row
#   tile n meets: there dq is the sum in memory plus this addend, and leaves scaled and rounded;
# - the first key tile's addends are stored, not added, so nothing is cleared;
# - dq's sum is (programs, T, 64) fp32, 34 MB at T = 1,024, whatever the batch is.
# dV of a row tile, dQ of the tile before and dK follow each other on the tensor cores, as in
# FlashAttention-4: dS is computed under dV, and dQ stored under dK. S and dP of 64 x 128 spill 104
# bytes or more, so they have two parts of 64 x 64. A storer warp starts the copies out of shared
# memory. Besides full and empty:
#
#     ds_full    both consumers, dS of a tile is stored    both, before its dQ and the next dS
#     dq_full    a consumer, its half of dQ is stored      the storer
#     dq_empty   the storer, TMA has read that half        that consumer
#     sum_full   TMA, the sum of a row tile's dq           that consumer, at the end of a key tile
#     out_full   a consumer, dq, dk and dv are stored      the storer
#     kv_empty   the storer, TMA has read dq, dk and dv    the producer


@gluon.jit
def _wait_for_sums():
    """Waits until all that this thread had TMA store or add is in memory, where TMA may read it."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; fence.proxy.async; mov.u32 $0, 0;",
        "=r", [], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _head_tile(
    dk, dv, memory, m, n, count, walks, scale_log2,
    GROUP: gl.constexpr, MASK: gl.constexpr, PENDING: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """Adds what row tile m gives to dk and dv [64, 64]. PENDING: and dq of row tile m + 1."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operands, ds_s, dq_s, _, ds_full, dq_full, dq_empty, _, _, _ = memory
    k_s, _, _, _, _, _, full, empty = operands
    slot = count & 1
    mbarrier.wait(full.index(slot), count >> 1 & 1)
    for i in gl.static_range(TILE // PART):
        q, g, p, dp, p_left, delta = _scores(
            operands, slot, n * TILE, m * TILE, 0, scale_log2, GROUP, MASK, True, 64, PART, i
        )
        dv_sum = warpgroup_mma(p_left, g, dv, is_async=True)
        ds = (p * (dp - gl.expand_dims(delta, 0))).to(q.dtype)
        # Each has stored dS of the tile before, so both have multiplied what was in this slot.
        if PENDING and i == 0:
            mbarrier.wait(ds_full.index(slot ^ 1), count - 1 >> 1 & 1)
        ds_s.index(slot * 2 + GROUP).slice(i * PART, PART, dim=1).store(ds)
        ds_left = gl.convert_layout(ds, gl.DotOperandLayout(0, ACC, 2))
        if PENDING and i == 0:
            dq = _begin_dq(k_s, ds_s, slot ^ 1, GROUP * 64, 0)
        dk_sum = warpgroup_mma(ds_left, q, dk, is_async=True)
        if i == TILE // PART - 1:
            # Also for lse and delta, whose memory a copy will take: all of them are loaded.
            fence_async_shared()
            arrive_all(ds_full.index(slot))
        if PENDING and i == 0:
            dq, dv = warpgroup_mma_wait(1, deps=[dq, dv_sum])  # dk's is in flight
            mbarrier.wait(dq_empty.index(GROUP), count - walks & 1)
            dq_s.index(GROUP).store(dq)
            fence_async_shared()
            arrive_all(dq_full.index(GROUP))
            dk = warpgroup_mma_wait(0, deps=[dk_sum])
        else:
            dv, dk = warpgroup_mma_wait(0, deps=[dv_sum, dk_sum])
    arrive_all(empty.index(slot))  # its matmuls are done
    return dk, dv


@gluon.jit
def _head_consumer(
    memory, sizes, scale_log2, scale, GROUP: gl.constexpr, PART: gl.constexpr
):  # fmt: skip
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operands, ds_s, dq_s, out_s, ds_full, _, _, sum_full, out_full, _ = memory
    k_s, v_s, _, _, _, kv_full, _, _ = operands
    tiles, _, head_count, programs = sizes
    count = 0  # row tiles begun
    walks = 0  # key tiles done
    for _ in range(gl.program_id(0), head_count, programs):
        for n in range(0, tiles):
            dk = gl.zeros([64, 64], gl.float32, layout=ACC)
            dv = gl.zeros([64, 64], gl.float32, layout=ACC)
            mbarrier.wait(kv_full, walks & 1)
            # The first may be the diagonal's and has a mask; no dq is pending.
            m = tiles - 1
            dk, dv = _head_tile(
                dk, dv, memory, m, n, count, walks, scale_log2, GROUP, True, False, PART
            )
            for i in range(1, m - n):
                count += 1
                dk, dv = _head_tile(
                    dk, dv, memory, m - i, n, count, walks, scale_log2, GROUP, False, True, PART
                )
            if n < m:
                count += 1
                dk, dv = _head_tile(
                    dk, dv, memory, n, n, count, walks, scale_log2, GROUP, True, True, PART
                )
            # The last addend of row tile n's dq; the storer has the sum of the others brought.
            mbarrier.wait(ds_full.index(count & 1), count >> 1 & 1)
            dq = warpgroup_mma_wait(0, deps=[_begin_dq(k_s, ds_s, count & 1, GROUP * 64, 0)])
            v_s.index(GROUP).store(dv.to(v_s.dtype))  # the other consumer does not read it
            out_s.index(GROUP * 2).store((dk * scale).to(v_s.dtype))
            mbarrier.wait(sum_full.index(GROUP), walks & 1)
            dq += gl.where(n > 0, dq_s.index(GROUP).load(ACC), 0.0)
            out_s.index(GROUP * 2 + 1).store((dq * scale).to(v_s.dtype))
            fence_async_shared()
            arrive_all(out_full.index(GROUP))
            count += 1
            walks += 1


@gluon.jit
def _storer(out, memory, sizes):
    dq_tiles, out_tiles = out
    operands, _, dq_s, out_s, _, dq_full, dq_empty, sum_full, out_full, kv_empty = memory
    _, v_s, _, _, _, _, _, _ = operands
    tiles, n_head, head_count, programs = sizes
    place = gl.program_id(0)
    sent = 0  # row tiles
    walks = 0
    for batch_head in range(gl.program_id(0), head_count, programs):
        batch = batch_head // n_head
        column = batch_head % n_head * 64
        for n in range(0, tiles):
            for before in range(0, tiles - 1 - n):
                row = (tiles - 1 - before) * TILE
                for i in gl.static_range(2):
                    mbarrier.wait(dq_full.index(i), sent & 1)
                    if n == 0:
                        store(dq_tiles, [place, row + i * 64, 0], dq_s.index(i))
                    else:
                        reduce_add(dq_tiles, [place, row + i * 64, 0], dq_s.index(i))
                    tma.store_wait(pendings=0)
                    arrive_all(dq_empty.index(i))
                sent += 1
            _wait_for_sums()
            row = n * TILE
            for i in gl.static_range(2):
                mbarrier.expect(sum_full.index(i), 64 * 64 * 4)
                load(dq_tiles, [place, row + i * 64, 0], sum_full.index(i), dq_s.index(i))
            for i in gl.static_range(2):
                mbarrier.wait(out_full.index(i), walks & 1)
                at = row + i * 64
                store(out_tiles, [batch, at, column], out_s.index(i * 2 + 1))
                store(out_tiles, [batch, at, column + n_head * 64], out_s.index(i * 2))
                store(out_tiles, [batch, at, column + 2 * n_head * 64], v_s.index(i))
            tma.store_wait(pendings=0)
            arrive_all(kv_empty)
            walks += 1


@gluon.jit
def _head_producer(given, memory, sizes):
    _, kv_tiles, _, _ = given
    operands, _, _, _, _, _, _, _, _, kv_empty = memory
    tiles, n_head, head_count, programs = sizes
    count = 0
    walks = 0
    for batch_head in range(gl.program_id(0), head_count, programs):
        batch = batch_head // n_head
        column = batch_head % n_head * 64
        for n in range(0, tiles):
            for i in range(0, tiles - n):
                _load_rows(
                    given, operands, batch, (tiles - 1 - i) * TILE, column, batch_head,
                    head_count, count, 64, TILE, 2,
                )  # fmt: skip
                count += 1
                if i == 0:  # rows are there before the keys' memory is free
                    mbarrier.wait(kv_empty, walks & 1 ^ 1)
                    _load_keys(kv_tiles, operands, batch, n * TILE, column, n_head * 64, 64)
            walks += 1


@gluon.jit(do_not_specialize=["tiles", "n_head", "head_count", "programs"])
def attention_hopper_bwd_head_kernel(
    q_tiles,  # of qkv (B, T, 3 * C): blocks (1, 128, 64)
    kv_tiles,  # of the same: blocks (1, 64, 64)
    grad_tiles,  # of grad_y (B, T, C): blocks (1, 128, 64)
    stat_tiles,  # of stats (2 * B * H, padded) fp32: blocks (1, 128)
    dq_tiles,  # of dq's sum (programs, T, 64) fp32: blocks (1, 64, 64)
    out_tiles,  # of dqkv (B, T, 3 * C), out; blocks (1, 64, 64)
    tiles,  # of 128 rows and keys
    n_head, head_count,
    programs,  # in the grid: gl.num_programs would be kept in a register, and spill
    scale_log2, scale,
    PART: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], q_tiles.dtype)
    operands, ds_s, dq_s = _bwd_memory(q_tiles, 64, TILE, 2, 2)
    out_s = gl.allocate_shared_memory(q_tiles.dtype, [4, 64, 64], LAYOUT)
    ds_full = mbarriers(2, 2)
    dq_full = mbarriers(2, 1)
    dq_empty = mbarriers(2, 1)
    sum_full = mbarriers(2, 1)
    out_full = mbarriers(2, 1)
    kv_empty = mbarriers(1, 1).index(0)
    fence_async_shared()
    barrier()
    memory = (
        operands, ds_s, dq_s, out_s, ds_full, dq_full, dq_empty, sum_full, out_full, kv_empty,
    )  # fmt: skip
    sizes = (tiles, n_head, head_count, programs)
    given = (q_tiles, kv_tiles, grad_tiles, stat_tiles)
    out = (dq_tiles, out_tiles)
    gl.warp_specialize(
        [
            (_head_consumer, (memory, sizes, scale_log2, scale, 0, PART)),
            (_head_consumer, (memory, sizes, scale_log2, scale, 1, PART)),
            (_head_producer, (given, memory, sizes)),
            (_storer, (out, memory, sizes)),
        ],
        [4, 1, 1],
        [REGISTERS, 504 - 2 * REGISTERS, 504 - 2 * REGISTERS],  # as in the forward kernel
    )  # fmt: skip


# --- Launchers --------------------------------------------------------------------------------


def forward(
    qkv: Tensor, n_head: int, causal: bool, scale: float, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Launches the forward kernel: qkv (B, T, 3*C) -> y (B, T, C), lse (B*H, T) fp32."""
    qkv = addressable(qkv)
    batch, T, width = qkv.shape
    head_dim = width // (3 * n_head)
    y = torch.empty((batch, T, width // 3), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((batch * n_head, T), dtype=torch.float32, device=qkv.device)
    if y.numel() == 0:
        return y, lse
    pairs = triton.cdiv(triton.cdiv(T, TILE.value), 2)
    programs = min(multiprocessors(qkv), batch * n_head * pairs)
    with on_device(qkv):
        attention_hopper_fwd_kernel[(programs,)](
            blocks(qkv, [1, 64, head_dim]), blocks(qkv, [1, TILE.value, head_dim]),
            blocks(y, [1, 64, head_dim]), lse, T, n_head, batch * n_head, scale * LOG2_E,
            CAUSAL=causal, HEAD=head_dim, **(config or lookup(FORWARD, "sm_90", head_dim)).kwargs(),
        )  # fmt: skip
    return y, lse


def batches_together(n_head: int, T: int, head_dim: int, sm_count: int) -> int:
    """Returns for how many batch entries dq's sum is in memory at a time.

    At least one, and as many as fit the L2 cache, but no more than give an SM eight programs.
    """
    heads = min(DQ_BUDGET // (4 * T * head_dim), 8 * sm_count // triton.cdiv(T, TILE.value))
    return max(1, heads // n_head)


def backward(
    grad_y: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, n_head: int,
    causal: bool, scale: float, by_head: bool, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Launches the kernels of the backward pass; returns dqkv (B, T, 3*C), contiguous.

    by_head: a program takes whole heads, for causal attention of head dim 64.
    """
    qkv, grad_y = addressable(qkv), addressable(grad_y)
    batch, T, width = qkv.shape
    dqkv = torch.empty((batch, T, width), dtype=qkv.dtype, device=qkv.device)
    if dqkv.numel() == 0:
        return dqkv
    head_dim, sms = width // (3 * n_head), multiprocessors(qkv)
    config = config or lookup(BY_HEAD if by_head else BACKWARD, "sm_90", head_dim)
    tiles = triton.cdiv(T, TILE.value)
    padded = tiles * TILE.value
    step = batch if by_head else min(batch, batches_together(n_head, T, head_dim, sms))
    sums = min(sms, batch * n_head) if by_head else step * n_head
    stats = torch.empty((2 * step * n_head, padded), dtype=torch.float32, device=qkv.device)
    dq_sum = torch.empty((sums, T, head_dim), dtype=torch.float32, device=qkv.device)
    rows = TILE.value if by_head else config.blocks["ROWS"]
    with on_device(qkv):
        for first in range(0, batch, step):
            part = slice(first, min(first + step, batch))
            heads = (part.stop - first) * n_head
            x, g, out = qkv[part], grad_y[part], dqkv[part]
            sums_of_part, pairs = dq_sum[:heads], stats[: 2 * heads]
            attention_hopper_bwd_preprocess_kernel[(heads, tiles)](
                y[part], g, lse[first * n_head : part.stop * n_head], pairs,
                None if by_head else sums_of_part,
                g.stride(0), g.stride(1), T, n_head, padded, HEAD=head_dim, **options(4),
            )  # fmt: skip
            tensors = (
                blocks(x, [1, rows, head_dim]), blocks(x, [1, 64, head_dim]),
                blocks(g, [1, rows, head_dim]), blocks(pairs, [1, rows]),
                blocks(sums_of_part, [1, 64, 64]), blocks(out, [1, 64, head_dim]),
            )  # fmt: skip
            if by_head:
                attention_hopper_bwd_head_kernel[(sums,)](
                    *tensors, tiles, n_head, heads, sums, scale * LOG2_E, scale, **config.kwargs()
                )
                continue
            attention_hopper_bwd_kernel[(tiles * heads,)](
                *tensors, T, n_head, heads, scale * LOG2_E,
                CAUSAL=causal, HEAD=head_dim, **config.kwargs(),
            )  # fmt: skip
            attention_hopper_bwd_postprocess_kernel[(heads, tiles)](
                sums_of_part, out, T, n_head, scale, HEAD=head_dim, **options(4),
            )  # fmt: skip
    return dqkv
