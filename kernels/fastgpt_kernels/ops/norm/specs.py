"""The layer norms for the tools."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from fastgpt_kernels.configs import Config, entries
from fastgpt_kernels.ops.norm import configs
from fastgpt_kernels.ops.norm.op import add_layer_norm, layer_norm
from fastgpt_kernels.ops.norm.record import RECORDS
from fastgpt_kernels.record import Sizes
from fastgpt_kernels.specs import Model, Tunable, Use, tunable


def uses(m: Model) -> Iterator[Use]:
    """Both norms, in training and for a prompt of odd length; the parameters are fp32."""

    def call(norm: Callable[..., Any], streams: int, rows: int = m.tokens) -> Any:
        inputs = [m.activation(rows, m.n_embd) for _ in range(streams)]
        return norm(*inputs, m.parameter(m.n_embd), m.optional(m.n_embd))

    yield Use("layer_norm", partial(call, layer_norm, 1), often=1)
    yield Use("add_layer_norm", partial(call, add_layer_norm, 2), often=24)
    yield Use("layer_norm", partial(call, layer_norm, 1, 5), trains=False)
    yield Use("add_layer_norm", partial(call, add_layer_norm, 2, 5), trains=False)


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
