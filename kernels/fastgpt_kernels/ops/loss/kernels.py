"""The cross-entropy kernels and their launchers; the formula and the op are in cross_entropy.py.

A program owns one row. It keeps the row in registers, in the dtype of memory, between the softmax
statistics and the gradient: 8 warps hold 50,304 values. A row that does not fit is walked
twice, backwards the second time, so that what was read last is found in the L1 and L2 caches.

The padding of the vocabulary costs only the last tiles their masks, and the target only one store
more: every other column is loaded, and its probability stored, 128 bits at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels.launch import Config, arch_of, lookup, on_device, options
from fastgpt_kernels.ops.loss.configs import CROSS_ENTROPY, WIDEST_UNALIGNED

# The rescaling kernel: so few programs that a launch which finds nothing to do takes microseconds.
SCALE_PROGRAMS, SCALE_BLOCK, SCALE_WARPS = 2048, 2048, 8


@triton.jit
def _load_tiles(
    row_ptr, first, lanes, n_cols, vocab_size,
    FULL: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """TILES tiles [BLOCK] from column `first` on, not converted; -inf past the vocabulary.

    FULL of them lie inside it. The others are masked by n_cols, which unlike the vocabulary's size
    is a multiple of 16: 128 bits a load need that.
    """
    tiles = ()
    for i in tl.static_range(TILES):
        cols = first + i * BLOCK + lanes
        if i < FULL:
            x = tl.load(row_ptr + cols)
        else:
            x = tl.load(row_ptr + cols, mask=cols < n_cols, other=-float("inf"))
            x = tl.where(cols < vocab_size, x, -float("inf"))
        tiles = tiles + (x,)  # type: ignore[assignment]
    return tiles


@triton.jit
def _shift(peak):
    """What exponents, z log2(e), are lowered by: the peak's, rounded down to a whole number.

    So exp2(z log2(e) - shift) takes one multiply-add, which rounds once, and a change of the shift
    is an exact power of two. (Lowered by the product itself, a term would depend on whether the
    compiler contracts that product into a difference: with logits of 1e4 by 1e-3.)
    """
    return tl.floor(peak * 1.4426950408889634)


@triton.jit
def _exponential(z, shift):
    """exp2(z log2(e) - shift) of logits in the dtype of memory, in fp32."""
    return tl.exp2(tl.fma(z.to(tl.float32), 1.4426950408889634, -shift))


@triton.jit
def _accumulate(tiles, peak, total, FRESH: tl.constexpr, TILES: tl.constexpr):
    """Running maximum and sum of exponentials, lane by lane: no exchange between lanes yet.

    GROUP tiles at a time, so that the first are worked on while the last are on their way; each
    group costs a lane one exponential more. FRESH: the total is 0 yet.
    """
    GROUP: tl.constexpr = 10
    for first in tl.static_range(0, TILES, GROUP):
        new_peak = peak
        for i in tl.static_range(GROUP):
            if first + i < TILES:
                new_peak = tl.maximum(new_peak, tiles[first + i].to(tl.float32))
        shift = _shift(new_peak)
        if first > 0 or not FRESH:
            total *= tl.exp2(_shift(peak) - shift)
        for i in tl.static_range(GROUP):
            if first + i < TILES:
                total += _exponential(tiles[first + i], shift)
        peak = new_peak
    return peak, total


@triton.jit
def _store_gradient(
    row_ptr, tiles, first, lanes, n_cols, shift, factor,
    FULL: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The exponentials times `factor`, over the row's columns from `first` on."""
    for i in tl.static_range(TILES):
        cols = first + i * BLOCK + lanes
        p = (_exponential(tiles[i], shift) * factor).to(row_ptr.dtype.element_ty)
        if i < FULL:
            tl.store(row_ptr + cols, p)
        else:
            tl.store(row_ptr + cols, p, mask=cols < n_cols)


@triton.jit
def _store_zeros(row_ptr, first, lanes, n_cols, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """0 over TILES tiles from column `first` on."""
    zeros = tl.zeros([BLOCK], row_ptr.dtype.element_ty)
    for i in range(TILES):
        cols = first + i * BLOCK + lanes
        tl.store(row_ptr + cols, zeros, mask=cols < n_cols)


@triton.jit
def cross_entropy_kernel(
    logits_ptr,  # (M, V), rows `stride` apart
    targets_ptr,  # (M,) int64
    losses_ptr,  # (M,) fp32, or None
    gradient_ptr,  # (M, V), rows `gradient_stride` apart, may be logits_ptr; or None
    scale_ptr,  # fp32 per row, `scale_stride` apart; with COUNT one int64, the divisor; or None
    n_cols, vocab_size, stride, gradient_stride, scale_stride, ignore_index,  # n_cols: V
    BLOCK: tl.constexpr, TILES: tl.constexpr,  # columns of a tile, tiles in registers at a time
    STEPS: tl.constexpr,  # times TILES to cover the vocabulary; 1: the row stays in registers
    FULL: tl.constexpr,  # tiles of the last step that lie inside the vocabulary
    PADDING: tl.constexpr,  # tiles behind the last step
    COUNT: tl.constexpr,
):  # fmt: skip
    LN2: tl.constexpr = 0.6931471805599453
    STEP: tl.constexpr = BLOCK * TILES
    LAST: tl.constexpr = (STEPS - 1) * STEP  # the first column of the last step
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    lanes = tl.arange(0, BLOCK)
    # On their way while the target is: waiting for one and then the others would take twice as
    # long. The last step, which alone is ragged, stays in registers until its gradient is stored.
    last = _load_tiles(row_ptr, LAST, lanes, n_cols, vocab_size, FULL, BLOCK, TILES)
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        if losses_ptr is not None:
            tl.store(losses_ptr + row, 0.0)
        if gradient_ptr is not None:
            out_row_ptr = gradient_ptr + row * gradient_stride
            _store_zeros(out_row_ptr, 0, lanes, n_cols, BLOCK, STEPS * TILES + PADDING)
    else:
        # Read before anything is written here, and kept apart from the maximum: with logits of
        # 1e4 a log-sum-exp rounded to fp32 would be off by 1e-3.
        in_range = (target >= 0) & (target < vocab_size)
        at_target = tl.load(row_ptr + target, mask=in_range, other=float("nan")).to(tl.float32)
        # Finite, so that lanes that hold only -inf add exp2(-inf) = 0 rather than NaN.
        lane_peak = tl.full([BLOCK], -2.3e38, tl.float32)
        lane_total = tl.zeros([BLOCK], tl.float32)
        tiles = last
        for step in range(STEPS - 1):
            following = _load_tiles(
                row_ptr, step * STEP, lanes, n_cols, vocab_size, TILES, BLOCK, TILES
            )
            lane_peak, lane_total = _accumulate(tiles, lane_peak, lane_total, False, TILES)
            tiles = following
        lane_peak, lane_total = _accumulate(tiles, lane_peak, lane_total, STEPS == 1, TILES)
        peak = tl.max(lane_peak, 0)
        shift = _shift(peak)
        total = tl.sum(lane_total * tl.exp2(_shift(lane_peak) - shift), 0)
        if losses_ptr is not None:
            at_peak = _exponential(peak, shift)
            log_total = tl.log2(1.0 + (total - at_peak) / at_peak) * LN2
            tl.store(losses_ptr + row, log_total - (at_target - peak))
        if gradient_ptr is not None:
            out_row_ptr = gradient_ptr + row * gradient_stride
            scale = 1.0
            if COUNT:
                scale = 1.0 / tl.load(scale_ptr).to(tl.float32)
            elif scale_ptr is not None:
                scale = tl.load(scale_ptr + row * scale_stride)
            scale = tl.where(in_range, scale, float("nan"))
            factor = scale / total
            _store_zeros(out_row_ptr, STEPS * STEP, lanes, n_cols, BLOCK, PADDING)
            _store_gradient(
                out_row_ptr, last, LAST, lanes, n_cols, shift, factor, FULL, BLOCK, TILES
            )
            for i in range(STEPS - 1):
                first = LAST - (i + 1) * STEP
                tiles = _load_tiles(row_ptr, first, lanes, n_cols, vocab_size, TILES, BLOCK, TILES)
                _store_gradient(
                    out_row_ptr, tiles, first, lanes, n_cols, shift, factor, TILES, BLOCK, TILES
                )
            # One probability less 1, once whoever stored it has done so.
            gradient = (_exponential(at_target, shift) - total) * factor
            tl.debug_barrier()
            gradient = gradient.to(gradient_ptr.dtype.element_ty)
            tl.store(out_row_ptr + target, gradient, mask=in_range)


@triton.jit
def cross_entropy_scale_kernel(
    x_ptr, out_ptr,  # rows `stride` apart; may be the same
    scale_ptr,  # one fp32
    n_cols, stride, BLOCK: tl.constexpr, STEPS: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    scale = tl.load(scale_ptr)
    if (not IN_PLACE) or scale != 1.0:  # known to the GPU only: 1 in a plain `loss.backward()`
        offset = tl.program_id(0).to(tl.int64) * stride
        first = tl.program_id(1).to(tl.int64) * (BLOCK * STEPS)
        for step in range(STEPS):
            cols = first + step * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offset + cols, mask=cols < n_cols).to(tl.float32)
            y = (x * scale).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + offset + cols, y, mask=cols < n_cols)


# What may be one tensor, for who counts bytes (`tools/launches.py`).
cross_entropy_kernel.in_place = "logits_ptr", "gradient_ptr"
cross_entropy_scale_kernel.in_place = "x_ptr", "out_ptr"


def launch_cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, vocab_size: int,
    losses: Tensor | None = None, gradient: Tensor | None = None, scale: Tensor | None = None,
    config: Config | None = None,
) -> None:  # fmt: skip
    """Fill `losses` (M,) fp32 and `gradient` (M, V), either of which may be None.

    `gradient` may be `logits` itself. `scale` multiplies it: fp32 (M,), any stride; or it divides
    it: one int64, the number of rows that count; None is 1. Rows must be contiguous.
    """
    n_rows, n_cols = logits.shape
    if n_rows == 0:
        return
    size = logits.element_size()
    key = n_cols * size // 2  # the table counts in 2-byte elements
    if key > WIDEST_UNALIGNED and (logits.data_ptr() | logits.stride(0) * size) % 16:
        key = 1 << 31
    config = config or lookup(CROSS_ENTROPY, arch_of(logits), key)
    count = scale is not None and scale.dtype == torch.int64
    with on_device(logits):
        cross_entropy_kernel[(n_rows,)](
            logits, targets, losses, gradient, scale, n_cols, vocab_size, logits.stride(0),
            0 if gradient is None else gradient.stride(0),
            0 if scale is None or count else scale.stride(0), ignore_index,
            **tiling(config, n_cols, vocab_size, size), COUNT=count,
            **config.options,
        )  # fmt: skip


def launch_scale(x: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """out = x * scale, one fp32 number; nothing is read if `out` is `x` and the number is 1.

    `torch.mul` would first round a 0-dim factor to the dtype of x. x and out (M, N) have the same
    strides.
    """
    n_rows, n_cols, stride = *x.shape, x.stride(0)
    if x.numel() == 0:
        return out
    if x.is_contiguous():
        n_rows, n_cols, stride = 1, x.numel(), 0
    steps = triton.next_power_of_2(triton.cdiv(x.numel(), SCALE_BLOCK * SCALE_PROGRAMS))
    with on_device(x):
        cross_entropy_scale_kernel[(n_rows, triton.cdiv(n_cols, SCALE_BLOCK * steps))](
            x, out, scale, n_cols, stride,
            BLOCK=SCALE_BLOCK, STEPS=steps, IN_PLACE=out is x, **options(SCALE_WARPS),
        )  # fmt: skip
    return out


def tiling(config: Config, n_cols: int, vocab_size: int, element_size: int) -> dict[str, int]:
    """How the kernel covers a row; BLOCK is in 2-byte elements in the config."""
    block = config.blocks["BLOCK"] * 2 // element_size
    tiles = min(config.blocks["TILES"], triton.cdiv(vocab_size, block))
    steps = triton.cdiv(vocab_size, block * tiles)
    full = vocab_size // block - (steps - 1) * tiles
    padding = max(triton.cdiv(n_cols, block) - steps * tiles, 0)
    return {"BLOCK": block, "TILES": tiles, "STEPS": steps, "FULL": full, "PADDING": padding}
