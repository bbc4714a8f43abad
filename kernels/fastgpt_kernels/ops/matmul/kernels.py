"""The matrix product of linear layers: persistent, split along K if tiles are few, GELU fused.

    out (M, N) = a b^T      a (M, K), b (N, K), either of them given transposed

One kernel for the three products of a layer: y = x W^T, dx = dy W (W as it lies is b transposed)
and dW = dy^T x (both transposed, K the tokens). Operands come through tensor descriptors: on sm_90
and later TMA copies whole boxes into shared memory, where tensor cores read them either way round.

Persistence. As many programs as fit the device walk over the units of work: the start of a program
is paid once and not once a tile, and with K = 768 a tile is only 12 steps long. Tiles are taken in
bands of GROUP_M rows, column by column within a band, so that what the programs in flight read
stays in the L2. The loop over units is not fused with the one over K (`tl.range(flatten=True)`):
for Hopper Triton 3.7 compiles the pair to the same code either way. With two programs an SM the
epilogue of one runs during the products of the other.

Split K. dW of GPT-2's attn.c_proj is 36 tiles for 132 SMs, K = 65,536 steps long. A unit is then a
tile's share of K; shares are written in fp32 and added in a fixed order, so that the result is the
same in every run. dW and the bias's gradient are written in the dtype asked for, fp32 for fp32
masters: nothing rounds them to 16 bits on the way.

Epilogues, on tiles still in registers:

    BIAS     out = a b^T + bias
    GELU     z = a b^T + bias, rounded, is written; and out = gelu(z)
    SLOPE    out = a b^T * gelu'(z), and the sum over its rows: dz and the bias's gradient

`column_sums` are the sums of a over K, wanted with dW: they are dy summed over the tokens, the
gradient of the bias. A product with ones adds them up on the tensor cores beside the first column
of tiles, from the same shared memory.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt_kernels.configs import Config, lookup
from fastgpt_kernels.host import arch_of, multiprocessors, on_device, refuse_interpreted_bf16
from fastgpt_kernels.ops.gelu.kernels import gate_and_slope
from fastgpt_kernels.ops.matmul.configs import ALIGNMENT, MATMUL, MATMUL_REDUCE

ONES = 16  # columns of the product that adds up `column_sums`: the narrowest Triton has


@triton.jit
def _tile_of(unit, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Number of a tile -> (its row, its column) of tiles."""
    in_band = GROUP_M * tiles_n
    first = unit // in_band * GROUP_M
    height = min(GROUP_M, tiles_m - first)
    rest = unit % in_band
    return first + rest % height, rest // height


@triton.jit
def _load(operand, row, k, TRANSPOSED: tl.constexpr):
    """[rows, BLOCK_K] of an operand from (row, k) on, zeros past its end."""
    return operand.load([k, row]).T if TRANSPOSED else operand.load([row, k])


@triton.jit
def _finish(
    acc, row, column, out_row, tile_m, out, bias_ptr, z, partials_ptr, M, N,
    GELU: tl.constexpr, SLOPE: tl.constexpr, TANH: tl.constexpr,
    BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The epilogue of [BLOCK_M, WIDTH] sums of the output from (row, column) on."""
    columns = column + tl.arange(0, WIDTH)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        rounded = acc.to(z.dtype)
        z.store([row, column], rounded)
        acc = rounded.to(tl.float32)
        gate, _ = gate_and_slope(acc, TANH)
        acc = acc * gate
    if SLOPE:
        _, slope = gate_and_slope(z.load([row, column]).to(tl.float32), TANH)
        acc = acc * slope
        if partials_ptr is not None:  # rows past M are zeros
            sums = tl.sum(acc, axis=0)
            tl.store(partials_ptr + tile_m.to(tl.int64) * N + columns, sums, mask=columns < N)
    out.store([out_row, column], acc.to(out.dtype))


@triton.jit
def matmul_kernel(
    a,  # (M, K), or (K, M) with A_TRANSPOSED: a descriptor, as are b, out and z
    b,  # (N, K), or (K, N) with B_TRANSPOSED
    out,  # (M, N), or (splits * rows padded to whole tiles, N) fp32 with SPLIT
    bias_ptr,  # (N,) or None
    z,  # (M, N): written with GELU, read with SLOPE, else None
    partials_ptr,  # (tiles of M, N) fp32: SLOPE's sums over the rows; or None
    column_sums_ptr,  # (splits, M) fp32: a summed over K; or None
    M, N, K, splits,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, SPLIT: tl.constexpr, GELU: tl.constexpr,
    SLOPE: tl.constexpr, TANH: tl.constexpr, PRECISION: tl.constexpr, ONES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,  # 2: the epilogue goes half by half, with half the registers
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    steps = tl.cdiv(K, BLOCK_K)
    share = tl.cdiv(steps, splits)
    units = tiles * splits
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        tile_m, tile_n = _tile_of(unit % tiles, tiles_m, tiles_n, GROUP_M)
        split = unit // tiles
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        first = split * share
        last = min(first + share, steps)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if column_sums_ptr is not None and tile_n == 0:
            sums = tl.zeros((BLOCK_M, ONES), tl.float32)
            ones = tl.full((BLOCK_K, ONES), 1.0, a.dtype)
            for step in range(first, last):
                k = step * BLOCK_K
                a_tile = _load(a, row, k, A_TRANSPOSED)
                b_tile = _load(b, column, k, B_TRANSPOSED)
                acc = tl.dot(a_tile, b_tile.T, acc, input_precision=PRECISION)
                sums = tl.dot(a_tile, ones, sums, input_precision=PRECISION)
            rows = row + tl.arange(0, BLOCK_M)
            total = tl.sum(sums, axis=1) * (1.0 / ONES)  # all columns are the same
            tl.store(column_sums_ptr + split * M + rows, total, mask=rows < M)
        else:
            for step in range(first, last):
                k = step * BLOCK_K
                a_tile = _load(a, row, k, A_TRANSPOSED)
                b_tile = _load(b, column, k, B_TRANSPOSED)
                acc = tl.dot(a_tile, b_tile.T, acc, input_precision=PRECISION)
        out_row = split * (tiles_m * BLOCK_M) + row if SPLIT else row
        if SUBTILES == 2:
            halves = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1)
            left, right = halves.split()
            _finish(
                left, row, column, out_row, tile_m, out, bias_ptr, z, partials_ptr, M, N,
                GELU, SLOPE, TANH, BLOCK_M, BLOCK_N // 2,
            )  # fmt: skip
            _finish(
                right, row, column + BLOCK_N // 2, out_row, tile_m, out, bias_ptr, z, partials_ptr,
                M, N, GELU, SLOPE, TANH, BLOCK_M, BLOCK_N // 2,
            )  # fmt: skip
        else:
            _finish(
                acc, row, column, out_row, tile_m, out, bias_ptr, z, partials_ptr, M, N,
                GELU, SLOPE, TANH, BLOCK_M, BLOCK_N,
            )  # fmt: skip


def aligned(x: Tensor) -> bool:
    """Whether rows of x (rows, columns) can be read by TMA as they lie."""
    pitch = x.stride(0) * x.element_size()
    return x.stride(1) == 1 and pitch % ALIGNMENT == 0 and x.data_ptr() % ALIGNMENT == 0


def n_splits(M: int, N: int, K: int, config: Config, x: Tensor) -> int:
    """Shares of K so that units fill the device evenly, none below 16 steps and at most 16."""
    tiles = triton.cdiv(M, config.blocks["BLOCK_M"]) * triton.cdiv(N, config.blocks["BLOCK_N"])
    steps = triton.cdiv(K, config.blocks["BLOCK_K"])
    programs = multiprocessors(x) * config.blocks["PROGRAMS_PER_SM"]
    if tiles >= 2 * programs:
        return 1  # the last, partial wave costs less than writing and adding shares

    def busy(splits: int) -> float:
        waves = triton.cdiv(tiles * splits, programs)
        return tiles * splits / (waves * programs)

    most = max(1, min(16, steps // 16))
    best = max(busy(s) for s in range(1, most + 1))
    return next(s for s in range(1, most + 1) if busy(s) >= 0.97 * best)


def launch_matmul(
    a: Tensor, b: Tensor, *,
    a_transposed: bool = False, b_transposed: bool = False, dtype: torch.dtype | None = None,
    bias: Tensor | None = None, z: Tensor | None = None, gelu: bool = False, slope: bool = False,
    tanh: bool = True, row_sums: bool = False, column_sums: bool = False,
    config: Config | None = None, splits: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(out, sums): out (M, N) in `dtype` (that of a), and whichever sums were asked for, in fp32.

    a is (M, K), transposed (K, M); b (N, K), transposed (K, N). z (M, N) is filled with `gelu` and
    read with `slope`. sums: with `row_sums` (N,), of out over its rows (`slope` only); with
    `column_sums` (M,), of a over K.
    """
    refuse_interpreted_bf16("matmul", a, b)
    M, K = a.shape[::-1] if a_transposed else a.shape
    N = b.shape[1] if b_transposed else b.shape[0]
    dtype = dtype or a.dtype
    reduces = a_transposed  # dW: few tiles, a long K
    config = config or lookup(MATMUL_REDUCE if reduces else MATMUL, arch_of(a), N)
    blocks = dict(config.blocks)
    m, n, k = blocks["BLOCK_M"], blocks["BLOCK_N"], blocks["BLOCK_K"]
    splits = splits or (n_splits(M, N, K, config, a) if reduces else 1)
    tiles_m = triton.cdiv(M, m)
    fp32 = partial(torch.empty, dtype=torch.float32, device=a.device)
    if splits > 1:
        target = fp32(splits * tiles_m * m, N)
    else:
        target = torch.empty(M, N, dtype=dtype, device=a.device)
    partials = fp32(tiles_m, N) if row_sums else None
    sums = fp32(splits, M) if column_sums else None

    a, b = (t if aligned(t) else t.contiguous() for t in (a, b))
    box = [m, n // blocks["SUBTILES"]]
    units = tiles_m * triton.cdiv(N, n) * splits
    programs = min(units, multiprocessors(a) * blocks.pop("PROGRAMS_PER_SM"))
    with on_device(a):
        matmul_kernel[(programs,)](
            TensorDescriptor.from_tensor(a, [k, m] if a_transposed else [m, k]),
            TensorDescriptor.from_tensor(b, [k, n] if b_transposed else [n, k]),
            TensorDescriptor.from_tensor(target, box), None if bias is None else bias.contiguous(),
            None if z is None else TensorDescriptor.from_tensor(z, box),
            partials, sums, M, N, K, splits,
            A_TRANSPOSED=a_transposed, B_TRANSPOSED=b_transposed, SPLIT=splits > 1, GELU=gelu,
            SLOPE=slope, TANH=tanh, PRECISION="ieee" if a.dtype == torch.float32 else "tf32",
            ONES=ONES, **blocks, **config.options,
        )  # fmt: skip
    if splits > 1:
        target = target.view(splits, -1, N)[:, :M].sum(0).to(dtype)
    if partials is not None:
        return target, partials.sum(0)
    return target, None if sums is None else sums.sum(0)
