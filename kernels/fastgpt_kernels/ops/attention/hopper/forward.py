"""Attention forward for Hopper, warp-specialised (the structure of Shah et al. 2024,
"FlashAttention-3"): what `ops/attention/forward.py` computes, with softmax under the products.
"""

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

from fastgpt_kernels.ops.attention.hopper.compat import barrier, load, store

@gluon.jit
def _fold(s, row_max, row_sum, scale_log2):
    """Scores [M, N] into the running softmax: (p, maximum, sum, by what to scale what was)."""
    new_max = gl.maximum(row_max, gl.max(s, 1) * scale_log2)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(new_max, 1))
    decay = gl.exp2(row_max - new_max)
    row_sum = row_sum * decay + gl.sum(p, 1)
    return p, new_max, row_sum, decay


@gluon.jit
def _step(
    q, k_s, v_s, k_full, k_empty, v_full, v_empty, order, zero, o, p, row_max, row_sum, count,
    scale_log2, STAGES: gl.constexpr, ACC: gl.constexpr, LEFT: gl.constexpr,
):  # fmt: skip
    """Scores of key tile `count` + 1 while tile `count`'s p meets its values."""
    k_slot = (count + 1) % STAGES
    v_slot = count % STAGES
    mbarrier.wait(k_full.index(k_slot), (count + 1) // STAGES & 1)
    s_token = warpgroup_mma(q, k_s.index(k_slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(v_slot), count // STAGES & 1)
    o_token = warpgroup_mma(p, v_s.index(v_slot), o, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s_token])
    mbarrier.arrive(k_empty.index(k_slot))
    p_next, row_max, row_sum, decay = _fold(s, row_max, row_sum, scale_log2)
    p_next = gl.convert_layout(p_next.to(q.dtype), LEFT)
    order.store(row_sum)
    o, p_next, decay, p = warpgroup_mma_wait(0, deps=[o_token, p_next, decay, p])
    mbarrier.arrive(v_empty.index(v_slot))
    o = o * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, ACC)), 1)
    return o, p_next, row_max, row_sum, count + 1


@gluon.jit
def _consumer(
    y_tiles, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, lse,
    T, n_head, head_count, scale_log2,
    GROUP: gl.constexpr, CAUSAL: gl.constexpr, HEAD: gl.constexpr, STAGES: gl.constexpr, UNROLL: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    zero = gl.zeros([64, 128], gl.float32, layout=SCORES)
    order = gl.allocate_shared_memory(gl.float32, [64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    tiles = gl.cdiv(T, 128)
    pairs = (tiles + 1) // 2
    count = 0
    done = 0
    for item in range(gl.program_id(0), head_count * pairs, gl.num_programs(0)):
        batch_head = item // pairs
        pair = item % pairs
        batch = batch_head // n_head
        for half in range(0, gl.minimum(tiles - 2 * pair, 2)):
            tile = pair + (1 - half) * (tiles - 1 - 2 * pair)
            row = tile * 128 + GROUP * 64
            rows = row + gl.arange(0, 64, layout=ROWS)
            if CAUSAL:
                full = tile
            else:
                full = tiles - 1
            q_slot = done % 2
            q = q_s.index(q_slot * 2 + GROUP)
            mbarrier.wait(q_full.index(q_slot), done // 2 & 1)
            slot = count % STAGES
            mbarrier.wait(k_full.index(slot), count // STAGES & 1)
            s = warpgroup_mma(q, k_s.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(slot))
            keys = full * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, SCORES))
            if CAUSAL:
                visible = gl.expand_dims(rows, 1) >= gl.expand_dims(keys, 0)
            else:
                visible = gl.expand_dims(keys, 0) < T
            s = gl.where(visible, s, float("-inf"))
            row_max = gl.full([64], -1e30, gl.float32, layout=ROWS)
            row_sum = gl.full([64], 0.0, gl.float32, layout=ROWS)
            o = gl.zeros([64, HEAD], gl.float32, layout=ACC)
            p, row_max, row_sum, decay = _fold(s, row_max, row_sum, scale_log2)
            p = gl.convert_layout(p.to(q.dtype), LEFT)
            if UNROLL == 2:
                for _ in range(0, full // 2):
                    o, p, row_max, row_sum, count = _step(
                        q, k_s, v_s, k_full, k_empty, v_full, v_empty, order, zero, o, p,
                        row_max, row_sum, count, scale_log2, STAGES, ACC, LEFT,
                    )  # fmt: skip
                    o, p, row_max, row_sum, count = _step(
                        q, k_s, v_s, k_full, k_empty, v_full, v_empty, order, zero, o, p,
                        row_max, row_sum, count, scale_log2, STAGES, ACC, LEFT,
                    )  # fmt: skip
                if full % 2 == 1:
                    o, p, row_max, row_sum, count = _step(
                        q, k_s, v_s, k_full, k_empty, v_full, v_empty, order, zero, o, p,
                        row_max, row_sum, count, scale_log2, STAGES, ACC, LEFT,
                    )  # fmt: skip
            else:
                for _ in range(0, full):
                    o, p, row_max, row_sum, count = _step(
                        q, k_s, v_s, k_full, k_empty, v_full, v_empty, order, zero, o, p,
                        row_max, row_sum, count, scale_log2, STAGES, ACC, LEFT,
                    )  # fmt: skip
            slot = count % STAGES
            mbarrier.wait(v_full.index(slot), count // STAGES & 1)
            o = warpgroup_mma(p, v_s.index(slot), o, is_async=True)
            o = warpgroup_mma_wait(0, deps=[o])
            mbarrier.arrive(v_empty.index(slot))
            gl.store(lse + batch_head.to(gl.int64) * T + rows, row_max + gl.log2(row_sum), mask=rows < T)
            o = o * gl.expand_dims(gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, ACC)), 1)
            q.store(o.to(q.dtype))
            fence_async_shared()
            barrier()
            store(y_tiles, [batch, row, batch_head % n_head * HEAD], q)
            tma.store_wait(pendings=0)
            mbarrier.arrive(q_empty.index(q_slot))
            count += 1
            done += 1


@gluon.jit
def _producer(
    q_tiles, kv_tiles, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    T, n_head, head_count,
    CAUSAL: gl.constexpr, HEAD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    tiles = gl.cdiv(T, 128)
    pairs = (tiles + 1) // 2
    count = 0
    done = 0
    for item in range(gl.program_id(0), head_count * pairs, gl.num_programs(0)):
        batch_head = item // pairs
        pair = item % pairs
        batch = batch_head // n_head
        column = batch_head % n_head * HEAD
        for half in range(0, gl.minimum(tiles - 2 * pair, 2)):
            tile = pair + (1 - half) * (tiles - 1 - 2 * pair)
            if CAUSAL:
                full = tile
            else:
                full = tiles - 1
            q_slot = done % 2
            mbarrier.wait(q_empty.index(q_slot), done // 2 & 1 ^ 1)
            mbarrier.expect(q_full.index(q_slot), 2 * 64 * HEAD * 2)
            for group in gl.static_range(2):
                load(
                    q_tiles, [batch, tile * 128 + group * 64, column], q_full.index(q_slot),
                    q_s.index(q_slot * 2 + group),
                )  # fmt: skip
            for i in range(0, full + 1):
                n = full - i
                slot = count % STAGES
                free = count // STAGES & 1 ^ 1
                mbarrier.wait(k_empty.index(slot), free)
                mbarrier.expect(k_full.index(slot), 128 * HEAD * 2)
                load(kv_tiles, [batch, n * 128, column + n_head * HEAD], k_full.index(slot), k_s.index(slot))
                mbarrier.wait(v_empty.index(slot), free)
                mbarrier.expect(v_full.index(slot), 128 * HEAD * 2)
                load(kv_tiles, [batch, n * 128, column + 2 * n_head * HEAD], v_full.index(slot), v_s.index(slot))
                count += 1
            done += 1


@gluon.jit
def attention_hopper_forward_kernel(
    q_tiles, kv_tiles, y_tiles, lse, T, n_head, head_count, scale_log2,
    CAUSAL: gl.constexpr, HEAD: gl.constexpr, STAGES: gl.constexpr, UNROLL: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, HEAD], q_tiles.dtype)
    q_s = gl.allocate_shared_memory(q_tiles.dtype, [4, 64, HEAD], TILE)
    k_s = gl.allocate_shared_memory(q_tiles.dtype, [STAGES, 128, HEAD], TILE)
    v_s = gl.allocate_shared_memory(q_tiles.dtype, [STAGES, 128, HEAD], TILE)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (_consumer, (y_tiles, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, lse, T, n_head, head_count, scale_log2, 0, CAUSAL, HEAD, STAGES, UNROLL)),
            (_consumer, (y_tiles, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, lse, T, n_head, head_count, scale_log2, 1, CAUSAL, HEAD, STAGES, UNROLL)),
            (_producer, (q_tiles, kv_tiles, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, T, n_head, head_count, CAUSAL, HEAD, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 504 - 2 * REGISTERS],
    )  # fmt: skip
