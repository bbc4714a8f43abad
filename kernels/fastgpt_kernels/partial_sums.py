"""Partial sums: how a backward kernel reduces over rows without atomic sums.

Its programs keep sums of their share of the rows in registers and write them once, as one fp32 row
of `partials`. The last program of the kernel to end adds the rows up. The order of the additions is
fixed by the number of programs, so the result is the same in every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt_kernels.launch import tl, triton

# Programs are added up by groups, and then the groups, so that the last one, which has an SM alone,
# reads a few hundred KB. One counter counts the groups, and one the programs of each.
GROUP: tl.constexpr = tl.constexpr(16)
COUNTERS = 256
MAX_PROGRAMS = 16 * (COUNTERS - 1)


def empty_partials(programs: int, width: int, device: torch.device) -> Tensor:
    """Returns memory for `add_partials_at_last`: a row per program, and one per group."""
    rows = programs + triton.cdiv(programs, 16)
    return torch.empty((rows, width), dtype=torch.float32, device=device)


def sum_columns(num_warps: int) -> int:
    """Returns BLOCK_C of `add_partials_at_last`: 64 registers per thread, of 16 warps 32."""
    return min(128 * num_warps, 1024)


@triton.jit
def _last_of(counter_ptr, count):
    """True in the last of `count` programs to ask, which sees all that they have written.

    No program waits for another. The counter is 0 before and after.
    """
    tl.debug_barrier()  # all threads have written: what the atomic below, by one of them, publishes
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def _add_rows(
    rows_ptr,  # (P, K C) fp32
    out0_ptr, out1_ptr, out2_ptr,  # (C,): K of them, the others None
    P, C: tl.constexpr, K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    for first in range(0, K * C, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for start in range(0, P, BLOCK_P):
            rows = start + tl.arange(0, BLOCK_P)
            mask = (rows < P)[:, None] & (columns < K * C)[None, :]
            offsets = rows[:, None] * (K * C) + columns[None, :]
            # Other SMs wrote these: past the L1.
            total += tl.load(rows_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg")
        result = tl.sum(total, axis=0)
        tl.store(out0_ptr + columns, result.to(out0_ptr.dtype.element_ty), mask=columns < C)
        if out1_ptr is not None:
            mask = (columns >= C) & (columns < 2 * C)
            tl.store(out1_ptr + columns - C, result.to(out1_ptr.dtype.element_ty), mask=mask)
        if out2_ptr is not None:
            own = columns - (K - 1) * C
            mask = (own >= 0) & (own < C)
            tl.store(out2_ptr + own, result.to(out2_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_partials_at_last(
    partials_ptr,  # (programs + groups, K C) fp32
    counters_ptr,  # (COUNTERS,) 4-byte zeros, zeros again afterwards
    out0_ptr, out1_ptr, out2_ptr,  # (C,): K of them, the others None
    C: tl.constexpr, K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Every program calls this when its row is written; the last to come adds all rows up.

    (threadFenceReduction of the CUDA samples, in two levels.)
    """
    counters = counters_ptr.to(tl.pointer_type(tl.int32))
    program, programs = tl.program_id(0), tl.num_programs(0)
    group, groups = program // GROUP, (programs + GROUP - 1) // GROUP
    first = group * GROUP
    size = tl.minimum(programs - first, GROUP)
    if _last_of(counters + 1 + group, size):
        sums_ptr = partials_ptr + programs.to(tl.int64) * (K * C)
        rows_ptr, sum_ptr = partials_ptr + first.to(tl.int64) * (K * C), sums_ptr + group * (K * C)
        _add_rows(rows_ptr, sum_ptr, None, None, size, K * C, 1, GROUP, BLOCK_C)
        if _last_of(counters, groups):
            _add_rows(sums_ptr, out0_ptr, out1_ptr, out2_ptr, groups, C, K, GROUP, BLOCK_C)
