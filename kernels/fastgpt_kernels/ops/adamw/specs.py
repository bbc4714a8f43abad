"""AdamW for the tools."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod

import torch

from fastgpt_kernels.configs import Config, entries
from fastgpt_kernels.ops.adamw.configs import ADAMW
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
    """Blocks of 4 to 32 elements a thread."""
    candidates = [
        Config({"BLOCK": block}, num_warps)
        for block in (1024, 2048, 4096, 8192)
        for num_warps in (4, 8, 16)
        if 4 <= block // (32 * num_warps) <= 32
    ]
    for key in entries(ADAMW, arch):
        yield Tunable("ADAMW", key, candidates)
