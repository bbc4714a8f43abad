"""AdamW over fp32 master weights in one pass, which also clips and writes the 16-bit weights.

    g <- grad_scale g                                       the clip factor, 1 / the loss scale, ...
    p <- (1 - lr weight_decay) p
    m <- m + (1 - beta1) (g - m)            v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^t)  m / (sqrt(v) / sqrt(1 - beta2^t) + eps)             copy <- p

(Loshchilov and Hutter 2019, in the order and rounding of `torch.optim.AdamW`.) Bytes a parameter:

    this kernel                      read p g m v 16, write p m v 12, write the bf16 copy 2       30
    torch.optim.AdamW(fused=True)    28, clip g 8 (4 as its `grad_scale`), then copy 4 + 2   38 - 42

and both read g once more for its norm, 4; a parameter without a copy (a norm's, the embedding)
takes 28 here. So 8 to 12 bytes of 42 to 46 are saved, 19 to 26 %; at 4.3 TB/s 0.23 to 0.35 ms a
step of GPT-2 124M and 2.9 to 4.3 ms of 1558M (bytes over bandwidth, not measured), if all have one.
Gradients in bf16, if a step has one micro-batch, save 2 more. All tensors go in one launch: a table
of their addresses lies on the device. Step count, learning rate and clip factor are device tensors,
so that a CUDA graph replays it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgpt_kernels import reference
from fastgpt_kernels.configs import Config, lookup
from fastgpt_kernels.host import FLOAT_DTYPES, HAS_TRITON, arch_of, check_tensor, use_kernel
from fastgpt_kernels.ops.adamw.configs import ADAMW

if HAS_TRITON:
    from fastgpt_kernels.ops.adamw.kernels import launch_adamw


class AdamWTensors:
    """What `adamw_step` updates, and the table of its addresses on the device.

    params, exp_avgs and exp_avg_sqs: fp32; grads: all of one dtype, fp32 or 16 bits; copies: one
    16-bit dtype, or None for a parameter without a copy, or no list at all. All contiguous, on one
    device, tensor by tensor of one shape. weight_decay: one number, or one a parameter. The table
    keeps the tensors alive; a parameter whose gradient is replaced (`zero_grad` frees it) needs
    `set_gradients` before the next step.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        copies: Sequence[Tensor | None] | None = None,
        weight_decay: float | Sequence[float] = 0.0,
        config: Config | None = None,
    ) -> None:
        self.params, self.exp_avgs, self.exp_avg_sqs = [*params], [*exp_avgs], [*exp_avg_sqs]
        self.copies = [None] * len(self.params) if copies is None else [*copies]
        if not self.params:
            raise ValueError("adamw: params must not be empty")
        self.device = self.params[0].device
        self._check("params", self.params, (torch.float32,))
        self._check("exp_avgs", self.exp_avgs, (torch.float32,))
        self._check("exp_avg_sqs", self.exp_avg_sqs, (torch.float32,))
        self.copy_dtype = self._check("copies", self.copies, (torch.bfloat16, torch.float16))
        decays = weight_decay if isinstance(weight_decay, Sequence) else [weight_decay]
        if isinstance(weight_decay, Sequence) and len(decays) != len(self.params):
            raise ValueError(
                f"adamw: weight_decay must be a number or one for each of {len(self.params)} "
                f"params, got {len(decays)}"
            )
        self.weight_decays = [*decays] * (len(self.params) // len(decays))

        self.config = config or lookup(ADAMW, arch_of(self.params[0]), 0)
        block = self.config.blocks["BLOCK"]
        sizes = torch.tensor([p.numel() for p in self.params])
        counts = (sizes + block - 1) // block
        which = torch.arange(len(sizes)).repeat_interleave(counts)
        first = torch.arange(len(which)) - (counts.cumsum(0) - counts)[which]
        self.blocks = torch.stack([which, first], 1).int().to(self.device)
        self.sizes = sizes.to(self.device)
        self.decays = torch.tensor(self.weight_decays, dtype=torch.float32, device=self.device)
        self._addresses: list[int] = []
        self.set_gradients(grads)

    def _check(
        self, name: str, tensors: Sequence[Tensor | None], dtypes: tuple[torch.dtype, ...]
    ) -> torch.dtype | None:
        """The dtype of `tensors`, all of one; None if there are none."""
        if len(tensors) != len(self.params):
            raise ValueError(
                f"adamw: {name} must be {len(self.params)} tensors, got {len(tensors)}"
            )
        dtype = None
        for i, (p, t) in enumerate(zip(self.params, tensors, strict=True)):
            check_tensor(
                "adamw", f"{name}[{i}]", t, shape=p.shape, like=self.params[0],
                dtypes=dtypes if dtype is None else (dtype,), optional=name == "copies",
            )  # fmt: skip
            if t is None:
                continue
            if not t.is_contiguous():
                raise ValueError(f"adamw: {name}[{i}] must be contiguous, got strides {t.stride()}")
            dtype = t.dtype
        return dtype

    def set_gradients(self, grads: Sequence[Tensor]) -> None:
        """Take these gradients from now on; does not wait for the device."""
        self.grad_dtype = self._check("grads", grads, FLOAT_DTYPES) or torch.float32
        self.grads = [*grads]
        lists = (self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.copies)
        addresses = [0 if t is None else t.data_ptr() for tensors in lists for t in tensors]
        if addresses == self._addresses:
            return
        self._addresses = addresses
        self.aligned = all(address % 16 == 0 for address in addresses)
        host = torch.tensor(addresses, pin_memory=self.device.type == "cuda")
        self.addresses = host.to(self.device, non_blocking=True)


@torch._disable_dynamo  # torch.compiler.disable, but the compiler is loaded at the first call
@torch.no_grad()
def adamw_step(
    tensors: AdamWTensors,
    step: Tensor,
    lr: Tensor,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of AdamW, in place: params, both averages, the copies, and `step` by one.

    step, lr, grad_scale and found_inf are fp32 tensors of one element on the device of the
    parameters, so that a captured CUDA graph counts and follows a schedule. The gradients count
    times `grad_scale` (the clip factor over the loss scale), and are not changed themselves. If
    `found_inf` is not 0, neither the step nor its count happens; the host does not learn of it.
    """
    scalars = {"step": step, "lr": lr, "grad_scale": grad_scale, "found_inf": found_inf}
    for name, t in scalars.items():
        optional = name in ("grad_scale", "found_inf")
        check_tensor("adamw", name, t, like=tensors.params[0], optional=optional)
        if t is not None and t.numel() != 1:
            raise ValueError(f"adamw: {name} must have one element, got shape {tuple(t.shape)}")
    for beta in betas:
        if not 0 <= beta < 1:
            raise ValueError(f"adamw: betas must be in [0, 1), got {betas}")
    if found_inf is None:
        step += 1
    else:
        step += (found_inf == 0).view_as(step)
    arguments = (tensors, step, lr, betas, eps, grad_scale, found_inf)
    if not use_kernel(step):
        reference.adamw_update(*arguments)
        return
    launch_adamw(*arguments)
    # The kernel writes through addresses: tell autograd, as an in-place op would.
    written = (tensors.params, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.copies)
    torch.autograd.graph.increment_version([t for ts in written for t in ts if t is not None])
