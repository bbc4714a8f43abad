"""The layer norms for the tools."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from fastgpt_kernels.configs import Config, entries
from fastgpt_kernels.ops.norm import configs
from fastgpt_kernels.ops.norm.record import RECORDS
from fastgpt_kernels.specs import Model, Tunable, Use, recorded


def uses(m: Model) -> Iterator[Use]:
    """Also a prompt of odd length."""

    def call(norm: Callable[..., Any], streams: int) -> Any:
        inputs = [m.activation(5, m.n_embd) for _ in range(streams)]
        return norm(*inputs, m.parameter(m.n_embd), m.optional(m.n_embd))

    for streams, (name, op) in enumerate(RECORDS.items(), 1):
        yield from recorded(op, m)
        yield Use(name, partial(call, op.ours, streams), trains=False)


def tunables(arch: str) -> Iterator[Tunable]:
    """Both tables."""
    tiles = [(256, 1), (512, 2), (1024, 4), (2048, 8), (4096, 16)]  # columns, warps that span them
    for key in entries(configs.FORWARD, arch):
        candidates = [
            Config({"TILE": columns, "ROWS": rows, "STEPS": steps}, rows * warps)
            for columns, warps in tiles
            for rows in (1, 2, 4)
            for steps in (1, 2, 4, 8)
            if columns <= max(key, 256) <= 8 * columns and rows * warps <= 16
        ]
        yield Tunable("FORWARD", key, candidates)
    for key in entries(configs.BACKWARD, arch):
        candidates = [
            Config({"TILE": columns, "ROWS": rows, "PROGRAMS_PER_SM": programs}, rows * warps)
            for columns, warps in tiles
            for rows in (1, 2, 4, 8)
            for programs in (1, 2, 3, 4, 6, 8, 12)
            if columns <= key <= 4 * columns and 8 <= rows * warps * programs <= 32
        ]
        yield Tunable("BACKWARD", key, candidates)
