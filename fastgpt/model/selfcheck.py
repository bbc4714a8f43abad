"""Does an implementation of an op agree with the eager one on this device? Asked before it is used.

A kernel that was right on another GPU or with another compiler can be wrong here. Forward and every
gradient of a case with few rows, an odd number of them, are compared with the eager op in fp32, in
well under a second besides compilation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from fastgpt_kernels.record import Case, Record, Sizes, normal

# Relative error (Frobenius norm) that rounding explains: inputs and results of 8, 11 and 24 bits.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}


@contextlib.contextmanager
def _exact_matmuls() -> Iterator[None]:
    """fp32 products in fp32: TF32 would put the yardstick itself off by 1e-3."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def few_rows(sizes: Sizes) -> Sizes:
    """The same model on a few short sequences: more than a tile long, and no multiple of it."""
    rows, length = min(sizes.batch_size, 8), min(sizes.block_size, 150)
    return replace(sizes, batch_size=rows, block_size=length)


def disagreement(
    op: Record,
    function: Callable[..., Any],
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes,
) -> str:
    """What is wrong with `function` against the op's eager one; empty if they agree."""
    case = op.case(few_rows(sizes), normal(device))
    dtype = torch.float32 if op.masters else dtype
    rounded = Case([x.to(dtype) for x in case.inputs], case.arguments)
    exact = Case([x.float() for x in rounded.inputs], case.arguments)
    with _exact_matmuls(), torch.enable_grad():
        want = op.run(op.eager, exact)
        try:
            got = op.run(function, rounded)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as e:
            line = (str(e).strip().splitlines() or [type(e).__name__])[0]
            return f"does not run here ({line[:160]})"
    for g, w in zip(got, want, strict=True):
        error = ((g.float() - w).norm() / w.norm()).item()
        if not error <= TOLERANCE[dtype]:
            return f"is off by {error:.2g} here"
    return ""
