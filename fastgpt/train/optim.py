"""AdamW with decay on matrices only, the learning-rate schedule, and clipping."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.config.schema import OptimConfig
from fastgpt.model.gpt import GPT
from fastgpt.model.ops import Choice, Wish, choose_all
from fastgpt.train.sharding import like, whole
from fastgpt_kernels.record import Sizes, record


def learning_rate(step: int, c: OptimConfig) -> float:
    """Linear warm-up, then a cosine down to min_lr at lr_decay_iters, then min_lr (nanoGPT's)."""
    if not c.decay_lr:
        return c.learning_rate
    if step < c.warmup_iters:
        return c.learning_rate * (step + 1) / (c.warmup_iters + 1)
    if step >= c.lr_decay_iters:
        return c.min_lr
    progress = (step - c.warmup_iters) / (c.lr_decay_iters - c.warmup_iters)
    return c.min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (c.learning_rate - c.min_lr)


def choose(device: torch.device, wish: Wish | None = None) -> tuple[Choice, Callable[..., Any]]:
    """Which AdamW a device gets, and the function that makes it."""
    from fastgpt.train.adamw import FusedAdamW

    op = record("adamw")
    op = replace(op, implementations={"eager": op.eager, "triton": FusedAdamW})
    return choose_all([op], device, torch.float32, Sizes(), wish or Wish())[op.name]


def make_optimizer(
    model: GPT, c: OptimConfig, wish: Wish | None = None
) -> tuple[torch.optim.AdamW, Choice]:
    """AdamW, and which one; matrices and embeddings decay, vectors do not.

    Raises UserError if the one that `wish` asks for cannot run here.
    """
    choice, make = choose(next(model.parameters()).device, wish)
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": c.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = make(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2))
    if hasattr(optimizer, "copies"):  # FusedAdamW's
        optimizer.copies = model.copies()
    return optimizer, choice


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def clip_gradients(optimizer: torch.optim.Optimizer, model: nn.Module, max_norm: float) -> Tensor:
    """Have the next step scale gradients to a global norm of at most max_norm (0: as they are).

    Returns their norm. Scaling is left to the fused optimizer, which reads every gradient anyway;
    for one that is not fused (on mps) they are scaled here.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(grads))
    if max_norm > 0:
        if fused(optimizer):
            # As torch.nn.utils.clip_grads_with_norm_ does it; these optimizers divide by it.
            optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0)  # type: ignore[attr-defined]
        else:
            torch.nn.utils.clip_grads_with_norm_(list(model.parameters()), max_norm, norm)
    return norm


def fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step` heeds grad_scale and found_inf, on the device itself."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as flat named tensors: {"exp_avg.transformer.wte.weight": ...}."""
    out: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            # FusedAdamW has one count for all parameters; in a file each has its own.
            out[f"{key}.{name}"] = value.clone() if key == "step" else value
    return out


def load_state_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """The inverse of `state_tensors`; every parameter's state comes from `tensors`.

    Raises UserError where the optimizer cannot go on from it.
    """
    params = dict(model.named_parameters())
    for full_name, value in tensors.items():
        key, _, name = full_name.partition(".")
        p = params[name]
        # `step` too lives on the parameter's device: fused AdamW wants it there.
        optimizer.state[p][key] = like(value.to(p.device, copy=True), p)
    if share_step := getattr(optimizer, "share_step", None):  # FusedAdamW's
        share_step([p for p in params.values() if p in optimizer.state])
