"""The kernels of bias_gelu; the formulas are in op.py.

The programs of the backward pass loop over the rows of their columns and add up dbias, the sum of
dx over the rows, in registers (see `partials`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels.checks import refuse_interpreted_bf16
from fastgpt_kernels.launch import Config, arch_of, lookup, multiprocessors, on_device, row_view
from fastgpt_kernels.ops.gelu import configs
from fastgpt_kernels.partial_sums import add_partials, sum_partials


@triton.jit
def gate_and_slope(z, TANH: tl.constexpr):
    """(gate, dy/dz) of y = z * gate."""
    if TANH:
        # t = exp(-|2u|) as a power of two: the constants are 2 sqrt(2/pi) log2(e), and the same
        # times 0.044715. t is at most 1, so that 1 - s is exact too: t r if s is r.
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
def tanh_approx(u):
    """tanh in one instruction, sm_75 and later; off by a 2**-10.987th at most (PTX ISA, tanh)."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def gelu_and_slope(z, FORM: tl.constexpr):
    """(y, dy/dz) of y = gelu(z), z in fp32, FORM as `form_of` says."""
    if FORM == "tanh.approx":
        # u and u' as in op.py, t = tanh(u), s = (1 + t) / 2: dy/dz = s + 2 z u' (s - s t) / 2. The
        # error of t makes at most 0.00025 |z| in y. In dy/dz it is multiplied by 2 z u' / 2, which
        # grows without end while s - s t vanishes: cut at 7.5 it makes at most 0.0036.
        square = z * z
        minus_t = tanh_approx(z * tl.fma(square, -0.0356774081, -0.7978845608))
        s = tl.fma(minus_t, -0.5, 0.5)
        zu = tl.clamp(z * tl.fma(square, 0.1070322243, 0.7978845608), -7.5, 7.5)
        return z * s, tl.fma(zu, tl.fma(s, minus_t, s), s)
    else:
        gate, slope = gate_and_slope(z, FORM == "tanh")
        return z * gate, slope


@triton.jit
def bias_gelu_forward_kernel(
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
    y, _ = gelu_and_slope(z, FORM)
    tl.store(y_ptr + wide * C + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def bias_gelu_backward_kernel(
    dy_ptr,  # (M, C), rows dy_stride apart
    x_ptr,  # (M, C), rows x_stride apart
    bias_ptr,  # (C,) or None
    dx_ptr,  # (M, C) contiguous
    partials_ptr,  # (1, programs of a column, C) fp32, or None without bias
    dy_stride, x_stride, M,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, FORM: tl.constexpr,
    STAGES: tl.constexpr,  # above 1: the loop's loads are copied ahead through shared memory
):  # fmt: skip
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
        _, slope = gelu_and_slope(z, FORM)
        dx = dy.to(tl.float32) * slope
        tl.store(dx_ptr + wide * C + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if bias_ptr is not None:
            total += dx
    if bias_ptr is not None:
        dbias = tl.sum(total, axis=0)
        tl.store(partials_ptr + program * C + columns, dbias, mask=column_mask)


@triton.jit
def bias_gelu_sum_kernel(
    partials_ptr, out0_ptr, out1_ptr, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    add_partials(partials_ptr, out0_ptr, out1_ptr, P, C, BLOCK_P, BLOCK_C)


def form_of(tanh: bool, x: Tensor) -> str:
    """How a kernel computes gelu for x: "erf", "tanh", or "tanh.approx".

    The last has half the instructions and is for NVIDIA's GPUs and bf16, whose rounding alone is
    coarse enough to hide its error.
    """
    if tanh and x.dtype == torch.bfloat16 and arch_of(x).startswith("sm_"):
        return "tanh.approx"
    return "tanh" if tanh else "erf"


def _tile(config: Config, C: int) -> tuple[int, int]:
    """(ROWS, BLOCK_C) of the config, or as many elements in fewer columns for a narrow C."""
    rows, columns = config.blocks["ROWS"], config.blocks["BLOCK_C"]
    narrow = min(columns, triton.next_power_of_2(C))
    return rows * columns // narrow, narrow


def launch_forward(
    x: Tensor, bias: Tensor | None, tanh: bool, config: Config | None = None
) -> Tensor:
    refuse_interpreted_bf16("bias_gelu", x, bias)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows = row_view(x)
    M, C = rows.shape
    config = config or lookup(configs.FORWARD, arch_of(x), C)
    ROWS, BLOCK_C = _tile(config, C)
    with on_device(x):
        bias_gelu_forward_kernel[(triton.cdiv(M, ROWS) * triton.cdiv(C, BLOCK_C),)](
            rows, None if bias is None else bias.contiguous(), y, rows.stride(0), M,
            C, ROWS, BLOCK_C, form_of(tanh, x),
            **config.options,
        )  # fmt: skip
    return y


def launch_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, config: Config | None = None
) -> tuple[Tensor, Tensor | None]:
    """(dx, dbias); dbias None if there is no bias."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel() == 0:
        return dx, None if bias is None else torch.zeros_like(bias)
    rows, dy_rows = row_view(x), row_view(dy)
    M, C = rows.shape
    config = config or lookup(configs.BACKWARD, arch_of(x), C)
    ROWS, BLOCK_C = _tile(config, C)
    column_blocks = triton.cdiv(C, BLOCK_C)
    wanted = multiprocessors(x) * config.blocks["PROGRAMS_PER_SM"] // column_blocks
    programs = max(1, min(triton.cdiv(M, ROWS), wanted))
    partials = None
    if bias is not None:
        partials = torch.empty((1, programs, C), dtype=torch.float32, device=x.device)
    with on_device(x):
        bias_gelu_backward_kernel[(programs * column_blocks,)](
            dy_rows, rows, None if bias is None else bias.contiguous(), dx, partials,
            dy_rows.stride(0), rows.stride(0), M, C, ROWS, BLOCK_C, form_of(tanh, x),
            config.num_stages, **config.options,
        )  # fmt: skip
    if bias is None or partials is None:
        return dx, None
    return dx, sum_partials(bias_gelu_sum_kernel, partials, bias.dtype)[0]
