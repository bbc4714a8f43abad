"""What the emulator's programs run on: shared memory that knows who touched it, mbarriers, tasks,
asynchronous operations, and the scheduler of one CTA.

What the kernels call is in `emulator.py`, and so are the rules.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from tests.kernels.gluon.values import KernelError, Tensor, raw, where

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
        """Checks an access by a Task or an Operation against earlier ones, and records it."""
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
        self.unlanded = list[Operation]()  # stores that may not be in global memory yet
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
        """Gives up the turn, until `ready()` if given."""
        self.ready, self.waits_for = ready, waits_for
        self.cta.turn.release()
        self.wake.acquire()
        if self.cta.aborting:
            raise Abort
        self.ready = None

    def publish(self) -> Clock:
        """Returns a copy of the clock for others to join, without what this task does later."""
        clock = dict(self.clock)
        self.clock[self.agent] += 1
        return clock

    def wait_for(self, pending: list[Operation], most: int, what: str) -> list[Operation]:
        """Waits for all but the last `most` operations; returns those not waited for."""
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
        kinds = ("TMA load", "TMA store", "TMA reduce", "landing", "wgmma")
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
            left = [op.text for op in self.operations if not op.text.startswith("landing")]
            if left and self.strict:
                raise KernelError(f"under way at the kernel's end: {', '.join(left)}")
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
