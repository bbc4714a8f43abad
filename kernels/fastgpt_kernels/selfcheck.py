"""Does an implementation of an op agree with its specification on this device?

A kernel that was right on another GPU or with another compiler can be wrong here, and one that was
never compiled here may not compile. Checked are the calls that the run makes: its widths, head dim,
vocabulary, dropout, biases and dtypes, on so few tokens that it takes well under a second besides
compilation. Forward and every gradient are compared with the specification in fp32.

What runs here can hang, or end its process: `contact.py` keeps that away from the run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from fastgpt_kernels.registry import ExampleInputs, OpSpec, Sizes, normal
from fastgpt_kernels.telling import why

# Relative error (Frobenius norm) that rounding explains: inputs and results of 8, 11 and 24 bits.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
# Kernels are compiled anew for sequences that are not whole tiles of this many tokens (the longest
# that attention has), and for row counts that are no multiple of ALIGNMENT.
TILE, ALIGNMENT = 128, 16


@contextlib.contextmanager
def _exact_matmuls() -> Iterator[None]:
    """fp32 products in fp32: TF32 would put the yardstick itself off by 1e-3."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def few_rows(sizes: Sizes, tokens: int) -> Sizes:
    """The same model on about `tokens` tokens, for which the same kernels are compiled.

    A sequence has two tiles and what the run's has beyond whole tiles; there are as few of them as
    divide by ALIGNMENT if the run's tokens do.
    """
    B, T = sizes.batch_size, sizes.block_size
    length = T if T < 3 * TILE else 2 * TILE + T % TILE

    def aligned(rows: int) -> bool:
        return rows * length % ALIGNMENT == 0

    least = min(B, max(1, tokens // length))
    rows = next(b for b in range(least, B + 1) if aligned(b) == aligned(B))
    return replace(sizes, batch_size=rows, block_size=length)


def calls(
    op: OpSpec, name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes
) -> Iterator[tuple[ExampleInputs, ExampleInputs]]:
    """Every call of the run that implementation `name` makes: in its dtypes, and in fp32."""
    if op.few_tokens:
        sizes = few_rows(sizes, op.few_tokens)
    for example in op.example_inputs(sizes, normal(device)):
        if not op.implementations[name].follows_seed:
            example = example.without_dropout()
        inputs = [
            None if x is None else x if i in example.fp32_inputs else x.to(dtype)
            for i, x in enumerate(example.inputs)
        ]
        exact = [None if x is None else x.float() for x in inputs]
        yield replace(example, inputs=inputs), replace(example, inputs=exact)


def disagreement(
    op: OpSpec, name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes
) -> str:
    """What is wrong with an op's implementation `name`; empty if it agrees in every call."""
    function = op.implementations[name].function
    for rounded, exact in calls(op, name, device, dtype, sizes):
        with _exact_matmuls(), torch.enable_grad():
            want = op.run(op.reference, exact)
            try:
                got = op.run(function, rounded)
                off = _error(got, want)
            except Exception as e:
                return f"does not run here ({why(e)})"
        masters = all(i in rounded.fp32_inputs for i in range(len(rounded.inputs)))
        if not off <= TOLERANCE[torch.float32 if masters else dtype]:
            return f"is off by {off:.2g} here"
    return ""


def _error(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """The largest relative error among results and gradients; NaN if any is not a number."""
    pairs = zip(got, want, strict=True)
    errors = torch.stack([(g.float() - w).norm() / w.norm() for g, w in pairs])
    return float("nan") if errors.isnan().any() else errors.max().item()


def compile_ahead(
    checks: Sequence[tuple[OpSpec, str, torch.dtype, Sizes]], device: torch.device, threads: int
) -> int:
    """Compile in parallel what these checks launch, for later launches; returns how many kernels.

    A first round launches nothing: Triton's hook notes what would be compiled and has the launch
    left out. Errors are left to the launch itself, which will meet them again.
    """
    from triton import AsyncCompileMode, knobs

    wanted: dict[str, tuple[Any, str]] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        data = compile["specialization_data"]
        wanted[f"{fn.module}.{fn.name} {compile['key']}"] = fn.jit_function, data
        return True

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        for op, name, dtype, sizes in checks:
            with contextlib.suppress(Exception), torch.enable_grad():
                for rounded, _ in calls(op, name, device, dtype, sizes):
                    op.run(op.implementations[name].function, rounded)
    finally:
        knobs.runtime.jit_cache_hook = before
    with ThreadPoolExecutor(threads) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for function, data in wanted.values():
            with contextlib.suppress(Exception):
                function.preload(data)
    return len(wanted)
