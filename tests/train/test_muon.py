"""Muon against torch.optim.Muon and against a reference in fp64; as part of a run."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import cli
from fastgpt.config.schema import OptimConfig
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.train import muon, optim
from fastgpt.train.muon import Muon, newton_schulz, orthogonal
from tests import runs
from tests.train.helpers import DEVICE

C = OptimConfig(optimizer="muon", learning_rate=1e-2, weight_decay=0.1)
SHAPE = ModelShape(2, 2, 16, 8, 20, bias=True)


def made(c: OptimConfig = C, dtype: torch.dtype = torch.float32) -> tuple[GPT, Any]:
    """A model and its optimizer."""
    model = GPT(SHAPE).init_weights(0).to(DEVICE)
    optimizer = optim.make_optimizer(model, c)
    if isinstance(optimizer, Muon):
        optimizer.dtype = dtype
    return model, optimizer


def of_blocks(model: GPT) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if ".h." in n and p.ndim == 2}


def gradients(model: GPT, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(DEVICE) / 50


def pieces(name: str, t: Tensor) -> tuple[Tensor, ...]:
    return t.chunk(3) if name.endswith("c_attn.weight") else (t,)


class Reference:
    """The formulas of the module's docstring for one matrix, in fp64 on the CPU."""

    def __init__(self, weight: Tensor):
        self.weight, self.buffer = weight.detach().double().cpu(), torch.zeros(1).double()

    def step(self, gradient: Tensor, lr: float, decay: float) -> None:
        g = gradient.double().cpu()
        self.buffer = 0.95 * self.buffer + 0.05 * g
        x = 0.95 * self.buffer + 0.05 * g
        x = x / x.norm()
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        scale = 0.2 * math.sqrt(max(x.shape))
        self.weight = (1 - lr * decay) * self.weight - scale * lr * x


# bf16 has 8 bits and a step three matmuls in a row, five times.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)])
def test_steps_are_the_formulas(dtype, tolerance):
    """Every matrix, q, k and v apart; clipping, a schedule; the update's error relative to it."""
    model, optimizer = made(dtype=dtype)
    blocks = of_blocks(model)
    references = {n: [*map(Reference, pieces(n, p))] for n, p in blocks.items()}
    before = {n: p.detach().double().cpu() for n, p in blocks.items()}
    for step in range(4):
        lr, divisor = 1e-2 / (step + 1), 1.0 + step
        optim.set_learning_rate(optimizer, lr)
        gradients(model, step)
        optimizer.grad_scale = torch.tensor(divisor, device=DEVICE)
        for n, p in blocks.items():
            for r, g in zip(references[n], pieces(n, p.grad), strict=True):
                r.step(g / divisor, lr, 0.1)
        optimizer.step()
    assert len(blocks) == 8
    for n, p in blocks.items():
        want = torch.cat([r.weight for r in references[n]]) - before[n]
        error = p.detach().double().cpu() - before[n] - want
        assert error.norm() <= tolerance * want.norm(), n


def test_steps_are_torchs():
    """torch.optim.Muon of each matrix, which computes in bf16; and AdamW's of all else, exactly."""
    model, optimizer = made(dtype=torch.bfloat16)
    other, adamw = made(replace(C, optimizer="adamw"))
    start = {n: p.detach().clone() for n, p in of_blocks(other).items()}
    parts = {n: [torch.nn.Parameter(x.clone()) for x in pieces(n, p)] for n, p in start.items()}
    reference = torch.optim.Muon(
        sum(parts.values(), []), lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(3):
        gradients(model, step)
        gradients(other, step)
        for o in (optimizer, reference, adamw):
            optim.set_learning_rate(o, 1e-2 / (1 + step))
        for name, cut in parts.items():
            for x, g in zip(cut, pieces(name, other.get_parameter(name).grad), strict=True):
                x.grad = g.clone()
        for o in (optimizer, reference, adamw):
            o.step()
    for name, p in model.named_parameters():
        if name not in parts:
            assert torch.equal(p, other.get_parameter(name)), name
            continue
        want = torch.cat(parts[name])
        assert (p - want).norm() <= 2e-2 * (want - start[name]).norm(), name


@pytest.mark.parametrize("smallest", [-2, -4])
def test_singular_values_come_near_one(smallest):
    """The directions stay. In fp32 wide matrices go by their Gram matrix, which has the squares."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(n, 24, generator=generator).double() for n in (24, 96))
    u, v = torch.linalg.qr(u)[0], torch.linalg.qr(v)[0]
    x = u @ torch.diag(torch.logspace(smallest, 0, 24).double()) @ v.T / 2
    want, found = newton_schulz(x), newton_schulz(x.float())
    assert (found - want).norm() < 1e-3 * want.norm()
    if smallest == -2:
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.3 and values.max() < 1.3
        assert (u.T @ want @ v).diagonal().min() > 0.3, "not U V^T"


def test_stacks_come_back_as_they_went():
    """Tall, wide, several parts: as each matrix alone."""
    generator = torch.Generator().manual_seed(0)
    square = {(2, 24, 8): 3, (3, 8, 8): 1, (2, 8, 8): 1}
    for shapes in (square, {(2, 32, 8): 1, (2, 8, 32): 1}):
        stacks = [torch.randn(s, generator=generator) for s in shapes]
        found = zip(stacks, orthogonal(stacks, [*shapes.values()]), shapes.values(), strict=True)
        for stack, made, parts in found:
            assert made.shape == stack.shape
            for x, y in zip(stack, made, strict=True):
                for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                    a = a / a.norm()
                    want = newton_schulz(a.T).T if len(a) > a.shape[1] else newton_schulz(a)
                    torch.testing.assert_close(b, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("columns", [8, 15, 16, 40])
def test_one_by_one_and_stacked_are_the_same(columns):
    x = torch.randn(3, 8, columns, generator=torch.Generator().manual_seed(0))
    x = x / x.norm(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(newton_schulz(x), torch.stack([*map(newton_schulz, x)]))


@pytest.mark.parametrize("first", [True, False])
def test_found_inf_calls_a_step_off(first):
    """Without a look at it: gradients may be NaN, and nothing at all may change."""
    model, optimizer = made()
    if not first:
        gradients(model, 0)
        optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    state = {k: v.clone() for k, v in optim.state_tensors(optimizer, model).items()}
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.found_inf = torch.ones((), device=DEVICE)
    optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    after = optim.state_tensors(optimizer, model)
    for name, value in after.items():
        assert torch.equal(value, state.get(name, torch.zeros_like(value))), name


@pytest.mark.slow
def test_compiled_is_the_same():
    """Kernels by torch.compile, for this device."""
    steps = []
    for compiled in (False, True):
        model, optimizer = made()
        if compiled:
            optimizer._momentum = torch.compile(muon.momentum, dynamic=False)
            optimizer._orthogonal = torch.compile(orthogonal, dynamic=False)
        before = [p.detach().clone() for p in model.parameters()]
        gradients(model, 9)
        optimizer.warm_up()
        assert all(map(torch.equal, before, model.parameters())) or not compiled
        for step in range(2):
            gradients(model, step)
            optimizer.step()
        steps.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*steps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture
def train(tmp_path: Path, monkeypatch, capsys):
    """`fastgpt train` of a tiny run in a folder of its own; what it said."""
    monkeypatch.chdir(tmp_path)
    text = f"--input={runs.write_text(tmp_path)}"

    def call(*args: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as e:
            cli.main(["train", *args])
        said = capsys.readouterr()
        assert (e.value.code or 0) == code, said.err
        return said.err if code else said.out

    call.new = (*runs.TINY, text, "--n_layer=1", "--sample_tokens=0", "--eval_interval=6")  # type: ignore[attr-defined]
    return call


def test_resume_is_exact(train):
    new = (*train.new, "--optimizer=muon", "--lr_schedule=wsd", "--lr_decay_iters=12")
    train(*new, "--out_dir=straight", "--max_iters=12")
    train(*new, "--out_dir=cut", "--max_iters=6")
    train("--init_from=resume", "--out_dir=cut", "--max_iters=12")
    assert runs.records(Path("cut")) == runs.records(Path("straight"))
    files = runs.tensor_files(Path("cut"))
    assert files == runs.tensor_files(Path("straight"))
    assert b"momentum_buffer.transformer.h.0.attn.c_attn.weight" in files["optimizer.safetensors"]
    resume = ("--init_from=resume", "--out_dir=cut", "--max_iters=20")
    assert train(*resume, "--optimizer=adamw", code=2) == (
        "fastgpt: --optimizer=adamw: the checkpoint has the state of muon; leave the flag out, or "
        "start a new run\n"
    )


def test_the_speedrun_end_to_end(train):
    """The preset at a tiny size: down to a loss that it meets, and then it is at its end."""
    tiny = [x for x in runs.TINY if not x.startswith("--max_iters")][1:]
    text = f"--input={Path('text.txt').absolute()}"
    args = ("gpt2_speedrun", *tiny, text, "--tokenizer=byte", "--out_dir=run", "--max_iters=400")
    args = (*args, "--gradient_accumulation_steps=1", "--learning_rate=2e-2", "--warmup_iters=5")
    said = train(*args, "--lr_decay_iters=400", "--target_val_loss=2.8")
    evals = runs.records(Path("run"), "eval")
    assert evals[-1]["val_loss"] <= 2.8 < evals[-2]["val_loss"]
    steps = evals[-1]["step"]
    assert 0 < steps < 400 and runs.latest(Path("run")).name == f"step_{steps:08d}"
    found = re.search(
        rf"reached --target_val_loss=2.8 after {steps} steps, {steps * 64:,} tokens, "
        r"([\d.]+) s of training, ([\d.]+) s in all",
        said,
    )
    assert found and 0 <= float(found[1]) <= float(found[2])
    assert b"momentum_buffer" in runs.tensor_files(Path("run"))["optimizer.safetensors"]
    again = train("--init_from=resume", "--out_dir=run")
    assert found[0].rpartition(",")[0] in again and "iter " not in again
    further = train("--init_from=resume", "--out_dir=run", "--target_val_loss=2.4")
    assert f"iter {steps}:" in further and "reached --target_val_loss=2.4 after" in further
