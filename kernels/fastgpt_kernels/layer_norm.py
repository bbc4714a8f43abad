"""Layer normalisation, alone or after the residual addition and dropout (Ba et al., 2016).

    s = residual + Z (x + x_bias)      add_layer_norm only; rounded to x's dtype once, and returned
    y = (s - mean) rstd weight + bias             rstd = 1 / sqrt(var(s) + eps), var over 1/C
    ds = rstd (g - mean(g) - xhat mean(g xhat)) + d_residual_out     xhat = (s - mean) rstd,
    dx = Z ds,  dweight, dbias, dx_bias = sums over rows of dy xhat, dy, dx     g = dy weight

x, residual, y, s (..., C) in one dtype, vectors (C,) in any, statistics fp32. Z is the branch's
dropout mask, all ones without. Bytes per element in 16 bits: forward 4, with the addition 8;
backward 6, with the addition 8, with dropout 10.
"""
# Tuples of tiles grow, which their types do not allow.
# mypy: disable-error-code=assignment

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import launch, reference
from fastgpt_kernels.checks import check_dropout, check_tensor, refuse_interpreted_bf16
from fastgpt_kernels.dropout import dropout_threshold, keep_norm, seed_tensor
from fastgpt_kernels.launch import Config, Table, contiguous, lookup, rows_and_stride, tl, triton
from fastgpt_kernels.library import define_op, tensors_only
from fastgpt_kernels.registry import ExampleInputs, OpSpec, Random, Sizes, implementations, traffic

MAX_WIDTH = 8192  # a row, and in the backward dweight and dbias, must fit in registers

# --- Launch configs ---------------------------------------------------------------------------

# Key: the width C. A tile is ROWS x TILE. 8 columns per thread are one 128-bit access in 16 bits.
# Up to 2048 columns a warp has a row of the forward to itself, and a program is one warp that
# computes STEPS tiles. In the backward a warp has a row up to 1024 columns. PROGRAMS_PER_SM of
# its programs fit an SM together, and no more start, since each has the same number of rows.
FORWARD: Table = {
    "default": {
        2048: Config({"TILE": 256, "ROWS": 1, "STEPS": 4}, 1),  # measured 2026-11-26, H200: 50 µs
        4096: Config({"TILE": 1024, "ROWS": 1, "STEPS": 2}, 4),  # not measured
        8192: Config({"TILE": 2048, "ROWS": 1, "STEPS": 1}, 8),  # not measured
    },
}
# 768: 69 µs, with the addition of partial sums, which was then inside. DRAM needs 42. num_stages=3
# copies rows to shared memory two iterations ahead: not measured.
BACKWARD: Table = {
    "default": {
        768: Config({"TILE": 256, "ROWS": 4, "PROGRAMS_PER_SM": 3}, 4),  # measured 2026-11-26, H200
        1024: Config({"TILE": 256, "ROWS": 4, "PROGRAMS_PER_SM": 2}, 4),  # not measured
        2048: Config({"TILE": 512, "ROWS": 2, "PROGRAMS_PER_SM": 2}, 4),  # not measured
        4096: Config({"TILE": 2048, "ROWS": 1, "PROGRAMS_PER_SM": 2}, 8),  # not measured
        8192: Config({"TILE": 4096, "ROWS": 1, "PROGRAMS_PER_SM": 1}, 16),  # not measured
    },
}

# --- Kernels ----------------------------------------------------------------------------------

# A row stays in registers while its statistics are computed, so that every tensor is read once. The
# backward's programs loop over rows with dweight and dbias in registers. Rows are cut into tiles of
# which C is nearly a multiple. If a warp has a row to itself, no thread waits for another.


@triton.jit
def _within(row_mask, columns, i: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr):
    """Returns the mask of tile i at `columns` + i TILE. Only the last tile can reach past C."""
    mask = row_mask
    if (i + 1) * TILE > C:
        mask = mask & (columns + i * TILE < C)
    return mask


@triton.jit
def _load_rows(ptr, stride, rows, row_mask, columns, C: tl.constexpr, TILE: tl.constexpr):
    """Loads `rows` [ROWS, 1] as a tuple of tiles [ROWS, TILE], 0 where masked."""
    ptrs = ptr + rows.to(tl.int64) * stride + columns
    tiles = ()
    for i in tl.static_range((C + TILE - 1) // TILE):
        mask = _within(row_mask, columns, i, C, TILE)
        tiles = tiles + (tl.load(ptrs + i * TILE, mask=mask, other=0.0),)
    return tiles


@triton.jit
def layer_norm_fwd_kernel(
    x_ptr,  # (M, C), rows x_stride apart
    residual_ptr,  # (M, C), rows residual_stride apart, or None
    weight_ptr, bias_ptr,  # (C,), the bias or None
    x_bias_ptr,  # (C,), added to x, or None
    seed_ptr,  # int64, of the dropout of x; None without
    y_ptr,  # (M, C) contiguous
    sum_ptr,  # (M, C) contiguous: x + residual; None without residual
    stats_ptr,  # (2, M) fp32: means, rstds
    x_stride, residual_stride, M, eps,
    threshold, scale,  # of `dropout_threshold`
    C: tl.constexpr, TILE: tl.constexpr,  # columns of a tile
    ROWS: tl.constexpr, STEPS: tl.constexpr,  # rows of a tile, tiles of a program
):  # fmt: skip
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
            residuals = _load_rows(residual_ptr, residual_stride, rows, row_mask, columns, C, TILE)
        tiles = ()
        total = tl.zeros((ROWS, TILE), tl.float32)
        for i in tl.static_range(TILES):
            s = loaded[i].to(tl.float32)  # [ROWS, TILE]
            if x_bias_ptr is not None:
                own = columns + i * TILE
                s += tl.load(x_bias_ptr + own, mask=own < C, other=0.0).to(tl.float32)
            if seed_ptr is not None:
                s = tl.where(keep_norm(seed, rows, i * TILE, threshold, ROWS, TILE), s * scale, 0.0)
            if residual_ptr is not None:
                rounded = (s + residuals[i].to(tl.float32)).to(sum_ptr.dtype.element_ty)
                mask = _within(row_mask, columns, i, C, TILE)
                tl.store(sum_ptr + out + i * TILE, rounded, mask=mask)
                s = rounded.to(tl.float32)  # the statistics are those of the returned sum
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
def layer_norm_bwd_kernel(
    dy_ptr,  # (M, C), rows dy_stride apart
    d_sum_ptr,  # (M, C), rows d_sum_stride apart: gradient of residual_out, or None
    s_ptr,  # (M, C), rows s_stride apart: the input of the normalisation
    weight_ptr,  # (C,)
    seed_ptr,  # of the forward
    stats_ptr,  # (2, M) fp32: means, rstds
    dx_ptr,  # (M, C) contiguous
    d_residual_ptr,  # (M, C) contiguous, or None without dropout, when it is dx
    partials_ptr,  # (1 to 3, programs, C) fp32: partial sums of dweight, dbias, dx_bias
    dy_stride, d_sum_stride, s_stride, M, threshold, scale,
    C: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,  # as in the forward
    BIAS: tl.constexpr, X_BIAS: tl.constexpr,  # True with such a bias
    STAGES: tl.constexpr,  # STAGES - 1 tiles of rows are copied ahead to shared memory
):  # fmt: skip
    TILES: tl.constexpr = (C + TILE - 1) // TILE
    columns = tl.arange(0, TILE)[None, :]
    weights = ()
    dweight = ()  # [ROWS, TILE] each: rows of a tile are added up after the loop
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
            g = gradient * weights[i]  # 0 in columns past C, so both means exclude them
            total_g += g
            total_gx += g * xhat
            xhats = xhats + (xhat,)
            gs = gs + (g,)
            new_dweight = new_dweight + (dweight[i] + gradient * xhat,)
            new_dbias = new_dbias + (dbias[i] + gradient,)
        dweight = new_dweight
        if BIAS:
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
                dx = tl.where(
                    keep_norm(seed, rows, i * TILE, threshold, ROWS, TILE), dx * scale, 0.0
                )
            tl.store(dx_ptr + out + i * TILE, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if X_BIAS:
                new_dx_bias = new_dx_bias + (dx_bias[i] + dx,)
        if X_BIAS:
            dx_bias = new_dx_bias
    flat = tl.arange(0, TILE)
    programs = tl.num_programs(0)
    for i in tl.static_range(TILES):
        own = flat + i * TILE
        ptrs = partials_ptr + tl.program_id(0) * C + own
        tl.store(ptrs, tl.sum(dweight[i], axis=0), mask=own < C)
        if BIAS:
            tl.store(ptrs + programs * C, tl.sum(dbias[i], axis=0), mask=own < C)
        if X_BIAS:
            ptrs += (1 + BIAS) * programs * C
            tl.store(ptrs, tl.sum(dx_bias[i], axis=0), mask=own < C)


# --- Launchers --------------------------------------------------------------------------------


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None,
    x_bias: Tensor | None, eps: float, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the forward kernel; returns (y, residual_out, stats).

    residual_out is empty without residual. stats (2, M) fp32 are the rows' means and rstds.
    """
    refuse_interpreted_bf16("layer_norm", x, weight, bias, x_bias)
    C = x.shape[-1]
    M = x.numel() // C
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual_out = None if residual is None else torch.empty_like(y)
    stats = torch.empty((2, M), dtype=torch.float32, device=x.device)
    if M > 0:
        rows, stride = rows_and_stride(x)
        residuals, residual_stride = rows_and_stride(residual)
        config = lookup(FORWARD, launch.arch_of(x), C)
        rows_per_program = config.blocks["ROWS"] * config.blocks["STEPS"]
        with launch.on_device(x):
            layer_norm_fwd_kernel[(triton.cdiv(M, rows_per_program),)](
                rows, residuals, weight.contiguous(), contiguous(bias), contiguous(x_bias), seed, y,
                residual_out, stats, stride, residual_stride, M, eps,
                *dropout_threshold(dropout_p), C, **config.kwargs(),
            )  # fmt: skip
    return tensors_only(y, residual_out, stats)


def _backward(
    dy: Tensor | None, d_residual_out: Tensor | None, s: Tensor, weight: Tensor,
    bias: Tensor | None, x_bias: Tensor | None, seed: Tensor | None, stats: Tensor,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the backward kernel; returns (dx, d_residual, dweight, dbias, dx_bias).

    d_residual is empty without dropout, when it equals dx, and the gradients of absent biases are
    empty. dy is None if only residual_out was used.
    """
    C = s.shape[-1]
    M = s.numel() // C
    ds = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    d_residual = None if seed is None else torch.empty_like(ds)
    arch = launch.arch_of(s)
    # The sums of a third gradient take the registers of a row of twice the width.
    config = lookup(BACKWARD, arch, C if x_bias is None else 2 * C)
    TILE, ROWS = config.blocks["TILE"], config.blocks["ROWS"]
    # Dropout's mask takes the registers that copying ahead would.
    stages = config.num_stages if seed is None else 1
    wanted = launch.multiprocessors(s) * config.blocks["PROGRAMS_PER_SM"]
    programs = min(triton.cdiv(M, ROWS), wanted)
    parameters = (weight, bias, x_bias)
    count = sum(t is not None for t in parameters)
    partials = torch.empty((count, programs, C), dtype=torch.float32, device=s.device)
    registers = {}
    if arch != "sm_90":  # which is measured without; elsewhere ptxas may take too few, and spill
        threads = 32 * config.num_warps * config.blocks["PROGRAMS_PER_SM"]
        registers = {"maxnreg": min(65536 // threads // 8 * 8, 255)}
    if M > 0:
        rows, stride = rows_and_stride(s)
        dy_rows, dy_stride = rows_and_stride(torch.zeros_like(s) if dy is None else dy)
        d_sums, d_sum_stride = rows_and_stride(d_residual_out)
        with launch.on_device(s):
            layer_norm_bwd_kernel[(programs,)](
                dy_rows, d_sums, rows, weight.contiguous(), seed, stats, ds, d_residual, partials,
                dy_stride, d_sum_stride, stride, M, *dropout_threshold(dropout_p), C, TILE, ROWS,
                bias is not None, x_bias is not None, stages, **config.options, **registers,
            )  # fmt: skip
    sums = iter(partials)
    gradients = [None if t is None else next(sums).sum(0).to(t.dtype) for t in parameters]
    return tensors_only(ds, d_residual, *gradients)


# --- Registration -----------------------------------------------------------------------------


def _new(like: Tensor | None) -> Tensor | None:
    return None if like is None else like.new_empty(like.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, x_bias, _, ctx.dropout_p, seed = inputs
    _, residual_out, stats = output
    ctx.save_for_backward(
        x if residual is None else residual_out, weight, bias, x_bias, seed, stats
    )
    ctx.mark_non_differentiable(stats, *([residual_out] if residual is None else []))


def _gradients(ctx: Any, dy: Tensor | None, d_residual_out: Tensor | None, _: None) -> Any:
    s, weight, bias, x_bias, seed, stats = ctx.saved_tensors
    dx, d_residual, *sums = _backward_op(
        dy, d_residual_out, s, weight, bias, x_bias, seed, stats, ctx.dropout_p
    )
    return dx, dx if seed is None else d_residual, *sums


_backward_op = define_op(
    "layer_norm_backward", _backward,
    lambda dy, d_residual_out, s, weight, bias, x_bias, seed, *_: tensors_only(
        _new(s), None if seed is None else _new(s), _new(weight), _new(bias), _new(x_bias)
    ),
)  # fmt: skip
_op = define_op(
    "layer_norm", _forward,
    lambda x, residual, *_: tensors_only(
        _new(x), _new(residual),
        x.new_empty((2, x.numel() // x.shape[-1]), dtype=torch.float32),
    ),
    setup_context=_setup_context, backward=_gradients,
)  # fmt: skip


def _check(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor, **biases: Tensor | None
) -> None:  # fmt: skip
    check_tensor(op, "x", x)
    if x.ndim == 0 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(
            f"{op}: x must have shape (..., C) with 1 <= C <= {MAX_WIDTH}, got {tuple(x.shape)}"
        )
    if op == "add_layer_norm":
        check_tensor(op, "residual", residual, shape=x.shape, dtypes=(x.dtype,), like=x)
    check_tensor(op, "weight", weight, shape=x.shape[-1:], like=x)
    for name, bias in biases.items():
        check_tensor(op, name, bias, shape=x.shape[-1:], like=x, optional=True)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Normalises the last dimension of x (..., C), then scales by weight and shifts by bias (C,).

    y has x's shape and dtype (bf16, fp16, fp32) and is contiguous. C is 1 to 8192. weight, bias and
    their gradients may have another dtype, such as fp32.

    Raises TypeError or ValueError for arguments that do not fit.
    """
    _check("layer_norm", x, None, weight, bias=bias)
    if not launch.use_kernel(x):
        return reference.layer_norm(x, weight, bias, eps)
    return _op(x, None, weight, bias, None, eps, 0.0, None)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None,
    x_bias: Tensor | None = None, eps: float = 1e-5,
    *, dropout_p: float = 0.0, seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns (y, residual_out): residual_out = residual + dropout(x + x_bias), y its layer_norm.

    x and residual (..., C) and both results have one dtype; residual_out is rounded once. x_bias
    (C,) of any dtype is the bias of the linear layer before, whose gradient is summed as dx is
    written. dropout_p and seed are those of `attention`. The mask depends on seed, row and column
    alone (`dropout.norm_dropout_mask`). All else is as in `layer_norm`.
    """
    op = "add_layer_norm"
    _check(op, x, residual, weight, bias=bias, x_bias=x_bias)
    if dropout_p or seed is not None:
        check_dropout(op, dropout_p, seed, x)
    if not launch.use_kernel(x):
        return reference.add_layer_norm(
            x, residual, weight, bias, x_bias, eps, dropout_p=dropout_p, seed=seed
        )
    seed = seed_tensor(seed, x.device) if dropout_p > 0 else None
    return _op(x, residual, weight, bias, x_bias, eps, dropout_p, seed)[:2]


def _too_wide(s: Sizes, dtype: torch.dtype, arch: str) -> str | None:
    return f"width {s.n_embd} is more than {MAX_WIDTH}" if s.n_embd > MAX_WIDTH else None


def _examples(s: Sizes, random: Random, streams: int) -> ExampleInputs:
    """Returns a call with `streams` activations, the weight, and the bias if the model has one."""
    shapes = [(s.tokens, s.n_embd)] * streams + [(s.n_embd,)] * (1 + s.bias)
    inputs = [random(*shape) for shape in shapes]
    return ExampleInputs(inputs, fp32_inputs=range(streams, len(inputs)))


def _add_layer_norm_inputs(s: Sizes, random: Random) -> list[ExampleInputs]:
    """Returns the calls of training, with the branch's bias and dropout, and of evaluation."""
    plain = training = _examples(s, random, 2)
    found = []
    if s.bias:
        inputs = [*plain.inputs, random(s.n_embd)]
        training = ExampleInputs(inputs, fp32_inputs=range(2, len(inputs)))
        found = [replace(plain, gradients=False)]
    if s.dropout:
        found = [replace(training, gradients=False), *found]
        training = replace(training, arguments={"dropout_p": s.dropout, "seed": 1})
    return [training, *found]


_KERNELS = ("layer_norm_fwd_kernel", "layer_norm_bwd_kernel")
SPECS = {
    "layer_norm": OpSpec(
        "layer_norm", implementations(reference.layer_norm, layer_norm, _too_wide),
        lambda s, random: [_examples(s, random, 1)], traffic(2, 3),
        kernels=_KERNELS, category="memory", label="norms", calls_per_step=1,
    ),
    "add_layer_norm": OpSpec(
        "add_layer_norm", implementations(reference.add_layer_norm, add_layer_norm, _too_wide),
        _add_layer_norm_inputs, traffic(4, 4),
        kernels=_KERNELS, category="memory", label="norms", calls_per_step=24,
    ),
}  # fmt: skip
