"""Sum per-program partial gradients: how the backward kernels reduce over rows without atomic sums.

A backward kernel loops over its share of the rows with sums in registers and writes them once, as
one fp32 row of `partials`. Then either one more launch adds the rows (`sum_partials`), or the last
program of the kernel itself (`add_partials_at_last`), which takes counters that are zero.
The order of the additions is fixed by the number of programs, so that the result is the same in
every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of `add_partials_at_last`: programs are added up by groups, and then the groups, so that the last
# one, which has an SM alone, reads a few hundred KB. A counter for the groups, and one for each.
GROUP: tl.constexpr = tl.constexpr(16)
COUNTERS = 256
MAX_PROGRAMS = GROUP.value * (COUNTERS - 1)


def empty_partials(programs: int, width: int, device: torch.device) -> Tensor:
    """Room for `add_partials_at_last`: a row a program, and one a group."""
    rows = programs + triton.cdiv(programs, GROUP.value)
    return torch.empty((rows, width), dtype=torch.float32, device=device)


def sum_columns(num_warps: int) -> int:
    """BLOCK_C of `add_partials_at_last`: with GROUP rows 64 registers a thread, of 16 warps 32."""
    return min(128 * num_warps, 1024)


@triton.jit
def _last_of(counter_ptr, count, AMD: tl.constexpr):
    """Whether this is the last of `count` programs to ask; it sees all that they have written.

    Nobody waits for anybody. The counter is 0 before and after.
    """
    if AMD:  # where a barrier waits for threads, not for what they have stored
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\n v_mov_b32 $0, 0",
            "=v,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
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
    C: tl.constexpr, K: tl.constexpr, BLOCK_C: tl.constexpr, AMD: tl.constexpr,
):  # fmt: skip
    """Every program calls this when its row is written; the last to come adds all rows up.

    (threadFenceReduction of the CUDA samples, in two levels.)
    """
    counters = counters_ptr.to(tl.pointer_type(tl.int32))
    program, programs = tl.program_id(0), tl.num_programs(0)
    group, groups = program // GROUP, (programs + GROUP - 1) // GROUP
    first = group * GROUP
    size = tl.minimum(programs - first, GROUP)
    if _last_of(counters + 1 + group, size, AMD):
        sums_ptr = partials_ptr + programs.to(tl.int64) * (K * C)
        rows_ptr, sum_ptr = partials_ptr + first.to(tl.int64) * (K * C), sums_ptr + group * (K * C)
        _add_rows(rows_ptr, sum_ptr, None, None, size, K * C, 1, GROUP, BLOCK_C)
        if _last_of(counters, groups, AMD):
            _add_rows(sums_ptr, out0_ptr, out1_ptr, out2_ptr, groups, C, K, GROUP, BLOCK_C)
