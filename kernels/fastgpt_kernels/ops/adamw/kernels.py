"""The kernel of AdamW and its launcher; the formula is in op.py."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels.host import on_device

if TYPE_CHECKING:
    from fastgpt_kernels.ops.adamw.op import AdamWTensors

TL_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _one_minus_power(log_beta, step):
    """1 - beta^step, by a series if the difference would cancel (1 - 0.999 leaves 13 bits)."""
    x = step * log_beta
    terms = 1 + x / 6 * (1 + x / 7 * (1 + x / 8))
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * terms))))
    return tl.where(x > -0.3, series, 1 - tl.exp(x))


@triton.jit
def adamw_kernel(
    addresses_ptr,  # (5, N) int64: of p, g, m, v and the copy, 0 for none
    sizes_ptr,  # (N,) int64, elements
    decays_ptr,  # (N,) fp32, weight decay
    blocks_ptr,  # (programs, 2) int32: which tensor, which block of it
    step_ptr, lr_ptr,  # fp32; the step is t
    grad_scale_ptr, found_inf_ptr,  # fp32 or None; found_inf, if not 0, calls the update off
    n_tensors, log_beta1, log_beta2,
    rest_beta1,  # 1 - beta1, rounded once
    beta2, rest_beta2, eps,
    GRAD_DTYPE: tl.constexpr,
    COPY_DTYPE: tl.constexpr,  # None if no tensor has a copy
    ALIGNED: tl.constexpr,  # every address is a multiple of 16
    BLOCK: tl.constexpr,
):  # fmt: skip
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
            # By eights: 128 bits of the copy are two accesses of the others, which have to lie side
            # by side in a warp. Of another shape, the copy alone changes threads.
            rounded = tl.reshape(p.to(COPY_DTYPE), (BLOCK // 8, 8))
            eights = first + tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
            if whole:
                tl.store(copy_ptr + eights, rounded)
            else:
                tl.store(copy_ptr + eights, rounded, mask=eights < size)


def launch_adamw(
    tensors: AdamWTensors, step: Tensor, lr: Tensor, betas: tuple[float, float], eps: float,
    grad_scale: Tensor | None, found_inf: Tensor | None,
) -> None:  # fmt: skip
    """One update of everything in `tensors`; `step` is t, counted already."""
    if len(tensors.blocks) == 0:
        return
    log_betas = [math.log(beta) if beta else -math.inf for beta in betas]
    with on_device(step):
        adamw_kernel[(len(tensors.blocks),)](
            tensors.addresses, tensors.sizes, tensors.decays, tensors.blocks, step, lr, grad_scale,
            found_inf, len(tensors.params), *log_betas, 1 - betas[0], betas[1], 1 - betas[1], eps,
            GRAD_DTYPE=TL_DTYPE[tensors.grad_dtype],
            COPY_DTYPE=None if tensors.copy_dtype is None else TL_DTYPE[tensors.copy_dtype],
            ALIGNED=tensors.aligned, **tensors.config.kwargs(),
        )  # fmt: skip
