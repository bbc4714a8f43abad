"""Two small kernels that are right, for the emulator's own tests."""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastgpt_kernels.hopper import barrier, load, store


@gluon.jit
def _double_rows(out, ring, full, empty, tiles):
    for i in range(0, tiles):
        slot = i % 2
        mbarrier.wait(full.index(slot), i // 2 & 1)
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
        x = ring.index(slot).load(LAYOUT)
        ring.index(slot).store(x + x)
        fence_async_shared()
        barrier()
        store(out, [i * 32, 0], ring.index(slot))
        tma.store_wait(pendings=0)
        barrier()
        mbarrier.arrive(empty.index(slot))


@gluon.jit
def _bring_rows(x, ring, full, empty, tiles):
    for i in range(0, tiles):
        slot = i % 2
        mbarrier.wait(empty.index(slot), i // 2 & 1 ^ 1)
        mbarrier.expect(full.index(slot), 32 * 32 * 4)
        load(x, [i * 32, 0], full.index(slot), ring.index(slot))


@gluon.jit
def double_kernel(x, out, tiles):
    ring = gl.allocate_shared_memory(gl.float32, [2, 32, 32], x.layout)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (_double_rows, (out, ring, full, empty, tiles)),
            (_bring_rows, (x, ring, full, empty, tiles)),
        ],
        [1],
        [24],
    )  # fmt: skip


@gluon.jit
def product_kernel(a, b, c, tiles):
    """One partition: a copy ahead of the product, and one product ahead of the wait."""
    a_s = gl.allocate_shared_memory(gl.bfloat16, [3, 64, 64], a.layout)
    b_s = gl.allocate_shared_memory(gl.bfloat16, [3, 64, 64], b.layout)
    full = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(3):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    total = gl.zeros([64, 64], gl.float32, layout=LAYOUT)
    for i in range(0, tiles + 1):
        if i < tiles:
            slot = i % 3
            mbarrier.expect(full.index(slot), 2 * 64 * 64 * 2)
            load(a, [0, i * 64], full.index(slot), a_s.index(slot))
            load(b, [i * 64, 0], full.index(slot), b_s.index(slot))
        if i > 0:
            slot = (i - 1) % 3
            mbarrier.wait(full.index(slot), (i - 1) // 3 & 1)
            total = warpgroup_mma(a_s.index(slot), b_s.index(slot), total, is_async=True)
            total = warpgroup_mma_wait(1, deps=[total])
    total = warpgroup_mma_wait(0, deps=[total])
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, 64, layout=gl.SliceLayout(0, LAYOUT))
    gl.store(c + gl.expand_dims(rows, 1) * 64 + gl.expand_dims(columns, 0), total)


def double(x: torch.Tensor) -> torch.Tensor:
    """x (M, 32) fp32, M a multiple of 32 or not."""
    out = torch.empty_like(x)
    layout = gl.NVMMASharedLayout.get_default_for([32, 32], gl.float32)
    tiles = [TensorDescriptor.from_tensor(t, [32, 32], layout) for t in (x, out)]
    double_kernel[(1,)](*tiles, -(-len(x) // 32), num_warps=4)
    return out


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (64, K) times b (K, 64), bf16, K a multiple of 64; the result is fp32."""
    c = torch.empty(64, 64)
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    tiles = [TensorDescriptor.from_tensor(t, [64, 64], layout) for t in (a, b)]
    product_kernel[(1,)](*tiles, c, a.shape[1] // 64, num_warps=4)
    return c
