"""Muon for the blocks' matrices and AdamW for all else, behind the face of one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) makes of a matrix's momentum
the nearest matrix whose singular values are all about 1, so that a step moves every direction of
it alike. One matrix is what maps one vector to another: c_attn is three, for q, k and v. Embeddings
(with the head, which is tied to them), norms and biases are no such maps and stay with AdamW.

    B = mu B + (1 - mu) g,   U = mu B + (1 - mu) g                      Nesterov's momentum
    X = U / |U|,   X = a X + (b A + c A^2) X  with A = X X^T, 5 times   Newton-Schulz
    W = (1 - lr decay) W - 0.2 sqrt(max(rows, columns)) lr X

That is `torch.optim.Muon(adjust_lr_fn="match_rms_adamw", nesterov=True)` for each matrix by itself.
The last factor (Liu et al. 2025, https://arxiv.org/abs/2502.16982, section 2.2) gives a step the
root mean square that AdamW's have, so that one learning rate and one decay serve both.

Matrices of one shape are stacked and multiplied together; several ranks share them out (shares.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt.train.distributed import Shares, local

MOMENTUM, SCALE, EPS = 0.95, 0.2, 1e-7
# Of the quintic that lifts small singular values fastest; they end between about 0.7 and 1.2.
A, B, C, ITERATIONS = 3.4445, -4.7750, 2.0315, 5


def momentum(
    grads: Tensor, buffer: Tensor, divisor: Tensor, bad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(the new momentum, Nesterov's look ahead in `dtype`) of gradients / divisor.

    If `bad` the momentum stays, and no gradient gets into either: 0 times NaN would be NaN.
    """
    grads = torch.where(bad, buffer, grads / divisor)
    buffer = buffer.lerp(grads, 1 - MOMENTUM)
    return buffer, grads.lerp(buffer, MOMENTUM).to(dtype)


def newton_schulz(x: Tensor) -> Tensor:
    """Singular values of x (r, c) or (n, r, c), r <= c, all near 1. |x| is at most 1."""
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    if x.dtype == torch.float32 and 2 * x.shape[-2] <= x.shape[-1]:
        return _by_gram(x, add_product)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x


def _by_gram(x: Tensor, add_product: Callable[..., Tensor]) -> Tensor:
    """The same with r x r products but for the first and the last: 25 of them, at c = 4 r, for 45.

    Each iteration multiplies X from the left by a polynomial of A = X X^T, and so A from both
    sides. A has the squares of the singular values: lower precisions than fp32 would lose them.
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
    """What Newton-Schulz makes of stacks (n, R, C) of `parts` matrices on top of each other.

    Tall ones lie down meanwhile; all matrices of all stacks then have one shape.
    """
    single = [x.unflatten(1, (n, -1)).flatten(0, 1) for x, n in zip(stacks, parts, strict=True)]
    tall = [x.shape[1] > x.shape[2] for x in single]
    x = torch.cat([x.mT if t else x for x, t in zip(single, tall, strict=True)])
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = (x / norm.clamp(min=EPS)).to(x.dtype)
    # On a CPU one by one: there is no launch to save, and a small matrix stays in the cache.
    x = torch.stack([*map(newton_schulz, x)]) if x.device.type == "cpu" else newton_schulz(x)
    found = zip(x.split([len(s) for s in single]), tall, stacks, strict=True)
    return [(y.mT if t else y).reshape(stack.shape) for y, t, stack in found]


class Kind:
    """Parameters of one shape, each of `parts` matrices: a stack of them is (n, rows, columns)."""

    def __init__(self, params: list[Tensor], parts: int):
        self.params, self.parts, self.rows = params, parts, params[0].shape[0]
        sides = self.rows // parts, params[0].shape[1]
        self.sides = min(sides), max(sides)


class Muon(torch.optim.Optimizer):
    """Both optimizers.

    matrices  Muon's parameters, fp32, or DTensors of which each rank has rows; and how many
              matrices each of them is, as equal parts of its rows
    adamw     has all other parameters; its groups and its state are part of this one's
    dtype     of Newton-Schulz's products
    shares    how the ranks share them out
    compile   whether torch.compile makes the kernels

    Like fused AdamW it divides gradients by the tensor `grad_scale` and does nothing if the tensor
    `found_inf` is not 0, if these attributes are set, without waiting for the device. The state is
    PyTorch's, `momentum_buffer`. Parameters without a gradient are skipped.
    """

    def __init__(
        self,
        matrices: Mapping[Tensor, int],
        adamw: torch.optim.Optimizer,
        *,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
        shares: Shares | None = None,
        compile: bool = False,
    ):
        defaults = {"lr": adamw.param_groups[0]["lr"], "weight_decay": weight_decay}
        super().__init__([*matrices], defaults)
        self.param_groups += adamw.param_groups
        self.state = adamw.state
        self.adamw, self.matrices = adamw, matrices
        self.dtype, self.shares = dtype, shares or Shares()
        self._step_supports_amp_scaling = getattr(adamw, "_step_supports_amp_scaling", False)
        self._momentum: Callable[..., tuple[Tensor, Tensor]] = momentum
        self._orthogonal: Callable[..., list[Tensor]] = orthogonal
        if compile:
            self._momentum = torch.compile(momentum, dynamic=False)
            self._orthogonal = torch.compile(orthogonal, dynamic=False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters; does not wait for the device."""
        grad_scale, found_inf = (getattr(self, k, None) for k in ("grad_scale", "found_inf"))
        adamw: Any = self.adamw
        adamw.grad_scale, adamw.found_inf = grad_scale, found_inf
        loss = adamw.step(closure)
        group, device = self.param_groups[0], next(iter(self.matrices)).device
        divisor = torch.ones((), device=device) if grad_scale is None else grad_scale
        if found_inf is None:
            found_inf = torch.zeros((), device=device)
        bad = found_inf != 0
        rate = torch.where(bad, 0.0, group["lr"])
        keep = 1 - rate * group["weight_decay"]
        for kinds in self._batches():
            ahead = [self._look_ahead(kind, divisor, bad) for kind in kinds]
            mine = [self.shares.take(u, kind.rows) for kind, u in zip(kinds, ahead, strict=True)]
            made = self._orthogonal(mine, [kind.parts for kind in kinds])
            for kind, u, x in zip(kinds, ahead, made, strict=True):
                # A dimension makes it widen x to fp32.
                scale = (-SCALE * math.sqrt(kind.sides[1]) * rate)[None]
                params = [local(p) for p in kind.params]
                torch._foreach_mul_(params, keep)
                torch._foreach_add_(params, [*(self.shares.give(x, u) * scale).unbind()])
        return loss

    def _batches(self) -> Iterator[list[Kind]]:
        """What is multiplied together: kinds whose matrices have the same sides."""
        found: dict[tuple[Any, ...], list[Tensor]] = {}
        for p, parts in self.matrices.items():
            if p.grad is not None:
                found.setdefault((p.shape, parts), []).append(p)
        batches: dict[tuple[int, int], list[Kind]] = {}
        for (_, parts), params in found.items():
            kind = Kind(params, parts)
            batches.setdefault(kind.sides, []).append(kind)
        yield from batches.values()

    def _look_ahead(self, kind: Kind, divisor: Tensor, bad: Tensor) -> Tensor:
        """Move the momentum on. Returns this rank's stack of what is to be made orthogonal."""
        for p in kind.params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [local(self.state[p]["momentum_buffer"]) for p in kind.params]
        grads = torch.stack([local(p.grad) for p in kind.params if p.grad is not None])
        new, ahead = self._momentum(grads, torch.stack(buffers), divisor, bad, self.dtype)
        torch._foreach_copy_(buffers, [*new.unbind()])
        return ahead

    def warm_up(self) -> None:
        """Compile what a step runs, by one that is called off: nothing changes."""
        if self._orthogonal is orthogonal:
            return
        self.found_inf = torch.ones((), device=next(iter(self.matrices)).device)
        self.step()
        del self.found_inf
