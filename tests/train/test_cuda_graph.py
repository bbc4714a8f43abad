"""One CUDA graph for a micro-step: where it is wanted, and that it computes the same."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fastgpt.config.presets import shakespeare_char
from fastgpt.config.schema import SystemConfig
from fastgpt.config.settings import replace
from fastgpt.errors import UserError
from fastgpt.model.build import build
from fastgpt.model.device import Machine
from fastgpt.train import cuda_graph
from fastgpt.train.trainer import Trainer

CUDA = torch.device("cuda")
H200 = Machine(CUDA, "bfloat16", peak_tflops=989.4)
SMALL = replace(
    shakespeare_char(), n_layer=2, n_head=2, n_embd=128, block_size=64, bias=True, gelu="tanh"
)


@pytest.fixture(autouse=True)
def nothing_to_initialise(monkeypatch):
    for layer in (torch.nn.Linear, torch.nn.Embedding):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)


@pytest.mark.parametrize(("launching", "computing", "yes"), [(5, 0.2, True), (5, 40, False)])
def test_by_itself_only_where_launching_is_slow(launching, computing, yes, monkeypatch):
    """The fastest of three counts: the first has something to compile, or another process ran."""
    now, slow = [0.0], iter([7.0, 1.0, 1.1])

    def passes(ms):
        now[0] += ms / 1e3

    def synchronize(machine):
        passes(computing if launched else 0)
        launched.clear()

    def micro_step():
        passes(launching * next(slow))
        launched.append(True)

    launched = []
    timed = partial(cuda_graph.timed, clock=lambda: now[0])
    monkeypatch.setattr(cuda_graph, "timed", timed)
    monkeypatch.setattr(Machine, "synchronize", synchronize)
    decided, why = cuda_graph.wanted(SystemConfig(), H200, micro_step)
    assert decided is yes
    assert why == f"launching takes 5.0 of a micro-step's {launching + computing:.1f} ms"


def test_asked_for_and_not_to_be_had():
    def unused():
        raise AssertionError("nothing to measure")

    cpu = Machine(torch.device("cpu"))
    assert cuda_graph.wanted(SystemConfig(), cpu, unused) == (False, "no GPU")
    assert not cuda_graph.wanted(SystemConfig(cuda_graph=False), H200, unused)[0]
    asked = SystemConfig(cuda_graph=True)
    assert cuda_graph.wanted(asked, H200, unused)[0]
    cuda_graph.check(asked, H200)
    with pytest.raises(UserError, match="--cuda_graph=True: no GPU"):
        cuda_graph.check(asked, cpu)
    with pytest.raises(UserError, match="activation checkpointing"):
        cuda_graph.check(SystemConfig(cuda_graph=True, activation_checkpointing=True), H200)
    with pytest.raises(UserError, match="loss scale"):
        cuda_graph.check(asked, Machine(CUDA, "float16"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("n", [1, 2])
def test_graphed_steps_are_the_plain_ones(compile, dropout, n):
    losses = []
    for graphed in (False, True):
        config = replace(SMALL, batch_size=16 // n, gradient_accumulation_steps=n, dropout=dropout)
        machine = Machine(CUDA, "bfloat16", compile)
        model = build(config, 97, machine)
        t = Trainer(model, config, machine)
        generator = torch.Generator().manual_seed(0)
        batches = torch.randint(97, (10, 16, 65), generator=generator).to(CUDA)
        t.warm_up(0, batches[0][: 16 // n])
        if graphed:
            before = [p.detach().clone() for p in model.parameters()]
            t.capture(0, batches[0][: 16 // n])
            assert all(map(torch.equal, before, model.parameters())), "capturing changed a weight"
        losses.append([t.step(s, batches[s])[0].item() for s in range(10)])
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-3, atol=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphed", [False, True])
def test_a_step_never_waits_for_the_device(graphed):
    config = replace(SMALL, batch_size=4, dropout=0.1)
    machine = Machine(CUDA, "bfloat16", compile=True)
    t = Trainer(build(config, 97, machine), config, machine)
    tokens = torch.randint(97, (4, 65), device=CUDA)
    t.warm_up(0, tokens)
    if graphed:
        t.capture(0, tokens)
    t.step(0, tokens)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            t.step(step, tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphed", [False, True])
def test_deterministic_runs_are_equal_to_the_bit(graphed, monkeypatch):
    """Dropout, biases, an odd vocabulary and repeated tokens; gradients are summed in one order."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    config = replace(SMALL, batch_size=8, dropout=0.2, deterministic=True)
    machine = Machine(CUDA, "bfloat16", compile=True)
    tokens = torch.randint(97, (8, 65), generator=torch.Generator().manual_seed(0)).to(CUDA)
    weights = []
    try:
        for _ in range(2):
            t = Trainer(build(config, 97, machine), config, machine)
            t.warm_up(0, tokens)
            if graphed:
                t.capture(0, tokens)
            for step in range(10):
                t.step(step, tokens)
            weights.append([p.detach().clone() for p in t.model.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, *weights))
