"""The MLP's two matmuls next to GELU for Hopper (sm_90) in Gluon, with GELU in their epilogue.

    forward    z = x W1^T,  h = gelu(z + b1)          x (M, K), W1 (N, K), b1 (N,); z, h (M, N)
    backward   dz = (dy W2) * gelu'(z + b1)           dy (M, K), W2 (K, N), z (M, N); dz (M, N)

z and dy W2 are rounded to 16 bits first: the numbers are those of a matmul and bias_gelu after it.
A program computes tiles of 128 x 256, one after the other, in steps of 64 along K. Its warpgroups:

    consumers 0, 1   wait for a step's operands (`full`), and multiply 64 x 256 each; at the tile's
                     end they wait until the epilogue has read `stage` (`acc_empty`), store there
    consumer 0       also waits until consumer 1 has read a slot (`empty`), and has TMA refill it
    epilogue         waits for a half of `stage` (`acc_full`); applies GELU, and stores to memory,
                     while the consumers multiply the next tile

A wgmma of 256 columns reads 10 KB of shared memory in 128 clocks; two of 128 would read 12. Copies
have no warp of their own: with 512 threads of 128 registers ptxas takes no wgmma of 256 columns
(C7602). Shared memory has 3 slots of 48 KB for operands, and 64 KB of `stage`. Of 128 bytes per
clock at full speed wgmma reads 80, TMA writes 48 and the epilogue moves 10 if K is 768.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastgpt_kernels.bias_gelu import form_of, gelu_and_slope
from fastgpt_kernels.hopper import addressable, arrive_all, barrier, blocks, load, mbarriers
from fastgpt_kernels.launch import Config, contiguous, multiprocessors, on_device

# STAGES are slots of operands, as many as fit; REGISTERS are those of a consumer's thread, without
# spills in Triton 3.6 to 3.9.
CONFIG = Config({"STAGES": 3, "REGISTERS": 160}, num_warps=4)  # not measured

ROWS = gl.constexpr(64)  # of a consumer
COLUMNS = gl.constexpr(256)
DEPTH = gl.constexpr(64)
CHUNK = gl.constexpr(64)  # columns of a chunk, of which the epilogue has one in registers
CHUNKS = gl.constexpr(4)  # of a consumer
BAND = gl.constexpr(8)  # tile rows that are walked column by column: operands stay in the L2

# --- Consumers --------------------------------------------------------------------------------


@gluon.jit
def _corner(tile, sizes):
    """Returns the first row and column of a tile."""
    tiles_m, tiles_n, _, _, _ = sizes
    in_band = BAND * tiles_n
    first = tile // in_band * BAND
    height = gl.minimum(BAND, tiles_m - first)
    rest = tile % in_band
    return (first + rest % height) * (2 * ROWS), rest // height * COLUMNS


@gluon.jit
def _copy_operands(
    operands, memory, sizes, ahead, count,
    BACKWARD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Has TMA bring step `ahead` of this program as its number `count`; returns the next step."""
    a_tiles, b_tiles = operands
    a_s, b_s, _, full, _, _, _ = memory
    tiles_m, tiles_n, steps, _, _ = sizes
    tile, row, column, step = ahead
    slot = count % STAGES
    bar = full.index(slot)
    more = tile < tiles_m * tiles_n
    mbarrier.expect(bar, (2 * ROWS + COLUMNS) * DEPTH * 2, pred=more)
    for i in gl.static_range(2):
        load(a_tiles, [row + i * ROWS, step * DEPTH], bar, a_s.index(slot * 2 + i), pred=more)
    if BACKWARD:
        load(b_tiles, [step * DEPTH, column], bar, b_s.index(slot), pred=more)
    else:
        load(b_tiles, [column, step * DEPTH], bar, b_s.index(slot), pred=more)
    step += 1
    if step == steps:
        step = step * 0
        tile += gl.num_programs(0)
        row, column = _corner(tile, sizes)
    return tile, row, column, step


@gluon.jit
def _release(
    operands, memory, sizes, ahead, used,
    GROUP: gl.constexpr, BACKWARD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Lets go of the slot of step `used`; consumer 0 has TMA bring step `ahead` there."""
    _, _, _, _, empty, _, _ = memory
    barrier()  # all warps have waited for the product that read the slot
    if GROUP == 1:
        mbarrier.arrive(empty.index(used % STAGES))
    else:
        mbarrier.wait(empty.index(used % STAGES), used // STAGES & 1)
        ahead = _copy_operands(operands, memory, sizes, ahead, used + STAGES, BACKWARD, STAGES)
    return ahead


@gluon.jit
def _consumer(
    operands, memory, sizes,
    GROUP: gl.constexpr, BACKWARD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    a_s, b_s, stage_s, full, _, acc_full, acc_empty = memory
    tiles_m, tiles_n, steps, _, _ = sizes
    stage = stage_s.index(GROUP)
    count = 0  # steps begun
    done = 0  # tiles done
    first = gl.program_id(0)
    row, column = _corner(first, sizes)
    ahead = (first, row, column, first * 0)  # the step to copy next, STAGES steps ahead
    if GROUP == 0:
        for i in gl.static_range(STAGES):
            ahead = _copy_operands(operands, memory, sizes, ahead, i, BACKWARD, STAGES)
    for _ in range(first, tiles_m * tiles_n, gl.num_programs(0)):
        acc = gl.zeros([ROWS, COLUMNS], gl.float32, layout=ACC)
        for step in range(0, steps):
            slot = count % STAGES
            mbarrier.wait(full.index(slot), count // STAGES & 1)
            b = b_s.index(slot) if BACKWARD else b_s.index(slot).permute((1, 0))
            acc = warpgroup_mma(a_s.index(slot * 2 + GROUP), b, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            if step > 0:
                ahead = _release(operands, memory, sizes, ahead, count - 1, GROUP, BACKWARD, STAGES)
            count += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        ahead = _release(operands, memory, sizes, ahead, count - 1, GROUP, BACKWARD, STAGES)
        mbarrier.wait(acc_empty.index(GROUP), done & 1 ^ 1)
        stage.store(acc.to(stage.dtype))
        arrive_all(acc_full.index(GROUP))
        done += 1  # noqa: SIM113


# --- Epilogue ---------------------------------------------------------------------------------


@gluon.jit
def _chunk(x, row, column, n: gl.constexpr, more, sizes, LAYOUT: gl.constexpr):
    """Returns pointers to chunk n of the tile at (row, column) of x (M, N), their mask, columns.

    The mask is false without `more`, and outside of x.
    """
    _, _, _, M, N = sizes
    top = row + n // CHUNKS * ROWS
    left = column + n % CHUNKS * CHUNK
    rows = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)), 1)
    columns = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, LAYOUT))
    pointers = x + (top.to(gl.int64) * N + left) + (rows * N + gl.expand_dims(columns, 0))
    mask = (rows < M - top) & (gl.expand_dims(columns, 0) < N - left) & more
    return pointers, mask, left + columns


@gluon.jit
def _load_z(z, row, column, n: gl.constexpr, more, sizes, LAYOUT: gl.constexpr):
    pointers, mask, _ = _chunk(z, row, column, n, more, sizes, LAYOUT)
    return gl.load(pointers, mask=mask, other=0.0)


@gluon.jit
def _epilogue(
    z, out, bias, partials, memory, sizes, BACKWARD: gl.constexpr, FORM: gl.constexpr
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    _, _, stage_s, _, _, acc_full, acc_empty = memory
    tiles_m, tiles_n, _, _, N = sizes
    tiles = tiles_m * tiles_n
    done = 0  # tiles
    first = gl.program_id(0)
    row, column = _corner(first, sizes)
    if BACKWARD:  # z is loaded two chunks ahead
        z_0 = _load_z(z, row, column, 0, True, sizes, LAYOUT)
        z_1 = _load_z(z, row, column, 1, True, sizes, LAYOUT)
    for tile in range(first, tiles, gl.num_programs(0)):
        next_tile = tile + gl.num_programs(0)
        next_row, next_column = _corner(next_tile, sizes)
        for n in gl.static_range(2 * CHUNKS):  # group by group
            group = n // CHUNKS
            if n % CHUNKS == 0:
                mbarrier.wait(acc_full.index(group), done & 1)
            acc = stage_s.index(group).slice(n % CHUNKS * CHUNK, CHUNK, dim=1).load(LAYOUT)
            if n % CHUNKS == CHUNKS - 1:
                arrive_all(acc_empty.index(group))
            pointers, mask, columns = _chunk(out, row, column, n, True, sizes, LAYOUT)
            if BACKWARD:
                at = z_0.to(gl.float32)  # [64, 64]
                z_0 = z_1
                if n + 2 < 2 * CHUNKS:
                    z_1 = _load_z(z, row, column, n + 2, True, sizes, LAYOUT)
                else:
                    ahead = next_row, next_column, n + 2 - 2 * CHUNKS, next_tile < tiles
                    z_1 = _load_z(z, *ahead, sizes, LAYOUT)
            else:
                z_pointers, _mask, _columns = _chunk(z, row, column, n, True, sizes, LAYOUT)
                gl.store(z_pointers, acc, mask=mask)
                at = acc.to(gl.float32)
            if bias is not None:
                shift = gl.load(bias + columns, mask=columns < N, other=0.0).to(gl.float32)
                at += gl.expand_dims(shift, 0)
            h, slope = gelu_and_slope(at, FORM)
            if BACKWARD:
                dz = acc.to(gl.float32) * slope
                gl.store(pointers, dz.to(acc.dtype), mask=mask)
                if bias is not None:
                    sums = partials + (row // ROWS + group) * N + columns
                    gl.store(sums, gl.sum(dz, 0), mask=columns < N)
            else:
                gl.store(pointers, h.to(acc.dtype), mask=mask)
        row = next_row
        column = next_column
        done += 1  # noqa: SIM113


# --- Kernels ----------------------------------------------------------------------------------


@gluon.jit
def _run(
    operands, z, out, bias, partials, M, N, K,
    BACKWARD: gl.constexpr, FORM: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = operands[0].dtype
    A: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DEPTH], DTYPE)
    B_SHAPE: gl.constexpr = [DEPTH, COLUMNS] if BACKWARD else [COLUMNS, DEPTH]
    B: gl.constexpr = gl.NVMMASharedLayout.get_default_for(B_SHAPE, DTYPE)
    STAGE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], DTYPE)
    a_s = gl.allocate_shared_memory(DTYPE, [STAGES * 2, ROWS, DEPTH], A)  # slot * 2 + consumer
    b_s = gl.allocate_shared_memory(DTYPE, [STAGES, B_SHAPE[0], B_SHAPE[1]], B)
    stage_s = gl.allocate_shared_memory(DTYPE, [2, ROWS, COLUMNS], STAGE)
    full = mbarriers(STAGES, 1)
    empty = mbarriers(STAGES, 1)
    acc_full = mbarriers(2, 1)
    acc_empty = mbarriers(2, 1)
    fence_async_shared()
    barrier()
    memory = (a_s, b_s, stage_s, full, empty, acc_full, acc_empty)
    sizes = (gl.cdiv(M, 2 * ROWS), gl.cdiv(N, COLUMNS), gl.cdiv(K, DEPTH), M, N)
    gl.warp_specialize(
        [
            (_consumer, (operands, memory, sizes, 0, BACKWARD, STAGES)),
            (_consumer, (operands, memory, sizes, 1, BACKWARD, STAGES)),
            (_epilogue, (z, out, bias, partials, memory, sizes, BACKWARD, FORM)),
        ],
        [4, 4],
        [REGISTERS, 504 - 2 * REGISTERS],  # of 168 per thread of three warpgroups
    )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "K"])
def mlp_hopper_fwd_kernel(
    x_tiles,  # of x (M, K): blocks (64, 64)
    weight_tiles,  # of W1 (N, K): blocks (256, 64)
    z,  # (M, N), out
    h,  # (M, N), out
    bias,  # (N,) or None
    M, N, K,
    FORM: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    _run((x_tiles, weight_tiles), z, h, bias, None, M, N, K, False, FORM, STAGES, REGISTERS)


@gluon.jit(do_not_specialize=["M", "K"])
def mlp_hopper_bwd_kernel(
    dy_tiles,  # of dy (M, K): blocks (64, 64)
    weight_tiles,  # of W2 (K, N): blocks (64, 256)
    z,  # (M, N)
    dz,  # (M, N), out
    bias,  # (N,) or None
    partials,  # (2 * tile rows, N) fp32, out: dz's sums over 64 rows; or None
    M, N, K,
    FORM: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    _run(
        (dy_tiles, weight_tiles), z, dz, bias, partials, M, N, K,
        True, FORM, STAGES, REGISTERS,
    )  # fmt: skip


# --- Launchers --------------------------------------------------------------------------------


def _grid(x: Tensor, N: int) -> tuple[int]:
    """Returns the grid for x (M, K) and N columns."""
    tiles = triton.cdiv(x.shape[0], 2 * ROWS.value) * triton.cdiv(N, COLUMNS.value)
    return (min(multiprocessors(x), tiles),)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, config: Config = CONFIG
) -> tuple[Tensor, Tensor]:
    """Launches the forward kernel: x (M, K), weight (N, K) -> z and h (M, N).

    K and N are multiples of 8; x and weight of one 16-bit dtype.
    """
    x, weight = addressable(x), addressable(weight)
    (M, K), N = x.shape, weight.shape[0]
    z, h = (torch.empty((M, N), dtype=x.dtype, device=x.device) for _ in range(2))
    with on_device(x):
        mlp_hopper_fwd_kernel[_grid(x, N)](
            blocks(x, [64, 64]), blocks(weight, [256, 64]), z, h, contiguous(bias), M, N, K,
            FORM=form_of(True, x), **config.kwargs(),
        )  # fmt: skip
    return z, h


def backward(
    dy: Tensor, weight: Tensor, z: Tensor, bias: Tensor | None, config: Config = CONFIG
) -> tuple[Tensor, Tensor | None]:
    """Launches the backward kernel: dy (M, K), weight (K, N), z (M, N) -> dz (M, N), dbias (N,).

    dbias is None without a bias.
    """
    dy, weight, z = addressable(dy), addressable(weight), z.contiguous()
    (M, K), N = dy.shape, weight.shape[1]
    dz, partials = torch.empty_like(z), None
    if bias is not None:
        partials = torch.empty((2 * triton.cdiv(M, 128), N), dtype=torch.float32, device=z.device)
    with on_device(dy):
        mlp_hopper_bwd_kernel[_grid(dy, N)](
            blocks(dy, [64, 64]), blocks(weight, [64, 256]), z, dz, contiguous(bias), partials,
            M, N, K, FORM=form_of(True, z), **config.kwargs(),
        )  # fmt: skip
    return dz, None if bias is None or partials is None else partials.sum(0).to(bias.dtype)
