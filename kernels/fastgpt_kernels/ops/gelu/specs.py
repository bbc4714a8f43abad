"""GELU for the tools."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fastgpt_kernels.configs import Config, entries
from fastgpt_kernels.ops.gelu import configs
from fastgpt_kernels.ops.gelu.op import bias_gelu
from fastgpt_kernels.ops.gelu.record import SPECS
from fastgpt_kernels.specs import Model, Tunable, Use, recorded


def uses(m: Model) -> Iterator[Use]:
    """Also a prompt of odd length, whose model has its biases rounded."""
    width = 4 * m.n_embd

    def prompt() -> Tensor:
        bias = m.activation(width) if m.bias else None
        return bias_gelu(m.activation(5, width), bias, m.approximate)

    yield from recorded(SPECS["bias_gelu"], m)
    yield Use("bias_gelu", prompt, trains=False)


def tunables(arch: str) -> Iterator[Tunable]:
    """Both tables."""
    tiles = [
        (rows, columns, warps)
        for rows in (1, 2, 4, 8, 16, 32)
        for columns in (256, 512, 1024)
        for warps in (4, 8)
        if 8 <= rows * columns // (32 * warps) <= 16
    ]
    for key in entries(configs.FORWARD, arch):
        candidates = [Config({"ROWS": r, "BLOCK_C": c}, warps) for r, c, warps in tiles]
        yield Tunable("FORWARD", key, candidates)
        candidates = [
            Config({"ROWS": r, "BLOCK_C": c, "PROGRAMS_PER_SM": programs}, warps, stages)
            for r, c, warps in tiles
            for programs in (2, 3, 4, 5, 6, 8)
            for stages in (1, 2)
            if 16 <= warps * programs <= 32
        ]
        yield Tunable("BACKWARD", key, candidates)
