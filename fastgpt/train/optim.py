"""Optimizer of a run: learning-rate schedule, clipping, the check for finite values, its state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.config.schema import OptimConfig
from fastgpt.errors import UserError
from fastgpt.model.gpt import GPT
from fastgpt.train.distributed import MatrixScatter, like, whole
from fastgpt.train.muon import Muon


def learning_rate(step: int, c: OptimConfig) -> float:
    """Linear warm-up, then down until lr_decay_iters, and there it stays.

    cosine  to min_lr (nanoGPT's)
    wsd     warm-up, stable, decay: at learning_rate but for the last lr_decay_fraction, linear to 0
            (Hu et al. 2024, https://arxiv.org/abs/2404.06395)
    """
    if not c.decay_lr:
        return c.learning_rate
    if step < c.warmup_iters:
        return c.learning_rate * (step + 1) / (c.warmup_iters + 1)
    if c.lr_schedule == "wsd":
        left = max(c.lr_decay_iters - step, 0) / c.lr_decay_iters
        return c.learning_rate * min(1.0, left / c.lr_decay_fraction)
    if step >= c.lr_decay_iters:
        return c.min_lr
    progress = (step - c.warmup_iters) / (c.lr_decay_iters - c.warmup_iters)
    return c.min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (c.learning_rate - c.min_lr)


def make_optimizer(
    model: GPT, c: OptimConfig, scatter: MatrixScatter | None = None, compile: bool = False
) -> torch.optim.Optimizer:
    """Returns AdamW, or Muon with AdamW; matrices and embeddings decay, vectors do not.

    AdamW is fused where PyTorch has that (not on mps): `grad_scale` then divides the gradients and
    `found_inf` calls a step off, without a copy of either to the host.
    scatter and compile are for Muon: how its matrices are spread over the ranks, and whether
    torch.compile makes its kernels.
    """
    device = next(model.parameters()).device
    matrices = matrices_of_blocks(model) if c.optimizer == "muon" else {}
    params = [p for p in model.parameters() if p.requires_grad and p not in matrices]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": c.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = device.type in ("cuda", "cpu")
    adamw = torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=fused)
    if matrices:
        more: dict[str, Any] = {"weight_decay": c.weight_decay, "scatter": scatter}
        if device.type != "cpu":  # where bf16's products take over 10 times as long as fp32's
            more |= {"dtype": model.dtype, "compile": compile}
        return Muon(matrices, adamw, **more)
    return adamw


def matrices_of_blocks(model: GPT) -> dict[Tensor, int]:
    """How many maps each matrix of a block is: c_attn makes q, k and v."""
    named = model.transformer.h.named_parameters()
    return {p: 3 if name.endswith("c_attn.weight") else 1 for name, p in named if p.ndim == 2}


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    lr = torch.tensor(lr).item()  # fp32, as a CUDA graph reads it: the same bits with and without
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Let a CUDA graph take a step of AdamW's: the learning rate is read on the device."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
        group["capturable"] = True
    # Steps that warm a graph up are not captured: PyTorch would warn of that.
    optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]


@torch.no_grad()
def gradient_norms(model: nn.Module) -> list[Tensor]:
    """The norm of each gradient; of gradients that are sharded over ranks one, of all."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if hasattr(grads[0], "full_tensor"):
        return [whole(torch.nn.utils.get_total_norm(grads))]
    return [*torch._foreach_norm(grads)]


@torch.no_grad()
def divide_gradients(optimizer: torch.optim.Optimizer, model: nn.Module, divisor: Tensor) -> None:
    """Have the next step divide gradients by a scalar, of the same device.

    It is left to the fused optimizer, which reads every gradient anyway; for one that is not fused
    (on mps) they are divided here.
    """
    if fused(optimizer):
        optimizer.grad_scale = divisor  # type: ignore[attr-defined]
    else:
        torch._foreach_div_([p.grad for p in model.parameters() if p.grad is not None], divisor)


def fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step` heeds grad_scale and found_inf, on the device itself."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as flat named tensors: {"exp_avg.transformer.wte.weight": ...}."""
    out: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            out[f"{key}.{name}"] = value
    return out


def load_state_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """The inverse of `state_tensors`; every parameter's state comes from `tensors`.

    Raises UserError where the optimizer cannot go on from it.
    """
    params = dict(model.named_parameters())
    ours = "muon" if isinstance(optimizer, Muon) else "adamw"
    theirs = "muon" if any(k.startswith("momentum_buffer.") for k in tensors) else "adamw"
    if tensors and ours != theirs:
        raise UserError(
            f"--optimizer={ours}: the checkpoint has the state of {theirs}; leave the flag out, or "
            "start a new run"
        )
    for full_name, value in tensors.items():
        key, _, name = full_name.partition(".")
        p = params[name]
        # `step` too lives on the parameter's device: fused AdamW wants it there.
        optimizer.state[p][key] = like(value.to(p.device, copy=True), p)


ADDENDS = 100  # One kernel adds up so many numbers from different places; stacking them is another.


@torch.no_grad()
def clip_and_check_finite(
    norms: Sequence[Tensor],
    loss: Tensor,
    bad: Tensor,
    bad_steps: Tensor,
    max_norm: float,
    of_loss_alone: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients' norm and what they are to be divided by; all are fp32 scalars.

    norms          of each parameter's gradient
    bad            in place: 1 from the first step on whose loss or norm was not finite
    bad_steps      in place: how many steps there were since, with it
    max_norm       of the gradients after the division, as in torch.nn.utils.clip_grads_with_norm_;
                   0: they are not divided
    of_loss_alone  an infinite norm is no fault: with loss scaling it is how the scale is found
    """
    if torch.compiler.is_compiling() and len(norms) <= ADDENDS:
        norm = torch.sqrt(sum((x * x for x in norms), torch.zeros_like(loss)))
    else:
        norm = torch.linalg.vector_norm(torch.stack([*norms]))
    divisor = ((norm + 1e-6) / max_norm).clamp(min=1.0) if max_norm else None
    finite = loss if of_loss_alone else loss + norm
    bad.copy_(torch.maximum(bad, (~torch.isfinite(finite)).to(bad.dtype)))
    bad_steps.add_(bad)
    return norm, divisor
