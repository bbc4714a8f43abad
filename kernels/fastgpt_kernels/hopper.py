"""Helpers of the Gluon kernels for Hopper: names in Triton 3.6 to 3.9, mbarriers, TMA.

Gluon refuses to be imported under Triton's interpreter, so ops import this where a call needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# --- Triton 3.6 to 3.9 ------------------------------------------------------------------------


def names_of(gl: Any, core: Any, tma: Any) -> tuple[Any, Any, Any]:
    """Returns `barrier`, `tma.async_load` and `tma.async_store` of 3.9, also under 3.6's names.

    The threads of a partition wait for each other at a barrier.
    """
    return (
        getattr(gl, "barrier", None) or core.thread_barrier,
        getattr(tma, "async_load", None) or tma.async_copy_global_to_shared,
        getattr(tma, "async_store", None) or tma.async_copy_shared_to_global,
    )


barrier, load, store = names_of(gl, _core, tma)


@_core.builtin
def reduce_add(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
    """Has TMA add shared memory to the block at `coord` in global memory.

    `tma.async_atomic_add` of 3.9, which until then is not public.
    """
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = _core.ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


# --- Handing over shared memory ---------------------------------------------------------------


@gluon.jit
def mbarriers(n: gl.constexpr, arrivals: gl.constexpr):
    """Returns n mbarriers, each of which ends a phase after so many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(n):
        mbarrier.init(made.index(i), count=arrivals)
    return made


@gluon.jit
def arrive_all(bar):
    """Arrives at an mbarrier once all warps of the partition have come here."""
    barrier()
    mbarrier.arrive(bar)


# --- Tensors as TMA addresses them ------------------------------------------------------------

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def _strides(x: Tensor) -> list[int]:
    """Returns the strides of x; dims of size one have those of a dense tensor."""
    strides, dense = list(x.stride()), 1
    for i in range(x.ndim - 1, -1, -1):
        if x.shape[i] == 1:
            strides[i] = dense
        dense = strides[i] * x.shape[i]
    return strides


def addressable(x: Tensor) -> Tensor:
    """Returns x (B, T, columns) if TMA can address it, else a dense copy.

    It needs rows of consecutive elements that begin at multiples of 16 bytes.
    """
    *outer, inner = _strides(x)
    aligned = all(
        0 < s * x.element_size() < 2**40 and s * x.element_size() % 16 == 0 for s in outer
    )
    if inner == 1 and aligned and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def blocks(x: Tensor, shape: Sequence[int]) -> TensorDescriptor:
    """Returns a TMA descriptor of x in blocks; outside of x there are zeros, never written."""
    layout = (
        gl.NVMMASharedLayout.get_default_for(list(shape), _DTYPES[x.dtype])
        if shape[-2] > 1
        else gl.NVMMASharedLayout(0, 8 * x.element_size(), len(shape))
    )
    return TensorDescriptor(x, list(x.shape), _strides(x), list(shape), layout)
