"""The layer norms for the tools."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from fastgpt_kernels.configs import Config, entries
from fastgpt_kernels.ops.norm import configs
from fastgpt_kernels.ops.norm.record import SPECS
from fastgpt_kernels.specs import Model, Tunable, Use, recorded


def _first(call: Callable[[], Any]) -> Any:
    return call()[0]


def uses(m: Model) -> Iterator[Use]:
    """Also a prompt of odd length, and the last norm's stream, which nobody reads."""

    def call(norm: Callable[..., Any], streams: int) -> Any:
        inputs = [m.activation(5, m.n_embd) for _ in range(streams)]
        return norm(*inputs, m.parameter(m.n_embd), m.optional(m.n_embd))

    for streams, (name, op) in enumerate(SPECS.items(), 1):
        yield from recorded(op, m)
        yield Use(name, partial(call, op.triton, streams), trains=False)
    if m.dropout:  # without it, that backward pass is layer_norm's
        for use in recorded(SPECS["add_layer_norm"], m):
            yield replace(use, often=0, call=partial(_first, use.call))


def tunables(arch: str) -> Iterator[Tunable]:
    """All tables."""
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
    for name in ("BACKWARD", "BACKWARD_X_BIAS"):
        for key in entries(getattr(configs, name), arch):
            candidates = [
                Config(
                    {"TILE": columns, "ROWS": rows, "PROGRAMS_PER_SM": programs},
                    num_warps=rows * warps, num_stages=stages,
                )
                for columns, warps in tiles
                for rows in (1, 2, 4, 8)
                for programs in (1, 2, 3, 4, 6, 8, 12)
                for stages in (1, 3)
                if columns <= key <= 4 * columns and 8 <= rows * warps * programs <= 32
                if stages == 1 or programs <= 3  # more programs hide the memory's latency as well
            ]  # fmt: skip
            yield Tunable(name, key, candidates)
