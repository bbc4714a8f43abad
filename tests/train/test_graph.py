"""One CUDA graph for a micro-step: where it is wanted, and that it computes the same."""

from __future__ import annotations

import pytest
import torch

from fastgpt.config.presets import PRESETS, shakespeare_char
from fastgpt.config.schema import Config
from fastgpt.errors import UserError
from fastgpt.model import ops
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.train import graph
from fastgpt.train.step import Trainer

CUDA = torch.device("cuda")


def model_of(config: Config) -> GPT:
    m, vocab_size = config.model, 65 if config.data.dataset == "shakespeare_char" else 50257
    with torch.device("meta"):
        return GPT(ModelShape(m.n_layer, m.n_head, m.n_embd, m.block_size, vocab_size, m.bias))


@pytest.fixture(autouse=True)
def nothing_to_initialise(monkeypatch):
    for layer in (torch.nn.Linear, torch.nn.Embedding):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)


@pytest.mark.parametrize(
    ("preset", "yes"), [("shakespeare_char", True), ("gpt2", False), ("gpt2_xl", False)]
)
def test_by_itself_only_where_launching_is_slow(preset, yes):
    config = PRESETS[preset]()
    config.system.dtype = "bfloat16"
    decided, why = graph.wanted(config, model_of(config), CUDA, 989.4e12)
    assert decided is yes and "ms of compute" in why


def test_asked_for_and_not_to_be_had():
    config = shakespeare_char()
    model, cpu = model_of(config), torch.device("cpu")
    assert graph.wanted(config, model, cpu, 1e12) == (False, "no GPU")
    config.system.cuda_graph = False
    assert not graph.wanted(config, model, CUDA, 989.4e12)[0]
    config.system.cuda_graph = True
    graph.check(config, CUDA)
    with pytest.raises(UserError, match="--cuda_graph=True: no GPU"):
        graph.check(config, cpu)
    config.system.activation_checkpointing = True
    with pytest.raises(UserError, match="activation checkpointing"):
        graph.check(config, CUDA)
    config.system.activation_checkpointing, config.system.dtype = False, "float16"
    with pytest.raises(UserError, match="loss scale"):
        graph.check(config, CUDA)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_graphed_steps_are_the_plain_ones(compile, dropout):
    losses = []
    for graphed in (False, True):
        config = shakespeare_char()
        config.system.dtype, config.system.compile = "bfloat16", compile
        config.optim.batch_size, config.optim.gradient_accumulation_steps = 8, 2
        config.model.dropout = dropout
        shape = ModelShape(2, 2, 128, 64, 97, bias=True)
        table = ops.choose(CUDA, torch.bfloat16, shape.sizes(8))
        model = GPT(shape, dropout, table, torch.bfloat16).init_weights(0).to(CUDA)
        t = Trainer(model, config, CUDA)
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
    config = shakespeare_char()
    config.system.dtype, config.system.compile = "bfloat16", True
    config.optim.batch_size = 4
    config.op.adamw = adamw
    shape = ModelShape(2, 2, 128, 64, 97, bias=True)
    table = ops.choose(CUDA, torch.bfloat16, shape.sizes(4))
    model = GPT(shape, 0.1, table, torch.bfloat16)
    t = Trainer(model.init_weights(0).to(CUDA), config, CUDA)
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
