"""Sum per-program partial gradients: how the backward kernels reduce over rows without atomics.

A backward kernel loops over its share of the rows with sums in registers and writes them once, as
one fp32 row of `partials` (K, P, C): K parameters, P programs. One more launch adds the P rows.
The order of the additions is fixed by P alone, so the result is the same in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels.configs import options
from fastgpt_kernels.host import on_device

BLOCK_P, BLOCK_C = 64, 32  # 8 KB of partials in flight a program, and 128 contiguous bytes a row
NUM_WARPS = 4


@triton.jit
def add_partials(
    partials_ptr,  # (K, P, C) fp32
    out0_ptr, out1_ptr,  # (C,); the second is not used if K is 1
    P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
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


def sum_partials(kernel: Any, partials: Tensor, *dtypes: torch.dtype) -> list[Tensor]:
    """`partials` (K, P, C) fp32 summed over P: K (1 or 2) tensors (C,), the k-th in dtypes[k].

    `kernel` is `add_partials` under the name of the op that asks, for profiles.
    """
    K, P, C = partials.shape
    outs = [torch.empty(C, dtype=dtype, device=partials.device) for dtype in dtypes]
    with on_device(partials):
        kernel[(triton.cdiv(C, BLOCK_C), K)](
            partials, outs[0], outs[-1], P, C, BLOCK_P, BLOCK_C, **options(NUM_WARPS)
        )
    return outs
