"""Gradients that passes add to in place: the same training, and no pass of its own adds them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastgpt.config.presets import laptop
from fastgpt.config.settings import replace
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.model.kernels import KernelOptions, select
from fastgpt.train import optim
from fastgpt.train import trainer as trainer_module
from fastgpt.train.trainer import Trainer
from tests.fakes import interpreted

CPU = torch.device("cpu")
SHAPE = ModelShape(2, 2, 64, 16, 50, bias=True)


def trainer(sums: bool, monkeypatch, kernels: str = "eager", n: int = 2, **settings) -> Trainer:
    """Of n micro-batches, in bf16, or fp16 where kernels are interpreted."""
    monkeypatch.setattr(trainer_module, "accumulates_in_fp32", lambda device: sums)
    flags = {"batch_size": 8 // n, "gradient_accumulation_steps": n, **settings}
    config = replace(laptop(), kernels="eager", **flags)
    machine = Machine(CPU, "float16" if kernels == "triton" else "bfloat16")
    sizes = SHAPE.sizes(4)
    table = select(CPU, machine.torch_dtype, sizes, KernelOptions(kernels))
    return Trainer(GPT(SHAPE, 0.0, table, machine.torch_dtype).init_weights(0), config, machine)


def tokens(step: int = 0) -> Tensor:
    return torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize(
    ("kernels", "optimizer"),
    [("eager", "adamw"), ("eager", "muon"),
     pytest.param("triton", "adamw", marks=pytest.mark.slow)],
)  # fmt: skip
def test_trains_as_without_them(kernels, optimizer, monkeypatch):
    if kernels == "triton":
        if torch.cuda.is_available():
            pytest.skip("the kernels run for real here")
        interpreted(monkeypatch)
    ours, plain = (trainer(s, monkeypatch, kernels, optimizer=optimizer) for s in (True, False))
    kept = {n: p.grad for n, p in ours.model.named_parameters() if p.grad is not None}
    assert len(kept) == 8 + (kernels == "triton")  # the head's is with its kernel
    assert all(p.grad is None for p in plain.model.parameters())
    if kernels == "triton":  # whose scale starts where gradients overflow
        for t in (ours, plain):
            t.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    ours.warm_up(0, tokens()[:4])
    for step in range(2 if kernels == "triton" else 4):  # interpreted: a minute
        (loss, norm), (wanted, its_norm) = (t.step(step, tokens(step)) for t in (ours, plain))
        torch.testing.assert_close(loss, wanted, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(norm, its_norm, rtol=1e-2, atol=1e-3)
        for name, p in ours.model.named_parameters():
            assert name not in kept or (p.grad is kept[name] and not p.grad.any())
    found, wanted = (t.diagnose(4, tokens(4))["gradient_norms"] for t in (ours, plain))
    assert found.keys() == wanted.keys()
    for name, norm in found.items():
        assert float(norm) == pytest.approx(float(wanted[name]), rel=3e-2, abs=1e-4), name
    assert ours.model.state_dict().keys() == plain.model.state_dict().keys()


def test_of_one_micro_batch_there_is_nothing_to_add(monkeypatch):
    assert all(p.grad is None for p in trainer(True, monkeypatch, n=1).model.parameters())


def test_are_gone_on_with(monkeypatch):
    a, b = (trainer(True, monkeypatch) for _ in range(2))
    a.step(0, tokens())
    b.load(a.model.state_dict(), optim.state_tensors(a.optimizer, a.model), a.state_dict())
    assert torch.equal(a.step(1, tokens(1))[0], b.step(1, tokens(1))[0])
    assert all(map(torch.equal, a.model.parameters(), b.model.parameters()))


def test_compiled_in_one_graph(monkeypatch):
    torch._dynamo.reset()
    ours, plain = (trainer(s, monkeypatch) for s in (True, False))
    ours.forward = torch.compile(ours.model, fullgraph=True)
    for step in range(2):
        a, b = (t.step(step, tokens(step))[0] for t in (ours, plain))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
