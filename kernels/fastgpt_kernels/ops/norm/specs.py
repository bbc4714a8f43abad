"""The layer norms for the tools."""

from __future__ import annotations

from collections.abc import Iterator

from fastgpt_kernels.configs import Config, entries, lookup
from fastgpt_kernels.ops.norm import configs
from fastgpt_kernels.ops.norm.kernels import (
    layer_norm_backward_kernel,
    layer_norm_forward_kernel,
)
from fastgpt_kernels.ops.norm.record import RECORDS
from fastgpt_kernels.partials import COUNTERS, sum_columns
from fastgpt_kernels.record import Sizes
from fastgpt_kernels.specs import AotSpec, Tunable, tunable

_BF16 = ("x_ptr", "residual_ptr", "y_ptr", "sum_ptr", "dy_ptr", "d_sum_ptr", "s_ptr", "dx_ptr")
_FP32 = ("weight_ptr", "bias_ptr", "stats_ptr", "partials_ptr", "dweight_ptr", "dbias_ptr")
_TYPES = dict.fromkeys(_BF16, "*bf16") | dict.fromkeys(_FP32, "*fp32") | {"eps": "fp32"}
_ALIGNED = ("x_stride", "residual_stride", "dy_stride", "d_sum_stride", "s_stride", "M")


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """Both kernels at a width of every config; bf16 activations, fp32 parameters.

    With the addition they hold the most registers, so that the plain ones are compiled at GPT-2's
    768 only.
    """
    for C, fused in ((256, 1), (768, 0), (768, 1), (1024, 1), (1600, 1), (4096, 1), (8192, 1)):
        name = f"{'add_' if fused else ''}layer_norm {{}} C={C}"
        config = lookup(configs.FORWARD, arch, C)
        yield AotSpec.of(
            name.format("forward"), layer_norm_forward_kernel, config, _TYPES,
            {"C": C, "COUNTERS": COUNTERS}, absent=() if fused else ("residual_ptr", "sum_ptr"),
            aligned=_ALIGNED,
        )  # fmt: skip
        config = lookup(configs.BACKWARD, arch, C)
        columns = sum_columns(config.num_warps)
        yield AotSpec.of(
            name.format("backward"), layer_norm_backward_kernel, config, _TYPES,
            {"C": C, "SUM_COLUMNS": columns, "AMD": arch.startswith("gfx")},
            absent=() if fused else ("d_sum_ptr",), aligned=_ALIGNED,
        )  # fmt: skip


def tunables(arch: str) -> Iterator[Tunable]:
    """Both tables, with the residual addition: 50 million elements in bf16, fp32 parameters."""
    op = RECORDS["add_layer_norm"]
    tiles = [(256, 1), (512, 2), (1024, 4), (2048, 8), (4096, 16)]  # columns, warps that span them
    for key in entries(configs.FORWARD, arch):
        candidates = [
            Config({"TILE": columns, "ROWS": rows, "STEPS": steps}, rows * warps)
            for columns, warps in tiles
            for rows in (1, 2, 4)
            for steps in (1, 2, 4, 8)
            if columns <= max(key, 256) <= 8 * columns and rows * warps <= 16
        ]
        yield tunable(op, arch, "FORWARD", key, _sizes(key), candidates)
    for key in entries(configs.BACKWARD, arch):
        candidates = [
            Config({"TILE": columns, "ROWS": rows, "PROGRAMS_PER_SM": programs}, rows * warps)
            for columns, warps in tiles
            for rows in (1, 2, 4, 8)
            for programs in (1, 2, 3, 4, 6, 8, 12)
            if columns <= key <= 4 * columns and 8 <= rows * warps * programs <= 32
        ]
        yield tunable(op, arch, "BACKWARD", key, _sizes(key), candidates, backward=True)


def _sizes(key: int) -> Sizes:
    """50 million elements, of GPT-2's width if an entry is for one."""
    C = {2048: 1600}.get(key, key)
    return Sizes(1, (50 << 20) // C, 1, C)
