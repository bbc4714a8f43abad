"""The model on the Triton kernels trains as the eager one does, and traces without a break.

Without a GPU the kernels run in Triton's interpreter, in fp32.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from fastgpt.config.presets import laptop
from fastgpt.config.settings import replace
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.model.kernels import KernelOptions, select
from fastgpt.train.trainer import Trainer
from tests.fakes import interpreted

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = ModelShape(1, 1, 32, 20, 61, bias=True)  # the interpreter is slow


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    if DEVICE.type == "cpu":
        interpreted(monkeypatch)


def trainer(kernels: str, dropout: float = 0.0, bias: bool = True) -> Trainer:
    config = replace(
        laptop(), batch_size=1, warmup_iters=2, learning_rate=1e-2, dropout=dropout,
        kernels=kernels,
    )  # fmt: skip
    shape = ModelShape(**{**SHAPE.__dict__, "bias": bias})
    table = select(DEVICE, sizes=shape.sizes(1, dropout), options=KernelOptions(kernels))
    model = GPT(shape, dropout, table).init_weights(0).to(DEVICE)
    trainer = Trainer(model, config, Machine(DEVICE))
    assert {c.implementation for c in trainer.selected} == {kernels}
    return trainer


def tokens(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(61, (1, 21), generator=generator).to(DEVICE)


@pytest.mark.slow
def test_twenty_steps_are_the_eager_ones():
    eager, triton = trainer("eager"), trainer("triton")
    losses = [[t.step(s, tokens(s % 2))[0].item() for s in range(20)] for t in (eager, triton)]
    assert losses[0][-1] < losses[0][0] - 0.5, "nothing was learned"
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=2e-5, atol=2e-5)
    # Vectors are left out: a key bias has no true gradient, and Adam scales rounding up to a step.
    matrices = {n: p for n, p in eager.model.named_parameters() if p.ndim == 2}
    for name, p in matrices.items():
        error = (p - triton.model.get_parameter(name)).norm() / p.norm()
        assert error < 1e-3, f"{name} is off by {error:.2g}"


def test_gradients_are_the_eager_ones():
    grads = []
    for t in (trainer("eager", bias=False), trainer("triton", bias=False)):
        t._backward(0, tokens(0))
        grads.append({n: p.grad for n, p in t.model.named_parameters()})
    for name, want in grads[0].items():
        torch.testing.assert_close(grads[1][name], want, rtol=1e-3, atol=1e-6, msg=name)


def test_dropout_in_the_kernels_repeats_with_the_step():
    a, b = trainer("triton", dropout=0.3), trainer("triton", dropout=0.3)
    first = a.step(4, tokens(0))[0]
    assert torch.equal(first, b.step(4, tokens(0))[0])
    assert not torch.equal(first, trainer("triton", dropout=0.3).step(5, tokens(0))[0])


@pytest.mark.slow
def test_one_graph_and_no_recompile():
    """fullgraph refuses any break; after the first step and evaluation nothing compiles again."""
    t = trainer("triton", dropout=0.3)
    torch._dynamo.reset()
    counters.clear()
    t.forward = torch.compile(t.model, backend="aot_eager", fullgraph=True)
    t.step(0, tokens(0))
    t.losses(tokens(0))
    first = dict(counters["stats"])
    assert first["unique_graphs"] == 2 and not counters["graph_break"]
    for step in range(1, 3):
        t.step(step, tokens(step))
        t.losses(tokens(step))
    assert counters["stats"]["unique_graphs"] == 2, "a step was compiled again"


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_steps_are_the_plain_ones(dropout):
    plain, checkpointed = trainer("triton", dropout), trainer("triton", dropout)
    checkpointed.model.checkpointing = True
    for step in range(2):
        a, b = (t.step(step, tokens(step)) for t in (plain, checkpointed))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.slow
def test_checkpointing_traces_without_a_break():
    t = trainer("triton", dropout=0.3)
    t.model.checkpointing = True
    torch._dynamo.reset()
    counters.clear()
    t.forward = torch.compile(t.model, backend="aot_eager", fullgraph=True)
    for step in range(2):
        loss, _ = t.step(step, tokens(step))
        assert torch.isfinite(loss)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
