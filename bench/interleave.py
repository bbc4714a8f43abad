"""Timing of calls by device events, interleaved and from a cold L2, and the device's roofs."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastgpt.model.device import measured_peak

L2_FLUSH_BYTES = 256 << 20  # more than the L2 of any GPU (B200: 126 MB)
HEAD_START_CYCLES = 1_000_000  # about half a millisecond of GPU time to queue launches behind
Call = Callable[[], object]


def mark(device: torch.device) -> Any:
    """Returns an event recorded on the device, or the time on a CPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def ms_between(a: Any, b: Any) -> float:
    """Returns the milliseconds between two marks; the device must have reached both."""
    return (b - a) * 1e3 if isinstance(a, float) else a.elapsed_time(b)


def interleave(
    makes: Sequence[Callable[[], Call]], device: torch.device, rounds: int, warmup: int = 3
) -> list[list[float]]:
    """Returns the milliseconds of `rounds` calls of each kind, in an order shuffled each round.

    Each of `makes` returns the timed call and runs untimed. Before a call the L2 is overwritten and
    the GPU kept busy until launches are queued, so that the device is timed, not Python.
    """
    cuda, order = device.type == "cuda", random.Random(0)
    flush = torch.empty(L2_FLUSH_BYTES if cuda else 0, dtype=torch.int8, device=device)
    for make in [make for make in makes for _ in range(warmup)]:
        make()()
    times: list[list[float]] = [[] for _ in makes]
    for _ in range(rounds):
        marks = []
        for i in order.sample(range(len(makes)), len(makes)):
            call = makes[i]()
            if cuda:
                flush.zero_()
                torch.cuda._sleep(HEAD_START_CYCLES)
            before = mark(device)
            call()
            marks.append((i, before, mark(device)))
        if cuda:
            torch.cuda.synchronize(device)
        for i, before, after in marks:
            times[i].append(ms_between(before, after))
    return times


def roofs(device: torch.device, dtype: torch.dtype, copied: int) -> tuple[float, float]:
    """Returns FLOP/s of matmuls, and bytes/s of copies, reads and writes, of `copied` bytes."""
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    (times,) = interleave([lambda: lambda: target.copy_(source)], device, rounds=10)
    return measured_peak(device, dtype).flops, 2 * source.nbytes / (min(times) * 1e-3)
