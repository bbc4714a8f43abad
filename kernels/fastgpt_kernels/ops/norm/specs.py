"""The layer norms for the tools."""

from __future__ import annotations

from collections.abc import Iterator

import triton

from fastgpt_kernels import partials
from fastgpt_kernels.configs import Config, entries, lookup
from fastgpt_kernels.ops.norm import configs
from fastgpt_kernels.ops.norm.kernels import (
    layer_norm_backward_kernel,
    layer_norm_forward_kernel,
    layer_norm_sum_kernel,
)
from fastgpt_kernels.ops.norm.record import RECORDS
from fastgpt_kernels.record import Sizes
from fastgpt_kernels.specs import AotSpec, Tunable, tunable

_BF16 = ("x_ptr", "residual_ptr", "y_ptr", "sum_ptr", "dy_ptr", "d_sum_ptr", "s_ptr", "dx_ptr")
_FP32 = ("weight_ptr", "bias_ptr", "stats_ptr", "partials_ptr")
_TYPES = dict.fromkeys(_BF16, "*bf16") | dict.fromkeys(_FP32, "*fp32") | {"eps": "fp32"}
_ALIGNED = ("x_stride", "residual_stride", "dy_stride", "d_sum_stride", "s_stride", "M")


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """Both kernels at a width of every config; bf16 activations, fp32 parameters.

    With the addition they hold the most registers, so that the plain ones are compiled at GPT-2's
    768 only. And the sum of partial gradients, for parameters in fp32 and in bf16.
    """
    for dtype in ("fp32", "bf16"):
        types = {"partials_ptr": "*fp32", "out0_ptr": f"*{dtype}", "out1_ptr": f"*{dtype}"}
        config = Config({}, partials.NUM_WARPS)
        blocks = {"BLOCK_P": partials.BLOCK_P, "BLOCK_C": partials.BLOCK_C}
        name = f"sum_partials {dtype}"
        yield AotSpec.of(name, layer_norm_sum_kernel, config, types, blocks, aligned="C")
    for C, fused in ((256, 1), (512, 1), (768, 0), (768, 1), (1600, 1), (4096, 1), (8192, 1)):
        name = f"{'add_' if fused else ''}layer_norm {{}} C={C}"
        sizes = {"C": C, "BLOCK_C": triton.next_power_of_2(C)}
        yield AotSpec.of(
            name.format("forward"), layer_norm_forward_kernel, lookup(configs.FORWARD, arch, C),
            _TYPES, sizes, absent=() if fused else ("residual_ptr", "sum_ptr"), aligned=_ALIGNED,
        )  # fmt: skip
        config = lookup(configs.BACKWARD, arch, C)
        flags = {"HAS_BIAS": True, "STAGES": config.num_stages}
        yield AotSpec.of(
            name.format("backward"), layer_norm_backward_kernel, config, _TYPES, sizes | flags,
            absent=() if fused else ("d_sum_ptr",), aligned=_ALIGNED,
        )  # fmt: skip


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
