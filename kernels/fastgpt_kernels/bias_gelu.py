"""GELU of x + bias, with the bias's gradient summed as dx is computed (Hendrycks, Gimpel 2016).

    z = x + bias, not rounded                x and y (..., C), bias (C,) or None
    erf    y = z Phi(z)                      Phi(z) = (1 + erf(z / sqrt 2)) / 2
    tanh   y = z s,  s = sigmoid(2u)         u = sqrt(2 / pi) (z + 0.044715 z^3)
    dx = dy * (Phi(z) + z phi(z))   or   dy * (s + z s (1 - s) 2u'),   dbias = sum of dx over rows

All arithmetic is fp32. s is (1 + tanh u) / 2 without its cancellation for negative z. In bf16 tanh
is the GPU's approximation. Bytes per element in 16 bits: 4 forward, 6 backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import launch, reference
from fastgpt_kernels.checks import check_tensor, refuse_interpreted_bf16
from fastgpt_kernels.launch import Config, Table, lookup, tl, triton
from fastgpt_kernels.library import define_op, tensors_only
from fastgpt_kernels.registry import ExampleInputs, OpSpec, Random, Sizes, implementations, traffic

# --- Launch configs ---------------------------------------------------------------------------

# Key: the width C, though one config serves all. A tile is ROWS x BLOCK_C. A program computes one
# of them forward, and loops over a column of them backward, where PROGRAMS_PER_SM fit an SM
# together. 8 elements of a row per thread are one 128-bit access in 16 bits. 256 divides 4C of
# every GPT-2.
# Both measured 2026-11-26, H200: 96 and 157 µs at 3072.
FORWARD: Table = {"default": {1 << 31: Config({"ROWS": 8, "BLOCK_C": 256}, num_warps=4)}}
BACKWARD: Table = {
    "default": {1 << 31: Config({"ROWS": 8, "BLOCK_C": 256, "PROGRAMS_PER_SM": 5}, 4, num_stages=2)}
}

# --- Kernels ----------------------------------------------------------------------------------


@triton.jit
def tanh_approx(u):
    """Returns tanh by one instruction, with a relative error of at most 2**-10.987 (PTX ISA)."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def gelu_and_slope(z, FORM: tl.constexpr):
    """Returns y = gelu(z) and dy/dz for z in fp32 and a FORM of `form_of`."""
    if FORM == "tanh.approx":
        # t = tanh(u), s = (1 + t) / 2, dy/dz = s + 2 z u' (s - s t) / 2. The error of t makes at
        # most 0.00025 |z| in y. In dy/dz its factor z u' grows without bound while s - s t
        # vanishes. Clamped at 7.5 it makes at most 0.0036.
        square = z * z
        minus_t = tanh_approx(z * tl.fma(square, -0.0356774081, -0.7978845608))
        s = tl.fma(minus_t, -0.5, 0.5)
        zu = tl.clamp(z * tl.fma(square, 0.1070322243, 0.7978845608), -7.5, 7.5)
        return z * s, tl.fma(zu, tl.fma(s, minus_t, s), s)
    elif FORM == "tanh":
        # t = exp(-|2u|) as a power of two. The constants are 2 sqrt(2/pi) log2(e), and the same
        # times 0.044715. t is at most 1, so 1 - s is exact too (t r if s is r).
        square = z * z
        t = tl.exp2(-tl.abs(z) * (2.302208198 + 0.102943240 * square))
        r = 1.0 / (1.0 + t)
        s = tl.where(z >= 0, r, t * r)
        # 2u' = 2 sqrt(2/pi) (1 + 3 * 0.044715 z^2)
        return z * s, s + z * (t * r * r) * (1.595769122 + 0.214064487 * square)
    else:
        gate = 0.5 + 0.5 * tl.math.erf(z * 0.7071067811865476)
        return z * gate, gate + z * 0.3989422804014327 * tl.exp2(z * z * -0.7213475204444817)


@triton.jit
def bias_gelu_fwd_kernel(
    x_ptr,  # (M, C), rows x_stride apart
    bias_ptr,  # (C,) or None
    y_ptr,  # (M, C) contiguous
    x_stride, M,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
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
    y, _ = gelu_and_slope(z, FORM)  # [ROWS, BLOCK_C]
    tl.store(y_ptr + wide * C + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def bias_gelu_bwd_kernel(
    dy_ptr,  # (M, C), rows dy_stride apart
    x_ptr,  # (M, C), rows x_stride apart
    bias_ptr,  # (C,) or None
    dx_ptr,  # (M, C) contiguous
    partials_ptr,  # (programs of a column, C) fp32, empty without bias
    dy_stride, x_stride, M,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, FORM: tl.constexpr,
    STAGES: tl.constexpr,  # above 1 the loop's loads are copied ahead through shared memory
):  # fmt: skip
    column_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program, programs = tl.program_id(0) // column_blocks, tl.num_programs(0) // column_blocks
    columns = tl.program_id(0) % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    column_mask = columns < C
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
        # One sum per element of a tile: warps lie along the rows and exchange after the loop.
        total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in tl.range(program * ROWS, M, programs * ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < M)[:, None]
        if C % BLOCK_C != 0:
            mask = mask & column_mask[None, :]
        wide = rows.to(tl.int64)[:, None]
        z = tl.load(x_ptr + wide * x_stride + columns[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + wide * dy_stride + columns[None, :], mask=mask, other=0.0)
        z = z.to(tl.float32)  # [ROWS, BLOCK_C]
        if bias_ptr is not None:
            z += bias[None, :]
        _, slope = gelu_and_slope(z, FORM)
        dx = dy.to(tl.float32) * slope
        tl.store(dx_ptr + wide * C + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if bias_ptr is not None:
            total += dx
    if bias_ptr is not None:
        dbias = tl.sum(total, axis=0)
        tl.store(partials_ptr + program * C + columns, dbias, mask=column_mask)


# --- Launchers --------------------------------------------------------------------------------


def form_of(tanh: bool, x: Tensor) -> str:
    """Returns how a kernel computes gelu of x: "erf", "tanh" or "tanh.approx".

    The last has half the instructions, and an error below the rounding to bf16.
    """
    if tanh and x.dtype == torch.bfloat16 and launch.arch_of(x).startswith("sm_"):
        return "tanh.approx"
    return "tanh" if tanh else "erf"


def _forward(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """Launches the forward kernel; returns y."""
    refuse_interpreted_bf16("bias_gelu", x, bias)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows, stride = launch.rows_and_stride(x)
    C = x.shape[-1]
    M = x.numel() // C
    config = lookup(FORWARD, launch.arch_of(x), C)
    grid = triton.cdiv(M, config.blocks["ROWS"]) * triton.cdiv(C, config.blocks["BLOCK_C"])
    with launch.on_device(x):
        bias_gelu_fwd_kernel[(grid,)](
            rows, launch.contiguous(bias), y, stride, M, C, FORM=form_of(tanh, x), **config.kwargs()
        )
    return y


def _backward(dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    """Launches the backward kernel; returns dx and dbias, which is empty without a bias."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel() == 0:
        return tensors_only(dx, None if bias is None else torch.zeros_like(bias))
    (rows, stride), (dy_rows, dy_stride) = map(launch.rows_and_stride, (x, dy))
    C = x.shape[-1]
    M = x.numel() // C
    config = lookup(BACKWARD, launch.arch_of(x), C)
    ROWS, BLOCK_C = config.blocks["ROWS"], config.blocks["BLOCK_C"]
    column_blocks = triton.cdiv(C, BLOCK_C)
    wanted = launch.multiprocessors(x) * config.blocks["PROGRAMS_PER_SM"] // column_blocks
    programs = max(1, min(triton.cdiv(M, ROWS), wanted))
    shape = (0 if bias is None else programs, C)
    partials = torch.empty(shape, dtype=torch.float32, device=x.device)
    with launch.on_device(x):
        bias_gelu_bwd_kernel[(programs * column_blocks,)](
            dy_rows, rows, launch.contiguous(bias), dx, partials,
            dy_stride, stride, M, C, ROWS, BLOCK_C, form_of(tanh, x),
            config.num_stages, **config.options,
        )  # fmt: skip
    return tensors_only(dx, None if bias is None else partials.sum(0).to(bias.dtype))


# --- Registration -----------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.tanh = inputs
    ctx.save_for_backward(x, bias)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _backward_op(dy, *ctx.saved_tensors, ctx.tanh)


_backward_op = define_op(
    "bias_gelu_backward", _backward,
    lambda dy, x, bias, tanh: tensors_only(
        x.new_empty(x.shape), None if bias is None else bias.new_empty(bias.shape)
    ),
)  # fmt: skip
_op = define_op(
    "bias_gelu", _forward, lambda x, bias, tanh: x.new_empty(x.shape),
    setup_context=_setup_context, backward=_gradients,
)  # fmt: skip


def bias_gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """Returns gelu(x + bias): x (..., C) in bf16, fp16 or fp32, bias (C,) in any of them or None.

    approximate is "tanh" (GPT-2's) or "none" (by erf), as in `torch.nn.functional.gelu`. The result
    has x's shape and dtype and is contiguous. The bias's gradient has the bias's dtype. The linear
    layer before goes without its bias: `bias_gelu(F.linear(x, weight), bias)`.

    Raises TypeError or ValueError for arguments that do not fit.
    """
    check_tensor("bias_gelu", "x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"bias_gelu: x must have shape (..., C) with C >= 1, got {tuple(x.shape)}")
    check_tensor("bias_gelu", "bias", bias, shape=x.shape[-1:], like=x, optional=True)
    if approximate not in ("tanh", "none"):
        raise ValueError(f"bias_gelu: approximate must be 'tanh' or 'none', got {approximate!r}")
    if not launch.use_kernel(x):
        return reference.bias_gelu(x, bias, approximate)
    return _op(x, bias, approximate == "tanh")


def _example_inputs(s: Sizes, random: Random) -> list[ExampleInputs]:
    inputs = [random(s.tokens, 4 * s.n_embd), random(4 * s.n_embd) if s.bias else None]
    return [ExampleInputs(inputs, {"approximate": s.approximate}, fp32_inputs=(1,))]


SPECS = {
    "bias_gelu": OpSpec(
        "bias_gelu", implementations(reference.bias_gelu, bias_gelu), _example_inputs,
        traffic(2, 3, width=4),
        kernels=tuple(f"bias_gelu_{part}_kernel" for part in ("fwd", "bwd")),
        category="memory", label="GELU", calls_per_step=12,
    )
}  # fmt: skip
