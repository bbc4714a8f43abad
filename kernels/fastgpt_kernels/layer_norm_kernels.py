"""The kernels of layer_norm and add_layer_norm; the formulas are in layer_norm.py.

A row stays in registers while its statistics are computed, so every tensor is read once. The
backward's programs loop over the rows with dweight and dbias in registers, see `_partials`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import reference
from fastgpt_kernels._host import (
    arch_of,
    multiprocessors,
    on_device,
    refuse_interpreted_bf16,
    row_view,
)
from fastgpt_kernels._partials import partials_aot_specs, sum_partials
from fastgpt_kernels.configs import (
    LAYER_NORM_BACKWARD,
    LAYER_NORM_FORWARD,
    Config,
    entries,
    lookup,
)
from fastgpt_kernels.specs import AotSpec, Tunable


@triton.jit
def _load_rows(ptr, stride, rows, columns, mask):
    """A tile of rows in fp32, zeros where masked; int64 offsets, for tensors past 2^31 elements."""
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    x_ptr,  # (M, C), rows x_stride apart
    residual_ptr,  # (M, C), rows residual_stride apart, or None
    weight_ptr,  # (C,)
    bias_ptr,  # (C,) or None
    y_ptr,  # (M, C) contiguous
    sum_ptr,  # (M, C) contiguous: x + residual; None without residual
    stats_ptr,  # (2, M) fp32: mean, rstd
    x_stride,
    residual_stride,
    M,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,  # C rounded up to a power of two
    ROWS: tl.constexpr,  # rows of one program
):
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
def backward_kernel(
    dy_ptr,  # (M, C), rows dy_stride apart
    d_sum_ptr,  # (M, C), rows d_sum_stride apart: gradient of residual_out, or None
    s_ptr,  # (M, C), rows s_stride apart: what was normalised
    weight_ptr,  # (C,)
    stats_ptr,  # (2, M) fp32: mean, rstd
    dx_ptr,  # (M, C) contiguous
    partials_ptr,  # (1 or 2, programs, C) fp32: dweight, then dbias
    dy_stride,
    d_sum_stride,
    s_stride,
    M,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,  # C rounded up to a power of two
    ROWS: tl.constexpr,  # rows of one step of the loop
    HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,  # above 1: the loop's loads are copied ahead through shared memory
):
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


def launch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
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
    config = config or lookup(LAYER_NORM_FORWARD, arch_of(x), C)
    with on_device(x):
        forward_kernel[(triton.cdiv(M, config.blocks["ROWS"]),)](
            rows,
            others,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            residual_out,
            stats,
            rows.stride(0),
            0 if others is None else others.stride(0),
            M,
            eps,
            C,
            triton.next_power_of_2(C),
            **config.kwargs(),
        )
    return y, residual_out, stats


def launch_backward(
    dy: Tensor,
    d_residual_out: Tensor | None,
    s: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stats: Tensor,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(ds, dweight, dbias) for the normalised tensor s; dbias None where there is no bias."""
    C = s.shape[-1]
    rows, dy_rows = row_view(s), row_view(dy)
    M = rows.shape[0]
    ds = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    if M == 0:
        return ds, torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
    others = None if d_residual_out is None else row_view(d_residual_out)
    config = config or lookup(LAYER_NORM_BACKWARD, arch_of(s), C)
    steps = triton.cdiv(M, config.blocks["ROWS"])
    programs = min(steps, multiprocessors(s) * config.blocks["PROGRAMS_PER_SM"])
    dtypes = [weight.dtype] if bias is None else [weight.dtype, bias.dtype]
    partials = torch.empty((len(dtypes), programs, C), dtype=torch.float32, device=s.device)
    with on_device(s):
        backward_kernel[(programs,)](
            dy_rows,
            others,
            rows,
            weight.contiguous(),
            stats,
            ds,
            partials,
            dy_rows.stride(0),
            0 if others is None else others.stride(0),
            rows.stride(0),
            M,
            C,
            triton.next_power_of_2(C),
            config.blocks["ROWS"],
            bias is not None,
            config.num_stages,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    sums = sum_partials(partials, *dtypes)
    return ds, sums[0], None if bias is None else sums[1]


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """Both kernels at a width of every config; bf16 activations, fp32 parameters.

    The fused ones hold the most registers and so stand for the plain ones, except at GPT-2's 768.
    """
    yield from partials_aot_specs()
    for C, fused in ((256, 1), (512, 1), (768, 0), (768, 1), (1600, 1), (4096, 1), (8192, 1)):
        name = f"{'add_' if fused else ''}layer_norm {{}} C={C}"
        block = triton.next_power_of_2(C)
        config = lookup(LAYER_NORM_FORWARD, arch, C)
        pointers = ["x_ptr", "y_ptr"] + ["residual_ptr", "sum_ptr"] * fused
        floats = ["weight_ptr", "bias_ptr", "stats_ptr"]
        strides = ["x_stride", "residual_stride"]
        yield AotSpec(
            name=name.format("forward"),
            kernel=forward_kernel,
            signature=dict.fromkeys(pointers, "*bf16")
            | dict.fromkeys(floats, "*fp32")
            | dict.fromkeys((*strides, "M"), "i32")
            | {"eps": "fp32"},
            constexprs={"C": C, "BLOCK_C": block, **config.blocks}
            | ({} if fused else {"residual_ptr": None, "sum_ptr": None}),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            divisible_by_16=(*pointers, *floats, *strides, "M"),
        )
        config = lookup(LAYER_NORM_BACKWARD, arch, C)
        pointers = ["dy_ptr", "s_ptr", "dx_ptr"] + ["d_sum_ptr"] * fused
        floats = ["weight_ptr", "stats_ptr", "partials_ptr"]
        strides = ["dy_stride", "d_sum_stride", "s_stride"]
        yield AotSpec(
            name=name.format("backward"),
            kernel=backward_kernel,
            signature=dict.fromkeys(pointers, "*bf16")
            | dict.fromkeys(floats, "*fp32")
            | dict.fromkeys((*strides, "M"), "i32"),
            constexprs={"C": C, "BLOCK_C": block, "ROWS": config.blocks["ROWS"]}
            | {"HAS_BIAS": True, "STAGES": config.num_stages}
            | ({} if fused else {"d_sum_ptr": None}),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            divisible_by_16=(*pointers, *floats, *strides, "M"),
        )


def tunables(arch: str) -> Iterator[Tunable]:
    """Both tables, with the residual addition: 50 million elements in bf16, fp32 parameters."""

    def forward(x: tuple[Any, ...], config: Config) -> tuple[Tensor, ...]:
        y, residual_out, _ = launch_forward(x[0], x[1], x[2], x[3], 1e-5, config)
        assert residual_out is not None
        return y, residual_out

    def forward_reference(x: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return reference.add_layer_norm(*x[:4])

    def backward(x: tuple[Any, ...], config: Config) -> tuple[Tensor, ...]:
        dy, d_residual_out, weight, bias, s, stats = x
        ds, dweight, dbias = launch_backward(dy, d_residual_out, s, weight, bias, stats, config)
        assert dbias is not None
        return ds, dweight, dbias

    def backward_reference(x: tuple[Any, ...]) -> tuple[Tensor, ...]:
        dy, d_residual_out, *leaves = x[0].float(), x[1].float(), x[4].float(), x[2], x[3]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        y = reference.layer_norm(*leaves)
        ds, dweight, dbias = torch.autograd.grad(y, leaves, dy)
        return ds + d_residual_out, dweight, dbias

    for key in entries(LAYER_NORM_FORWARD, arch):
        C = {1024: 768, 2048: 1600}.get(key, key)

        def inputs(device: torch.device, C: int = C) -> tuple[Tensor, ...]:
            """x and residual, or the gradients of both results; parameters; what forward saves."""
            rows = (50 << 20) // C
            x, residual = torch.randn((2, rows, C), device=device).bfloat16()
            weight, bias = torch.randn((2, C), device=device)
            _, s, stats = launch_forward(x, residual, weight, bias, 1e-5)
            assert s is not None
            return x, residual, weight, bias, s, stats

        candidates = [
            Config({"ROWS": rows}, warps)
            for rows in (1, 2, 4, 8, 16, 32)
            for warps in (1, 2, 4, 8, 16)
            if 4 <= rows * key // (32 * warps) <= 64
        ]
        yield Tunable("LAYER_NORM_FORWARD", key, candidates, inputs, forward, forward_reference)
        candidates = [
            Config({"ROWS": rows, "PROGRAMS_PER_SM": programs}, warps, stages)
            for rows in (1, 2, 4, 8)
            for warps in (1, 2, 4, 8, 16)
            for programs in (1, 2, 4, 6, 8, 12, 16)
            for stages in (1, 2)
            if 8 <= rows * key // (32 * warps) <= 32 and 12 <= warps * programs <= 32
        ]
        yield Tunable("LAYER_NORM_BACKWARD", key, candidates, inputs, backward, backward_reference)
