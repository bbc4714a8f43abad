"""Decoding for the tools: what is compiled ahead of time. Its configs are not tuned yet."""

from __future__ import annotations

from collections.abc import Iterator

from fastgpt_kernels.ops.decode.record import RECORDS
from fastgpt_kernels.specs import Model, Tunable, Use, recorded


def uses(m: Model) -> Iterator[Use]:
    """A token of one sequence, at 124M of eight too."""
    for op in RECORDS.values():
        yield from recorded(op, m)
        if m.n_embd == 768:
            yield from recorded(op, m, rows=8)


def tunables(arch: str) -> Iterator[Tunable]:
    """None yet."""
    return iter(())
