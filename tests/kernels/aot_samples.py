"""Kernels that the gate must judge: one sound, the others each with a fault."""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl

from fastgpt_kernels.launch import arch_of, options
from fastgpt_kernels.specs import Model, Use


@triton.jit
def outer_sums(x_ptr, y_ptr, B: tl.constexpr):
    offsets = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    x = tl.load(x_ptr + offsets).to(tl.float32)
    for _ in range(2):  # x lives across the loop: B * B / 32 / warps registers
        x += tl.sum(x, 0)[None, :] * tl.sum(x, 1)[:, None]
    tl.store(y_ptr + offsets, x.to(y_ptr.dtype.element_ty))


@triton.jit
def product(x_ptr, y_ptr, B: tl.constexpr):
    offsets = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, tl.dot(x, x).to(y_ptr.dtype.element_ty))


@triton.jit
def masked_copy(x_ptr, y_ptr, n, B: tl.constexpr):
    """`n` decides how wide accesses may be: 16 bits, if it is no multiple of 16."""
    columns = tl.arange(0, B)
    x = tl.load(x_ptr + columns, mask=columns < n, other=0.0)
    tl.store(y_ptr + columns, x, mask=columns < n)


@triton.jit
def key_value(q_ptr, k_ptr, y_ptr, rows, B: tl.constexpr, D: tl.constexpr):
    """The backward of attention in small: sums of products of what products gave."""
    at = tl.arange(0, B)[:, None] * D + tl.arange(0, D)[None, :]
    k = tl.load(k_ptr + at)
    dk = tl.zeros([B, D], tl.float32)
    dv = tl.zeros([B, D], tl.float32)
    for _ in range(0, rows, B):
        q = tl.load(q_ptr + at)
        scores = tl.dot(k, tl.trans(q))
        p = tl.exp2(scores)
        dp = tl.dot(k, tl.trans(q))
        dv = tl.dot(p.to(q.dtype), q, dv)
        dk = tl.dot((p * dp).to(q.dtype), q, dk)
        q_ptr += B * D
    tl.store(y_ptr + at, (dk + dv).to(y_ptr.dtype.element_ty))


@triton.jit
def endless(x_ptr, N: tl.constexpr):
    x = tl.load(x_ptr).to(tl.float32)
    for i in tl.static_range(N):
        x = tl.exp(x) * i
    tl.store(x_ptr, x.to(x_ptr.dtype.element_ty))


def uses(m: Model) -> Iterator[Use]:
    x = torch.empty(1 << 20, dtype=m.dtype, device="meta")
    y = torch.empty_like(x)

    def use(name: str, kernel, *arguments: object, **options: object) -> Use:
        return Use(name, partial(kernel[(1,)], *arguments, **options), trains=False)

    four = options(4)
    yield use("sound", outer_sums, x, y, 32, **four)
    yield use("matmul", product, x, y, 64, **four)
    yield use("spill", outer_sums, x, y, 128, **options(2))
    yield use("aligned", masked_copy, x, y, 2048, 4096, **four)
    yield use("unaligned", masked_copy, x, y, 2049, 4096, **four)
    yield use("in flight", key_value, x, x, y, 1024, 64, 64, **options(4, 2))
    if arch_of(x) == "sm_90":
        # With so few registers ptxas finds none that are the products' alone while they fly.
        yield use("serialised", key_value, x, x, y, 1024, 64, 64, maxnreg=152, **options(4, 2))
    yield use("no wgmma", product, x, y, 16, **four)
    yield use("no power of two", outer_sums, x, y, 48, **four)
    yield use("default fusion", outer_sums, x, y, 16, num_warps=4)
    yield use("endless", endless, x, 10**6, **four)
