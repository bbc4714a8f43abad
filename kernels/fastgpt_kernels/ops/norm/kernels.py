"""The kernels of layer_norm and add_layer_norm; the formulas are in op.py.

A row stays in registers while its statistics are computed, so that every tensor is read once. The
backward's programs loop over the rows with dweight and dbias in registers, and the last of them to
end adds up what they found (see `partials`). Rows are cut into tiles of which C is nearly a
multiple, and a warp has a row to itself while its registers hold one: no thread waits for another.
"""
# Tuples of tiles grow, which no type of theirs allows.
# mypy: disable-error-code=assignment

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels.checks import refuse_interpreted_bf16
from fastgpt_kernels.launch import Config, arch_of, lookup, multiprocessors, on_device, row_view
from fastgpt_kernels.ops.norm import configs
from fastgpt_kernels.partial_sums import (
    COUNTERS,
    MAX_PROGRAMS,
    add_partials_at_last,
    empty_partials,
    sum_columns,
)
from fastgpt_kernels.reference import dropout_threshold


@triton.jit
def _within(row_mask, columns, i: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr):
    """The mask of tile i, whose columns are `columns` + i TILE: only the last can reach past C."""
    mask = row_mask
    if (i + 1) * TILE > C:
        mask = mask & (columns + i * TILE < C)
    return mask


@triton.jit
def _load_rows(ptr, stride, rows, row_mask, columns, C: tl.constexpr, TILE: tl.constexpr):
    """Rows (ROWS, 1) as a tuple of tiles [ROWS, TILE], 0 where masked; offsets are int64."""
    ptrs = ptr + rows.to(tl.int64) * stride + columns
    tiles = ()
    for i in tl.static_range((C + TILE - 1) // TILE):
        mask = _within(row_mask, columns, i, C, TILE)
        tiles = tiles + (tl.load(ptrs + i * TILE, mask=mask, other=0.0),)
    return tiles


@triton.jit
def _kept(seed, rows, i: tl.constexpr, threshold, ROWS: tl.constexpr, TILE: tl.constexpr):
    """[ROWS, TILE] bool: which entries of tile i survive dropout, as `norm_dropout_mask` says.

    A Philox call is for eight neighbours, which one thread has in 16-bit tiles.
    """
    groups = i * (TILE // 8) + tl.arange(0, TILE // 8)[None, :]
    a, b, c, d = tl.philox(seed, groups, rows, 0, 1, n_rounds=7)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # [ROWS, TILE / 8, 2, 2]: a, b, c, d
    return tl.join(words & 0xFFFF, words >> 16).reshape(ROWS, TILE) >= threshold


@triton.jit
def layer_norm_forward_kernel(
    x_ptr,  # (M, C), rows x_stride apart
    residual_ptr,  # (M, C), rows residual_stride apart, or None
    weight_ptr, bias_ptr,  # (C,), the bias or None
    x_bias_ptr,  # (C,), added to x, or None
    seed_ptr,  # int64, of the dropout of x; None without
    y_ptr,  # (M, C) contiguous
    sum_ptr,  # (M, C) contiguous: x + residual; None without residual
    stats_ptr,  # (2 M + COUNTERS) fp32: means, rstds, and zeros for the backward's counters
    x_stride, residual_stride, M, eps,
    threshold, scale,  # of `dropout_threshold`
    C: tl.constexpr, TILE: tl.constexpr,  # columns of a tile
    ROWS: tl.constexpr, STEPS: tl.constexpr,  # rows of a tile, how many times a program
    COUNTERS: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) == 0:
        tl.store(stats_ptr + M + M + tl.arange(0, COUNTERS), 0.0)
    TILES: tl.constexpr = (C + TILE - 1) // TILE
    columns = tl.arange(0, TILE)[None, :]
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    first = tl.program_id(0) * ROWS * STEPS
    for start in range(first, min(first + ROWS * STEPS, M), ROWS):
        rows = (start + tl.arange(0, ROWS))[:, None]
        row_mask = rows < M
        out = rows.to(tl.int64) * C + columns
        loaded = _load_rows(x_ptr, x_stride, rows, row_mask, columns, C, TILE)
        if residual_ptr is not None:
            others = _load_rows(residual_ptr, residual_stride, rows, row_mask, columns, C, TILE)
        tiles = ()
        total = tl.zeros((ROWS, TILE), tl.float32)
        for i in tl.static_range(TILES):
            s = loaded[i].to(tl.float32)
            if x_bias_ptr is not None:
                own = columns + i * TILE
                s += tl.load(x_bias_ptr + own, mask=own < C, other=0.0).to(tl.float32)
            if seed_ptr is not None:
                s = tl.where(_kept(seed, rows, i, threshold, ROWS, TILE), s * scale, 0.0)
            if residual_ptr is not None:
                rounded = (s + others[i].to(tl.float32)).to(sum_ptr.dtype.element_ty)
                mask = _within(row_mask, columns, i, C, TILE)
                tl.store(sum_ptr + out + i * TILE, rounded, mask=mask)
                s = rounded.to(tl.float32)  # the statistics are those of what others see
            total += s
            tiles = tiles + (s,)
        mean = tl.sum(total, axis=1, keep_dims=True) / C
        squares = tl.zeros((ROWS, TILE), tl.float32)
        for i in tl.static_range(TILES):
            centered = tiles[i] - mean
            if (i + 1) * TILE > C:
                centered = tl.where(columns + i * TILE < C, centered, 0.0)
            squares += centered * centered
        rstd = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / C + eps)
        for i in tl.static_range(TILES):
            mask = _within(row_mask, columns, i, C, TILE)
            own = columns + i * TILE
            weight = tl.load(weight_ptr + own, mask=own < C, other=0.0).to(tl.float32)
            y = (tiles[i] - mean) * rstd * weight
            if bias_ptr is not None:
                y += tl.load(bias_ptr + own, mask=own < C, other=0.0).to(tl.float32)
            tl.store(y_ptr + out + i * TILE, y.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(stats_ptr + rows, mean, mask=row_mask)
        tl.store(stats_ptr + M + rows, rstd, mask=row_mask)


@triton.jit
def layer_norm_backward_kernel(
    dy_ptr,  # (M, C), rows dy_stride apart
    d_sum_ptr,  # (M, C), rows d_sum_stride apart: gradient of residual_out, or None
    s_ptr,  # (M, C), rows s_stride apart: what was normalised
    weight_ptr,  # (C,)
    seed_ptr,  # of the forward
    stats_ptr,  # (2 M + COUNTERS) fp32: means, rstds, counters (see `partials`)
    dx_ptr,  # (M, C) contiguous
    d_residual_ptr,  # (M, C) contiguous, with dropout; else None: it is dx
    partials_ptr,  # (programs, C to 3 C) fp32: dweight, dbias, dx_bias
    dweight_ptr, dbias_ptr, dx_bias_ptr,  # (C,), the biases or None
    dy_stride, d_sum_stride, s_stride, M, threshold, scale,
    C: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,  # as in the forward
    STAGES: tl.constexpr,  # of rows: this many less one are on their way to shared memory
    SUM_COLUMNS: tl.constexpr, AMD: tl.constexpr,  # SUM_COLUMNS: of a tile of partials
):  # fmt: skip
    TILES: tl.constexpr = (C + TILE - 1) // TILE
    columns = tl.arange(0, TILE)[None, :]
    weights = ()
    dweight = ()  # of each row of a tile: the rows meet after the loop
    dbias = ()
    dx_bias = ()
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for i in tl.static_range(TILES):
        own = columns + i * TILE
        weight = tl.load(weight_ptr + own, mask=own < C, other=0.0).to(tl.float32)
        weights = weights + (weight,)
        dweight = dweight + (tl.zeros((ROWS, TILE), tl.float32),)
        dbias = dbias + (tl.zeros((ROWS, TILE), tl.float32),)
        dx_bias = dx_bias + (tl.zeros((ROWS, TILE), tl.float32),)
    every = tl.num_programs(0) * ROWS
    for start in tl.range(tl.program_id(0) * ROWS, M, every, num_stages=STAGES):
        rows = (start + tl.arange(0, ROWS))[:, None]
        row_mask = rows < M
        s = _load_rows(s_ptr, s_stride, rows, row_mask, columns, C, TILE)
        dy = _load_rows(dy_ptr, dy_stride, rows, row_mask, columns, C, TILE)
        if d_sum_ptr is not None:
            d_sum = _load_rows(d_sum_ptr, d_sum_stride, rows, row_mask, columns, C, TILE)
        mean = tl.load(stats_ptr + rows, mask=row_mask, other=0.0)
        rstd = tl.load(stats_ptr + M + rows, mask=row_mask, other=0.0)
        total_g = tl.zeros((ROWS, TILE), tl.float32)
        total_gx = tl.zeros((ROWS, TILE), tl.float32)
        xhats = ()
        gs = ()
        new_dweight = ()
        new_dbias = ()
        for i in tl.static_range(TILES):
            gradient = dy[i].to(tl.float32)
            xhat = (s[i].to(tl.float32) - mean) * rstd
            g = gradient * weights[i]  # 0 in the columns past C, which keeps them out of both means
            total_g += g
            total_gx += g * xhat
            xhats = xhats + (xhat,)
            gs = gs + (g,)
            new_dweight = new_dweight + (dweight[i] + gradient * xhat,)
            new_dbias = new_dbias + (dbias[i] + gradient,)
        dweight = new_dweight
        if dbias_ptr is not None:
            dbias = new_dbias
        mean_g = tl.sum(total_g, axis=1, keep_dims=True) / C
        mean_gx = tl.sum(total_gx, axis=1, keep_dims=True) / C
        out = rows.to(tl.int64) * C + columns
        new_dx_bias = ()
        for i in tl.static_range(TILES):
            dx = (gs[i] - mean_g - xhats[i] * mean_gx) * rstd
            if d_sum_ptr is not None:
                dx += d_sum[i].to(tl.float32)
            mask = _within(row_mask, columns, i, C, TILE)
            if seed_ptr is not None:
                rounded = dx.to(d_residual_ptr.dtype.element_ty)
                tl.store(d_residual_ptr + out + i * TILE, rounded, mask=mask)
                dx = tl.where(_kept(seed, rows, i, threshold, ROWS, TILE), dx * scale, 0.0)
            tl.store(dx_ptr + out + i * TILE, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if dx_bias_ptr is not None:
                new_dx_bias = new_dx_bias + (dx_bias[i] + dx,)
        if dx_bias_ptr is not None:
            dx_bias = new_dx_bias
    K: tl.constexpr = 1 + (dbias_ptr is not None) + (dx_bias_ptr is not None)
    flat = tl.arange(0, TILE)
    row_ptrs = partials_ptr + tl.program_id(0).to(tl.int64) * (K * C) + flat
    for i in tl.static_range(TILES):
        mask = flat + i * TILE < C
        tl.store(row_ptrs + i * TILE, tl.sum(dweight[i], axis=0), mask=mask)
        if dbias_ptr is not None:
            tl.store(row_ptrs + (C + i * TILE), tl.sum(dbias[i], axis=0), mask=mask)
        if dx_bias_ptr is not None:
            own = row_ptrs + ((K - 1) * C + i * TILE)
            tl.store(own, tl.sum(dx_bias[i], axis=0), mask=mask)
    add_partials_at_last(
        partials_ptr, stats_ptr + M + M, dweight_ptr, dbias_ptr, dx_bias_ptr, C, K, SUM_COLUMNS, AMD
    )


def _tile(config: Config, C: int) -> tuple[int, int]:
    """(TILE, ROWS) of the config, or as many elements in more rows for a narrow C."""
    columns, rows = config.blocks["TILE"], config.blocks["ROWS"]
    narrow = min(columns, max(8, triton.next_power_of_2(C)))
    return narrow, rows * columns // narrow


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None,
    x_bias: Tensor | None, eps: float, dropout_p: float, seed: Tensor | None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """(y, residual_out, stats): residual_out None without residual; stats (2 M + COUNTERS,) are
    means, rstds, and zeros that the backward counts in (see `partials`).
    """
    refuse_interpreted_bf16("layer_norm", x, weight, bias, x_bias)
    C = x.shape[-1]
    rows = row_view(x)
    M = rows.shape[0]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual_out = None if residual is None else torch.empty_like(y)
    stats = torch.empty(2 * M + COUNTERS, dtype=torch.float32, device=x.device)
    if M == 0:
        return y, residual_out, stats
    others = None if residual is None else row_view(residual)
    config = config or lookup(configs.FORWARD, arch_of(x), C)
    TILE, ROWS = _tile(config, C)
    STEPS = config.blocks["STEPS"]
    with on_device(x):
        layer_norm_forward_kernel[(triton.cdiv(M, ROWS * STEPS),)](
            rows, others, weight.contiguous(), _contiguous(bias), _contiguous(x_bias), seed, y,
            residual_out, stats, rows.stride(0), 0 if others is None else others.stride(0), M, eps,
            *dropout_threshold(dropout_p), C, TILE, ROWS, STEPS, COUNTERS,
            **config.options,
        )  # fmt: skip
    return y, residual_out, stats


def launch_backward(
    dy: Tensor | None, d_residual_out: Tensor | None, s: Tensor, weight: Tensor,
    bias: Tensor | None, x_bias: Tensor | None, seed: Tensor | None, stats: Tensor,
    dropout_p: float, config: Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(dx, d_residual, dweight, dbias, dx_bias) for the normalised tensor s.

    d_residual is None without dropout, when it is dx, and so are the gradients of biases that are
    not there. dy is None if only residual_out was used.
    """
    C = s.shape[-1]
    rows, dy_rows = row_view(s), row_view(torch.zeros_like(s) if dy is None else dy)
    M = rows.shape[0]
    ds = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    d_residual = None if seed is None else torch.empty_like(ds)
    given = [_contiguous(t) for t in (weight, bias, x_bias)]
    sums = [None if t is None else torch.empty_like(t) for t in given]
    if M == 0:
        sums = [None if t is None else t.zero_() for t in sums]
        return ds, d_residual, *sums  # type: ignore[return-value]
    others = None if d_residual_out is None else row_view(d_residual_out)
    table = configs.BACKWARD if x_bias is None else configs.BACKWARD_X_BIAS
    config = config or lookup(table, arch_of(s), C)
    TILE, ROWS = _tile(config, C)
    # Dropout's mask takes the registers that copies ahead would.
    stages = config.num_stages if seed is None else 1
    wanted = multiprocessors(s) * config.blocks["PROGRAMS_PER_SM"]
    programs = min(triton.cdiv(M, ROWS), wanted, MAX_PROGRAMS)
    partials = empty_partials(programs, sum(C for t in sums if t is not None), s.device)
    registers = {}
    if arch_of(s) == "sm_100":  # where ptxas stops at 128, and spills, if it may
        threads = 32 * config.num_warps * config.blocks["PROGRAMS_PER_SM"]
        registers = {"maxnreg": min(65536 // threads // 8 * 8, 255)}
    with on_device(s):
        layer_norm_backward_kernel[(programs,)](
            dy_rows, others, rows, given[0], seed, stats, ds, d_residual, partials, *sums,
            dy_rows.stride(0), 0 if others is None else others.stride(0), rows.stride(0), M,
            *dropout_threshold(dropout_p), C, TILE, ROWS, stages,
            sum_columns(config.num_warps), arch_of(s).startswith("gfx"),
            **config.options, **registers,
        )  # fmt: skip
    return ds, d_residual, *sums  # type: ignore[return-value]
