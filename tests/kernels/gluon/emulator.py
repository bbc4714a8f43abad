"""Runs the Python source of Gluon kernels for Hopper on a CPU, under the most hostile timing.

    with emulated(seed=7):
        module.launch(tensors on the CPU)

Within, `kernel[grid](...)` of a Gluon kernel calls the very function under `@gluon.jit`; of what
it sees, `gl`, `tma`, `mbarrier`, wgmma's functions and `reduce_add` are replaced. A partition of
`warp_specialize` is a task. One task runs at a time; at every primitive a scheduler seeded by
`seed` picks who goes on: a task, or an asynchronous operation that was issued before (a TMA copy
lands, a wgmma or a TMA store reads its operands, a store reaches memory). Nothing but what waits
for an operation forces it, so it comes as late or as early as the rules allow.

Two nets catch what is wrong, and the second needs no luck:

- values: shared memory begins as NaN, and a buffer is NaN while a copy into it is under way. Before
  `fence_async_shared` wgmma and TMA see of a store by threads what was there, the new, or NaN. Sums
  with products are rounded once on some CTAs, as FMA does. Whoever calls compares the results.
- order: vector clocks (Mattern 1989) say which accesses to a box of shared memory come after which.
  Two that nothing orders are an error that names both lines, whichever order this seed ran them in;
  so are accesses of threads and then of wgmma or TMA with no proxy fence between, and what TMA does
  to a block in global memory that it stored before and that was not awaited in full.

A deadlock is reported with who waits for what.

What it takes as given: Gluon's documentation, and the PTX ISA's memory model and its rules for
mbarriers, bulk copies and wgmma. What it does not model:

- warps within a partition: that all have passed a point when one thread arrives at an mbarrier or
  starts a copy is the compiler's business;
- layouts and registers, and so whether it compiles, spills, or how fast it is;
- global memory between CTAs, which run one after the other; a kernel whose CTAs wait for each other
  hangs here;
- approximate exponentials, and the order in which a matrix product is summed;
- clusters, multicast, and TMA's limits but for the box's size.
"""

from __future__ import annotations

import functools
import importlib
import linecache
import random
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton.language as tl
from triton import knobs

from tests.kernels.gluon.machine import (
    Accumulator,
    Barrier,
    Barriers,
    Buffer,
    Cta,
    Operation,
    Shared,
    Task,
    join,
    known,
)  # fmt: skip
from tests.kernels.gluon.values import KernelError, Pointer, Scalar, Tensor, Tiles, raw, where

with mock.patch.object(type(knobs.runtime), "interpret", True):  # or its import refuses
    from triton.experimental.gluon import language as real_gl
    from triton.experimental.gluon._runtime import GluonJITFunction
    from triton.experimental.gluon.language.nvidia import hopper

    names = importlib.import_module("fastgpt_kernels.hopper")


# ---- Gluon's primitives -------------------------------------------------------------------------


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    data, offset, kept = pointer.locate(mask)
    out = torch.full(kept.shape, raw(other), dtype=data.dtype)
    out[kept] = data[offset]
    return Tensor(out)


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    data, offset, kept = pointer.locate(mask)
    data[offset] = torch.as_tensor(raw(value)).to(data.dtype).expand(kept.shape)[kept]


def _allocate(dtype: Any, shape: Sequence[int], layout: Any = None, value: Any = None) -> Any:
    frame: Any = sys._getframe(1)
    frame = frame.f_back if frame.f_code.co_name == "mbarriers" else frame
    name = linecache.getline(frame.f_code.co_filename, frame.f_lineno).split("=")[0].strip()
    if isinstance(layout, hopper.mbarrier.MBarrierLayout):
        made = Barriers(Barrier(f"{name}[{i}]") for i in range(shape[0]))
        Cta.now.barriers += made
        return made if len(shape) > 1 else made[0]
    buffer = Buffer(dtype, shape, name)
    box, dims = tuple((0, n) for n in shape), list(range(len(shape)))
    Cta.now.memory.append(Shared(buffer, buffer.generic, buffer.proxy, box, dims))
    if value is not None:
        Cta.now.memory[-1].store(value)
    return Cta.now.memory[-1]


def _warp_specialize(partitions: Any, worker_num_warps: Any, worker_num_regs: Any = None) -> Any:
    task = Cta.now.running
    clock = task.publish()
    workers = [
        Task(Cta.now, f"{function.__name__}[{i}]", partial(function, *args), clock)
        for i, (function, args) in enumerate(partitions[1:], 1)
    ]
    result = partitions[0][0](*partitions[0][1])
    task.pause(lambda: all(w.done for w in workers), lambda: "the other partitions")
    for worker in workers:
        join(task.clock, worker.clock)
    return result


def _pause() -> None:
    Cta.now.running.pause()


def _where(condition: Any, x: Any, y: Any) -> Any:
    if isinstance(condition, bool):
        return x if condition else y
    return Tensor(torch.where(raw(condition), raw(x), raw(y)))


def _minimum(x: Any, y: Any) -> Any:
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        return Tensor(torch.minimum(raw(x), raw(y)))
    return Scalar(min(x, y))


def _fma(x: Tensor, y: Any, z: Any) -> Tensor:
    return Tensor((raw(x).double() * raw(y) + raw(z)).float())


def _inline_asm(asm: str, constraints: str, args: Sequence[Tensor], **_: Any) -> Tensor:
    if asm.startswith("cp.async.bulk.wait_group 0; fence.proxy.async;"):
        _store_wait(0)
        task = Cta.now.running
        task.unlanded = task.wait_for(task.unlanded, 0, "TMA stores to be in memory")
        _fence()
        return Tensor(torch.zeros(()))
    if not asm.startswith("tanh.approx.f32 $0, $1;"):
        raise KernelError(f"{where()}: unknown assembly: {asm}")
    u = raw(args[0])
    return Tensor(torch.tanh(u) * (1 + 2**-10.987 * torch.sin(1e4 * u)))  # as wrong as it may be


def scalar_range(*args: int) -> Iterator[Scalar]:
    return map(Scalar, range(*args))


class Layout:
    """Of no meaning here."""

    def __init__(self, *_: Any, **__: Any):
        pass

    @staticmethod
    def get_default_for(*_: Any, **__: Any) -> Layout:
        return Layout()


def _gl() -> SimpleNamespace:
    """`triton.experimental.gluon.language`."""
    names: dict[str, Any] = {}
    for n, x in vars(real_gl).items():
        if isinstance(x, real_gl.dtype) and hasattr(torch, n):
            names[n] = getattr(torch, n)
        elif isinstance(x, type):
            names[n] = Layout if n.endswith("Layout") else x
    names |= {
        "program_id": lambda axis: Scalar(Cta.now.program_id[axis]),
        "num_programs": lambda axis: Scalar(Cta.now.grid[axis]),
        "static_range": scalar_range,
        "static_assert": _static_assert,
        "cdiv": lambda a, b: Scalar(-(-a // b)),
        "arange": lambda a, b, layout=None: Tensor(torch.arange(a, b)),
        "zeros": lambda shape, dtype, layout=None: Tensor(torch.zeros(shape, dtype=dtype)),
        "full": lambda shape, x, dtype, layout=None: Tensor(torch.full(shape, raw(x), dtype=dtype)),
        "convert_layout": lambda x, layout: Tensor(raw(x)),
        "expand_dims": lambda x, axis: Tensor(raw(x).unsqueeze(axis)),
        "max": lambda x, axis: Tensor(raw(x).amax(axis)),
        "sum": lambda x, axis: Tensor(raw(x).sum(axis)),
        "exp2": lambda x: Tensor(torch.exp2(raw(x))),
        "abs": lambda x: Tensor(raw(x).abs()),
        "clamp": lambda x, low, high: Tensor(raw(x).clamp(low, high)),
        "fma": _fma,
        "inline_asm_elementwise": _inline_asm,
        "log2": lambda x: Tensor(torch.log2(raw(x))),
        "where": _where,
        "maximum": lambda x, y: Tensor(torch.maximum(raw(x), raw(y))),
        "minimum": _minimum,
        "load": _load,
        "store": _store,
        "warp_specialize": _warp_specialize,
        "allocate_shared_memory": _allocate,
    }
    return SimpleNamespace(**names)


def _static_assert(condition: bool, message: str = "") -> None:
    if not condition:
        raise KernelError(f"{where()}: static_assert: {message}")


# mbarrier


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.pending = count
    barrier.bytes = barrier.phase = 0


def _arrive(barrier: Barrier, *, count: int = 1, pred: Any = True, expected: int = 0) -> None:
    if pred:
        _pause()
        barrier.update(Cta.now.running.publish(), count, expected)


def _expect(barrier: Barrier, size: int, pred: Any = True) -> None:
    _arrive(barrier, pred=pred, expected=size)


def _wait(barrier: Barrier, phase: int, pred: Any = True, deps: Any = ()) -> None:
    line, task = where(), Cta.now.running
    if pred:
        state = partial(barrier.describe, f"parity {phase} of {barrier.name} at {line}")
        task.pause(lambda: barrier.phase != phase, state)
        join(task.clock, barrier.completed)


# TMA


def _copy_in(
    tiles: Tiles, coord: Any, barrier: Barrier, result: Shared, pred: Any = True
) -> None:  # fmt: skip
    if not pred:
        return
    _pause()
    if Cta.now.strict and not barrier.fenced:
        raise KernelError(f"{where()}: no fence_async_shared after the init of {barrier.name}")
    inside, part = tiles.window(coord, result)
    _order_global(tiles, inside)

    def land(op: Operation) -> None:
        result.touch(op, op.text, writes=True, asynchronous=True)
        for memory in (result.generic, result.proxy):
            memory.zero_()
            tiles.view(memory)[part] = tiles.data[inside]
        barrier.update({op.agent: 1}, expected=-tiles.bytes)

    Operation("TMA load", land)
    if Cta.now.rng.random() < 0.8:  # what is there while the copy is under way
        result.poison()


def _copy_out(
    tiles: Tiles, coord: Any, src: Shared, kind: str = "TMA store", write: Any = torch.Tensor.copy_
) -> None:
    _pause()
    inside, part = tiles.window(coord, src)
    _order_global(tiles, inside, kind)

    def read(op: Operation) -> torch.Tensor:
        src.touch(op, op.text, writes=False, asynchronous=True)
        return tiles.view(src.proxy)[part].clone()

    op = Operation(kind, read)
    landing = Operation("landing", lambda _: write(tiles.data[inside], op.value), op)
    tiles.writes.append((inside, landing, kind))
    Cta.now.running.stores.append(op)
    Cta.now.running.unlanded.append(landing)


def _order_global(tiles: Tiles, inside: tuple[slice, ...], kind: str = "TMA load") -> None:
    """Raises KernelError if a block was stored before by TMA, and may not be in memory yet.

    Additions have no order among themselves.
    """
    for box, op, before in tiles.writes:
        apart = any(
            a.stop <= b.start or b.stop <= a.start for a, b in zip(box, inside, strict=True)
        )
        if apart or op.cta is not Cta.now or kind == before == "TMA reduce":
            continue
        if Cta.now.strict and not known(Cta.now.running.clock, op.agent, 1):
            raise KernelError(f"{where()}: {kind} before the {before} to {inside} has landed")


def _reduce_add(tiles: Tiles, coord: Any, src: Shared) -> None:
    _copy_out(tiles, coord, src, "TMA reduce", torch.Tensor.add_)


def _store_wait(pendings: int) -> None:
    task = Cta.now.running
    task.stores = task.wait_for(task.stores, pendings, "TMA stores")


def _fence(cluster: bool = False) -> None:
    """Accesses of threads that this task knows of come before what it lets wgmma and TMA do."""
    _pause()
    task = Cta.now.running
    for barrier in Cta.now.barriers:
        barrier.fenced = barrier.count > 0
    for buffer in (view.buffer for view in Cta.now.memory):
        for a in buffer.accesses:
            if not a.asynchronous and known(task.clock, a.agent, a.time):
                if all(agent != task.agent for agent, _ in a.fences):
                    a.fences.append((task.agent, task.clock[task.agent]))
                box = tuple(slice(*b) for b in a.box)
                if a.writes:
                    buffer.proxy[box] = buffer.generic[box]


# wgmma


def _product(a: Any, b: Any, acc: Any, *, use_acc: Any = True, is_async: bool = False, **_: Any):
    _pause()
    if not isinstance(b, Shared) or a.shape[1] != b.shape[0]:
        raise KernelError(f"{where()}: wgmma of {a.shape} and {b.shape}")
    before = acc.op if isinstance(acc, Accumulator) else None
    start: Any = None if before else raw(acc)

    def act(op: Operation) -> torch.Tensor:
        for x in (a, b):
            if isinstance(x, Shared):
                x.touch(op, op.text, writes=False, asynchronous=True)
        left, right = ((x.proxy if isinstance(x, Shared) else raw(x)).float() for x in (a, b))
        if not use_acc:
            return left @ right
        return torch.addmm(before.value if before else start, left, right)

    op = Operation("wgmma", act, before)
    Cta.now.running.products.append(op)
    return Accumulator(op) if is_async else _wait_products(0, [Accumulator(op)])


def _wait_products(num_outstanding: int = 0, deps: Any = None) -> Any:
    task = Cta.now.running
    task.products = task.wait_for(task.products, num_outstanding, "wgmmas")
    found = [
        Tensor(x.op.value) if isinstance(x, Accumulator) and x.op not in task.products else x
        for x in deps
    ]
    return found[0] if len(found) == 1 else tuple(found)


# ---- Kernels ------------------------------------------------------------------------------------

_MBARRIER = SimpleNamespace(
    MBarrierLayout=hopper.mbarrier.MBarrierLayout,
    init=_init, invalidate=lambda barrier: _init(barrier, 0),
    arrive=_arrive, expect=_expect, wait=_wait,
)  # fmt: skip
_TMA = SimpleNamespace(
    async_copy_global_to_shared=_copy_in,
    async_copy_shared_to_global=_copy_out,
    store_wait=_store_wait,
)
# What a kernel's file imported, and what stands in for it.
_REPLACED: list[tuple[Any, Any]] = [
    (real_gl, _gl()), (tl, _gl()), (hopper.mbarrier, _MBARRIER), (hopper.tma, _TMA),
    (hopper.fence_async_shared, _fence), (hopper.warpgroup_mma_init, lambda x: x),
    (hopper.warpgroup_mma, _product), (hopper.warpgroup_mma_wait, _wait_products),
    (names.barrier, _pause), (names.load, _copy_in), (names.store, _copy_out),
]  # fmt: skip


@functools.cache
def python_of(code: Any) -> Callable[..., Any]:
    """Returns the function under `@gluon.jit` with globals replaced, also in what it calls."""
    names: dict[str, Any] = {"range": scalar_range}
    made = types.FunctionType(code.__code__, names, code.__name__, code.__defaults__)
    for name in code.__code__.co_names:
        if name in code.__globals__:
            value = code.__globals__[name]
            stand_in = [new for old, new in _REPLACED if old is value]
            stand_in += [_reduce_add] * (name == "reduce_add")  # each copy of the file has its own
            if not stand_in and hasattr(value, "fn") and hasattr(value, "arg_names"):
                stand_in = [python_of(value.fn)]
            names[name] = stand_in[0] if stand_in else getattr(value, "value", value)
    return made


def launch(
    kernel: Any, grid: Any, *args: Any, seed: int = 0, strict: bool = True, **kwargs: Any
) -> None:
    """Runs `kernel[grid](*args, **kwargs)`; arguments that are none of the kernel's are options."""

    def value(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return Pointer(x)
        if hasattr(x, "block_shape"):
            return Tiles(x)
        if isinstance(x, float):
            return torch.tensor(x).item()  # fp32
        return Scalar(x) if type(x) is int else x

    constants = {name: x for name, x in kwargs.items() if name in kernel.arg_names}
    values = [value(x) for x in args]
    grid = (*grid, 1, 1)[:3]
    ids = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
    random.Random(seed).shuffle(ids)
    for program_id in ids:
        Cta(program_id, grid, seed, strict).run(partial(python_of(kernel.fn), *values, **constants))


@contextmanager
def emulated(seed: int = 0, strict: bool = True) -> Iterator[None]:
    """Runs launches of Gluon kernels on CPU tensors here."""

    def run(kernel: Any, grid: Any) -> Any:
        return partial(launch, kernel, grid, seed=seed, strict=strict)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    patch = mock.patch.object(GluonJITFunction, "__getitem__", run)
    patch.start()
    try:
        yield
    finally:
        patch.stop()
        torch.set_num_threads(threads)
