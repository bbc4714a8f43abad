"""AdamW for the tools."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import reference
from fastgpt_kernels.configs import Config, entries
from fastgpt_kernels.ops.adamw.configs import ADAMW
from fastgpt_kernels.ops.adamw.kernels import launch_adamw
from fastgpt_kernels.ops.adamw.op import AdamWTensors, adamw_step
from fastgpt_kernels.specs import Model, Tunable, Use


def uses(m: Model) -> Iterator[Use]:
    """fp32 gradients, with and without the copies that the forward pass reads."""
    C = m.n_embd
    layer = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C), (C,), (C,)]
    shapes = [(m.padded_vocab_size, C), (m.block_size, C), *12 * layer, (C,)]
    parameters = sum(prod(shape) for shape in shapes)

    def step(copies: bool) -> None:
        p, g, m1, m2 = ([m.parameter(*shape).detach() for shape in shapes] for _ in range(4))
        rounded = [m.activation(*shape).detach() for shape in shapes] if copies else None
        count, lr, scale, inf = (torch.empty(1, device="meta") for _ in range(4))
        tensors = AdamWTensors(p, g, m1, m2, rounded)
        adamw_step(tensors, count, lr, grad_scale=scale, found_inf=inf)

    for copies in (False, True) if C == 768 else ():  # one kernel does for all sizes
        moved = (30 if copies else 28) * parameters
        yield Use("adamw", partial(step, copies), False, often=int(copies), moved=moved)


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
