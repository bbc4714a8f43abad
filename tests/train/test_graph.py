"""One CUDA graph for a micro-step: where it is wanted, and that it computes the same."""

from __future__ import annotations

import pytest
import torch

from fastgpt.config.presets import PRESETS, shakespeare_char
from fastgpt.config.schema import Config, SystemConfig
from fastgpt.config.settings import replace
from fastgpt.errors import UserError
from fastgpt.model.build import build
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.train import graph
from fastgpt.train.step import Trainer

CUDA = torch.device("cuda")
H200 = Machine(CUDA, "bfloat16", peak_tflops=989.4)
SMALL = replace(
    shakespeare_char(), n_layer=2, n_head=2, n_embd=128, block_size=64, bias=True, gelu="tanh"
)


def model_of(config: Config) -> GPT:
    vocab_size = 65 if config.data.dataset == "shakespeare_char" else 50257
    with torch.device("meta"):
        return GPT(ModelShape.of(config.model, vocab_size))


@pytest.fixture(autouse=True)
def nothing_to_initialise(monkeypatch):
    for layer in (torch.nn.Linear, torch.nn.Embedding):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)


@pytest.mark.parametrize(
    ("preset", "yes"), [("shakespeare_char", True), ("gpt2", False), ("gpt2_xl", False)]
)
def test_by_itself_only_where_launching_is_slow(preset, yes):
    config = PRESETS[preset]()
    size = config.optim.batch_size
    decided, why = graph.wanted(config.system, model_of(config), H200, size)
    assert decided is yes and "ms of compute" in why


def test_asked_for_and_not_to_be_had():
    model, cpu = model_of(shakespeare_char()), Machine(torch.device("cpu"))
    assert graph.wanted(SystemConfig(), model, cpu, 64) == (False, "no GPU")
    assert not graph.wanted(SystemConfig(cuda_graph=False), model, H200, 64)[0]
    asked = SystemConfig(cuda_graph=True)
    graph.check(asked, H200)
    with pytest.raises(UserError, match="--cuda_graph=True: no GPU"):
        graph.check(asked, cpu)
    with pytest.raises(UserError, match="activation checkpointing"):
        graph.check(SystemConfig(cuda_graph=True, activation_checkpointing=True), H200)
    with pytest.raises(UserError, match="loss scale"):
        graph.check(asked, Machine(CUDA, "float16"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_graphed_steps_are_the_plain_ones(compile, dropout):
    losses = []
    for graphed in (False, True):
        config = replace(SMALL, batch_size=8, gradient_accumulation_steps=2, dropout=dropout)
        machine = Machine(CUDA, "bfloat16", compile)
        model = build(config, 97, machine)
        t = Trainer(model, config, machine)
        generator = torch.Generator().manual_seed(0)
        batches = torch.randint(97, (10, 16, 65), generator=generator).to(CUDA)
        t.warm_up(0, batches[0][:8])
        if graphed:
            before = [p.detach().clone() for p in model.parameters()]
            t.capture(0, batches[0][:8])
            assert all(map(torch.equal, before, model.parameters())), "capturing changed a weight"
        losses.append([t.step(s, batches[s])[0].item() for s in range(10)])
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-3, atol=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("adamw", ["eager", "triton"])
@pytest.mark.parametrize("graphed", [False, True])
def test_a_step_never_waits_for_the_device(graphed, adamw):
    config = replace(SMALL, batch_size=4, dropout=0.1, **{"op.adamw": adamw})
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


def test_a_capture_that_fails(monkeypatch):
    """Steps go on without a graph, unless it was asked for; out of memory is said."""
    config = replace(SMALL, device="cpu", compile=False)
    trainer = Trainer(build(config, 65, Machine(torch.device("cpu"))), config, Machine.of("cpu"))
    monkeypatch.setattr(graph, "wanted", lambda *_: (True, "launches"))

    def fails(error: Exception):
        def capture(step, micro_batch):
            raise error

        monkeypatch.setattr(trainer, "capture", capture)

    fails(RuntimeError("no stream\nsecond line"))
    assert trainer.capture_if_it_pays(0, lambda: None) == (True, False, "no stream")
    trainer.config = replace(config, cuda_graph=True)
    with pytest.raises(UserError, match="--cuda_graph=True: no stream; leave the flag out"):
        trainer.capture_if_it_pays(0, lambda: None)
    fails(torch.OutOfMemoryError("full"))
    with pytest.raises(torch.OutOfMemoryError):
        trainer.capture_if_it_pays(0, lambda: None)
