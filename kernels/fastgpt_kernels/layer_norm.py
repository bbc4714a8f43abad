"""Layer normalisation, alone or with the residual addition before it (Ba et al., 2016).

    s = x + residual                    (add_layer_norm only; rounded to x's dtype, returned)
    y = (s - mean(s)) * rstd * weight + bias          rstd = 1 / sqrt(var(s) + eps), var over 1/C

x, residual, y, s (..., C) in one dtype; weight, bias (C,) in any; mean and rstd in fp32.
With xhat = (s - mean) * rstd and g = dy * weight the gradients are

    ds = rstd * (g - mean(g) - xhat * mean(g * xhat)) + d_residual_out        for x and residual
    dweight = sum over rows of dy * xhat, dbias = sum over rows of dy

Bytes an element, 2-byte dtype: forward 4, with the addition 8; backward 6, with the addition 8.
Every tensor is read once: a row stays in registers while its statistics are computed. dweight and
dbias are summed in registers over the rows a program visits, see `_partials`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgpt_kernels import reference
from fastgpt_kernels._host import (
    FLOAT_DTYPES,
    arch_of,
    call_directly,
    check_tensor,
    multiprocessors,
    on_device,
    refuse_interpreted_bf16,
    row_view,
    use_kernel,
)
from fastgpt_kernels._partials import partials_aot_specs, sum_partials
from fastgpt_kernels.configs import (
    LAYER_NORM_BACKWARD,
    LAYER_NORM_FORWARD,
    Config,
    lookup,
)
from fastgpt_kernels.specs import AotSpec

MAX_WIDTH = 8192  # a row, and in the backward its share of dweight and dbias, live in registers

# ---------------------------------------------------------------------------------------- kernels


@triton.jit
def _load_rows(ptr, stride, rows, columns, mask):
    """A tile of rows in fp32, zeros where masked; int64 offsets, for tensors past 2^31 elements."""
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
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
def _backward_kernel(
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


# -------------------------------------------------------------------------------------- launchers


def _forward(
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
        _forward_kernel[(triton.cdiv(M, config.blocks["ROWS"]),)](
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


def _backward(
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
        _backward_kernel[(programs,)](
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


# --------------------------------------------------------------------------------- registered ops


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """Registered ops return tensors only: an empty one stands for None."""
    return like.new_empty(0) if x is None else x


@torch.library.custom_op("fastgpt::layer_norm", mutates_args=())
def _op(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, residual_out, stats = _forward(x, residual, weight, bias, eps)
    return y, _or_empty(residual_out, x), stats


@_op.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    residual_out = x.new_empty(0 if residual is None else x.shape)
    stats = x.new_empty((2, x.numel() // x.shape[-1]), dtype=torch.float32)
    return x.new_empty(x.shape), residual_out, stats


@torch.library.custom_op("fastgpt::layer_norm_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    d_residual_out: Tensor | None,
    s: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    ds, dweight, dbias = _backward(dy, d_residual_out, s, weight, bias, stats)
    return ds, dweight, _or_empty(dbias, weight)


@_backward_op.register_fake
def _(
    dy: Tensor,
    d_residual_out: Tensor | None,
    s: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return s.new_empty(s.shape), weight.new_empty(weight.shape), dbias


def _gradients(
    ctx: Any, dy: Tensor | None, d_residual_out: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients for (x, residual, weight, bias, eps), from the registered op or straight."""
    s, weight, bias, stats = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(s)
    backward = _backward if call_directly(dy, d_residual_out, s) else _backward_op
    ds, dweight, dbias = backward(dy, d_residual_out, s, weight, bias, stats)
    return ds, ds if ctx.has_residual else None, dweight, None if bias is None else dbias, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, residual, weight, bias, _ = inputs
    _, residual_out, stats = output
    ctx.set_materialize_grads(False)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(residual_out if ctx.has_residual else x, weight, bias, stats)


def _op_backward(
    ctx: Any, dy: Tensor | None, d_residual_out: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, dy, d_residual_out if ctx.has_residual else None)


_op.register_autograd(_op_backward, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The same as the registered op, without its cost a call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        y, residual_out, stats = _forward(*inputs)
        _setup_context(ctx, inputs, (y, residual_out, stats))
        return (y, residual_out) if ctx.has_residual else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_residual_out: Tensor | None = None) -> Any:
        return _gradients(ctx, dy, d_residual_out)


# --------------------------------------------------------------------------------- public functions


def _check(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None
) -> None:
    check_tensor(op, "x", x, dtypes=FLOAT_DTYPES)
    if x.ndim == 0 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(
            f"{op}: x must have shape (..., C) with 1 <= C <= {MAX_WIDTH}, got {tuple(x.shape)}"
        )
    if residual is not None:
        check_tensor(op, "residual", residual, shape=x.shape, dtypes=(x.dtype,), device=x.device)
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None or name == "weight":
            check_tensor(op, name, p, shape=x.shape[-1:], dtypes=FLOAT_DTYPES, device=x.device)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Normalise the last dimension of x (..., C), then scale by weight and shift by bias (C,).

    y has x's shape and dtype (bf16, fp16, fp32), contiguous; statistics are fp32. weight and bias
    may be in another dtype than x, such as fp32 masters; their gradients come in their own dtype.
    C from 1 to 8192. Raises TypeError or ValueError for arguments that do not fit.
    """
    _check("layer_norm", x, None, weight, bias)
    if not use_kernel(x):
        return reference.layer_norm(x, weight, bias, eps)
    if call_directly(x, weight, bias):
        return _Direct.apply(x, None, weight, bias, eps)
    return _op(x, None, weight, bias, eps)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(y, residual_out): residual_out = x + residual, y = layer_norm(residual_out), in one pass.

    x and residual (..., C) in the same dtype, which both results have. The backward pass adds the
    gradients that arrive through y and residual_out in one kernel; x and residual get the same
    tensor. Everything else as in `layer_norm`.
    """
    check_tensor("add_layer_norm", "residual", residual)
    _check("add_layer_norm", x, residual, weight, bias)
    if not use_kernel(x):
        return reference.add_layer_norm(x, residual, weight, bias, eps)
    if call_directly(x, residual, weight, bias):
        return _Direct.apply(x, residual, weight, bias, eps)
    y, residual_out, _ = _op(x, residual, weight, bias, eps)
    return y, residual_out


# ----------------------------------------------------------------------------- for aot and for tune


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
            kernel=_forward_kernel,
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
            kernel=_backward_kernel,
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
