"""AdamW in one launch for all parameters: `fastgpt_kernels.adamw_step` as a PyTorch optimizer.

Seen from outside it is `torch.optim.AdamW(fused=True)`, with the same groups and the same state, so
that either goes on from the other's checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt.errors import UserError
from fastgpt.train.distributed import local
from fastgpt_kernels import AdamWTensors, adamw_step


class FusedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)` on our kernel; all groups have one lr, betas and eps.

    Parameters and state are fp32, contiguous and on one device, or DTensors, of which each rank
    updates its part. The state is PyTorch's, but `step` is the same tensor for all parameters. Like
    PyTorch's it skips parameters without a gradient. A parameter's tensor in `copies`, of 16 bits,
    becomes its rounded copy in the same pass. If these attributes are set, it divides
    gradients by the tensor `grad_scale` and does nothing if the tensor `found_inf` is not 0. The
    gradients themselves are not changed.
    """

    def __init__(self, groups: Any, **options: Any):
        super().__init__(groups, fused=True, **options)
        self.copies: Mapping[Tensor, Tensor] = {}
        self._tensors: AdamWTensors | None = None
        self._made_from: list[Tensor] = []
        self._lr = torch.empty(0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; waits for the device only if it is the first with these parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first, *others = self.param_groups
        for key in ("lr", "betas", "eps"):
            # What only the device reads, in a CUDA graph, `set_learning_rate` has filled.
            if not isinstance(first[key], Tensor) and any(g[key] != first[key] for g in others):
                raise ValueError(f"adamw: all groups must have the same {key}")
        groups = self.param_groups
        decays = {p: g["weight_decay"] for g in groups for p in g["params"] if p.grad is not None}
        if not decays:
            return loss
        tensors = self._table([*decays], [*decays.values()])
        if isinstance(first["lr"], Tensor):
            self._lr.copy_(first["lr"])
        else:
            self._lr.fill_(first["lr"])
        divisor = getattr(self, "grad_scale", None)
        adamw_step(
            tensors,
            self.state[next(iter(decays))]["step"],
            self._lr,
            betas=first["betas"],
            eps=first["eps"],
            grad_scale=None if divisor is None else divisor.reciprocal(),
            found_inf=getattr(self, "found_inf", None),
        )
        # Gradients may be freed now: zeroing and adding to them would cost more bytes than the
        # kernel saves, and what the table held on to would be in memory a second time.
        tensors.grads.clear()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As PyTorch's, whose AdamW would count a shared `step` once for each parameter."""
        saved = super().state_dict()
        states = saved["state"].items()
        return {**saved, "state": {k: {**s, "step": s["step"].clone()} for k, s in states}}

    def _table(self, params: list[Tensor], decays: list[float]) -> AdamWTensors:
        """What the kernel updates, with today's gradients."""
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device)
                for key in ("exp_avg", "exp_avg_sq"):
                    self.state[p][key] = torch.zeros_like(p)
        grads = [local(p.grad) for p in params if p.grad is not None]
        sources = self._sources(params)
        if (
            self._tensors is not None
            and len(sources) == len(self._made_from)
            and all(a is b for a, b in zip(sources, self._made_from, strict=True))
            and decays == self._tensors.weight_decays
        ):
            self._tensors.set_gradients(grads)
            return self._tensors
        self.share_step(params)
        m, v = ([local(self.state[p][k]) for p in params] for k in ("exp_avg", "exp_avg_sq"))
        copies = [self.copies.get(p) for p in params]
        parts = [local(p) for p in params]
        self._tensors = AdamWTensors(parts, grads, m, v, copies, weight_decay=decays)
        self._made_from = self._sources(params)
        self._lr = torch.zeros((), device=self._tensors.device)
        return self._tensors

    def _sources(self, params: list[Tensor]) -> list[Tensor]:
        """What a table of these is made from: as long as it is the same, so is the table."""
        own = ((p, *self.state[p].values(), self.copies.get(p)) for p in params)
        return [t for tensors in own for t in tensors if t is not None]

    def share_step(self, params: list[Tensor]) -> None:
        """Make the step count of these parameters one new tensor, which is no others'.

        Waits for the device. Raises UserError if they have been updated a different number of
        times: then PyTorch's AdamW, which counts for each, has to go on.
        """
        steps = {id(t): t for t in (self.state[p]["step"] for p in params)}
        counts = {float(t) for t in steps.values()}
        if len(counts) > 1:
            raise UserError(
                f"--op.adamw=triton: parameters were updated {min(counts):g} to {max(counts):g} "
                "times, and the kernel counts once for all; pass --op.adamw=eager"
            )
        for count in counts:
            step = torch.tensor(count, device=params[0].device)
            for p in params:
                self.state[p]["step"] = step
