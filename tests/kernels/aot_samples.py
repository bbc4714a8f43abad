"""Kernels that the ahead-of-time harness must judge: one sound, the others each with a fault."""

from collections.abc import Iterator

import triton
import triton.language as tl

from fastgpt_kernels.specs import AotSpec


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
def endless(x_ptr, N: tl.constexpr):
    x = tl.load(x_ptr)
    for i in tl.static_range(N):
        x = tl.exp(x) * i
    tl.store(x_ptr, x)


def aot_specs(arch: str) -> Iterator[AotSpec]:
    pointers = {"x_ptr": "*bf16", "y_ptr": "*bf16"}
    aligned = ("x_ptr", "y_ptr")
    yield AotSpec("sound", outer_sums, pointers, {"B": 32}, 4, 1, aligned)
    yield AotSpec("matmul", product, pointers, {"B": 64}, 4, 1, aligned, expect_wgmma=True)
    yield AotSpec("spills", outer_sums, pointers, {"B": 128}, 2, 1, aligned)
    yield AotSpec("not a power of two", outer_sums, pointers, {"B": 48}, 4, 1, aligned)
    yield AotSpec("no wgmma", outer_sums, pointers, {"B": 16}, 4, 1, aligned, expect_wgmma=True)
    if arch == "sm_90":
        yield AotSpec("endless", endless, {"x_ptr": "*fp32"}, {"N": 10**6}, 4, 1)
    yield AotSpec("argument forgotten", product, {"x_ptr": "*bf16"}, {"B": 32}, 4, 1)
