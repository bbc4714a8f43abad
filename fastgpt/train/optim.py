"""Optimizer of a run: learning-rate schedule, clipping, check for finite values, state."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgpt.config.schema import OptimConfig
from fastgpt.errors import UserError
from fastgpt.model.gpt import GPT
from fastgpt.train.distributed import MatrixScatter, like, whole
from fastgpt.train.muon import Muon


def learning_rate(step: int, c: OptimConfig) -> float:
    """Returns the learning rate of a step: nanoGPT's cosine, or wsd (arxiv.org/abs/2404.06395)."""
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


def describe_schedule(c: OptimConfig, max_iters: int) -> str:
    """Returns the course of the learning rate in a line, with a warning if the run cuts it off."""
    if not c.decay_lr:
        return f"learning rate {c.learning_rate:g}, constant"
    lowest, end = (0.0 if c.lr_schedule == "wsd" else c.min_lr), c.lr_decay_iters
    line = f"learning rate {c.learning_rate:g} after {c.warmup_iters:,} steps of warm-up, "
    line += f"{c.lr_schedule} to {lowest:g} at step {end:,}"
    if c.warmup_iters >= min(end, max_iters):
        return f"{line}\nwarning: the run ends within its warm-up; give fewer --warmup_iters"
    if end > max_iters:
        last = learning_rate(max_iters, c)
        return f"{line}\nwarning: it ends at {last:g}, as --lr_decay_iters exceeds --max_iters"
    if end < max_iters and not lowest:
        return f"{line}\nwarning: from there on nothing is learned; give more --lr_decay_iters"
    return line


def make_optimizer(
    model: GPT, c: OptimConfig, scatter: MatrixScatter | None = None, compile: bool = False
) -> torch.optim.Optimizer:
    """Returns AdamW, or Muon with AdamW; matrices and embeddings decay, vectors do not.

    AdamW is fused on GPUs and CPUs, for `Trainer._clip`. scatter and compile are for Muon: how its
    matrices are spread over the ranks, and whether torch.compile makes its kernels.
    """
    device = next(model.parameters()).device
    matrices: dict[Tensor, int] = {}
    if c.optimizer == "muon":  # c_attn holds the matrices of q, k and v
        named = model.transformer.h.named_parameters()
        matrices = {p: 3 if n.endswith("c_attn.weight") else 1 for n, p in named if p.ndim == 2}
    params = [p for p in model.parameters() if p not in matrices]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": c.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = device.type in ("cuda", "cpu")
    adamw = torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=fused)
    if not matrices:
        return adamw
    dtype = model.dtype
    if device.type == "cpu":  # bf16 matmuls take over 10 times as long as fp32 there
        dtype, compile = torch.float32, False
    return Muon(matrices, adamw, c.weight_decay, dtype, scatter, compile)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of all groups, rounded to fp32."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(lr).item()


@torch.no_grad()
def gradient_norms(model: nn.Module) -> list[Tensor]:
    """Returns the norm of each gradient, or of sharded gradients the one norm of all."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if hasattr(grads[0], "full_tensor"):
        return [whole(torch.nn.utils.get_total_norm(grads))]
    return [*torch._foreach_norm(grads)]


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Returns the optimizer's state as named tensors: {"exp_avg.transformer.wte.weight": ...}."""
    state = ((name, optimizer.state.get(p, {})) for name, p in model.named_parameters())
    return {f"{key}.{name}": value for name, own in state for key, value in own.items()}


def load_state_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """Loads the result of `state_tensors`, or no tensors at all for fresh moments.

    Raises UserError if they are another optimizer's, or do not fit it in names, shapes or dtypes.
    """
    params, names = dict(model.named_parameters()), ("adamw", "muon")
    own = names[isinstance(optimizer, Muon)]
    found = names[any(key.startswith("momentum_buffer.") for key in tensors)]
    if tensors and own != found:
        raise UserError(
            f"--optimizer={own}: the checkpoint has the state of {found}; leave the flag out, or "
            "start a new run"
        )
    is_ = {name: f"{t.dtype} {tuple(t.shape)}" for name, t in tensors.items()}
    wanted: dict[str, str] = {}
    for name, p in params.items():
        shapes = {"exp_avg": p.shape, "exp_avg_sq": p.shape, "step": ()}
        if isinstance(optimizer, Muon) and p in optimizer.matrices:
            shapes = {"momentum_buffer": p.shape}
        wanted |= {f"{key}.{name}": f"torch.float32 {tuple(s)}" for key, s in shapes.items()}
    for name in wanted | is_ if tensors else ():
        if is_.get(name) != wanted.get(name):
            raise UserError(
                f"the checkpoint's optimizer tensor {name} is {is_.get(name, 'missing')}, wanted "
                f"{wanted.get(name, 'no such tensor')}; --reset_optimizer=True goes on with fresh "
                "moments"
            )
    for full_name, value in tensors.items():
        key, _, name = full_name.partition(".")
        p = params[name]
        # Fused AdamW needs `step` on the parameter's device, too.
        optimizer.state[p][key] = like(value.to(p.device, copy=True), p)


MAX_ADDENDS = 100  # Inductor adds up to about this many scalars in one kernel.


@torch.no_grad()
def clip_and_check_finite(
    norms: Sequence[Tensor], loss: Tensor, skipped: Tensor, max_norm: float, of_loss_alone: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns the norm of all gradients, their divisor for clipping, and 1 to skip the update.

    All are fp32 scalars on the device. From the first loss or norm that is not finite on, every
    update is skipped and counted in `skipped`. `of_loss_alone` does not count an infinite norm, by
    which loss scaling finds its scale. The divisor is None if max_norm is 0.
    """
    if torch.compiler.is_compiling() and len(norms) <= MAX_ADDENDS:
        norm = torch.sqrt(sum((x * x for x in norms), torch.zeros_like(loss)))
    else:
        norm = torch.linalg.vector_norm(torch.stack([*norms]))
    divisor = ((norm + 1e-6) / max_norm).clamp(min=1.0) if max_norm else None
    finite = torch.isfinite(loss if of_loss_alone else loss + norm)
    bad = ~finite | (skipped > 0)
    skipped.add_(bad)
    return norm, divisor, (bad | ~torch.isfinite(norm)).to(skipped.dtype)
