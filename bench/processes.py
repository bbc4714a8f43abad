"""Interleaved timing of variants, each in its own process, for its peak memory.

Turns in an order shuffled every round let all see the same clocks. All take their first steps on
one batch from the same weights. A variant whose losses differ gets no time.
"""

from __future__ import annotations

import gc
import math
import os
import random
import resource
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import fastgpt
from bench import power, results, setup
from bench.interleave import mark, ms_between
from bench.variants import Variant, build
from fastgpt.config import settings
from fastgpt.config.schema import Config
from fastgpt.model.device import synchronize
from fastgpt_kernels.worker import TaskFailed, Worker

POOL = 8  # batches that the steps rotate through
CHECK_STEPS = 8
# Relative differences that rounding explains, and the factor for other dropout masks
LOSS_TOLERANCE, NORM_TOLERANCE, DROPOUT_FACTOR = 0.01, 0.05, 4
BUILDERS = 3  # variants built at the same time on a GPU
PAUSE_S = 0.2  # before each turn, so that all begin from the same clock and temperature
SETTLED = 0.003  # relative spread of three turns, below which the clock counts as settled


class Seat:
    """State of a variant's process: its stepper, built once, of which it runs turns."""

    def __init__(self, variant: Variant, values: dict[str, Any], vocab_size: int):
        self.variant, self.values, self.vocab_size = variant, values, vocab_size
        self.at = 0

    def build(self) -> dict[str, Any]:
        """Builds and compiles the stepper, then takes the first steps on one batch."""
        config = setup.with_values(Config(), self.values)
        self.device = torch.device(config.system.device)
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        elif self.device.index is not None:
            torch.cuda.set_device(self.device)  # events are recorded on the current one
        self.gpu = power.open_gpu()[0] if self.device.type == "cuda" else None
        size = (POOL, config.optim.rows, config.model.block_size + 1)
        generator = torch.Generator().manual_seed(0)
        self.batches = torch.randint(self.vocab_size, size, generator=generator).to(self.device)
        self.stepper = build(self.variant, config, self.vocab_size)
        started = time.perf_counter()
        self.stepper.warm_up(self.batches[0])
        warm_up_s = time.perf_counter() - started
        first = [self.stepper.step(s, self.batches[0]) for s in range(CHECK_STEPS)]
        self.at = CHECK_STEPS
        self.park()
        losses, norms = ([x.item() for x in some] for some in zip(*first, strict=True))
        seen = {"losses": losses, "grad_norms": norms, "source": fastgpt.__file__}
        return seen | {"warm_up_s": warm_up_s, "ops": self.stepper.ops}

    def call(self, method: str, *args: Any) -> Any:
        """Returns the result of a method, which runs in the seat's process."""
        return getattr(self, method)(*args)

    def turn(self, steps: int, sustained_s: float) -> dict[str, Any]:
        """Returns the mean ms per step, gaps included, with memory, energy and clock."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            time.sleep(0 if sustained_s else PAUSE_S)
        self.run(1)  # memory is allocated, clocks rise
        end, times = time.monotonic() + sustained_s, list[float]()
        while time.monotonic() < end and not settled(times[-3:]):
            times.append(self.timed(steps))
        with power.metered(self.gpu) as energy:
            ms = self.timed(steps)
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if cuda and self.stepper.graphed:  # its memory was allocated when it was captured
            peak = torch.cuda.max_memory_reserved(self.device)
        elif cuda:
            peak = torch.cuda.max_memory_allocated(self.device)
        self.park()
        if energy["joules"] is not None:
            energy["joules"] /= steps + 1
        return {"ms": ms, "peak_bytes": peak, **energy}

    def timed(self, steps: int) -> float:
        """Runs a step, then `steps` timed ones behind it. Returns the mean ms of these."""
        synchronize(self.device)
        self.run(1)
        before = mark(self.device)
        self.run(steps)
        after = mark(self.device)
        synchronize(self.device)
        return ms_between(before, after) / steps

    def run(self, count: int) -> None:
        """Launches steps on the batches in turn."""
        for _ in range(count):
            self.stepper.step(self.at, self.batches[self.at % POOL])
            self.at += 1

    def park(self) -> None:
        """Waits for the device, and frees memory that no tensor needs."""
        synchronize(self.device)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def settled(times: Sequence[float]) -> bool:
    """Returns True for three times that differ by less than `SETTLED`."""
    return len(times) == 3 and max(times) - min(times) < SETTLED * min(times)


_starting = threading.Lock()


def start(worker: Worker, root: str) -> None:
    """Starts a process that imports the checkout `root`, or this one if that is empty."""
    before = list(sys.path)
    with _starting, TemporaryDirectory() as folder:  # the process gets the current sys.path
        Path(folder, "bench").symlink_to(results.ROOT / "bench")
        sys.path[:0] = [folder, root, f"{root}/kernels"] if root else []
        try:
            worker.spawn()
            worker.ready()
        finally:
            sys.path[:] = before


@dataclass
class Measured:
    """Outcome of a variant: one turn per round, or a problem."""

    variant: Variant
    built: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, Any]] = field(default_factory=list)
    problem: str = ""
    worker: Worker | None = None

    def ask(self, *task: Any, timeout: float) -> dict[str, Any]:
        """Returns the answer of the variant's process, or {} and sets `problem`."""
        assert self.worker is not None
        try:
            if task[0] == "build":
                start(self.worker, self.variant.root)
            return self.worker.ask(*task, timeout=timeout)
        except TaskFailed as e:
            self.problem, self.turns = str(e), []
            self.worker.close()
            return {}


def judge(found: Sequence[Measured], dropout: float) -> None:
    """Sets the problem of variants whose losses or first gradient norm differ from the first's."""

    def apart(a: Sequence[float], b: Sequence[float]) -> float:
        off = [abs(x - y) / abs(y) for x, y in zip(a, b, strict=True)]
        return max(off) if all(map(math.isfinite, off)) else math.inf

    built = [m for m in found if m.built and not m.problem]
    for m in built:
        mine, first = m.built, built[0].built
        loss_off = apart(mine["losses"], first["losses"])
        # Norms of later steps differ as the weights drift apart. The first sees all gradients.
        norm_off = apart(mine["grad_norms"][:1], first["grad_norms"][:1])
        factor = DROPOUT_FACTOR if dropout else 1
        if not (loss_off <= factor * LOSS_TOLERANCE and norm_off <= factor * NORM_TOLERANCE):
            whose = f"wrong: losses differ from {built[0].variant.name}'s"
            m.problem = f"{whose} by {loss_off:.1%}, the first gradient norm by {norm_off:.1%}"


def measure(
    variants: Sequence[Variant], config: Config, vocab_size: int, rounds: int, turn_s: float,
    sustained_s: float = 0.0,
) -> Iterator[list[Measured]]:  # fmt: skip
    """Builds and judges the variants, then gives each one turn per round.

    Yields them before and after building and after each round. `sustained_s` limits the load before
    a turn, under which the step's time settles. Without it there is a pause.
    """
    values, found = settings.to_dict(config), [Measured(v) for v in variants]
    builders = BUILDERS if config.system.device != "cpu" else 1
    # Variants that compile at the same time share the cores, as each starts compile processes.
    threads = max(1, (os.cpu_count() or 1) // builders)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))

    def build_one(m: Measured) -> None:
        m.worker = Worker(Seat.call, Seat(m.variant, values, vocab_size), quiet=True)
        m.built = m.ask("build", timeout=300)

    def turn(m: Measured, steps: int) -> dict[str, Any]:
        return m.ask("turn", steps, sustained_s, timeout=120 + 20 * turn_s)

    try:
        yield found
        with ThreadPoolExecutor(builders) as pool:
            list(pool.map(build_one, found))
        judge(found, config.model.dropout)
        yield found
        first = [turn(m, 2) if not m.problem else {} for m in found]
        counts = [max(2, min(50, round(turn_s * 1e3 / f.get("ms", 1e9)))) for f in first]
        order = random.Random(0)
        for _ in range(rounds):
            for m, count in order.sample([*zip(found, counts, strict=True)], len(found)):
                if not m.problem and (got := turn(m, count)):
                    m.turns.append(got)
            yield found
    finally:
        for m in found:
            if m.worker is not None:
                m.worker.close()
