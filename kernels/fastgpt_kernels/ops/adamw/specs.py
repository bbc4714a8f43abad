"""AdamW for the tools."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import reference
from fastgpt_kernels.configs import Config, entries
from fastgpt_kernels.ops.adamw.configs import ADAMW
from fastgpt_kernels.ops.adamw.kernels import adamw_kernel, launch_adamw
from fastgpt_kernels.ops.adamw.op import AdamWTensors
from fastgpt_kernels.specs import AotSpec, Tunable


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """With clipping and bf16 copies, from fp32 and from bf16 gradients."""
    types = {"addresses_ptr": "*i64", "sizes_ptr": "*i64", "blocks_ptr": "*i32"}
    scalars = ("decays_ptr", "step_ptr", "lr_ptr", "grad_scale_ptr", "found_inf_ptr")
    types |= dict.fromkeys(scalars, "*fp32")
    numbers = ("log_beta1", "log_beta2", "rest_beta1", "beta2", "rest_beta2", "eps")
    types |= dict.fromkeys(numbers, "fp32")
    for config in entries(ADAMW, arch).values():
        for grad_dtype, aligned in ((tl.float32, True), (tl.float32, False), (tl.bfloat16, True)):
            flags = {"GRAD_DTYPE": grad_dtype, "COPY_DTYPE": tl.bfloat16, "ALIGNED": aligned}
            name = f"adamw {grad_dtype} gradients{'' if aligned else ' unaligned'}"
            yield AotSpec.of(name, adamw_kernel, config, types, flags)


def tunables(arch: str) -> Iterator[Tunable]:
    """One step over 64 matrices of GPT-2's size, 151 M parameters, with bf16 copies.

    With betas of 0 the averages come out the same however often it runs, and with lr = 0 so do the
    parameters: the bytes and the arithmetic are those of any step.
    """
    candidates = [
        Config({"BLOCK": block}, num_warps)
        for block in (1024, 2048, 4096, 8192)
        for num_warps in (4, 8, 16)
        if 4 <= block // (32 * num_warps) <= 32
    ]
    betas = (0.0, 0.0)

    def inputs(device: torch.device) -> tuple[Any, ...]:
        p, g, m, v = (torch.randn(64, 3072, 768, device=device) for _ in range(4))
        copies = torch.empty(p.shape, dtype=torch.bfloat16, device=device)
        tables: dict[str, AdamWTensors] = {}  # by config: making one is not what is timed
        return p, g, m, v, copies, torch.tensor(0.0, device=device), tables

    def table(given: tuple[Any, ...], config: Config | None) -> AdamWTensors:
        p, g, m, v, copies = (list(t) for t in given[:5])
        tensors = AdamWTensors(p, g, m, v, copies, weight_decay=0.1, config=config)
        return given[6].setdefault(repr(config), tensors)

    def run(given: tuple[Any, ...], config: Config) -> tuple[Tensor, ...]:
        tables, zero = given[6], given[5]
        tensors = tables.get(repr(config)) or table(given, config)
        launch_adamw(tensors, zero + 1, zero, betas, 1e-8, None, None)
        return given[2:5]

    def oracle(given: tuple[Any, ...]) -> tuple[Tensor, ...]:
        zero = given[5]
        reference.adamw_update(table(given, None), zero + 1, zero, betas, 1e-8, None, None)
        return tuple(t.clone() for t in given[2:5])

    for key in entries(ADAMW, arch):
        yield Tunable("ADAMW", key, candidates, inputs, run, oracle)
