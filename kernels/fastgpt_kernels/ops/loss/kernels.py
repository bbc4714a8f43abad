"""The cross-entropy kernels and their launchers; the formula and the op are in cross_entropy.py.

A program owns one row. It keeps the row in registers, in the dtype of memory, between the softmax
statistics and the gradient: 8 warps hold 50,304 values. A row that does not fit is walked
twice, backwards the second time, so that what was read last is found in the L1 and L2 caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels.configs import Config, lookup, options
from fastgpt_kernels.host import arch_of, on_device
from fastgpt_kernels.ops.loss.configs import CROSS_ENTROPY

# The rescaling kernel: so few programs that a launch which finds nothing to do takes microseconds.
SCALE_PROGRAMS, SCALE_BLOCK, SCALE_WARPS = 2048, 2048, 8


@triton.jit
def _load_tiles(row_ptr, step, lanes, vocab_size, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """TILES neighbouring tiles [BLOCK] of a row, not converted; -inf past the vocabulary."""
    tiles = ()
    for i in tl.static_range(TILES):
        cols = (step * TILES + i) * BLOCK + lanes
        x = tl.load(row_ptr + cols, mask=cols < vocab_size, other=-float("inf"))
        tiles = tiles + (x,)  # type: ignore[assignment]
    return tiles


@triton.jit
def _accumulate(tiles, peak, total, TILES: tl.constexpr):
    """Running maximum and sum of exponentials, lane by lane: no exchange between lanes yet.

    GROUP tiles at a time, so that the first are worked on while the last are on their way; each
    group costs a lane one exponential more.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    GROUP: tl.constexpr = 5
    for first in tl.static_range(0, TILES, GROUP):
        new_peak = peak
        for i in tl.static_range(GROUP):
            if first + i < TILES:
                new_peak = tl.maximum(new_peak, tiles[first + i].to(tl.float32))
        total *= tl.exp2((peak - new_peak) * LOG2E)
        for i in tl.static_range(GROUP):
            if first + i < TILES:
                total += tl.exp2((tiles[first + i].to(tl.float32) - new_peak) * LOG2E)
        peak = new_peak
    return peak, total


@triton.jit
def cross_entropy_kernel(
    logits_ptr,  # (M, V), rows `stride` apart
    targets_ptr,  # (M,) int64
    losses_ptr,  # (M,) fp32, or None
    gradient_ptr,  # (M, V), rows `gradient_stride` apart, may be logits_ptr; or None
    scale_ptr,  # fp32 per row, `scale_stride` apart; with COUNT one int64, the divisor; or None
    n_cols, vocab_size, stride, gradient_stride, scale_stride, ignore_index,  # n_cols: V
    BLOCK: tl.constexpr, TILES: tl.constexpr,  # columns of a tile, tiles in registers at a time
    STEPS: tl.constexpr,  # times TILES to cover a row; 1: the row stays in registers
    COUNT: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    lanes = tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        if losses_ptr is not None:
            tl.store(losses_ptr + row, 0.0)
        if gradient_ptr is not None:
            out_row_ptr = gradient_ptr + row * gradient_stride
            zeros = tl.zeros([BLOCK], gradient_ptr.dtype.element_ty)
            for i in range(STEPS * TILES):
                cols = i * BLOCK + lanes
                tl.store(out_row_ptr + cols, zeros, mask=cols < n_cols)
    else:
        # Read before anything is written here, and kept apart from the maximum: with logits of
        # 1e4 a log-sum-exp rounded to fp32 would be off by 1e-3.
        in_range = (target >= 0) & (target < vocab_size)
        at_target = tl.load(row_ptr + target, mask=in_range, other=float("nan")).to(tl.float32)
        # Finite, so that lanes that hold only -inf add exp2(-inf) = 0 rather than NaN.
        lane_peak = tl.full([BLOCK], -2.3e38, tl.float32)
        lane_total = tl.zeros([BLOCK], tl.float32)
        if STEPS == 1:
            tiles = _load_tiles(row_ptr, 0, lanes, vocab_size, BLOCK, TILES)
            lane_peak, lane_total = _accumulate(tiles, lane_peak, lane_total, TILES)
        else:
            for step in range(STEPS):
                group = _load_tiles(row_ptr, step, lanes, vocab_size, BLOCK, TILES)
                lane_peak, lane_total = _accumulate(group, lane_peak, lane_total, TILES)
        peak = tl.max(lane_peak, 0)
        total = tl.sum(lane_total * tl.exp2((lane_peak - peak) * LOG2E), 0)
        if losses_ptr is not None:
            tl.store(losses_ptr + row, tl.log2(total) * LN2 - (at_target - peak))
        if gradient_ptr is not None:
            out_row_ptr = gradient_ptr + row * gradient_stride
            scale = 1.0
            if COUNT:
                scale = 1.0 / tl.load(scale_ptr).to(tl.float32)
            elif scale_ptr is not None:
                scale = tl.load(scale_ptr + row * scale_stride)
            scale = tl.where(in_range, scale, float("nan"))
            p_scale = scale / total
            for i in range(STEPS):
                step = STEPS - 1 - i
                if STEPS == 1:
                    group = tiles
                else:
                    group = _load_tiles(row_ptr, step, lanes, vocab_size, BLOCK, TILES)
                for j in tl.static_range(TILES):
                    cols = (step * TILES + j) * BLOCK + lanes
                    z = group[j].to(tl.float32)
                    p = tl.exp2((z - peak) * LOG2E) * p_scale  # times scale
                    gradient = tl.where(cols == target, p - scale, p)
                    gradient = gradient.to(gradient_ptr.dtype.element_ty)
                    tl.store(out_row_ptr + cols, gradient, mask=cols < n_cols)


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
    key = n_cols * logits.element_size() // 2  # the table counts in 2-byte elements
    config = config or lookup(CROSS_ENTROPY, arch_of(logits), key)
    block, tiles = tiling(config, n_cols, logits.element_size())
    count = scale is not None and scale.dtype == torch.int64
    with on_device(logits):
        cross_entropy_kernel[(n_rows,)](
            logits, targets, losses, gradient, scale, n_cols, vocab_size, logits.stride(0),
            0 if gradient is None else gradient.stride(0),
            0 if scale is None or count else scale.stride(0), ignore_index,
            BLOCK=block, TILES=tiles, STEPS=triton.cdiv(n_cols, block * tiles), COUNT=count,
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


def tiling(config: Config, n_cols: int, element_size: int) -> tuple[int, int]:
    """(BLOCK, TILES) for rows of `n_cols`; BLOCK is in 2-byte elements in the config."""
    block = config.blocks["BLOCK"] * 2 // element_size
    return block, min(config.blocks["TILES"], triton.cdiv(n_cols, block))
