"""Variants that take turns: each lives in a process of its own, and one at a time is measured.

A process a variant keeps peak memory honest and lets none profit from another's cache; turns,
shuffled every round, let all see the same clocks and temperatures. A parked variant gives back all
GPU memory but weights and optimizer state. `alive="one"` is for models of which several do not
fit: a variant then gets all its turns before the next is built, and ratios are less certain.

All take their first steps on the same batch from the same weights: `judge` compares what came out,
and a variant that is wrong gets no turns.
"""

from __future__ import annotations

import contextlib
import gc
import io
import math
import os
import random
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import fastgpt
from bench import setup
from bench.variants import Stepper, Variant, build
from fastgpt.config import settings
from fastgpt.config.schema import Config
from fastgpt.data.prepare import cores
from fastgpt.model.device import synchronize
from fastgpt_kernels.worker import TaskFailed, Worker

POOL = 8  # batches that the steps rotate through
CHECK_STEPS = 8
# Relative difference from the reference that rounding explains, and dropout's other random numbers.
LOSS_TOLERANCE, NORM_TOLERANCE = 0.01, 0.05
DROPOUT_FACTOR = 4
COMPILERS = "TORCHINDUCTOR_COMPILE_THREADS"
ROOT = Path(__file__).resolve().parents[1]


def quietly_built(variant: Variant, config: Config, vocab_size: int) -> Stepper:
    """`build` in a worker process."""
    device = torch.device(config.system.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # events are recorded on the current one
    if device.type == "cpu":
        torch.set_num_threads(1)  # shared cores: waiting threads would cost more than they give
    with contextlib.redirect_stdout(io.StringIO()):  # nanoGPT's model talks
        return build(variant, config, vocab_size)


def serve(seat: Any, command: str, *args: Any) -> Any:
    """What a worker process answers to `ask(command, *args)`: the seat's method."""
    return getattr(seat, command)(*args)


def mark(device: torch.device) -> Any:
    """A moment among the device's work: an event, on a CPU the time."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def ms_between(a: Any, b: Any) -> float:
    return (b - a) * 1e3 if isinstance(a, float) else a.elapsed_time(b)


class Seat:
    """What a worker process holds: one variant, and what it is asked for."""

    stepper: Stepper

    def __init__(self, variant: Variant, values: dict[str, Any], vocab_size: int):
        self.variant, self.values, self.vocab_size = variant, values, vocab_size
        self.at = 0

    def build(self) -> dict[str, Any]:
        """Build and compile, then the first steps, all on one batch: their losses and norms."""
        config = setup.with_values(Config(), self.values)
        self.device = torch.device(config.system.device)
        generator = torch.Generator().manual_seed(0)
        size = (POOL, config.optim.rows, config.model.block_size + 1)
        self.batches = torch.randint(self.vocab_size, size, generator=generator).to(self.device)
        self.stepper = quietly_built(self.variant, config, self.vocab_size)
        started = time.perf_counter()
        self.stepper.warm_up(self.batches[0])
        warm_up_s = time.perf_counter() - started
        first = [self.stepper.step(s, self.batches[0]) for s in range(CHECK_STEPS)]
        self.at = CHECK_STEPS
        self.park()
        return {
            "warm_up_s": warm_up_s,
            "losses": [loss.item() for loss, _ in first],
            "grad_norms": [norm.item() for _, norm in first],
            "choices": self.stepper.choices,
            "source": fastgpt.__file__,
        }

    def _steps(self, count: int) -> None:
        for _ in range(count):
            self.stepper.step(self.at, self.batches[self.at % POOL])
            self.at += 1

    def turn(self, steps: int) -> dict[str, float]:
        """Mean ms of a step over `steps` in a row, launch gaps and all, and the peak memory."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        self._steps(1)  # memory comes back, clocks rise
        synchronize(self.device)
        if cuda:
            self._steps(1)  # the clock starts with work queued, as in the middle of a run
        before = mark(self.device)
        self._steps(steps)
        after = mark(self.device)
        synchronize(self.device)
        if cuda:
            reserved = torch.cuda.max_memory_reserved(self.device)
            # What a graph's replay uses was allocated when it was captured.
            allocated = torch.cuda.max_memory_allocated(self.device)
            peak = reserved if self.stepper.graphed else allocated
        else:
            peak = reserved = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.park()
        ms = ms_between(before, after) / steps
        return {"ms": ms, "peak_bytes": peak, "reserved_bytes": reserved}

    def park(self) -> None:
        synchronize(self.device)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass
class Measured:
    """A variant's outcome: `problem` says why there are no samples (ms a step, one a round)."""

    variant: Variant
    built: dict[str, Any] = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)
    peak_bytes: float = 0
    reserved_bytes: float = 0
    problem: str = ""


def judge(found: Sequence[Measured], dropout: float) -> None:
    """Mark variants whose first losses or gradient norms are not the first sound variant's."""
    factor = DROPOUT_FACTOR if dropout else 1
    built = [m for m in found if m.built and not m.problem]
    for m in built:
        loss_off = apart(m.built["losses"], built[0].built["losses"])
        # Norms of later steps differ as the weights drift apart; the first sees all gradients.
        norm_off = apart(m.built["grad_norms"][:1], built[0].built["grad_norms"][:1])
        if not (loss_off <= factor * LOSS_TOLERANCE and norm_off <= factor * NORM_TOLERANCE):
            m.problem = (
                f"wrong: losses differ from {built[0].variant.name}'s by {loss_off:.1%}, "
                f"the first gradient norm by {norm_off:.1%}"
            )


def apart(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest relative difference; infinite if one is not finite."""
    if not all(map(math.isfinite, [*a, *b])):
        return math.inf
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


_starting = threading.Lock()


def _start(worker: Worker, root: str) -> None:
    """Start the process; with `root`, one whose fastgpt and kernels are that checkout's."""
    if not root:
        with _starting:  # it gets the path as it is now
            worker.spawn()
        return worker.ready()
    with _starting, TemporaryDirectory() as folder:
        path = list(sys.path)
        Path(folder, "bench").symlink_to(ROOT / "bench")
        sys.path[:0] = [folder, root, f"{root}/kernels"]
        try:
            worker.spawn()
            worker.ready()
        finally:
            sys.path[:] = path


def measure(
    variants: Sequence[Variant],
    config: Config,
    vocab_size: int,
    *,
    rounds: int,
    turn_s: float = 1.0,
    alive: str = "all",
    builders: int = 3,
    build_timeout: float = 300.0,
    progress: Callable[[Sequence[Measured]], object] = lambda _: None,
    seed: int = 0,
) -> list[Measured]:
    """Build, judge, then `rounds` turns of about `turn_s` each.

    `progress` sees all variants before and after building and after each round of all, so that what
    there is can be kept. Those that have neither samples nor a problem were not measured yet.
    """
    values = settings.to_dict(config)
    # Those that compile at the same time share the cores: each begins processes of its own for it.
    os.environ.setdefault(COMPILERS, str(max(1, cores() // builders)))
    found = [Measured(v) for v in variants]
    workers = [Worker(serve, Seat(v, values, vocab_size)) for v in variants]

    def ask(i: int, *task: Any, timeout: float) -> dict[str, Any]:
        """The answer of a variant's process; if there is none, {}, and that is its problem."""
        try:
            return workers[i].ask(*task, timeout=timeout)
        except TaskFailed as e:
            found[i].problem, found[i].samples = str(e), []
            workers[i].close()
            return {}

    def build_one(i: int) -> None:
        found[i].problem = ""
        try:
            _start(workers[i], variants[i].root)
        except TaskFailed as e:
            found[i].problem = str(e)
            return
        found[i].built = ask(i, "build", timeout=build_timeout)

    def turn(i: int, steps: int) -> float:
        m, got = found[i], ask(i, "turn", steps, timeout=max(120.0, 20 * turn_s))
        if not got:
            return 0.0
        m.peak_bytes = max(m.peak_bytes, got["peak_bytes"])
        m.reserved_bytes = max(m.reserved_bytes, got["reserved_bytes"])
        return got["ms"]

    everyone, order = list(range(len(found))), random.Random(seed)
    try:
        progress(found)
        for group in [[i] for i in everyone] if alive == "one" else [everyone]:
            with ThreadPoolExecutor(builders) as pool:
                list(pool.map(build_one, group))
            for i in group:  # together they may not have fitted
                if "OutOfMemoryError" in found[i].problem:
                    build_one(i)
            judge(found, config.model.dropout)
            progress(found)
            sound = [i for i in group if not found[i].problem]
            counts = {i: max(2, min(50, round(turn_s * 1e3 / (turn(i, 2) or 1e9)))) for i in sound}
            for r in range(1, rounds + 1):
                sound = [i for i in sound if not found[i].problem]
                for i in order.sample(sound, len(sound)):
                    if ms := turn(i, counts[i]):
                        found[i].samples.append(ms)
                if r == rounds or alive == "all":  # ratios are of as many rounds
                    progress(found)
            for i in group:
                workers[i].close()
    finally:
        for worker in workers:
            worker.close()
    return found
