"""The layer norms for the tools."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from fastgpt_kernels.configs import Config, entries
from fastgpt_kernels.ops.norm import configs
from fastgpt_kernels.ops.norm.record import RECORDS
from fastgpt_kernels.record import Sizes
from fastgpt_kernels.specs import Model, Tunable, Use, recorded, tunable


def uses(m: Model) -> Iterator[Use]:
    """Also a prompt of odd length."""

    def call(norm: Callable[..., Any], streams: int) -> Any:
        inputs = [m.activation(5, m.n_embd) for _ in range(streams)]
        return norm(*inputs, m.parameter(m.n_embd), m.optional(m.n_embd))

    for streams, (name, op) in enumerate(RECORDS.items(), 1):
        yield from recorded(op, m)
        yield Use(name, partial(call, op.ours, streams), trains=False)


def tunables(arch: str) -> Iterator[Tunable]:
    """Both tables, with the residual addition: 50 million elements in bf16, fp32 parameters."""
    op = RECORDS["add_layer_norm"]
    for key in entries(configs.FORWARD, arch):
        C = {1024: 768, 2048: 1600}.get(key, key)
        sizes = Sizes(1, (50 << 20) // C, 1, C)
        candidates = [
            Config({"ROWS": rows}, warps)
            for rows in (1, 2, 4, 8, 16, 32)
            for warps in (1, 2, 4, 8, 16)
            if 4 <= rows * key // (32 * warps) <= 64
        ]
        yield tunable(op, arch, "FORWARD", key, sizes, candidates)
        candidates = [
            Config({"ROWS": rows, "PROGRAMS_PER_SM": programs}, warps, stages)
            for rows in (1, 2, 4, 8)
            for warps in (1, 2, 4, 8, 16)
            for programs in (1, 2, 4, 6, 8, 12, 16)
            for stages in (1, 2)
            if 8 <= rows * key // (32 * warps) <= 32 and 12 <= warps * programs <= 32
        ]
        yield tunable(op, arch, "BACKWARD", key, sizes, candidates, backward=True)
