"""What differs between the versions of Triton, for kernels in Gluon.

Gluon is new and still changes: functions are renamed, and TMA's reduction became public with 3.9
only. The kernels take these names from here. With a version that nobody has compiled them with the
op counts as not available (`versions.refusal`).
"""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia.hopper import tma

# The threads of a partition wait for each other; `thread_barrier` in 3.6.
barrier: Any = getattr(gl, "barrier", None) or _core.thread_barrier


@_core.builtin
def _reduce_add(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = _core.ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


# TMA: (descriptor, coordinates, mbarrier, shared memory), and twice (descriptor, coordinates,
# shared memory), of which the second adds to what is in global memory; private until 3.9.
load: Any = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store: Any = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
reduce_add: Any = getattr(tma, "async_atomic_add", _reduce_add)
