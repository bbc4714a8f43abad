"""One CUDA graph for a micro-step: where it is wanted, and that it computes the same."""

from __future__ import annotations

import pytest
import torch

from fastgpt.config.presets import shakespeare_char
from fastgpt.config.schema import SystemConfig
from fastgpt.config.settings import replace
from fastgpt.model.build import build
from fastgpt.model.device import Machine
from fastgpt.train import cuda_graph
from fastgpt.train.trainer import Trainer
from tests.train.helpers import weights

CUDA = torch.device("cuda")
H200 = Machine(CUDA, "bfloat16", peak_tflops=989.4)
SMALL = replace(
    shakespeare_char(), n_layer=2, n_head=2, n_embd=128, block_size=64, bias=True, gelu="tanh"
)


@pytest.mark.parametrize(("launching", "computing", "yes"), [(5, 0.2, True), (5, 40, False)])
def test_by_itself_only_where_launching_is_slow(launching, computing, yes, monkeypatch):
    """The fastest of three counts: the first has something to compile, or another process ran."""
    now, slow = 0.0, iter([7.0, 1.0, 1.1])
    launched = False

    def micro_step():
        nonlocal now, launched
        now, launched = now + launching * next(slow) / 1e3, True

    def synchronize(machine):
        nonlocal now, launched
        now, launched = now + (computing / 1e3 if launched else 0), False

    monkeypatch.setattr(cuda_graph.time, "perf_counter", lambda: now)
    monkeypatch.setattr(Machine, "synchronize", synchronize)
    decided, why = cuda_graph.wanted(SystemConfig(), H200, micro_step)
    assert decided is yes
    assert why == f"launching takes 5.0 of a micro-step's {launching + computing:.1f} ms"


def test_where_there_is_no_graph():
    def unused():
        raise AssertionError("nothing to measure")

    cpu, asked = Machine(torch.device("cpu")), SystemConfig(cuda_graph=True)
    assert cuda_graph.wanted(SystemConfig(), cpu, unused) == (False, "no GPU")
    assert not cuda_graph.wanted(SystemConfig(cuda_graph=False), H200, unused)[0]
    assert cuda_graph.wanted(asked, H200, unused)[0]
    reason = cuda_graph.unsupported_reason
    assert reason(asked, H200) is None
    assert "loss scale" in str(reason(asked, Machine(CUDA, "float16")))
    checkpointing = SystemConfig(activation_checkpointing=True)
    assert "activation checkpointing" in str(reason(checkpointing, H200))


def ready(graphed: bool, rows: int = 8, n: int = 1, compile: bool = True, **settings) -> Trainer:
    """A trainer of n micro-batches with the kernels that a GPU gets, captured or not."""
    split = {"batch_size": rows // n, "gradient_accumulation_steps": n, "cuda_graph": True}
    config = replace(SMALL, **split, **settings)
    machine = Machine(CUDA, "bfloat16", compile)
    t = Trainer(build(config, 97, machine), config, machine)
    before, micro_batch = weights(t), tokens(0, rows // n)
    t.warm_up(0, micro_batch)
    if graphed:
        t.capture(0, micro_batch)
    assert all(map(torch.equal, before, weights(t))), "a weight was changed"
    return t


def tokens(step: int, rows: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(97, (rows, 65), generator=generator).to(CUDA)


@pytest.mark.cuda
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("n", [1, 2])
def test_graphed_steps_are_the_plain_ones(compile, dropout, n):
    losses = []
    for graphed in (False, True):
        t = ready(graphed, 16, n, compile, dropout=dropout)
        losses.append([t.step(s, tokens(s, 16))[0].item() for s in range(10)])
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-3, atol=0)


@pytest.mark.cuda
@pytest.mark.parametrize("graphed", [False, True])
def test_a_step_never_waits_for_the_device(graphed):
    t, rows = ready(graphed, dropout=0.1), tokens(0)
    t.step(0, rows)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            t.step(step, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("graphed", [False, True])
def test_deterministic_runs_are_equal_to_the_bit(graphed, monkeypatch):
    """Dropout, biases, an odd vocabulary and repeated tokens; gradients are summed in one order."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    ends = []
    try:
        for _ in range(2):
            t = ready(graphed, dropout=0.2, deterministic=True)
            for step in range(10):
                t.step(step, tokens(0))
            ends.append(weights(t))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, *ends))
