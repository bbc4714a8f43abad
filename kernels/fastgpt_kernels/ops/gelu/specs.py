"""GELU for the tools."""

from __future__ import annotations

from collections.abc import Iterator

from fastgpt_kernels.configs import Config, entries, lookup
from fastgpt_kernels.ops.gelu import configs
from fastgpt_kernels.ops.gelu.kernels import bias_gelu_backward_kernel, bias_gelu_forward_kernel
from fastgpt_kernels.ops.gelu.record import RECORDS
from fastgpt_kernels.record import Sizes
from fastgpt_kernels.specs import AotSpec, Tunable, tunable

_TYPES = dict.fromkeys(("x_ptr", "y_ptr", "dy_ptr", "dx_ptr", "bias_ptr"), "*bf16")
_TYPES |= {"partials_ptr": "*fp32"}


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """Both kernels, tanh and erf, at GPT-2's 4 * 768, with a bf16 bias; without one for tanh."""
    C, aligned = 3072, ("x_stride", "dy_stride", "M")
    for tanh, has_bias in ((True, True), (False, True), (True, False)):
        name = f"bias_gelu {{}} {'tanh' if tanh else 'erf'}{'' if has_bias else ' no bias'}"
        approx = "tanh.approx" if arch.startswith("sm_") else "tanh"
        flags = {"C": C, "FORM": approx if tanh else "erf"}
        yield AotSpec.of(
            name.format("forward"), bias_gelu_forward_kernel, lookup(configs.FORWARD, arch, C),
            _TYPES, flags, absent=() if has_bias else ("bias_ptr",), aligned=aligned,
        )  # fmt: skip
        config = lookup(configs.BACKWARD, arch, C)
        yield AotSpec.of(
            name.format("backward"), bias_gelu_backward_kernel, config, _TYPES,
            flags | {"STAGES": config.num_stages},
            absent=() if has_bias else ("bias_ptr", "partials_ptr"), aligned=aligned,
        )  # fmt: skip


def tunables(arch: str) -> Iterator[Tunable]:
    """Both tables at GPT-2's 4 * 768, 65,536 tokens in bf16, tanh."""
    op, sizes = RECORDS["bias_gelu"], Sizes(64, 1024)
    tiles = [
        (rows, columns, warps)
        for rows in (1, 2, 4, 8, 16, 32)
        for columns in (256, 512, 1024)
        for warps in (4, 8)
        if 8 <= rows * columns // (32 * warps) <= 16
    ]
    for key in entries(configs.FORWARD, arch):
        candidates = [Config({"ROWS": r, "BLOCK_C": c}, warps) for r, c, warps in tiles]
        yield tunable(op, arch, "FORWARD", key, sizes, candidates)
        candidates = [
            Config({"ROWS": r, "BLOCK_C": c, "PROGRAMS_PER_SM": programs}, warps, stages)
            for r, c, warps in tiles
            for programs in (2, 3, 4, 5, 6, 8)
            for stages in (1, 2)
            if 16 <= warps * programs <= 32
        ]
        yield tunable(op, arch, "BACKWARD", key, sizes, candidates, backward=True)
