"""GELU of x + bias, the bias gradient included (Hendrycks & Gimpel, 2016).

    z = x + bias (not rounded)
    approximate="none"   y = z Phi(z)                Phi(z) = (1 + erf(z / sqrt 2)) / 2
    approximate="tanh"   y = z sigmoid(2u)           u = sqrt(2 / pi) (z + 0.044715 z^3)

since (1 + tanh u) / 2 = sigmoid(2u): one exponential, and no cancellation for negative z. The
derivatives are

    none   Phi(z) + z phi(z)                         phi(z) = exp(-z^2 / 2) / sqrt(2 pi)
    tanh   s + z s (1 - s) 2u'                       s = sigmoid(2u), u' = du/dz

x, y (..., C) in one dtype, bias (C,) in any; the arithmetic is fp32.
Bytes an element, 2-byte dtype: forward 4, backward 6. dbias, the sum of dx over the rows, is kept
in registers by the programs that compute dx, see `_partials`: no pass of its own.
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
from fastgpt_kernels._partials import sum_partials
from fastgpt_kernels.configs import BIAS_GELU_BACKWARD, BIAS_GELU_FORWARD, Config, lookup
from fastgpt_kernels.specs import AotSpec

# ---------------------------------------------------------------------------------------- kernels


@triton.jit
def _gate_and_slope(z, TANH: tl.constexpr):
    """(gate, dy/dz) of y = z * gate."""
    if TANH:
        # t = exp(-|2u|) as a power of two: the constants are 2 sqrt(2/pi) log2(e), and the same
        # times 0.044715. t is at most 1, and 1 - s is known to full precision: t r where s is r.
        square = z * z
        t = tl.exp2(-tl.abs(z) * (2.302208198 + 0.102943240 * square))
        r = 1.0 / (1.0 + t)
        gate = tl.where(z >= 0, r, t * r)
        # 2u' = 2 sqrt(2/pi) (1 + 3 * 0.044715 z^2)
        slope = gate + z * (t * r * r) * (1.595769122 + 0.214064487 * square)
    else:
        gate = 0.5 + 0.5 * tl.math.erf(z * 0.7071067811865476)
        slope = gate + z * 0.3989422804014327 * tl.exp2(z * z * -0.7213475204444817)
    return gate, slope


@triton.jit
def _forward_kernel(
    x_ptr,  # (M, C), rows x_stride apart
    bias_ptr,  # (C,) or None
    y_ptr,  # (M, C) contiguous
    x_stride,
    M,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TANH: tl.constexpr,
):
    column_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    rows = program // column_blocks * ROWS + tl.arange(0, ROWS)
    columns = program % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (rows < M)[:, None]
    if C % BLOCK_C != 0:
        mask = mask & (columns < C)[None, :]
    wide = rows.to(tl.int64)[:, None]
    z = tl.load(x_ptr + wide * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    gate, _ = _gate_and_slope(z, TANH)
    tl.store(y_ptr + wide * C + columns[None, :], (z * gate).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr,  # (M, C), rows dy_stride apart
    x_ptr,  # (M, C), rows x_stride apart
    bias_ptr,  # (C,) or None
    dx_ptr,  # (M, C) contiguous
    partials_ptr,  # (1, programs of a column, C) fp32, or None without bias
    dy_stride,
    x_stride,
    M,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TANH: tl.constexpr,
    STAGES: tl.constexpr,  # above 1: the loop's loads are copied ahead through shared memory
):
    column_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program, programs = tl.program_id(0) // column_blocks, tl.num_programs(0) // column_blocks
    columns = tl.program_id(0) % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    column_mask = columns < C
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
        # One sum a tile element: warps lie along the rows, and meet once, after the loop.
        total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in tl.range(program * ROWS, M, programs * ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < M)[:, None]
        if C % BLOCK_C != 0:
            mask = mask & column_mask[None, :]
        wide = rows.to(tl.int64)[:, None]
        z = tl.load(x_ptr + wide * x_stride + columns[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + wide * dy_stride + columns[None, :], mask=mask, other=0.0)
        z = z.to(tl.float32)
        if bias_ptr is not None:
            z += bias[None, :]
        _, slope = _gate_and_slope(z, TANH)
        dx = dy.to(tl.float32) * slope
        tl.store(dx_ptr + wide * C + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if bias_ptr is not None:
            total += dx
    if bias_ptr is not None:
        dbias = tl.sum(total, axis=0)
        tl.store(partials_ptr + program * C + columns, dbias, mask=column_mask)


# -------------------------------------------------------------------------------------- launchers


def _tile(config: Config, C: int) -> tuple[int, int]:
    """(ROWS, BLOCK_C) of the config, or as many elements in fewer columns for a narrow C."""
    rows, columns = config.blocks["ROWS"], config.blocks["BLOCK_C"]
    narrow = min(columns, triton.next_power_of_2(C))
    return rows * columns // narrow, narrow


def _forward(x: Tensor, bias: Tensor | None, tanh: bool, config: Config | None = None) -> Tensor:
    refuse_interpreted_bf16("bias_gelu", x, bias)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows = row_view(x)
    M, C = rows.shape
    config = config or lookup(BIAS_GELU_FORWARD, arch_of(x), C)
    ROWS, BLOCK_C = _tile(config, C)
    with on_device(x):
        _forward_kernel[(triton.cdiv(M, ROWS) * triton.cdiv(C, BLOCK_C),)](
            rows,
            None if bias is None else bias.contiguous(),
            y,
            rows.stride(0),
            M,
            C,
            ROWS,
            BLOCK_C,
            tanh,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y


def _backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, config: Config | None = None
) -> tuple[Tensor, Tensor | None]:
    """(dx, dbias); dbias None where there is no bias."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel() == 0:
        return dx, None if bias is None else torch.zeros_like(bias)
    rows, dy_rows = row_view(x), row_view(dy)
    M, C = rows.shape
    config = config or lookup(BIAS_GELU_BACKWARD, arch_of(x), C)
    ROWS, BLOCK_C = _tile(config, C)
    column_blocks = triton.cdiv(C, BLOCK_C)
    wanted = multiprocessors(x) * config.blocks["PROGRAMS_PER_SM"] // column_blocks
    programs = max(1, min(triton.cdiv(M, ROWS), wanted))
    partials = None
    if bias is not None:
        partials = torch.empty((1, programs, C), dtype=torch.float32, device=x.device)
    with on_device(x):
        _backward_kernel[(programs * column_blocks,)](
            dy_rows,
            rows,
            None if bias is None else bias.contiguous(),
            dx,
            partials,
            dy_rows.stride(0),
            rows.stride(0),
            M,
            C,
            ROWS,
            BLOCK_C,
            tanh,
            config.num_stages,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    if bias is None or partials is None:
        return dx, None
    return dx, sum_partials(partials, bias.dtype)[0]


# --------------------------------------------------------------------------------- registered ops


@torch.library.custom_op("fastgpt::bias_gelu", mutates_args=())
def _op(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    return _forward(x, bias, tanh)


@_op.register_fake
def _(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("fastgpt::bias_gelu_backward", mutates_args=())
def _backward_op(dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    dx, dbias = _backward(dy, x, bias, tanh)
    return dx, x.new_empty(0) if dbias is None else dbias


@_backward_op.register_fake
def _(dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.tanh = inputs
    ctx.save_for_backward(x, bias)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients for (x, bias, tanh), from the registered op or straight from the launcher."""
    x, bias = ctx.saved_tensors
    backward = _backward if call_directly(dy, x) else _backward_op
    dx, dbias = backward(dy, x, bias, ctx.tanh)
    return dx, None if bias is None else dbias, None


_op.register_autograd(_gradients, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The same as the registered op, without its cost a call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        y = _forward(*inputs)
        _setup_context(ctx, inputs, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _gradients(ctx, dy)


# --------------------------------------------------------------------------------- public function


def bias_gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """GELU of x + bias: x (..., C) in bf16, fp16 or fp32, bias (C,) in any of them or None.

    approximate is "tanh" (GPT-2's) or "none" (by erf), as in `torch.nn.functional.gelu`. The result
    has x's shape and dtype, contiguous; bias's gradient comes in bias's dtype. Leave the bias out
    of the linear layer before: `bias_gelu(F.linear(x, weight), bias)`.
    Raises TypeError or ValueError for arguments that do not fit.
    """
    check_tensor("bias_gelu", "x", x, dtypes=FLOAT_DTYPES)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"bias_gelu: x must have shape (..., C) with C >= 1, got {tuple(x.shape)}")
    if bias is not None:
        check_tensor(
            "bias_gelu", "bias", bias, shape=x.shape[-1:], dtypes=FLOAT_DTYPES, device=x.device
        )
    if approximate not in ("tanh", "none"):
        raise ValueError(f"bias_gelu: approximate must be 'tanh' or 'none', got {approximate!r}")
    if not use_kernel(x):
        return reference.bias_gelu(x, bias, approximate)
    if call_directly(x, bias):
        return _Direct.apply(x, bias, approximate == "tanh")
    return _op(x, bias, approximate == "tanh")


# ----------------------------------------------------------------------------- for aot and for tune


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """Both kernels, tanh and erf, at GPT-2's 4 * 768, with a bf16 bias; without one for tanh."""
    C = 3072
    for tanh, has_bias in ((True, True), (False, True), (True, False)):
        name = f"bias_gelu {{}} {'tanh' if tanh else 'erf'}{'' if has_bias else ' no bias'}"
        pointers = ["x_ptr", "y_ptr"] + ["bias_ptr"] * has_bias
        config = lookup(BIAS_GELU_FORWARD, arch, C)
        tile = {"C": C, "TANH": tanh, "ROWS": config.blocks["ROWS"]}
        yield AotSpec(
            name=name.format("forward"),
            kernel=_forward_kernel,
            signature=dict.fromkeys(pointers, "*bf16") | {"x_stride": "i32", "M": "i32"},
            constexprs=tile
            | {"BLOCK_C": config.blocks["BLOCK_C"]}
            | ({} if has_bias else {"bias_ptr": None}),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            divisible_by_16=(*pointers, "x_stride", "M"),
        )
        pointers = ["dy_ptr", "x_ptr", "dx_ptr"] + ["bias_ptr"] * has_bias
        partials = {"partials_ptr": "*fp32"} if has_bias else {}
        integers = ["dy_stride", "x_stride", "M"]
        config = lookup(BIAS_GELU_BACKWARD, arch, C)
        tile = {"C": C, "TANH": tanh, "ROWS": config.blocks["ROWS"]}
        yield AotSpec(
            name=name.format("backward"),
            kernel=_backward_kernel,
            signature=dict.fromkeys(pointers, "*bf16") | dict.fromkeys(integers, "i32") | partials,
            constexprs=tile
            | {"BLOCK_C": config.blocks["BLOCK_C"], "STAGES": config.num_stages}
            | ({} if has_bias else {"bias_ptr": None, "partials_ptr": None}),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            divisible_by_16=(*pointers, *partials, *integers),
        )
