"""FusedAdamW is torch.optim.AdamW: the same steps, state and groups.

Without a GPU the kernel runs in Triton's interpreter.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgpt import cli
from fastgpt.config.presets import laptop
from fastgpt.config.schema import OptimConfig
from fastgpt.config.settings import replace
from fastgpt.errors import UserError
from fastgpt.model import ops
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.model.ops import Wish
from fastgpt.train import optim
from fastgpt.train.adamw import FusedAdamW
from fastgpt.train.trainer import Trainer
from fastgpt_kernels.registry import spec
from tests import runs
from tests.model.test_ops import interpreted

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(33, 70), (5000,), (1,), (8, 3, 5)]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95)}
torch_adamw = spec("adamw").eager


@pytest.fixture(autouse=True)
def kernel_runs(monkeypatch):
    if DEVICE.type == "cpu":
        interpreted(monkeypatch)


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(DEVICE).requires_grad_() for s in SHAPES]


def groups(params: list[Tensor]) -> list[dict]:
    return [
        {"params": params[::2], "weight_decay": 0.1},
        {"params": params[1::2], "weight_decay": 0.0},
    ]


def gradients(params: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(DEVICE)


def both() -> list[tuple[list[Tensor], torch.optim.AdamW]]:
    made = []
    for kind in (torch_adamw, FusedAdamW):
        params = parameters()
        made.append((params, kind(groups(params), **OPTIONS)))
    return made


def equal(made: list[tuple[list[Tensor], torch.optim.AdamW]]) -> None:
    (params, optimizer), (other_params, other) = made
    for p, q in zip(params, other_params, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)
        for key, value in optimizer.state[p].items():
            torch.testing.assert_close(other.state[q][key], value, rtol=1e-5, atol=1e-7)


def test_steps_are_pytorchs():
    """Decay by group, a schedule, clipping, gradients freed in between and kept."""
    made = both()
    for step in range(6):
        for params, optimizer in made:
            optim.set_learning_rate(optimizer, 1e-2 / (step + 1))
            gradients(params, step)
            optimizer.grad_scale = torch.tensor(1.0 + step % 2, device=DEVICE)
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
    equal(made)
    first = made[1][0][0]
    assert made[1][1].state[first]["step"].item() == 6


def test_gradients_are_left_as_they_are():
    _, (params, optimizer) = both()
    gradients(params, 0)
    before = [p.grad.clone() for p in params]
    optimizer.grad_scale = torch.tensor(3.0, device=DEVICE)
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))


def test_found_inf_calls_a_step_off():
    _, (params, optimizer) = both()
    gradients(params, 0)
    optimizer.step()
    before = [t.clone() for p in params for t in (p, *optimizer.state[p].values())]
    gradients(params, 1)
    optimizer.found_inf = torch.ones((), device=DEVICE)
    optimizer.step()
    after = [t for p in params for t in (p, *optimizer.state[p].values())]
    assert all(map(torch.equal, before, after))


def test_parameters_without_a_gradient_are_left_alone():
    made = both()
    for params, optimizer in made:
        gradients(params, 0)
        params[1].grad = None
        optimizer.step()
        assert not optimizer.state[params[1]]
    equal(made)
    _, optimizer = made[1]
    optimizer.zero_grad()
    optimizer.step()  # nothing to do


def small() -> GPT:
    table = ops.choose(DEVICE, wish=Wish("eager"))
    return GPT(ModelShape(1, 2, 16, 8, 20, bias=True), 0.0, table).init_weights(0).to(DEVICE)


@pytest.mark.parametrize(
    "order", [(torch_adamw, FusedAdamW), (FusedAdamW, torch_adamw)], ids=["to", "from"]
)
def test_either_goes_on_from_the_others_state(order):
    idx = torch.randint(20, (2, 8), device=DEVICE)

    def trained(model: GPT, optimizer: torch.optim.AdamW, steps: int) -> None:
        for _ in range(steps):
            model(idx, idx).backward()
            optimizer.step()
            optimizer.zero_grad()

    def made(kind) -> tuple[GPT, torch.optim.AdamW]:
        model = small()
        return model, kind([{"params": [*model.parameters()], "weight_decay": 0.1}], **OPTIONS)

    (model, first), (other, second), (straight, all_along) = map(made, (*order, order[0]))
    trained(straight, all_along, 5)
    trained(model, first, 3)
    saved = {k: v.clone() for k, v in optim.state_tensors(first, model).items()}
    assert len({t.data_ptr() for t in optim.state_tensors(first, model).values()}) == len(saved)
    other.load_state_dict(model.state_dict())
    optim.load_state_tensors(second, other, saved)
    trained(other, second, 2)
    for p, q in zip(straight.parameters(), other.parameters(), strict=True):
        if p.ndim == 2:  # a key bias has no true gradient, and Adam scales rounding up to a step
            assert (p - q).norm() <= 1e-4 * p.norm()


def test_loading_after_a_step_takes_effect():
    """The table of addresses is of the state that was there: it has to be made anew."""
    model = small()
    optimizer = FusedAdamW([{"params": [*model.parameters()]}], **OPTIONS)
    idx = torch.randint(20, (2, 8), device=DEVICE)
    model(idx, idx).backward()
    optimizer.step()
    saved = {k: v + 1 for k, v in optim.state_tensors(optimizer, model).items()}
    optim.load_state_tensors(optimizer, model, saved)
    optimizer.found_inf = None
    optimizer.step()
    now = optim.state_tensors(optimizer, model)
    assert now["step.transformer.wte.weight"].item() == 3
    assert (now["exp_avg.transformer.wte.weight"] > 0.5).all()


@pytest.mark.parametrize(
    "kinds", [(torch_adamw, FusedAdamW), (FusedAdamW, torch_adamw)], ids=["to", "from"]
)
def test_either_goes_on_from_the_others_state_dict(kinds):
    straight, first, second = (
        (params, kind(groups(params), **OPTIONS))
        for kind, params in ((k, parameters()) for k in (kinds[0], *kinds))
    )

    def step(made, number: int) -> None:
        gradients(made[0], number)
        made[1].step()

    for number in range(3):
        step(straight, number)
        step(first, number)
    step(second, 9)  # what it held until then has to go
    for p, q in zip(second[0], first[0], strict=True):
        p.data.copy_(q)
    second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
    for number in range(3, 6):
        step(straight, number)
        step(second, number)
    equal([straight, second])


def test_different_counts_are_refused():
    model = small()
    optimizer = FusedAdamW([{"params": [*model.parameters()]}], **OPTIONS)
    idx = torch.randint(20, (2, 8), device=DEVICE)
    model(idx, idx).backward()
    optimizer.step()
    saved = optim.state_tensors(optimizer, model)
    saved["step.transformer.ln_f.weight"] += 3
    with pytest.raises(UserError, match="updated 1 to 4 times, .* pass --op.adamw=eager"):
        optim.load_state_tensors(optimizer, model, saved)


def test_groups_that_differ_in_more_than_decay_are_refused():
    _, (params, optimizer) = both()
    gradients(params, 0)
    optimizer.param_groups[1]["betas"] = (0.8, 0.9)
    with pytest.raises(ValueError, match="adamw: all groups must have the same betas"):
        optimizer.step()


def test_freed_gradients_are_freed():
    """Else two steps' gradients would be in memory at once."""
    _, (params, optimizer) = both()
    gradients(params, 0)
    gradient = weakref.ref(params[0].grad)
    optimizer.step()
    optimizer.zero_grad()
    assert gradient() is None


def trainer(kind: str, device: torch.device, dtype: str = "float32") -> Trainer:
    o = OptimConfig(
        batch_size=2, gradient_accumulation_steps=1, learning_rate=1e-2, warmup_iters=2,
        grad_clip=0.5,
    )  # fmt: skip
    config = dataclasses.replace(laptop(), optim=o)
    config = replace(config, **{"kernels": "eager", "op.adamw": kind})
    table = ops.choose(device, wish=Wish("eager"))
    model = GPT(ModelShape(2, 2, 16, 8, 20, bias=True), 0.0, table).init_weights(0).to(device)
    return Trainer(model, config, Machine(device, dtype))


def tokens(step: int) -> Tensor:
    return torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(step)).to(DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_training_is_pytorchs(dtype):
    """The whole step: clipping, the guard against NaNs on the device, loss scaling."""
    eager, triton = trainer("eager", DEVICE, dtype), trainer("triton", DEVICE, dtype)
    assert isinstance(triton.optimizer, FusedAdamW)
    for t in (eager, triton):
        t._guard_on_device = True
    losses = [[t.step(s, tokens(s))[0].item() for s in range(12)] for t in (eager, triton)]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-5)
    assert losses[0][-1] != losses[0][0]
    if dtype == "float16":
        assert eager.state_dict() == triton.state_dict()


def losses(run_dir: Path) -> list[float]:
    return [r[k] for r in runs.records(run_dir) for k in ("loss", "grad_norm")]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs in the interpreter here")
def test_runs_are_the_same_and_go_on_from_each_other(tmp_path, monkeypatch, capsys):
    """Straight under either; and cut, with each half under another."""
    monkeypatch.chdir(tmp_path)
    text = f"--input={runs.write_text(tmp_path)}"
    few = ("--max_iters=12", "--eval_interval=6", "--sample_tokens=0", "--n_layer=1")

    def train(name: str, *args: str) -> str:
        with pytest.raises(SystemExit) as e:
            cli.main(["train", *args, f"--out_dir={name}"])
        assert e.value.code in (0, None), capsys.readouterr().err
        return capsys.readouterr().out

    new = (*runs.TINY, text, *few, "--kernels=eager", "--grad_clip=0.5")
    said = train("eager", *new)
    assert "eager (--kernels=eager): attention" in said and ", adamw" in said
    said = train("triton", *new, "--op.adamw=triton")
    assert "; triton (--op.adamw=triton): adamw" in said
    assert losses(Path("triton")) != losses(Path("eager")), "the same code ran twice"
    assert losses(Path("triton")) == pytest.approx(losses(Path("eager")), rel=1e-4)
    state = (runs.latest(Path("triton")) / "state.json").read_text()
    assert '"op": "adamw"' in state and '"reason": "--op.adamw=triton"' in state
    for first, then in (("eager", "triton"), ("triton", "eager")):
        name = f"{first}-{then}"
        train(name, *new, f"--op.adamw={first}", "--max_iters=6")
        train(name, "--init_from=resume", f"--op.adamw={then}", "--max_iters=12")
        assert losses(Path(name)) == pytest.approx(losses(Path("eager")), rel=1e-4)
    train("cut", *new, "--op.adamw=triton", "--max_iters=6")
    train("cut", "--init_from=resume", "--max_iters=12")
    assert runs.tensor_files(Path("cut")) == runs.tensor_files(Path("triton"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the flag is granted here")
def test_a_refused_run_leaves_the_old_one_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()  # neither a GPU nor the interpreter
    monkeypatch.chdir(tmp_path)
    text = f"--input={runs.write_text(tmp_path)}"
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.toml").write_text("")
    refused = ["train", *runs.TINY, text, "--out_dir=old", "--overwrite=True", "--op.adamw=triton"]
    with pytest.raises(SystemExit) as e:
        cli.main(refused)
    assert e.value.code == 2 and capsys.readouterr().err == "fastgpt: --op.adamw=triton: no GPU\n"
    assert (old / "config.toml").exists()


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
def test_with_a_graph_of_the_micro_step():
    plain, graphed = trainer("triton", DEVICE), trainer("triton", DEVICE)
    graphed.warm_up(0, tokens(0))
    graphed.capture(0, tokens(0))
    for step in range(5):
        a, b = (t.step(step, tokens(step))[0] for t in (plain, graphed))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
