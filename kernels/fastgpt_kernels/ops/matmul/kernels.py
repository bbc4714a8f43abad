"""The matrix product of linear layers: persistent, GELU fused, dW's tokens shared out.

    out (M, N) = a b^T      a (M, K), b (N, K), either of them given transposed

One kernel for the three products of a layer: y = x W^T, dx = dy W (W as it lies is b transposed)
and dW = dy^T x (both transposed, K the tokens). Operands come through tensor descriptors: on sm_90
and later TMA copies whole boxes into shared memory, where tensor cores read them either way round.

Persistence. As many programs as fit the device walk over the tiles: the start of a program is paid
once and not once a tile, and with K = 768 a tile is only 12 steps long. Tiles are taken in bands of
GROUP_M rows, column by column within a band, so that what the programs in flight read stays in the
L2. The loop over tiles is not fused with the one over K (`tl.range(flatten=True)`): for Hopper
Triton 3.7 compiles the pair to the same code either way.

Shares of K. dW of GPT-2's attn.c_proj is 18 tiles for 132 SMs, K = 1,024 steps long: tiles are cut
along K into segments (`_level`), fewer than a tile and a program each. The first segment of a tile
goes to `out`, the others to `partials`, and a second kernel adds those in a fixed order: the result
is the same in every run. Stream-K (Osama et al., 2023) cuts into as many, but its programs read K
at as many places at once, which HBM has to serve each by itself; here they stand at few. dW and the
bias's gradient are fp32 until they are asked for in another dtype: nothing rounds them on the way.

Epilogues, on tiles still in registers:

    bias     out = a b^T + bias
    FORM     out = gelu(a b^T + bias), and its derivative there is written to `slope`
    factor   out = a b^T * factor: what `slope` is for

What they read is loaded before the loop over K and arrives during it. The derivative is written
and not its argument: it shares gelu's tanh, and the backward pass has nothing to compute.

`column_sums` are the sums of a over K, wanted with dW: they are dy summed over the tokens, the
gradient of the bias. A product with ones adds them up on the tensor cores from the same shared
memory; as it makes a step an eighth longer, the tiles of a row do equal parts of it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt_kernels.bias_gelu import form_of, gelu_and_slope
from fastgpt_kernels.checks import refuse_interpreted_bf16
from fastgpt_kernels.launch import Config, arch_of, lookup, multiprocessors, on_device, options
from fastgpt_kernels.ops.matmul.configs import ALIGNMENT, MATMUL, MATMUL_GELU, MATMUL_REDUCE

ONES = 16  # columns of the product that adds up `column_sums`: the narrowest Triton has
SHORTEST = 16  # steps of K: below that a share costs more to write and add than it saves
COST = 8  # not measured: the steps that a segment's epilogue and its pipeline's start are worth
SUM_ROWS, SUM_WARPS = 8, 8  # of a program of the second kernel: 8 elements a thread, no spills


@triton.jit
def _tile_of(unit, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Number of a tile -> (its row, its column) of tiles."""
    in_band = GROUP_M * tiles_n
    first = unit // in_band * GROUP_M
    height = min(GROUP_M, tiles_m - first)
    rest = unit % in_band
    return first + rest % height, rest // height


@triton.jit
def _level(left, team, steps, COST: tl.constexpr):
    """(width, taken, share): how a team of programs begins on `left` tiles of `steps` steps each.

    Segment i < `taken` is for program i: tile i % width, the (i // width)-th `share` of its steps.
    A team smaller than `left` takes a tile each, whole. Otherwise as many go to each tile as can,
    and they take what would be a fair share if all could; the rest of each tile is for the
    programs without one. If these would be too few to gain by it, nothing is left for them.
    Computes with Python's integers too.
    """
    width = team if team < left else left
    parts = team // width
    taken = parts * width
    whole = (steps + parts - 1) // parts
    fair = (steps * left + team - 1) // team
    others = team - taken
    rounds = left if others == 0 else (left + others - 1) // others
    pays = (team >= left) & (others > 0) & (fair + COST * rounds < whole)
    share = fair if pays else whole
    return width, taken, share


@triton.jit
def _load(operand, row, k, TRANSPOSED: tl.constexpr):
    """[rows, BLOCK_K] of an operand from (row, k) on, zeros past its end."""
    return operand.load([k, row]).T if TRANSPOSED else operand.load([row, k])


@triton.jit
def _add_steps(
    acc, a, b, row, column, first, last,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc and the products of steps [first, last)."""
    for step in range(first, last):
        k = step * BLOCK_K
        a_tile = _load(a, row, k, A_TRANSPOSED)
        b_tile = _load(b, column, k, B_TRANSPOSED)
        acc = tl.dot(a_tile, b_tile.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _finish(
    acc, row, column, out, slope, FORM: tl.constexpr, ACCUMULATE: tl.constexpr,
    SUBTILES: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The epilogue of sums [BLOCK_M, WIDTH] of the output from (row, column) on, part by part."""
    if SUBTILES > 1:
        left, right = acc.reshape(BLOCK_M, 2, WIDTH // 2).permute(0, 2, 1).split()
        _finish(left, row, column, out, slope, FORM, ACCUMULATE, SUBTILES // 2, BLOCK_M, WIDTH // 2)
        column += WIDTH // 2
        _finish(
            right, row, column, out, slope, FORM, ACCUMULATE, SUBTILES // 2, BLOCK_M, WIDTH // 2
        )
    else:
        if FORM is not None:
            acc, derivative = gelu_and_slope(acc, FORM)
            slope.store([row, column], derivative.to(slope.dtype))
        if ACCUMULATE:
            acc += out.load([row, column])
        out.store([row, column], acc.to(out.dtype))


@triton.jit
def _segment(
    a, b, out, bias_ptr, slope, factor_ptr, partials, column_sums_ptr, M, N, K,
    tile, number, first, last, piece, tiles_m, tiles_n,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, FORM: tl.constexpr,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr, ONES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
):  # fmt: skip
    """Steps [first, last) of a tile: segment `number` of all, the tiles' first ones in front."""
    tile_m, tile_n = _tile_of(tile, tiles_m, tiles_n, GROUP_M)
    row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
    if factor_ptr is not None:
        places = rows.to(tl.int64)[:, None] * N + columns[None, :]
        factor = tl.load(factor_ptr + places, mask=(rows < M)[:, None] & (columns < N)[None, :])
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if column_sums_ptr is not None:
        # A piece has the same steps for every tile of the row, and no segment crosses its ends.
        start = first // piece * piece
        steps = min(piece, tl.cdiv(K, BLOCK_K) - start)
        begin = min(max(start + steps * tile_n // tiles_n, first), last)
        end = min(max(start + steps * (tile_n + 1) // tiles_n, first), last)
        acc = _add_steps(
            acc, a, b, row, column, first, begin, A_TRANSPOSED, B_TRANSPOSED, PRECISION, BLOCK_K
        )
        sums = tl.zeros((BLOCK_M, ONES), tl.float32)
        ones = tl.full((BLOCK_K, ONES), 1.0, a.dtype)
        for step in range(begin, end):
            k = step * BLOCK_K
            a_tile = _load(a, row, k, A_TRANSPOSED)
            b_tile = _load(b, column, k, B_TRANSPOSED)
            acc = tl.dot(a_tile, b_tile.T, acc, input_precision=PRECISION)
            sums = tl.dot(a_tile, ones, sums, input_precision=PRECISION)
        total = tl.sum(sums, axis=1) * (1.0 / ONES)  # all columns are the same
        tl.store(column_sums_ptr + number * BLOCK_M + tl.arange(0, BLOCK_M), total)
        first = end
    acc = _add_steps(
        acc, a, b, row, column, first, last, A_TRANSPOSED, B_TRANSPOSED, PRECISION, BLOCK_K
    )
    if bias_ptr is not None:
        acc += bias.to(tl.float32)[None, :]
    if factor_ptr is not None:
        acc *= factor.to(tl.float32)
    if partials is None or number < tiles_m * tiles_n:
        _finish(acc, row, column, out, slope, FORM, ACCUMULATE, SUBTILES, BLOCK_M, BLOCK_N)
    else:
        slot = (number - tiles_m * tiles_n) * BLOCK_M
        _finish(acc, slot, 0, partials, None, None, False, SUBTILES, BLOCK_M, BLOCK_N)


@triton.jit
def matmul_kernel(
    a,  # (M, K), or (K, M) with A_TRANSPOSED: a descriptor, as are b, out, slope and partials
    b,  # (N, K), or (K, N) with B_TRANSPOSED
    out,  # (M, N)
    bias_ptr,  # (N,) or None
    slope,  # (M, N): gelu's derivative, with FORM; else None
    factor_ptr,  # (M, N) or None
    partials,  # (segments beyond one a tile * BLOCK_M, BLOCK_N) fp32, or None if there are none
    column_sums_ptr,  # (segments, BLOCK_M) fp32: a summed over their steps; with SHARES, or None
    M, N, K,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr,
    SHARES: tl.constexpr,  # tiles may be cut along K
    FORM: tl.constexpr,  # of gelu, or None
    ACCUMULATE: tl.constexpr,  # out is added to
    PRECISION: tl.constexpr, ONES: tl.constexpr, COST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,  # parts of the epilogue, which has fewer registers by them
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    steps = tl.cdiv(K, BLOCK_K)
    program, team = tl.program_id(0), tl.num_programs(0)
    if SHARES:
        tile, left, step, number = 0, tiles, 0, 0  # of the level: see `segments`
        _, _, piece = _level(left, team, steps, COST)
        while left > 0:
            width, taken, share = _level(left, team, steps - step, COST)
            if program < taken:
                first = step + program // width * share
                _segment(
                    a, b, out, bias_ptr, slope, factor_ptr, partials, column_sums_ptr, M, N, K,
                    tile + program % width, number + program, first, min(first + share, steps),
                    piece, tiles_m, tiles_n, A_TRANSPOSED, B_TRANSPOSED, FORM, ACCUMULATE,
                    PRECISION, ONES, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SUBTILES,
                )  # fmt: skip
            number += taken
            if team < left:
                tile += width
                left -= width
            else:
                step += taken // width * share
                left = 0 if (program < taken) | (step >= steps) else left
                program -= taken
                team -= taken
    else:
        for tile in range(program, tiles, team):
            _segment(
                a, b, out, bias_ptr, slope, factor_ptr, partials, column_sums_ptr, M, N, K,
                tile, tile, 0, steps, steps, tiles_m, tiles_n,
                A_TRANSPOSED, B_TRANSPOSED, FORM, ACCUMULATE, PRECISION, ONES,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SUBTILES,
            )  # fmt: skip


@triton.jit
def _add_segments(
    total, pointers, pitch, first, tile, tiles, team, steps, COST: tl.constexpr
):  # fmt: skip
    """total and what lies at `pointers`, `pitch` apart, for each segment of a tile from `first` on.

    The levels are those that the programs of `matmul_kernel` went through.
    """
    left, step, number = tiles, 0, 0
    while left > 0:
        width, taken, share = _level(left, team, steps - step, COST)
        if tile < width:
            for segment in range(number + tile, number + taken, width):
                if segment >= first:
                    total += tl.load(pointers + (segment - first) * pitch)
        number += taken
        if team < left:
            left = 0 if tile < width else left - width
            tile -= width
        else:
            step += taken // width * share
            team -= taken
            left = 0 if (team == 0) | (step >= steps) else left
    return total


@triton.jit(do_not_specialize=["team"])  # a team of one would become a constant
def matmul_sum_kernel(
    out_ptr,  # (M, N) fp32: the partials are added to it
    partials_ptr,  # as in `matmul_kernel`, or None
    column_sums_ptr,  # as in `matmul_kernel`, or None
    sums_ptr,  # (M,) fp32: the column sums of all segments; or None
    M, N, K, team,
    ROWS: tl.constexpr, COST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """What the programs of a `team` left: ROWS rows of a tile, or BLOCK_M column sums, each."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles, steps = tiles_m * tiles_n, tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0)
    if column_sums_ptr is not None and program < tiles_m:
        first_row = program // GROUP_M * GROUP_M
        height = min(GROUP_M, tiles_m - first_row)
        sums = tl.zeros((BLOCK_M,), tl.float32)
        sources = column_sums_ptr + tl.arange(0, BLOCK_M)
        for tile_n in range(tiles_n):  # the inverse of `_tile_of`
            in_row = first_row * tiles_n + tile_n * height + program - first_row
            sums = _add_segments(sums, sources, BLOCK_M, 0, in_row, tiles, team, steps, COST)
        features = program * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(sums_ptr + features, sums, mask=features < M)
    elif partials_ptr is not None:
        if column_sums_ptr is not None:
            program -= tiles_m
        tile, chunk = program // (BLOCK_M // ROWS), program % (BLOCK_M // ROWS)
        tile_m, tile_n = _tile_of(tile, tiles_m, tiles_n, GROUP_M)
        inner_rows, inner_columns = chunk * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_N)
        rows, columns = tile_m * BLOCK_M + inner_rows, tile_n * BLOCK_N + inner_columns
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        places = out_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
        pointers = partials_ptr + inner_rows[:, None] * BLOCK_N + inner_columns[None, :]
        total = tl.load(places, mask=mask, other=0.0)
        total = _add_segments(
            total, pointers, BLOCK_M * BLOCK_N, tiles, tile, tiles, team, steps, COST
        )
        tl.store(places, total, mask=mask)


def aligned(x: Tensor) -> bool:
    """Whether rows of x (rows, columns) can be read by TMA as they lie."""
    pitch = x.stride(0) * x.element_size()
    return x.stride(1) == 1 and pitch % ALIGNMENT == 0 and x.data_ptr() % ALIGNMENT == 0


class Segment(NamedTuple):
    program: int
    tile: int
    first: int  # step
    last: int  # the step behind the last


@functools.cache
def segments(tiles: int, steps: int, team: int, cost: int) -> list[Segment]:
    """What a team of programs does, in the order of the segments' numbers.

    The first `tiles` of them begin a tile each, the others continue one.
    """
    found: list[Segment] = []
    program, tile, left, step = 0, 0, tiles, 0
    while left > 0:
        width, taken, share = _level.fn(left, team, steps - step, cost)
        for i in range(taken):
            first = min(step + i // width * share, steps)
            last = min(first + share, steps)
            found.append(Segment(program + i, tile + i % width, first, last))
        if team < left:
            tile, left = tile + width, left - width
        else:
            program, team, step = program + taken, team - taken, step + taken // width * share
            left = 0 if team == 0 or step >= steps else left
    return found


def launch_matmul(
    a: Tensor, b: Tensor, *,
    a_transposed: bool = False, b_transposed: bool = False, dtype: torch.dtype | None = None,
    bias: Tensor | None = None, slope: Tensor | None = None, tanh: bool = True,
    factor: Tensor | None = None, column_sums: bool = False,
    out: Tensor | None = None, accumulate: bool = False,
    config: Config | None = None, programs: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(out, sums): out (M, N) in `dtype` (that of a), with `column_sums` a summed over K (M,) fp32.

    a is (M, K), transposed (K, M); b (N, K), transposed (K, N). With `slope` (M, N) out is gelu of
    the product and the bias, by tanh or erf, and its derivative fills `slope`. factor (M, N): the
    product is multiplied by it. `out`, contiguous fp32, is written, or added to with `accumulate`,
    in place of a new tensor; ValueError if it is anything else. `programs`: how many there are.
    """
    refuse_interpreted_bf16("matmul", a, b)
    M, K = a.shape[::-1] if a_transposed else a.shape
    N = b.shape[1] if b_transposed else b.shape[0]
    if out is not None and not (
        out.shape == (M, N) and out.dtype == torch.float32 and out.is_contiguous() and aligned(out)
    ):
        raise ValueError(
            f"matmul: out must be a contiguous, aligned float32 tensor of shape {(M, N)}, got "
            f"{out.dtype} of shape {tuple(out.shape)} and strides {out.stride()}"
        )
    shares = a_transposed  # dW: few tiles, a long K
    form = None if slope is None else form_of(tanh, a)
    table = MATMUL_GELU if form in ("tanh", "erf") else MATMUL
    config = config or lookup(MATMUL_REDUCE if shares else table, arch_of(a), N)
    blocks = dict(config.blocks)
    m, n, k = blocks["BLOCK_M"], blocks["BLOCK_N"], blocks["BLOCK_K"]
    tiles_m, steps = triton.cdiv(M, m), triton.cdiv(K, k)
    tiles = tiles_m * triton.cdiv(N, n)
    team = programs or min(
        multiprocessors(a) * blocks["PROGRAMS_PER_SM"],
        tiles * (max(1, steps // SHORTEST) if shares else 1),
    )
    n_segments = len(segments(tiles, steps, team, COST)) if shares else tiles
    fp32 = functools.partial(torch.empty, dtype=torch.float32, device=a.device)
    partials = fp32((n_segments - tiles) * m, n) if n_segments > tiles else None
    wanted = torch.float32 if out is not None else dtype or a.dtype
    if out is None:
        summed = torch.float32 if partials is not None else wanted
        out = torch.empty(M, N, dtype=summed, device=a.device)
    segment_sums, sums = (fp32(n_segments, m), fp32(M)) if column_sums else (None, None)

    a, b = (t if aligned(t) else t.contiguous() for t in (a, b))
    describe = TensorDescriptor.from_tensor
    box = [m, n // blocks["SUBTILES"]]
    tile_sizes = {name: blocks[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M")}
    with on_device(a):
        matmul_kernel[(team,)](
            describe(a, [k, m] if a_transposed else [m, k]),
            describe(b, [k, n] if b_transposed else [n, k]),
            describe(out, box), None if bias is None else bias.contiguous(),
            None if slope is None else describe(slope, box),
            None if factor is None else factor.contiguous(),
            None if partials is None else describe(partials, box), segment_sums, M, N, K,
            A_TRANSPOSED=a_transposed, B_TRANSPOSED=b_transposed, SHARES=shares,
            FORM=form, ACCUMULATE=accumulate,
            PRECISION="ieee" if a.dtype == torch.float32 else "tf32", ONES=ONES, COST=COST,
            **tile_sizes, SUBTILES=blocks["SUBTILES"],
            **config.options,
        )  # fmt: skip
        if partials is not None or sums is not None:
            chunks = 0 if partials is None else tiles * (m // SUM_ROWS)
            matmul_sum_kernel[(chunks + (0 if sums is None else tiles_m),)](
                out, partials, segment_sums, sums, M, N, K, team, ROWS=SUM_ROWS, COST=COST,
                **tile_sizes, **options(SUM_WARPS),
            )  # fmt: skip
    return out.to(wanted), sums
