"""Attention forward for Hopper in Gluon: softmax under the matrix products.

What `ops/attention/forward.py` computes, in the structure of FlashAttention-3 (Shah et al. 2024,
arXiv:2407.08608). A program has three partitions, one to an SM:

- a producer warp, which has TMA bring tiles of q, k and v from the packed projection: descriptors
  of (B, T, 3 * C), in blocks of one batch entry, so that what lies past T is zeros;
- two consumer warpgroups with 64 query rows each. While the tensor cores multiply p by the values
  of key tile i, a consumer's other units fold the scores of tile i + 1 into the softmax.

Programs are persistent. Row tile i of a head goes together with the last tile but i: such a pair
sees the same number of keys whatever i is, and where T is no multiple of 256 the last pair is a
single tile. Of a row tile's key tiles the last one is first: that with the diagonal, or the ragged
end, is the only one that needs a mask, and all others run in one loop.

Shared memory hands over in rings of slots, each with two mbarriers: `full`, one arrival and the
bytes of a copy, and `empty`, an arrival of each consumer. y leaves through q's slot.

What is not obvious:

- Masked scores are -inf and the maximum starts at a finite floor. If a maximum could be that of
  masked scores alone, s * c - max would not be 0 or -inf but whatever the rounding of s * c left:
  contracted to one FMA, the product is not the rounded one.
- ptxas moves all exponentials below the wait for the second product. A store of the row sums to
  memory that nobody reads, before that wait, holds them where they are.
- Two steps in a loop's body: with one, p's 32 registers move to where the product reads them.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastgpt_kernels.launch import Config, lookup, multiprocessors, on_device
from fastgpt_kernels.ops.attention.forward import LOG2_E
from fastgpt_kernels.ops.attention.hopper.compat import barrier, load, steps_a_loop, store
from fastgpt_kernels.ops.attention.hopper.configs import FORWARD
from fastgpt_kernels.ops.attention.hopper.host import blocks, in_place

TILE = gl.constexpr(128)  # rows of a tile of q, two consumers' 64, and of k and v
FLOOR = gl.constexpr(-1e30)  # below any logit
SCALARS = ["T", "n_head", "head_count"]


@gluon.jit
def _fold(s, row_max, row_sum, scale_log2):
    """Scores [M, N] into the running softmax: (p, maximum, sum, by what to scale what was)."""
    new_max = gl.maximum(row_max, gl.max(s, 1) * scale_log2)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(new_max, 1))
    decay = gl.exp2(row_max - new_max)
    return p, new_max, row_sum * decay + gl.sum(p, 1), decay


@gluon.jit
def _step(
    q, memory, order, zero, o, p, row_max, row_sum, count, scale_log2,
    STAGES: gl.constexpr, ACC: gl.constexpr, LEFT: gl.constexpr,
):  # fmt: skip
    """p of key tile `count` meets its values, while the next tile's scores become the next p."""
    _, k_s, v_s, _, _, k_full, k_empty, v_full, v_empty = memory
    k_slot = (count + 1) % STAGES
    v_slot = count % STAGES
    mbarrier.wait(k_full.index(k_slot), (count + 1) // STAGES & 1)
    s = warpgroup_mma(q, k_s.index(k_slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(v_slot), count // STAGES & 1)
    o = warpgroup_mma(p, v_s.index(v_slot), o, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    barrier()  # all warps have waited, whose scores read the slot
    mbarrier.arrive(k_empty.index(k_slot))
    next_p, row_max, row_sum, decay = _fold(s, row_max, row_sum, scale_log2)
    next_p = gl.convert_layout(next_p.to(q.dtype), LEFT)
    order.store(row_sum)
    o, next_p, decay, p = warpgroup_mma_wait(0, deps=[o, next_p, decay, p])
    barrier()
    mbarrier.arrive(v_empty.index(v_slot))
    o = o * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, ACC)), 1)
    return o, next_p, row_max, row_sum, count + 1


@gluon.jit
def _consumer(
    y_tiles, lse, memory, sizes, scale_log2,
    GROUP: gl.constexpr, CAUSAL: gl.constexpr, HEAD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty = memory
    T, n_head, head_count = sizes
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    STEPS: gl.constexpr = steps_a_loop(HEAD)
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
            barrier()
            mbarrier.arrive(k_empty.index(slot))
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
            barrier()
            mbarrier.arrive(v_empty.index(slot))
            lse_rows = lse + batch_head.to(gl.int64) * T + rows
            gl.store(lse_rows, row_max + gl.log2(row_sum), mask=rows < T)
            o = o * gl.expand_dims(gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, ACC)), 1)
            q.store(o.to(q.dtype))  # its last reader was the last product of scores
            fence_async_shared()
            barrier()
            store(y_tiles, [batch_head // n_head, row, batch_head % n_head * HEAD], q)
            tma.store_wait(pendings=0)
            barrier()
            mbarrier.arrive(q_empty.index(q_slot))
            count += 1
            done += 1


@gluon.jit
def _producer(
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


@gluon.jit(do_not_specialize=SCALARS)
def attention_hopper_forward_kernel(
    q_tiles,  # of qkv (B, T, 3 * C): blocks (1, 64, HEAD)
    kv_tiles,  # of the same: blocks (1, 128, HEAD)
    y_tiles,  # of y (B, T, C), out: blocks (1, 64, HEAD)
    lse,  # (B * H, T) fp32, out: base-2 log of softmax's divisors
    T, n_head, head_count, scale_log2,
    CAUSAL: gl.constexpr, HEAD: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, HEAD], q_tiles.dtype)
    MBARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_s = gl.allocate_shared_memory(q_tiles.dtype, [4, 64, HEAD], LAYOUT)  # slot * 2 + consumer
    k_s = gl.allocate_shared_memory(q_tiles.dtype, [STAGES, TILE, HEAD], LAYOUT)
    v_s = gl.allocate_shared_memory(q_tiles.dtype, [STAGES, TILE, HEAD], LAYOUT)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], MBARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], MBARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], MBARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], MBARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], MBARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], MBARRIER)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    barrier()
    memory = (q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    sizes = (T, n_head, head_count)
    gl.warp_specialize(
        [
            (_consumer, (y_tiles, lse, memory, sizes, scale_log2, 0, CAUSAL, HEAD, STAGES)),
            (_consumer, (y_tiles, lse, memory, sizes, scale_log2, 1, CAUSAL, HEAD, STAGES)),
            (_producer, (q_tiles, kv_tiles, memory, sizes, CAUSAL, HEAD, STAGES)),
        ],
        [4, 1],
        # Of 65,536 registers, 168 a thread of three warpgroups: what the consumers leave.
        [REGISTERS, 504 - 2 * REGISTERS],
    )  # fmt: skip


def launch_forward(
    qkv: torch.Tensor, n_head: int, causal: bool, scale: float, config: Config | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """qkv (B, T, 3*C) -> y (B, T, C), lse (B*H, T) fp32, as of the kernels in plain Triton."""
    qkv = in_place(qkv)
    batch, T, width = qkv.shape
    head_dim = width // (3 * n_head)
    y = torch.empty((batch, T, width // 3), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((batch * n_head, T), dtype=torch.float32, device=qkv.device)
    if y.numel() == 0:
        return y, lse
    pairs = triton.cdiv(triton.cdiv(T, TILE.value), 2)
    programs = min(multiprocessors(qkv), batch * n_head * pairs)
    with on_device(qkv):
        attention_hopper_forward_kernel[(programs,)](
            blocks(qkv, [1, 64, head_dim]), blocks(qkv, [1, TILE.value, head_dim]),
            blocks(y, [1, 64, head_dim]), lse, T, n_head, batch * n_head, scale * LOG2_E,
            CAUSAL=causal, HEAD=head_dim, **(config or lookup(FORWARD, "sm_90", head_dim)).kwargs(),
        )  # fmt: skip
    return y, lse
