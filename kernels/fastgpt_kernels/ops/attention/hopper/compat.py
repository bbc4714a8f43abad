"""What differs between the versions of Triton, for kernels in Gluon.

Gluon is new and still changes: functions are renamed, and the TMA reduction became public only with
3.9. The kernels take these names from here. A version that nobody has compiled them with counts as
one that does not have them: see `hopper.op.refusal`.
"""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia.hopper import tma

# Threads of the partition wait for each other: `thread_barrier` until 3.6.
barrier: Any = getattr(gl, "barrier", None) or _core.thread_barrier


@_core.builtin
def _reduce_add(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
    """Adds shared memory `src` to the block at `coord` in global memory, asynchronously."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = _core.ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


reduce_add: Any = getattr(tma, "async_atomic_add", _reduce_add)
load: Any = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store: Any = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
