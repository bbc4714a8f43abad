"""The kernels of layer_norm and add_layer_norm; the formulas are in op.py.

A row stays in registers while its statistics are computed, so that every tensor is read once. The
backward's programs loop over the rows with dweight and dbias in registers (see `partials`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels.configs import Config, lookup
from fastgpt_kernels.host import (
    arch_of,
    multiprocessors,
    on_device,
    refuse_interpreted_bf16,
    row_view,
)
from fastgpt_kernels.ops.norm import configs
from fastgpt_kernels.partials import add_partials, sum_partials


@triton.jit
def _load_rows(ptr, stride, rows, columns, mask):
    """A tile of rows in fp32, 0 if masked; offsets are int64, for over 2^31 elements."""
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def layer_norm_forward_kernel(
    x_ptr,  # (M, C), rows x_stride apart
    residual_ptr,  # (M, C), rows residual_stride apart, or None
    weight_ptr, bias_ptr,  # (C,), the bias or None
    y_ptr,  # (M, C) contiguous
    sum_ptr,  # (M, C) contiguous: x + residual; None without residual
    stats_ptr,  # (2, M) fp32: mean, rstd
    x_stride, residual_stride, M, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr,  # BLOCK_C: C rounded up to a power of two
    ROWS: tl.constexpr,  # of one program
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_C)
    row_mask = rows < M
    mask = row_mask[:, None]
    if C != BLOCK_C:
        mask = mask & (columns < C)[None, :]
    weight = tl.load(weight_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    s = _load_rows(x_ptr, x_stride, rows, columns, mask)  # [ROWS, BLOCK_C]
    offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]
    if residual_ptr is not None:
        s += _load_rows(residual_ptr, residual_stride, rows, columns, mask)
        rounded = s.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + offsets, rounded, mask=mask)
        s = rounded.to(tl.float32)  # the statistics are those of the tensor that others see
    mean = tl.sum(s, axis=1) / C
    centered = s - mean[:, None]
    if C != BLOCK_C:
        centered = tl.where((columns < C)[None, :], centered, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centered * centered, axis=1) / C + eps)
    y = centered * rstd[:, None] * weight[None, :]
    if bias_ptr is not None:
        y += bias[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(stats_ptr + rows, mean, mask=row_mask)
    tl.store(stats_ptr + M + rows, rstd, mask=row_mask)


@triton.jit
def layer_norm_backward_kernel(
    dy_ptr,  # (M, C), rows dy_stride apart
    d_sum_ptr,  # (M, C), rows d_sum_stride apart: gradient of residual_out, or None
    s_ptr,  # (M, C), rows s_stride apart: what was normalised
    weight_ptr,  # (C,)
    stats_ptr,  # (2, M) fp32: mean, rstd
    dx_ptr,  # (M, C) contiguous
    partials_ptr,  # (1 or 2, programs, C) fp32: dweight, then dbias
    dy_stride, d_sum_stride, s_stride, M,
    C: tl.constexpr, BLOCK_C: tl.constexpr,  # BLOCK_C: C rounded up to a power of two
    ROWS: tl.constexpr, HAS_BIAS: tl.constexpr,  # ROWS: of one step of the loop
    STAGES: tl.constexpr,  # above 1: the loop's loads are copied ahead through shared memory
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK_C)
    column_mask = columns < C
    weight = tl.load(weight_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_C,), tl.float32)
    dbias = tl.zeros((BLOCK_C,), tl.float32)
    for start in tl.range(program * ROWS, M, programs * ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        row_mask = rows < M
        mask = row_mask[:, None]
        if C != BLOCK_C:
            mask = mask & column_mask[None, :]
        s = _load_rows(s_ptr, s_stride, rows, columns, mask)  # [ROWS, BLOCK_C]
        dy = _load_rows(dy_ptr, dy_stride, rows, columns, mask)
        mean = tl.load(stats_ptr + rows, mask=row_mask, other=0.0)
        rstd = tl.load(stats_ptr + M + rows, mask=row_mask, other=0.0)
        if d_sum_ptr is not None:
            d_sum = _load_rows(d_sum_ptr, d_sum_stride, rows, columns, mask)
        xhat = (s - mean[:, None]) * rstd[:, None]
        g = dy * weight[None, :]  # 0 in the columns past C, which keeps them out of both means
        mean_g = tl.sum(g, axis=1) / C
        mean_gx = tl.sum(g * xhat, axis=1) / C
        dx = (g - mean_g[:, None] - xhat * mean_gx[:, None]) * rstd[:, None]
        if d_sum_ptr is not None:
            dx += d_sum
        offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dweight += tl.sum(dy * xhat, axis=0)
        if HAS_BIAS:
            dbias += tl.sum(dy, axis=0)
    tl.store(partials_ptr + program * C + columns, dweight, mask=column_mask)
    if HAS_BIAS:
        tl.store(partials_ptr + (programs + program) * C + columns, dbias, mask=column_mask)


@triton.jit
def layer_norm_sum_kernel(
    partials_ptr, out0_ptr, out1_ptr, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    add_partials(partials_ptr, out0_ptr, out1_ptr, P, C, BLOCK_P, BLOCK_C)


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """(y, residual_out, stats): residual_out None without residual, stats (2, M) mean and rstd."""
    refuse_interpreted_bf16("layer_norm", x, weight, bias)
    C = x.shape[-1]
    rows = row_view(x)
    M = rows.shape[0]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual_out = None if residual is None else torch.empty_like(y)
    stats = torch.empty((2, M), dtype=torch.float32, device=x.device)
    if M == 0:
        return y, residual_out, stats
    others = None if residual is None else row_view(residual)
    config = config or lookup(configs.FORWARD, arch_of(x), C)
    with on_device(x):
        layer_norm_forward_kernel[(triton.cdiv(M, config.blocks["ROWS"]),)](
            rows, others, weight.contiguous(), None if bias is None else bias.contiguous(), y,
            residual_out, stats, rows.stride(0), 0 if others is None else others.stride(0), M, eps,
            C, triton.next_power_of_2(C),
            **config.kwargs(),
        )  # fmt: skip
    return y, residual_out, stats


def launch_backward(
    dy: Tensor | None, d_residual_out: Tensor | None, s: Tensor, weight: Tensor,
    bias: Tensor | None, stats: Tensor, config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(ds, dweight, dbias) for the normalised tensor s; dbias None if there is no bias.

    dy is None if only residual_out was used.
    """
    C = s.shape[-1]
    rows, dy_rows = row_view(s), row_view(torch.zeros_like(s) if dy is None else dy)
    M = rows.shape[0]
    ds = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    if M == 0:
        return ds, torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
    others = None if d_residual_out is None else row_view(d_residual_out)
    config = config or lookup(configs.BACKWARD, arch_of(s), C)
    steps = triton.cdiv(M, config.blocks["ROWS"])
    programs = min(steps, multiprocessors(s) * config.blocks["PROGRAMS_PER_SM"])
    dtypes = [weight.dtype] if bias is None else [weight.dtype, bias.dtype]
    partials = torch.empty((len(dtypes), programs, C), dtype=torch.float32, device=s.device)
    with on_device(s):
        layer_norm_backward_kernel[(programs,)](
            dy_rows, others, rows, weight.contiguous(), stats, ds, partials, dy_rows.stride(0),
            0 if others is None else others.stride(0), rows.stride(0), M, C,
            triton.next_power_of_2(C), config.blocks["ROWS"], bias is not None, config.num_stages,
            **config.options,
        )  # fmt: skip
    sums = sum_partials(layer_norm_sum_kernel, partials, *dtypes)
    return ds, sums[0], None if bias is None else sums[1]
