"""What the launchers for Hopper share: tensors as TMA reads and writes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def _strides(x: torch.Tensor) -> list[int]:
    """Strides of x, of dims of size one those that a dense tensor would have."""
    strides, dense = list(x.stride()), 1
    for i in range(x.ndim - 1, -1, -1):
        if x.shape[i] == 1:
            strides[i] = dense
        dense = strides[i] * x.shape[i]
    return strides


def in_place(x: torch.Tensor) -> torch.Tensor:
    """x (B, T, columns) if TMA can address it, else a dense copy.

    It needs rows of consecutive elements that begin at multiples of 16 bytes.
    """
    *outer, inner = _strides(x)
    aligned = all(
        0 < s * x.element_size() < 2**40 and s * x.element_size() % 16 == 0 for s in outer
    )
    if inner == 1 and aligned and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def blocks(x: torch.Tensor, shape: Sequence[int]) -> TensorDescriptor:
    """A TMA descriptor of x in blocks; what lies outside of x is zeros, and is not written."""
    layout = (
        gl.NVMMASharedLayout.get_default_for(list(shape), _DTYPES[x.dtype])
        if shape[-2] > 1
        else gl.NVMMASharedLayout(0, 8 * x.element_size(), len(shape))
    )
    return TensorDescriptor(x, list(x.shape), _strides(x), list(shape), layout)
