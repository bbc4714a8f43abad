"""Runs the Python source of Gluon kernels for Hopper on a CPU, under the most hostile timing.

    with emulated(seed=7):
        module.launch(tensors on the CPU)

Within, `kernel[grid](...)` of a Gluon kernel calls the very function under `@gluon.jit`; of what
it sees, `gl`, `tma`, `mbarrier`, wgmma's functions and `hopper.compat` are replaced. A partition of
`warp_specialize` is a task. One task runs at a time; at every primitive a scheduler seeded by
`seed` picks who goes on: a task, or an asynchronous operation that was issued before (a TMA copy
lands, a wgmma or a TMA store reads its operands). Nothing but what waits for an operation forces
it, so it comes as late or as early as the rules allow.

Two nets catch what is wrong, and the second needs no luck:

- values: shared memory begins as NaN, and a buffer is NaN while a copy into it is under way. Before
  `fence_async_shared` wgmma and TMA see of a store by threads what was there, the new, or NaN. Sums
  with products are rounded once on some CTAs, as FMA does. Whoever calls compares the results.
- order: vector clocks (Mattern 1989) say which accesses to a box of shared memory come after which.
  Two that nothing orders are an error that names both lines, whichever order this seed ran them in;
  so are accesses of threads and then of wgmma or TMA with no proxy fence between.

A deadlock is reported with who waits for what.

What it takes as given: Gluon's documentation, and the PTX ISA's memory model and its rules for
mbarriers, bulk copies and wgmma. What it does not model:

- warps within a partition: that all have passed a point when one thread arrives at an mbarrier or
  starts a copy is the compiler's business, and `fastgpt_kernels.tools.ptx` reads whether it is so;
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
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from triton import knobs

from tests.kernels.gluon.values import KernelError, Pointer, Scalar, Tensor, Tiles, raw, where

with mock.patch.object(type(knobs.runtime), "interpret", True):  # or its import refuses
    from triton.experimental.gluon import language as real_gl
    from triton.experimental.gluon._runtime import GluonJITFunction
    from triton.experimental.gluon.language.nvidia import hopper

    compat = importlib.import_module("fastgpt_kernels.ops.attention.hopper.compat")

Clock = dict[int, int]  # agent -> how much of what it did is known


class Abort(BaseException):
    """Ends the other tasks once one has failed."""


def join(clock: Clock, other: Clock) -> None:
    for agent, time in other.items():
        clock[agent] = max(time, clock.get(agent, 0))


# ---- Shared memory and barriers -----------------------------------------------------------------


@dataclass
class Access:
    """Of a box of a buffer, to be ordered with later ones."""

    box: tuple[tuple[int, int], ...]
    agent: int
    time: int
    writes: bool
    asynchronous: bool
    text: str
    fences: list[tuple[int, int]] = field(default_factory=list)  # (agent, time) of those after it


class Buffer:
    """Shared memory as threads see it, and as wgmma and TMA (the async proxy) do."""

    def __init__(self, dtype: torch.dtype, shape: Sequence[int], name: str):
        self.name, self.accesses = name, list[Access]()
        self.generic = torch.full(tuple(shape), float("nan"), dtype=dtype)
        self.proxy = self.generic.clone()


class Shared:
    """A view of a buffer: `box` is its range in each of the buffer's dims, `dims` those it has."""

    def __init__(self, buffer: Buffer, generic: Any, proxy: Any, box: Any, dims: Any):
        self.buffer, self.generic, self.proxy, self.box, self.dims = (
            buffer, generic, proxy, box, dims,
        )  # fmt: skip
        self.shape, self.dtype = tuple(generic.shape), generic.dtype
        self.type = SimpleNamespace(shape=list(self.shape))

    def _view(self, apply: Callable[..., Any], box: Any, dims: Any) -> Shared:
        return Shared(self.buffer, apply(self.generic), apply(self.proxy), box, dims)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise KernelError(f"{where()}: slice out of the bounds of {self.buffer.name}")
        box, low = list(self.box), self.box[self.dims[dim]][0] + start
        box[self.dims[dim]] = (low, low + length)
        return self._view(lambda t: t.narrow(dim, start, length), tuple(box), self.dims)

    def index(self, i: int) -> Shared:
        one = self.slice(i, 1)
        return one._view(lambda t: t.select(0, 0), one.box, one.dims[1:])

    def permute(self, order: Sequence[int]) -> Shared:
        return self._view(lambda t: t.permute(order), self.box, [self.dims[d] for d in order])

    def load(self, layout: Any = None) -> Tensor:
        task = Cta.now.running
        task.pause()
        self.touch(task, f"load of {where()}", writes=False)
        return Tensor(self.generic.clone())

    def store(self, value: Any) -> None:
        task = Cta.now.running
        task.pause()
        self.touch(task, f"store of {where()}", writes=True)
        self.generic.copy_(raw(value))
        seen = Cta.now.rng.choice(["nan", "old", "new"])
        if seen != "old":
            self.proxy.copy_(self.generic * (1.0 if seen == "new" else float("nan")))

    def poison(self) -> None:
        self.generic.fill_(float("nan"))
        self.proxy.fill_(float("nan"))

    def touch(self, who: Any, text: str, writes: bool, asynchronous: bool = False) -> None:
        """Check an access by `who`, a Task or an Operation, against earlier ones, and record it."""
        kept = []
        for a in self.buffer.accesses:
            pairs = [(*x, *y) for x, y in zip(a.box, self.box, strict=True)]
            overlap = all(x0 < y1 and y0 < x1 for x0, x1, y0, y1 in pairs)
            if Cta.now.strict and overlap and (writes or a.writes):
                if not known(who.clock, a.agent, a.time):
                    place = f"{self.buffer.name}{list(self.box)}"
                    raise KernelError(f"race on {place}: {a.text} and {text}")
                fenced = any(known(who.clock, *fence) for fence in a.fences)
                if asynchronous and not a.asynchronous and not fenced:
                    raise KernelError(f"no fence_async_shared between {a.text} and {text}")
            inside = all(y0 <= x0 and x1 <= y1 for x0, x1, y0, y1 in pairs)
            same = a.agent == who.agent and a.box == self.box and not a.writes
            if not (inside if writes else same):  # what is superseded need not be kept
                kept.append(a)
        now = Access(self.box, who.agent, who.clock[who.agent], writes, asynchronous, text)
        self.buffer.accesses = [*kept, now]


def known(clock: Clock, agent: int, time: int) -> bool:
    return clock.get(agent, 0) >= time


class Barrier:
    """An mbarrier: a phase ends when neither arrivals nor bytes are to come."""

    def __init__(self, name: str):
        self.name, self.count, self.fenced = name, 0, False
        self.pending = self.bytes = self.phase = 0
        self.current: Clock = {}  # of this phase's arrivals
        self.completed: Clock = {}  # of all phases past

    def update(self, clock: Clock, arrivals: int = 0, expected: int = 0) -> None:
        if arrivals > self.pending or not self.count:
            want = f"more arrivals than its {self.count}" if self.count else "not initialised"
            raise KernelError(f"{where()}: {self.name}: {want}")
        join(self.current, clock)
        self.pending, self.bytes = self.pending - arrivals, self.bytes + expected
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase ^ 1, self.count
            join(self.completed, self.current)

    def describe(self, text: str) -> str:
        to_come = f"{self.pending} of {self.count} arrivals and {self.bytes} bytes to come"
        return f"{text} (now in phase {self.phase}, {to_come})"


class Barriers(list[Barrier]):
    def index(self, i: Any, *_: Any) -> Any:
        if not 0 <= i < len(self):
            raise KernelError(f"{where()}: no barrier {i} of {len(self)}")
        return self[i]


# ---- Who runs -----------------------------------------------------------------------------------


def _taken() -> threading.Lock:
    """A lock that one thread waits for and another releases."""
    lock = threading.Lock()
    lock.acquire()
    return lock


class Task:
    """A partition: a Python thread that runs only while it holds the turn."""

    def __init__(self, cta: Cta, name: str, function: Callable[[], Any], clock: Clock):
        self.cta, self.name, self.function, self.agent = cta, name, function, cta.new_agent()
        self.clock = {**clock, self.agent: 1}
        self.products, self.stores = list[Operation](), list[Operation]()  # not waited for yet
        self.ready: Callable[[], bool] | None = None
        self.waits_for: Callable[[], str] = str
        self.priority, self.done, self.wake = cta.rng.random(), False, _taken()
        threading.Thread(target=self._main, daemon=True).start()
        cta.tasks.append(self)

    def _main(self) -> None:
        self.wake.acquire()
        try:
            with torch.no_grad():  # a thread begins with gradients
                if not self.cta.aborting:
                    self.function()
        except Abort:
            pass
        except Exception as error:
            self.cta.error = self.cta.error or error
        self.done = True
        self.cta.turn.release()

    def run(self) -> None:
        self.cta.running = self
        self.wake.release()
        self.cta.turn.acquire()

    def pause(
        self, ready: Callable[[], bool] | None = None, waits_for: Callable[[], str] = str
    ) -> None:
        """Give up the turn, until `ready()` if given."""
        self.ready, self.waits_for = ready, waits_for
        self.cta.turn.release()
        self.wake.acquire()
        if self.cta.aborting:
            raise Abort
        self.ready = None

    def publish(self) -> Clock:
        """A copy of the clock, for others to join: what this task does from now on is not in it."""
        clock = dict(self.clock)
        self.clock[self.agent] += 1
        return clock

    def wait_for(self, pending: list[Operation], most: int, what: str) -> list[Operation]:
        """Wait for all but the last `most` operations; returns those not waited for."""
        line, first = where(), max(0, len(pending) - most)
        awaited = pending[:first]
        self.pause(lambda: all(op.done for op in awaited), lambda: f"{what} at {line}")
        for op in awaited:
            self.clock[op.agent] = 1
        return pending[first:]


class Operation:
    """An asynchronous operation, performed at some moment after it was issued."""

    def __init__(self, kind: str, act: Callable[[Operation], Any], after: Operation | None = None):
        self.cta, self.text, self.act, self.after = Cta.now, f"{kind} of {where()}", act, after
        self.agent, self.done = self.cta.new_agent(), False
        self.value: Any = None
        self.clock = {**self.cta.running.publish(), self.agent: 1}
        self.priority = self.cta.haste[kind] + self.cta.rng.uniform(-0.5, 0.5)
        self.cta.operations.append(self)

    def ready(self) -> bool:
        return self.after is None or self.after.done

    def run(self) -> None:
        self.value, self.done = self.act(self), True
        self.cta.operations.remove(self)


class Accumulator:
    """The result of an asynchronous wgmma, until a wait covers it."""

    def __init__(self, op: Operation):
        self.op, self.unfinished = op, op.text

    def __mul__(self, other: Any) -> Any:
        return raw(self)

    __add__ = __sub__ = __truediv__ = __rmul__ = to = __mul__


class Cta:
    """A program: its tasks, operations and shared memory, and the scheduler."""

    now: Cta  # the one that runs

    def __init__(self, program_id: tuple[int, ...], grid: tuple[int, ...], seed: int, strict: bool):
        self.program_id, self.grid, self.strict = program_id, grid, strict
        self.rng = random.Random(f"{seed} {program_id}")
        self.whim = self.rng.choice([0.0, 0.1, 0.5])  # how often priorities are ignored
        # Of a kind, operations are mostly late (< 0), among the tasks, or at once (> 1).
        kinds = ("TMA load", "TMA store", "TMA reduce", "wgmma")
        self.haste = {kind: self.rng.uniform(-1.5, 1.5) for kind in kinds}
        self.agents, self.turn, self.aborting = 0, _taken(), False
        self.tasks, self.operations = list[Task](), list[Operation]()
        self.memory, self.barriers = list[Shared](), Barriers()
        self.running: Task
        self.error: Exception | None = None
        Tensor.contract = self.rng.random() < 0.7
        Cta.now = self

    def new_agent(self) -> int:
        self.agents += 1
        return self.agents

    def run(self, function: Callable[[], Any]) -> None:
        Task(self, "kernel", function, {})
        try:
            while not all(task.done for task in self.tasks):
                self._step()
            if self.operations and self.strict:
                left = ", ".join(op.text for op in self.operations)
                raise KernelError(f"under way at the kernel's end: {left}")
            for view in self.memory:  # it is someone else's now
                view.poison()
            for op in list(self.operations):
                op.run()
        finally:
            self.aborting = True
            for task in self.tasks:
                if not task.done:
                    task.run()

    def _step(self) -> None:
        choices: list[Any] = [
            t for t in self.tasks if not t.done and (t.ready is None or t.ready())
        ]
        choices += [op for op in self.operations if op.ready()]
        if not choices:
            waits = [f"{t.name} waits for {t.waits_for()}" for t in self.tasks if not t.done]
            raise KernelError("deadlock: " + "; ".join(waits))
        if self.rng.random() < 0.03:
            self.rng.choice(self.tasks).priority = self.rng.random()
        whim = self.rng.random() < self.whim
        (self.rng.choice(choices) if whim else max(choices, key=lambda c: c.priority)).run()
        if self.error:
            raise self.error


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
    frame = sys._getframe(1)
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

    def act(op: Operation) -> None:
        src.touch(op, op.text, writes=False, asynchronous=True)
        write(tiles.data[inside], tiles.view(src.proxy)[part])

    Cta.now.running.stores.append(Operation(kind, act))


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
    (real_gl, _gl()), (hopper.mbarrier, _MBARRIER), (hopper.tma, _TMA),
    (hopper.fence_async_shared, _fence), (hopper.warpgroup_mma_init, lambda x: x),
    (hopper.warpgroup_mma, _product), (hopper.warpgroup_mma_wait, _wait_products),
    (compat.barrier, _pause), (compat.load, _copy_in), (compat.store, _copy_out),
    (compat.reduce_add, _reduce_add),
]  # fmt: skip


@functools.cache
def python_of(kernel: Any) -> Callable[..., Any]:
    """The function under `@gluon.jit` with its globals replaced, and so for what it calls."""
    code = kernel.fn
    names: dict[str, Any] = {"range": scalar_range}
    made = types.FunctionType(code.__code__, names, code.__name__, code.__defaults__)
    for name in code.__code__.co_names:
        if name in code.__globals__:
            value = code.__globals__[name]
            stand_in = [new for old, new in _REPLACED if old is value]
            if not stand_in and hasattr(value, "fn") and hasattr(value, "arg_names"):
                stand_in = [python_of(value)]
            names[name] = stand_in[0] if stand_in else getattr(value, "value", value)
    return made


def launch(
    kernel: Any, grid: Any, *args: Any, seed: int = 0, strict: bool = True, **kwargs: Any
) -> None:
    """Run `kernel[grid](*args, **kwargs)`; arguments that are none of the kernel's are options."""

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
        Cta(program_id, grid, seed, strict).run(partial(python_of(kernel), *values, **constants))


@contextmanager
def emulated(seed: int = 0, strict: bool = True) -> Iterator[None]:
    """Within, launches of Gluon kernels on CPU tensors run here."""

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
