"""AdamW over fp32 master weights in one pass, which also clips and writes the 16-bit weights.

    g <- grad_scale g                                       the clip factor, 1 / the loss scale, ...
    p <- (1 - lr weight_decay) p
    m <- m + (1 - beta1) (g - m)            v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^t)  m / (sqrt(v) / sqrt(1 - beta2^t) + eps)             copy <- p

(Loshchilov and Hutter 2019, in the order and rounding of `torch.optim.AdamW`.) Bytes a parameter:

    this kernel                      read p g m v 16, write p m v 12, write the bf16 copy 2       30
    torch.optim.AdamW(fused=True)    28, clip g 8 (4 as its `grad_scale`), cast p 4 + 2      38 - 42

and both read g once more for its norm, 4. So 8 to 12 bytes of 42 to 46 are saved, 19 to 26 %; at
4.3 TB/s 0.23 to 0.35 ms a step of GPT-2 124M and 2.9 to 4.3 ms of 1558M (bytes over bandwidth, not
measured). Gradients in bf16, where one micro-step is a step, save 2 more. All tensors go in one
launch: a table of their addresses lies on the device. Step count, learning rate and clip factor are
device tensors, so that a CUDA graph replays it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import reference
from fastgpt_kernels._host import FLOAT_DTYPES, arch_of, check_tensor, on_device, use_kernel
from fastgpt_kernels.configs import ADAMW, Config, entries, lookup
from fastgpt_kernels.specs import AotSpec, Tunable

TL_DTYPE = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@triton.jit
def _one_minus_power(log_beta, step):
    """1 - beta^step, by a series where the difference would cancel (1 - 0.999 leaves 13 bits)."""
    x = step * log_beta
    terms = 1 + x / 6 * (1 + x / 7 * (1 + x / 8))
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * terms))))
    return tl.where(x > -0.3, series, 1 - tl.exp(x))


@triton.jit
def _adamw_kernel(
    addresses_ptr,  # (5, N) int64: of p, g, m, v and the copy, 0 for none
    sizes_ptr,  # (N,) int64, elements
    decays_ptr,  # (N,) fp32, weight decay
    blocks_ptr,  # (programs, 2) int32: which tensor, which block of it
    step_ptr,  # fp32, t
    lr_ptr,  # fp32
    grad_scale_ptr,  # fp32 or None
    found_inf_ptr,  # fp32 or None: not 0 calls the update off
    n_tensors,
    log_beta1,
    log_beta2,
    rest_beta1,  # 1 - beta1, rounded once
    beta2,
    rest_beta2,
    eps,
    GRAD_DTYPE: tl.constexpr,
    COPY_DTYPE: tl.constexpr,  # None where no tensor has a copy
    ALIGNED: tl.constexpr,  # every address is a multiple of 16
    BLOCK: tl.constexpr,
):
    active = True
    if found_inf_ptr is not None:
        active = tl.load(found_inf_ptr) == 0.0
    if active:
        program = tl.program_id(0).to(tl.int64)
        which = tl.load(blocks_ptr + 2 * program)
        first = tl.load(blocks_ptr + 2 * program + 1).to(tl.int64) * BLOCK
        size = tl.load(sizes_ptr + which)
        decay = tl.load(decays_ptr + which)
        row = addresses_ptr + which
        p_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
        g_ptr = tl.load(row + n_tensors).to(tl.pointer_type(GRAD_DTYPE))
        m_ptr = tl.load(row + 2 * n_tensors).to(tl.pointer_type(tl.float32))
        v_ptr = tl.load(row + 3 * n_tensors).to(tl.pointer_type(tl.float32))
        if ALIGNED:
            p_ptr, g_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16)
            m_ptr, v_ptr = tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16)
        copy_address = tl.load(row + 4 * n_tensors)
        lr = tl.load(lr_ptr)
        step = tl.load(step_ptr)
        shrink = 1 - lr * decay
        step_size = lr / _one_minus_power(log_beta1, step)
        correction = tl.sqrt_rn(_one_minus_power(log_beta2, step))
        grad_scale = 1.0
        if grad_scale_ptr is not None:
            grad_scale = tl.load(grad_scale_ptr)

        # Without a mask, the bound of which is any number, accesses are 128 bits wide.
        offsets = first + tl.arange(0, BLOCK)
        whole = first + BLOCK <= size
        if whole:
            g, p = tl.load(g_ptr + offsets), tl.load(p_ptr + offsets)
            m, v = tl.load(m_ptr + offsets), tl.load(v_ptr + offsets)
        else:
            mask = offsets < size
            g, p = tl.load(g_ptr + offsets, mask=mask), tl.load(p_ptr + offsets, mask=mask)
            m, v = tl.load(m_ptr + offsets, mask=mask), tl.load(v_ptr + offsets, mask=mask)
        g = g.to(tl.float32) * grad_scale
        p *= shrink
        m += rest_beta1 * (g - m)
        v = beta2 * v + rest_beta2 * g * g
        p -= step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), correction) + eps)
        if whole:
            tl.store(p_ptr + offsets, p)
            tl.store(m_ptr + offsets, m)
            tl.store(v_ptr + offsets, v)
        else:
            mask = offsets < size
            tl.store(p_ptr + offsets, p, mask=mask)
            tl.store(m_ptr + offsets, m, mask=mask)
            tl.store(v_ptr + offsets, v, mask=mask)
        if COPY_DTYPE is not None and copy_address != 0:
            copy_ptr = copy_address.to(tl.pointer_type(COPY_DTYPE))
            if ALIGNED:
                copy_ptr = tl.multiple_of(copy_ptr, 16)
            if whole:
                tl.store(copy_ptr + offsets, p.to(COPY_DTYPE))
            else:
                tl.store(copy_ptr + offsets, p.to(COPY_DTYPE), mask=offsets < size)


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
        """The dtype of `tensors`, all of one; None where there are none."""
        if len(tensors) != len(self.params):
            raise ValueError(
                f"adamw: {name} must be {len(self.params)} tensors, got {len(tensors)}"
            )
        dtype = None
        for i, (p, t) in enumerate(zip(self.params, tensors, strict=True)):
            if t is None and name == "copies":
                continue
            wanted = dtypes if dtype is None else (dtype,)
            check_tensor(
                "adamw", f"{name}[{i}]", t, shape=p.shape, dtypes=wanted, device=self.device
            )
            assert t is not None
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


def launch_adamw(
    tensors: AdamWTensors,
    step: Tensor,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One update of everything in `tensors`; `step` is t, counted already."""
    if len(tensors.blocks) == 0:
        return
    log_betas = [math.log(beta) if beta else -math.inf for beta in betas]
    with on_device(step):
        _adamw_kernel[(len(tensors.blocks),)](
            tensors.addresses,
            tensors.sizes,
            tensors.decays,
            tensors.blocks,
            step,
            lr,
            grad_scale,
            found_inf,
            len(tensors.params),
            *log_betas,
            1 - betas[0],
            betas[1],
            1 - betas[1],
            eps,
            GRAD_DTYPE=TL_DTYPE[tensors.grad_dtype],
            COPY_DTYPE=None if tensors.copy_dtype is None else TL_DTYPE[tensors.copy_dtype],
            ALIGNED=tensors.aligned,
            **tensors.config.kwargs(),
        )


@torch.compiler.disable
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

    step and lr are fp32 tensors of one element on the device of the parameters, so that a captured
    CUDA graph counts and follows a schedule. `grad_scale`, the like, multiplies the gradients (the
    clip factor over the loss scale); the gradients themselves are not changed. `found_inf`, the
    like, calls the step off where it is not 0, the count too, without the host knowing.
    """
    for name, t in (
        ("step", step),
        ("lr", lr),
        ("grad_scale", grad_scale),
        ("found_inf", found_inf),
    ):
        if t is None and name in ("grad_scale", "found_inf"):
            continue
        check_tensor("adamw", name, t, dtypes=(torch.float32,), device=tensors.device)
        assert t is not None
        if t.numel() != 1:
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


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """With clipping and bf16 copies, from fp32 and from bf16 gradients."""
    pointers = {
        "addresses_ptr": "*i64",
        "sizes_ptr": "*i64",
        "decays_ptr": "*fp32",
        "blocks_ptr": "*i32",
        "step_ptr": "*fp32",
        "lr_ptr": "*fp32",
        "grad_scale_ptr": "*fp32",
        "found_inf_ptr": "*fp32",
    }
    numbers = ("log_beta1", "log_beta2", "rest_beta1", "beta2", "rest_beta2", "eps")
    for config in entries(ADAMW, arch).values():
        for grad_dtype, aligned in ((tl.float32, True), (tl.float32, False), (tl.bfloat16, True)):
            yield AotSpec(
                f"adamw {grad_dtype} gradients{'' if aligned else ' unaligned'}",
                _adamw_kernel,
                {**pointers, "n_tensors": "i32", **dict.fromkeys(numbers, "fp32")},
                {
                    "GRAD_DTYPE": grad_dtype,
                    "COPY_DTYPE": tl.bfloat16,
                    "ALIGNED": aligned,
                    **config.blocks,
                },
                config.num_warps,
                config.num_stages,
                tuple(pointers),
            )


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
