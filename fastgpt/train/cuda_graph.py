"""CUDA graph of a micro-step, replayed by a single launch.

It helps a small model, whose kernels take less time than Python needs to launch them. Gradients
keep their addresses (they are zeroed, never freed), tokens are copied into one buffer, and dropout
follows the generator's seed at each replay.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from fastgpt.config.schema import SystemConfig
from fastgpt.model.device import Machine

HOST_BOUND = 0.9  # part of a micro-step's time that launching takes, from which a graph helps


class StepGraph:
    """CUDA graph of a function: `graph(tokens)` repeats `step(tokens)` as it was captured."""

    def __init__(self, step: Callable[[Tensor], Tensor], tokens: Tensor):
        """Captures `step`, which must have run before, so that all of it is compiled."""
        self.tokens = tokens.clone()
        # Capture needs a warm-up on a side stream, in which cuBLAS takes its workspaces and the
        # gradients get their addresses.
        side = torch.cuda.Stream(tokens.device)
        side.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                step(self.tokens)
        torch.cuda.current_stream(tokens.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local lets the thread that reads batches go on allocating pinned memory.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.result = step(self.tokens)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Returns the result of `step` as a copy, which the next call leaves alone."""
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.result.clone()


def unsupported_reason(system: SystemConfig, machine: Machine) -> str | None:
    """Returns the reason that a micro-step cannot be one graph here, or None."""
    if machine.device.type != "cuda":
        return "no GPU"
    if dist.is_initialized():
        return "several ranks exchange gradients inside the micro-step"
    if machine.dtype == "float16":
        return "float16's loss scale changes from step to step"
    if system.activation_checkpointing:
        return "activation checkpointing reads the generator's state on the host"
    return None


def wanted(
    system: SystemConfig, machine: Machine, micro_step: Callable[[], object]
) -> tuple[bool, str]:
    """Returns True if the micro-step is to be a graph, and the reason.

    With --cuda_graph=auto it is if launching takes as long as computing, which is measured by
    running the compiled micro-step.
    """
    asked, reason = system.cuda_graph, unsupported_reason(system, machine)
    if asked != "auto" or reason:
        return asked is True, reason or f"--cuda_graph={asked}"

    def seconds() -> tuple[float, float]:
        machine.synchronize()
        begin = time.perf_counter()
        micro_step()
        launched = time.perf_counter()
        machine.synchronize()
        return launched - begin, time.perf_counter() - begin

    launching, computing = min(seconds() for _ in range(3))
    figures = f"launching takes {launching * 1e3:.1f} of a micro-step's {computing * 1e3:.1f} ms"
    return launching > HOST_BOUND * computing, figures
