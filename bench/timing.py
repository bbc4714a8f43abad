"""Timing several functions against each other: interleaved, from a cold L2, by device events."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

L2_FLUSH_BYTES = 256 << 20  # more than the L2 of any GPU at hand (B200: 126 MB)
HEAD_START_CYCLES = 1_000_000  # about half a millisecond of GPU time to queue launches behind


def interleaved(
    functions: Sequence[Callable[..., object]],
    device: torch.device,
    rounds: int,
    prepare: Sequence[Callable[[], Any]] | None = None,
    warmup: int = 3,
    seed: int = 0,
) -> list[list[float]]:
    """Milliseconds of each of `rounds` calls of each function, in an order shuffled every round.

    Before each call the L2 is overwritten and the GPU is kept busy, so that the launches are queued
    before the clock starts: what is timed is the device, not Python. On the CPU: wall-clock time.
    If `prepare` is given, each call gets the result of its own, made before the clock starts.
    """
    order = random.Random(seed)
    cuda = device.type == "cuda"
    flush = torch.empty(L2_FLUSH_BYTES if cuda else 0, dtype=torch.int8, device=device)

    def arguments(i: int) -> tuple[Any, ...]:
        return () if prepare is None else (prepare[i](),)

    for i, function in enumerate(functions):
        for _ in range(warmup):
            function(*arguments(i))
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        events = []
        for i in order.sample(range(len(functions)), len(functions)):
            given = arguments(i)
            if not cuda:
                start = time.perf_counter()
                functions[i](*given)
                times[i].append(1e3 * (time.perf_counter() - start))
                continue
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(HEAD_START_CYCLES)
            before.record()
            functions[i](*given)
            after.record()
            events.append((i, before, after))
        if cuda:
            torch.cuda.synchronize(device)
        for i, before, after in events:
            times[i].append(before.elapsed_time(after))
    return times
