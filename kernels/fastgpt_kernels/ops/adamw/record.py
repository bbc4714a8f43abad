"""What AdamW tells the rest of the program. Its implementations make a `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels.ops.adamw.op import adamw_step
from fastgpt_kernels.registry import (
    Cost,
    ExampleInputs,
    Implementation,
    OpSpec,
    Random,
    Sizes,
    triton_unsupported,
)


def eager(groups: Any, **options: Any) -> torch.optim.AdamW:
    """AdamW of parameter groups in one pass over all tensors, if PyTorch has that (not on mps).

    Fused, `grad_scale` divides the gradients and `found_inf` calls off a step, without a copy of
    either to the host.
    """
    fused = groups[0]["params"][0].device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, fused=fused, **options)


def _examples(s: Sizes, random: Random) -> list[ExampleInputs]:
    """A matrix and vectors, of sizes that end inside a block too."""
    inputs = [random(37, s.n_embd), random(5000), random(1)]
    return [ExampleInputs(inputs, fp32_inputs=(0, 1, 2))]


def _run(make: Callable[..., torch.optim.Optimizer], case: ExampleInputs) -> list[Tensor]:
    """Parameters and moments after three steps, clipped, and a fourth that is called off."""
    params = [x.float().clone().requires_grad_() for x in case.inputs]
    groups = [
        {"params": params[:1], "weight_decay": 0.1},
        {"params": params[1:], "weight_decay": 0.0},
    ]
    optimizer: Any = make(groups, lr=0.0, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(2)
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        optimizer.grad_scale = torch.tensor(1.0 + step, device=params[0].device)
        optimizer.found_inf = torch.tensor(float(step == 3), device=params[0].device)
        optimizer.step()
    moved = [(p - x.float()).detach() for p, x in zip(params, case.inputs, strict=True)]
    return [*moved, *(s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq"))]


def _cost(s: Sizes, itemsize: int) -> dict[str, Cost]:
    """p, g, m, v read; p, m, v and a 16-bit copy written: of a block's matrices."""
    return {"forward": Cost(0, 30.0 * 12 * s.n_embd**2)}


SPECS = {
    "adamw": OpSpec(
        "adamw",
        {
            "eager": Implementation(eager),
            "triton": Implementation(adamw_step, triton_unsupported),
        },
        _examples, _cost,
        kernels=("adamw_kernel",), category="optimizer", label="AdamW",
        library="PyTorch's fused AdamW",
        run=_run,
    )
}  # fmt: skip
