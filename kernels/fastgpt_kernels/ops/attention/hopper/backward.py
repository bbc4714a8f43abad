"""Attention backward for Hopper, warp-specialised."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastgpt_kernels.ops.attention.hopper.compat import barrier, load, reduce_add, store


@gluon.jit
def _walk_rows(
    dk, dv, dq_tiles, k_s, v_s, q_s, g_s, stat_s, ds_s, dq_s, full, empty, ds_full, ds_empty,
    slot_head, key, lo, hi, T, count, scale_log2,
    GROUP: gl.constexpr, MASK: gl.constexpr, CAUSAL: gl.constexpr, HEAD: gl.constexpr,
    ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    PART: gl.constexpr = 64 if HEAD == 64 else 32
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    PARTS: gl.constexpr = ROWS // PART
    k = k_s.index(GROUP)
    v = v_s.index(GROUP)
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    zero = gl.zeros([64, PART], gl.float32, layout=SCORES)
    for m in range(lo, hi):
        slot = count % STAGES
        mbarrier.wait(full.index(slot), count // STAGES & 1)
        for part in gl.static_range(PARTS):
            q = q_s.index(slot).slice(part * PART, PART, dim=0)
            g = g_s.index(slot).slice(part * PART, PART, dim=0)
            s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
            dp = warpgroup_mma(v, g.permute((1, 0)), zero, use_acc=False, is_async=True)
            lse = stat_s.index(slot * 2).slice(part * PART, PART).load(COLUMNS)
            s = warpgroup_mma_wait(1, deps=[s])
            p = gl.exp2(s * scale_log2 - gl.expand_dims(lse, 0))
            if MASK:
                keys = key + GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
                if CAUSAL:
                    rows = m * ROWS + part * PART + gl.arange(0, PART, layout=COLUMNS)
                    visible = gl.expand_dims(rows, 0) >= gl.expand_dims(keys, 1)
                else:
                    visible = gl.expand_dims(keys, 1) < T
                p = gl.where(visible, p, 0.0)
            p_left = gl.convert_layout(p.to(q_s.dtype), LEFT)
            delta = stat_s.index(slot * 2 + 1).slice(part * PART, PART).load(COLUMNS)
            dp = warpgroup_mma_wait(0, deps=[dp])
            dv_token = warpgroup_mma(p_left, g, dv, is_async=True)
            ds = (p * (dp - gl.expand_dims(delta, 0))).to(q_s.dtype)
            if part == 0:
                mbarrier.wait(ds_empty, count & 1 ^ 1)
            ds_s.index(GROUP).slice(part * PART, PART, dim=1).store(ds)
            dk_token = warpgroup_mma(gl.convert_layout(ds, LEFT), q, dk, is_async=True)
            if part == PARTS - 1:
                fence_async_shared()
                mbarrier.arrive(ds_full)
            dv, dk = warpgroup_mma_wait(0, deps=[dv_token, dk_token])
        barrier()
        mbarrier.arrive(empty.index(slot))
        mbarrier.wait(ds_full, count & 1)
        ROW: gl.constexpr = GROUP * 64 if ROWS == 128 else 0
        COLUMN: gl.constexpr = 0 if ROWS == 128 else GROUP * 64
        dq = gl.zeros([64, 64], gl.float32, layout=DQ)
        for i in gl.static_range(2):
            ds_left = ds_s.index(i).slice(ROW, 64, dim=1).permute((1, 0))
            dq = warpgroup_mma(ds_left, k_s.index(i).slice(COLUMN, 64, dim=1), dq, use_acc=i == 1, is_async=True)
        dq = warpgroup_mma_wait(0, deps=[dq])
        tma.store_wait(pendings=0)
        barrier()
        mbarrier.arrive(ds_empty)
        dq_s.index(GROUP).store(dq)
        fence_async_shared()
        barrier()
        reduce_add(dq_tiles, [slot_head, m * ROWS + ROW, COLUMN], dq_s.index(GROUP))
        count += 1
    return dk, dv, count


@gluon.jit
def _consumer(
    dq_tiles, out_tiles, k_s, v_s, q_s, g_s, stat_s, ds_s, dq_s, kv_full, full, empty, ds_full,
    ds_empty, head_count, first_head, T, n_head, scale, scale_log2,
    GROUP: gl.constexpr, CAUSAL: gl.constexpr, HEAD: gl.constexpr, ROWS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD, 16])
    slot_head = gl.program_id(0) % head_count
    key = gl.program_id(0) // head_count * 128
    tiles = gl.cdiv(T, ROWS)
    if CAUSAL:
        lo = key // ROWS
        masked = gl.minimum(lo + 128 // ROWS, tiles)
    else:
        lo = 0
        masked = tiles * ((key + 128) // (T + 1))
        masked = gl.minimum(masked, tiles)
    dk = gl.zeros([64, HEAD], gl.float32, layout=ACC)
    dv = gl.zeros([64, HEAD], gl.float32, layout=ACC)
    count = 0
    mbarrier.wait(kv_full, 0)
    dk, dv, count = _walk_rows(
        dk, dv, dq_tiles, k_s, v_s, q_s, g_s, stat_s, ds_s, dq_s, full, empty, ds_full, ds_empty,
        slot_head, key, lo, masked, T, count, scale_log2,
        GROUP, True, CAUSAL, HEAD, ROWS, STAGES,
    )  # fmt: skip
    dk, dv, count = _walk_rows(
        dk, dv, dq_tiles, k_s, v_s, q_s, g_s, stat_s, ds_s, dq_s, full, empty, ds_full, ds_empty,
        slot_head, key, masked, tiles, T, count, scale_log2,
        GROUP, False, CAUSAL, HEAD, ROWS, STAGES,
    )  # fmt: skip
    batch_head = first_head + slot_head
    batch = batch_head // n_head
    column = (n_head + batch_head % n_head) * HEAD
    out = v_s.index(GROUP)
    out.store(dv.to(q_s.dtype))
    fence_async_shared()
    barrier()
    store(out_tiles, [batch, key + GROUP * 64, column + n_head * HEAD], out)
    tma.store_wait(pendings=0)
    barrier()
    out.store((dk * scale).to(q_s.dtype))
    fence_async_shared()
    barrier()
    store(out_tiles, [batch, key + GROUP * 64, column], out)
    tma.store_wait(pendings=0)


@gluon.jit
def _producer(
    q_tiles, kv_tiles, g_tiles, stat_tiles, k_s, v_s, q_s, g_s, stat_s, kv_full, full, empty,
    head_count, first_head, T, n_head, stat_stride, delta_offset,
    CAUSAL: gl.constexpr, HEAD: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    batch_head = first_head + gl.program_id(0) % head_count
    key = gl.program_id(0) // head_count * 128
    batch = batch_head // n_head
    column = batch_head % n_head * HEAD
    mbarrier.expect(kv_full, 4 * 64 * HEAD * 2)
    for i in gl.static_range(2):
        load(kv_tiles, [batch, key + i * 64, column + n_head * HEAD], kv_full, k_s.index(i))
        load(kv_tiles, [batch, key + i * 64, column + 2 * n_head * HEAD], kv_full, v_s.index(i))
    if CAUSAL:
        lo = key // ROWS
    else:
        lo = 0
    count = 0
    for m in range(lo, gl.cdiv(T, ROWS)):
        slot = count % STAGES
        mbarrier.wait(empty.index(slot), count // STAGES & 1 ^ 1)
        mbarrier.expect(full.index(slot), 2 * ROWS * HEAD * 2 + 2 * ROWS * 4)
        row = m * ROWS
        stat = batch_head * stat_stride + row
        load(q_tiles, [batch, row, column], full.index(slot), q_s.index(slot))
        load(stat_tiles, [stat], full.index(slot), stat_s.index(slot * 2))
        load(g_tiles, [batch, row, column], full.index(slot), g_s.index(slot))
        load(stat_tiles, [stat + delta_offset], full.index(slot), stat_s.index(slot * 2 + 1))
        count += 1


@gluon.jit
def attention_hopper_backward_kernel(
    q_tiles, kv_tiles, g_tiles, stat_tiles, dq_tiles, out_tiles,
    head_count, first_head, T, n_head, stat_stride, delta_offset, scale, scale_log2,
    CAUSAL: gl.constexpr, HEAD: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, HEAD], q_tiles.dtype)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, ROWS], q_tiles.dtype)
    DQ: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.float32)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_s = gl.allocate_shared_memory(q_tiles.dtype, [2, 64, HEAD], TILE)
    v_s = gl.allocate_shared_memory(q_tiles.dtype, [2, 64, HEAD], TILE)
    q_s = gl.allocate_shared_memory(q_tiles.dtype, [STAGES, ROWS, HEAD], TILE)
    g_s = gl.allocate_shared_memory(q_tiles.dtype, [STAGES, ROWS, HEAD], TILE)
    stat_s = gl.allocate_shared_memory(gl.float32, [STAGES * 2, ROWS], stat_tiles.layout)
    ds_s = gl.allocate_shared_memory(q_tiles.dtype, [2, 64, ROWS], DS)
    dq_s = gl.allocate_shared_memory(gl.float32, [2, 64, 64], DQ)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    ds_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    ds_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(kv_full, count=1)
    mbarrier.init(ds_full, count=2)
    mbarrier.init(ds_empty, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (_consumer, (dq_tiles, out_tiles, k_s, v_s, q_s, g_s, stat_s, ds_s, dq_s, kv_full, full, empty, ds_full, ds_empty, head_count, first_head, T, n_head, scale, scale_log2, 0, CAUSAL, HEAD, ROWS, STAGES)),
            (_consumer, (dq_tiles, out_tiles, k_s, v_s, q_s, g_s, stat_s, ds_s, dq_s, kv_full, full, empty, ds_full, ds_empty, head_count, first_head, T, n_head, scale, scale_log2, 1, CAUSAL, HEAD, ROWS, STAGES)),
            (_producer, (q_tiles, kv_tiles, g_tiles, stat_tiles, k_s, v_s, q_s, g_s, stat_s, kv_full, full, empty, head_count, first_head, T, n_head, stat_stride, delta_offset, CAUSAL, HEAD, ROWS, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 504 - 2 * REGISTERS],
    )  # fmt: skip
