"""Sum per-program partial gradients: how the backward kernels reduce over rows without atomics.

A backward kernel loops over its share of the rows with sums in registers and writes them once, as
one fp32 row of `partials` (K, P, C): K parameters, P programs. One more launch adds the P rows.
The order of the additions is fixed by P alone, so the result is the same in every run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels._host import on_device
from fastgpt_kernels.specs import AotSpec

BLOCK_P, BLOCK_C = 64, 32  # 8 KB of partials in flight a program, and 128 contiguous bytes a row
NUM_WARPS = 4


@triton.jit
def _sum_partials(
    partials_ptr,  # (K, P, C) fp32
    out0_ptr,  # (C,)
    out1_ptr,  # (C,), unused where K is 1
    P,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    k = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    base = partials_ptr + k.to(tl.int64) * P * C
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, P, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        mask = (rows < P)[:, None] & (columns < C)[None, :]
        total += tl.load(base + rows[:, None] * C + columns[None, :], mask=mask, other=0.0)
    result = tl.sum(total, axis=0)
    if k == 0:
        tl.store(out0_ptr + columns, result.to(out0_ptr.dtype.element_ty), mask=columns < C)
    else:
        tl.store(out1_ptr + columns, result.to(out1_ptr.dtype.element_ty), mask=columns < C)


def sum_partials(partials: Tensor, *dtypes: torch.dtype) -> list[Tensor]:
    """`partials` (K, P, C) fp32 summed over P: K (1 or 2) tensors (C,), the k-th in dtypes[k]."""
    K, P, C = partials.shape
    outs = [torch.empty(C, dtype=dtype, device=partials.device) for dtype in dtypes]
    with on_device(partials):
        _sum_partials[(triton.cdiv(C, BLOCK_C), K)](
            partials, outs[0], outs[-1], P, C, BLOCK_P, BLOCK_C, num_warps=NUM_WARPS
        )
    return outs


def partials_aot_specs() -> Iterator[AotSpec]:
    """The reduction for parameters in fp32 and in bf16; one config on every architecture."""
    for dtype in ("fp32", "bf16"):
        yield AotSpec(
            name=f"sum_partials {dtype}",
            kernel=_sum_partials,
            signature={
                "partials_ptr": "*fp32",
                "out0_ptr": f"*{dtype}",
                "out1_ptr": f"*{dtype}",
                "P": "i32",
                "C": "i32",
            },
            constexprs={"BLOCK_P": BLOCK_P, "BLOCK_C": BLOCK_C},
            num_warps=NUM_WARPS,
            num_stages=1,
            divisible_by_16=("partials_ptr", "out0_ptr", "out1_ptr", "C"),
        )
