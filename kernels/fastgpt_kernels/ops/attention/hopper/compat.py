"""What differs between the versions of Triton, for kernels in Gluon.

Gluon is new and still changes: functions are renamed, and TMA's reduction became public with 3.9
only. The kernels take these names from here. With a version that nobody has compiled them with they
count as not available (`op.version_refusal`).
"""

from __future__ import annotations

from typing import Any

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia.hopper import tma

# The threads of a partition wait for each other; `thread_barrier` in 3.6.
barrier: Any = getattr(gl, "barrier", None) or _core.thread_barrier


@_core.builtin
def reduce_add(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
    """Has TMA add shared memory to the block at `coord` in global memory.

    `tma.async_atomic_add` of 3.9, which until then is not public.
    """
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = _core.ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


# TMA: (descriptor, coordinates, mbarrier, shared memory), (descriptor, coordinates, shared memory).
load: Any = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store: Any = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.constexpr_function
def steps_a_loop(head_dim: Any) -> int:
    """How many steps of the softmax the forward loop's body has.

    Two spare 32 moves. Registers do not suffice for two at head dim 128, nor with Triton 3.9.
    """
    return 2 if head_dim == 64 and triton.__version__ < "3.9" else 1
