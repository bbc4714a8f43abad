"""ATen ops as launches, as they are dispatched: what runs outside of compiled graphs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.fake_cuda import Launch

# A multi-tensor kernel takes so many chunks of 65,536 elements a launch, and so many tensors for
# each number of lists (ATen/native/cuda/MultiTensorApply.cuh).
CHUNK, CHUNKS_A_LAUNCH = 65536, 320
TENSORS_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}


class Dispatched(TorchDispatchMode):
    """A mode under which every op that computes becomes a launch in `launches`."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._paused = False

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Dynamo compiles under such a mode; it would leave a graph alone under any other."""
        return True

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within, nothing is noted."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._paused and _computes(func):
            self.launches += [_launch(func, args, kwargs or {}, result)] * launches_of(func, args)
        return result


@auto_functionalized_v2.py_impl(Dispatched)
def _in_a_graph(mode: Dispatched, *args: Any, **kwargs: Any) -> Any:
    """An op that changes its arguments, in a compiled graph, whose launches are counted there."""
    return auto_functionalized_v2(*args, **kwargs)


def _computes(func: Any) -> bool:
    """Not a view, an allocation, or a question about a tensor."""
    name = func._schema.name.partition("::")[2]
    return not (
        func.is_view
        or func.namespace in ("prim", "profiler")
        or name.startswith(
            ("empty", "new_empty", "detach", "alias", "_unsafe_view", "lift", "set_")
        )
        or name in ("_local_scalar_dense", "record_stream", "_reshape_alias", "resize_")
    )


def launches_of(func: Any, args: Any) -> int:
    """Kernels of an op: one, but for the multi-tensor ones."""
    name = func._schema.name
    if not ("_foreach_" in name or "_fused_" in name):
        return 1
    lists = [a for a in args if isinstance(a, list) and a and isinstance(a[0], torch.Tensor)]
    wide = [a for a in lists if a[0].numel() > 1 or len(lists) == 1]
    chunks = sum(-(-t.numel() // CHUNK) for t in lists[0])
    tensors = TENSORS_A_LAUNCH[min(max(len(wide), 1), 5)]
    return max(-(-len(lists[0]) // tensors), -(-chunks // CHUNKS_A_LAUNCH), 1)


def _launch(func: Any, args: Any, kwargs: Any, result: Any) -> Launch:
    name = func._schema.name.partition("::")[2]
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    out = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
    if (not out and "_foreach_" in name) or "_fused_" in name:
        out = tensors
    n = launches_of(func, args)
    reads, writes = (
        sum({id(t): t.numel() * t.element_size() for t in ts}.values()) // n
        for ts in (tensors, out)
    )
    flops = 0
    shape: tuple[int, ...] = ()
    if name in ("mm", "addmm"):
        a, b = args[:2] if name == "mm" else args[1:3]
        shape = (a.shape[0], b.shape[1], a.shape[1])
        flops = 2 * a.shape[0] * b.shape[1] * a.shape[1]
    return Launch(name, reads, writes, flops, shape, lines=_lines())


def _lines() -> tuple[str, ...]:
    """Where in fastgpt an op was called: "muon.py:95"; empty if nowhere."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "fastgpt" in path.parts:
            return (f"{path.name}:{frame.f_lineno}",)
        frame = frame.f_back  # type: ignore[assignment]
    return ()
