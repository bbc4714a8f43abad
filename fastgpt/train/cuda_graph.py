"""One CUDA graph for a micro-step, or for the whole step: all of it replayed by a single launch.

A small model's kernels are shorter than the time Python takes to launch them; a graph takes that
time away. Gradients stay where they are from step to step (zeroed, never freed), tokens are copied
into one place, and dropout's random numbers follow the generator's seed at each replay.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from fastgpt.config.schema import SystemConfig
from fastgpt.errors import UserError
from fastgpt.model.device import Machine

# The host is what a micro-step waits for if it is still launching when this share of it is over: a
# device that has work to catch up with is done later.
HOST_BOUND = 0.9


class StepGraph:
    """`graph(tokens)` does what `step(tokens)` did when it was captured."""

    def __init__(self, step: Callable[[Tensor], Tensor], tokens: Tensor):
        """Capture it; `step` must have run before, so that all of it is compiled."""
        self.tokens = tokens.clone()
        # Warm-up on a side stream, as capture wants it: cuBLAS takes its workspaces, gradients
        # get their place.
        side = torch.cuda.Stream(tokens.device)
        side.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                step(self.tokens)
        torch.cuda.current_stream(tokens.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that reads batches may go on allocating pinned memory.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.result = step(self.tokens)

    def __call__(self, tokens: Tensor) -> Tensor:
        """What `step` returns, which the next call leaves alone."""
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.result.clone()


def obstacle(system: SystemConfig, machine: Machine) -> str:
    """Why a micro-step cannot be one graph here; empty if it can."""
    if machine.device.type != "cuda":
        return "no GPU"
    if dist.is_initialized():
        return "several ranks exchange gradients inside the micro-step"
    if machine.dtype == "float16":
        return "float16's loss scale changes from step to step"
    if system.activation_checkpointing:
        return "activation checkpointing reads the generator's state on the host"
    return ""


def check(system: SystemConfig, machine: Machine) -> None:
    """Raise UserError if --cuda_graph=True is asked for and cannot be had."""
    if system.cuda_graph is True and (why_not := obstacle(system, machine)):
        raise UserError(f"--cuda_graph=True: {why_not}; leave the flag out")


def wanted(
    system: SystemConfig, machine: Machine, micro_step: Callable[[], object]
) -> tuple[bool, str]:
    """(whether the micro-step should be a graph, why).

    With --cuda_graph=auto it should if launching it takes as long as computing it. Then it runs,
    and must be compiled.
    """
    asked, why_not = system.cuda_graph, obstacle(system, machine)
    if asked != "auto" or why_not:
        return asked is True, why_not or f"--cuda_graph={asked}"
    launched, done = min(timed(micro_step, machine.synchronize) for _ in range(3))
    figures = f"launching takes {launched * 1e3:.1f} of a micro-step's {done * 1e3:.1f} ms"
    return launched > HOST_BOUND * done, figures


def timed(
    micro_step: Callable[[], object],
    synchronize: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Seconds after which a micro-step is launched, and after which it is done."""
    synchronize()
    begin = clock()
    micro_step()
    launched = clock()
    synchronize()
    return launched - begin, clock() - begin
