"""GELU for the tools."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import reference
from fastgpt_kernels.configs import Config, entries, lookup
from fastgpt_kernels.ops.gelu import configs
from fastgpt_kernels.ops.gelu.kernels import (
    bias_gelu_backward_kernel,
    bias_gelu_forward_kernel,
    launch_backward,
    launch_forward,
)
from fastgpt_kernels.specs import AotSpec, Tunable

_TYPES = dict.fromkeys(("x_ptr", "y_ptr", "dy_ptr", "dx_ptr", "bias_ptr"), "*bf16")
_TYPES |= {"partials_ptr": "*fp32"}


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """Both kernels, tanh and erf, at GPT-2's 4 * 768, with a bf16 bias; without one for tanh."""
    C, aligned = 3072, ("x_stride", "dy_stride", "M")
    for tanh, has_bias in ((True, True), (False, True), (True, False)):
        name = f"bias_gelu {{}} {'tanh' if tanh else 'erf'}{'' if has_bias else ' no bias'}"
        config = lookup(configs.FORWARD, arch, C)
        flags: dict[str, object] = {"C": C, "TANH": tanh, **config.blocks}
        flags |= {} if has_bias else {"bias_ptr": None}
        yield AotSpec.of(
            name.format("forward"), bias_gelu_forward_kernel, config, _TYPES, flags, aligned=aligned
        )
        config = lookup(configs.BACKWARD, arch, C)
        blocks = {k: v for k, v in config.blocks.items() if k != "PROGRAMS_PER_SM"}
        flags = {"C": C, "TANH": tanh, "STAGES": config.num_stages, **blocks}
        flags |= {} if has_bias else {"bias_ptr": None, "partials_ptr": None}
        yield AotSpec.of(
            name.format("backward"), bias_gelu_backward_kernel, config, _TYPES, flags,
            aligned=aligned,
        )  # fmt: skip


def tunables(arch: str) -> Iterator[Tunable]:
    """Both tables at GPT-2's 4 * 768, 65,536 tokens in bf16, tanh, a bf16 bias."""
    C = 3072

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        x, dy = torch.randn((2, 65536, C), device=device, dtype=torch.bfloat16)
        return x, torch.randn(C, device=device, dtype=torch.bfloat16), dy

    def forward(x: tuple[Any, ...], config: Config) -> tuple[Tensor, ...]:
        return (launch_forward(x[0], x[1], True, config),)

    def backward(x: tuple[Any, ...], config: Config) -> tuple[Tensor, ...]:
        dx, dbias = launch_backward(x[2], x[0], x[1], True, config)
        assert dbias is not None
        return dx, dbias

    def forward_reference(x: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return (reference.bias_gelu(x[0], x[1]),)

    def backward_reference(x: tuple[Any, ...]) -> tuple[Tensor, ...]:
        leaves = [leaf.float().requires_grad_() for leaf in x[:2]]
        return torch.autograd.grad(reference.bias_gelu(*leaves), leaves, x[2].float())

    tiles = [
        (rows, columns, warps)
        for rows in (1, 2, 4, 8, 16, 32)
        for columns in (256, 512, 1024)
        for warps in (4, 8)
        if 8 <= rows * columns // (32 * warps) <= 16
    ]
    for key in entries(configs.FORWARD, arch):
        candidates = [Config({"ROWS": r, "BLOCK_C": c}, warps) for r, c, warps in tiles]
        yield Tunable("FORWARD", key, candidates, inputs, forward, forward_reference)
        candidates = [
            Config({"ROWS": r, "BLOCK_C": c, "PROGRAMS_PER_SM": programs}, warps, stages)
            for r, c, warps in tiles
            for programs in (2, 3, 4, 5, 6, 8)
            for stages in (1, 2)
            if 16 <= warps * programs <= 32
        ]
        yield Tunable("BACKWARD", key, candidates, inputs, backward, backward_reference)
