"""Muon for the blocks' matrices and AdamW for all else, as one optimizer.

    B = mu B + (1 - mu) g,   U = mu B + (1 - mu) g                      Nesterov's momentum
    X = U / |U|,   X = a X + (b A + c A^2) X  with A = X X^T, 5 times   Newton-Schulz
    W = (1 - lr decay) W - 0.2 sqrt(max(rows, columns)) lr X

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. The factor 0.2 sqrt(...) of
Liu et al. 2025, https://arxiv.org/abs/2502.16982, lets one learning rate serve AdamW too. Each
matrix gets the update of `torch.optim.Muon(adjust_lr_fn="match_rms_adamw", nesterov=True)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt.train.distributed import MatrixScatter, local

MOMENTUM, SCALE, EPS = 0.95, 0.2, 1e-7
# Coefficients of the quintic that lifts small singular values fastest, to about 0.7 to 1.2.
A, B, C, ITERATIONS = 3.4445, -4.7750, 2.0315, 5


def momentum(
    grads: Tensor, buffer: Tensor, divisor: Tensor, bad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns the new momentum and Nesterov's look-ahead (in `dtype`) for gradients / divisor.

    If `bad`, the momentum stays and no gradient enters either result, since 0 times NaN is NaN.
    """
    grads = torch.where(bad, buffer, grads / divisor)
    buffer = buffer.lerp(grads, 1 - MOMENTUM)
    return buffer, grads.lerp(buffer, MOMENTUM).to(dtype)


def newton_schulz(x: Tensor) -> Tensor:
    """Returns x (r, c) or (n, r, c), r <= c, |x| <= 1, with all singular values near 1."""
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    if x.dtype == torch.float32 and 2 * x.shape[-2] <= x.shape[-1]:
        return _by_gram(x, add_product)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x


def _by_gram(x: Tensor, add_product: Callable[..., Tensor]) -> Tensor:
    """Runs the iterations on A = X X^T: 25 matmul FLOPs for 45 at c = 4 r.

    Each iteration multiplies X from the left by a polynomial of A, and so A from both sides. A has
    the squares of the singular values, which need fp32.
    """
    gram, all_so_far = x @ x.mT, None
    for i in range(ITERATIONS):
        factor = add_product(gram, gram, gram, beta=B, alpha=C)
        factor.diagonal(dim1=-2, dim2=-1).add_(A)
        all_so_far = factor if all_so_far is None else factor @ all_so_far
        if i + 1 < ITERATIONS:
            gram = factor @ gram @ factor
    return all_so_far @ x  # type: ignore[operator]


def orthogonal(stacks: Sequence[Tensor], parts: Sequence[int]) -> list[Tensor]:
    """Applies Newton-Schulz to stacks (n, R, C), each row of which holds `parts` matrices.

    Tall matrices are transposed for it, so that all matrices of all stacks have one shape.
    """
    single = [x.unflatten(1, (n, -1)).flatten(0, 1) for x, n in zip(stacks, parts, strict=True)]
    tall = [x.shape[1] > x.shape[2] for x in single]
    x = torch.cat([x.mT if t else x for x, t in zip(single, tall, strict=True)])
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = (x / norm.clamp(min=EPS)).to(x.dtype)
    # One by one on a CPU, where launches are free and a small matrix stays in the cache.
    x = torch.stack([*map(newton_schulz, x)]) if x.device.type == "cpu" else newton_schulz(x)
    found = zip(x.split([len(s) for s in single]), tall, stacks, strict=True)
    return [(y.mT if t else y).reshape(stack.shape) for y, t, stack in found]


class Muon(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer.

    matrices  Muon's parameters (fp32, or DTensors of which each rank has rows), with the number of
              matrices in each, which are equal parts of its rows: c_attn has those of q, k and v
    adamw     optimizer of all other parameters, whose groups and state become part of this one
    dtype     of the Newton-Schulz matmuls
    scatter   way in which the matrices are spread over the ranks
    compile   True for kernels by torch.compile

    Like fused AdamW it divides gradients by the tensor `grad_scale` and skips the update if the
    tensor `found_inf` is not 0, where these attributes are set. The state is `momentum_buffer`, as
    in PyTorch. Matrices of one shape are stacked and multiplied together.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        matrices: Mapping[Tensor, int],
        adamw: torch.optim.Optimizer,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
        scatter: MatrixScatter | None = None,
        compile: bool = False,
    ):
        defaults = {"lr": adamw.param_groups[0]["lr"], "weight_decay": weight_decay}
        super().__init__([*matrices], defaults)
        self.param_groups += adamw.param_groups
        self.state = adamw.state
        self.adamw, self.matrices = adamw, matrices
        self.dtype, self.scatter = dtype, scatter or MatrixScatter()
        self._step_supports_amp_scaling = getattr(adamw, "_step_supports_amp_scaling", False)
        self._momentum: Callable[..., tuple[Tensor, Tensor]] = momentum
        self._orthogonal: Callable[..., list[Tensor]] = orthogonal
        if compile:
            self._momentum = torch.compile(momentum, dynamic=False)
            self._orthogonal = torch.compile(orthogonal, dynamic=False)

        # Parameters of one shape are stacked, and matrices of the same sides multiplied together.
        stacks: dict[tuple[torch.Size, int], list[Tensor]] = {}
        for p, parts in matrices.items():
            stacks.setdefault((p.shape, parts), []).append(p)
        self._batches: dict[tuple[int, ...], list[tuple[list[Tensor], int]]] = {}
        for ((rows, columns), parts), params in stacks.items():
            sides = tuple(sorted((rows // parts, columns)))
            self._batches.setdefault(sides, []).append((params, parts))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters. Does not wait for the device."""
        adamw: Any = self.adamw
        adamw.grad_scale, adamw.found_inf = self.grad_scale, self.found_inf
        loss = adamw.step(closure)
        options, device = self.param_groups[0], next(iter(self.matrices)).device
        divisor = torch.ones((), device=device) if self.grad_scale is None else self.grad_scale
        bad = (torch.zeros((), device=device) if self.found_inf is None else self.found_inf) != 0
        rate = torch.where(bad, 0.0, options["lr"])
        keep = 1 - rate * options["weight_decay"]
        for (_, longer_side), batch in self._batches.items():
            # The extra dimension makes the multiplication promote the result to fp32.
            scale = (-SCALE * math.sqrt(longer_side) * rate)[None]
            ahead = [self._look_ahead(params, divisor, bad) for params, _ in batch]
            mine = [
                self.scatter.scatter(stack, params[0].shape[0])
                for stack, (params, _) in zip(ahead, batch, strict=True)
            ]
            made = self._orthogonal(mine, [parts for _, parts in batch])
            for (params, _), stack, x in zip(batch, ahead, made, strict=True):
                weights = [local(p) for p in params]
                torch._foreach_mul_(weights, keep)
                torch._foreach_add_(weights, [*(self.scatter.gather(x, stack) * scale).unbind()])
        return loss

    def _look_ahead(self, params: list[Tensor], divisor: Tensor, bad: Tensor) -> Tensor:
        """Updates the momentum. Returns this rank's stack (n, rows, columns) for Newton-Schulz."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [local(self.state[p]["momentum_buffer"]) for p in params]
        grads = torch.stack([local(p.grad) for p in params if p.grad is not None])
        new, ahead = self._momentum(grads, torch.stack(buffers), divisor, bad, self.dtype)
        torch._foreach_copy_(buffers, [*new.unbind()])
        return ahead

    def warm_up(self) -> None:
        """Compiles the kernels of a step by one that is skipped, so nothing changes."""
        if self._orthogonal is not orthogonal:
            self.found_inf = torch.ones((), device=next(iter(self.matrices)).device)
            self.step()
            self.found_inf = None
