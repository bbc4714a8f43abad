"""Schedule, weight decay, clipping, the check for finite values, and the optimizer's state."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fastgpt.config import settings
from fastgpt.config.presets import laptop
from fastgpt.config.schema import OptimConfig
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.train import optim
from fastgpt.train.optim import clip_and_check_finite
from fastgpt.train.trainer import Trainer


def config(**changes) -> OptimConfig:
    return OptimConfig(
        learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110, **changes
    )


@pytest.mark.parametrize(
    ("step", "want"),
    [(0, 1 / 11), (9, 10 / 11), (10, 1.0), (60, 0.55), (110, 0.1), (111, 0.1), (10**6, 0.1)],
)
def test_schedule(step, want):
    assert optim.learning_rate(step, config()) == pytest.approx(want)


def test_schedule_follows_the_cosine():
    lrs = [optim.learning_rate(s, config()) for s in range(10, 111)]
    want = [0.1 + 0.45 * (1 + math.cos(math.pi * i / 100)) for i in range(101)]
    assert lrs == pytest.approx(want)


def test_schedule_edges():
    assert optim.learning_rate(5, config(decay_lr=False)) == 1.0
    flat = OptimConfig(warmup_iters=5, lr_decay_iters=5, learning_rate=1.0, min_lr=0.1)
    assert optim.learning_rate(5, flat) == 0.1


def test_wsd_is_flat_and_then_linear_to_zero():
    wsd = config(lr_schedule="wsd", lr_decay_fraction=0.2)
    lrs = {s: optim.learning_rate(s, wsd) for s in (0, 9, 10, 50, 88, 99, 110, 500)}
    want = {0: 1 / 11, 9: 10 / 11, 10: 1.0, 50: 1.0, 88: 1.0, 99: 0.5, 110: 0.0, 500: 0.0}
    assert lrs == pytest.approx(want)
    all_of_it = config(lr_schedule="wsd", lr_decay_fraction=1.0)
    assert optim.learning_rate(55, all_of_it) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changes", "max_iters", "warning"),
    [
        ({}, 110, ""),
        ({}, 200, ""),  # on at min_lr, as nanoGPT
        ({}, 60, "it ends at 0.55, as --lr_decay_iters exceeds --max_iters"),
        ({}, 9, "the run ends within its warm-up; give fewer --warmup_iters"),
        ({"lr_schedule": "wsd"}, 110, ""),
        ({"lr_schedule": "wsd"}, 111, "from there on nothing is learned"),
        ({"decay_lr": False}, 5, ""),
    ],
)
def test_a_schedule_that_the_run_cuts_off_is_named(changes, max_iters: int, warning: str):
    first, *rest = optim.describe_schedule(config(**changes), max_iters).splitlines()
    assert first.startswith("learning rate 1") and bool(rest) == bool(warning)
    assert all(line.startswith(f"warning: {warning}") for line in rest)


def test_the_schedule_ends_with_the_run_unless_told():
    """For presets and flags; nanoGPT's config files keep nanoGPT's 600,000."""
    for flags, end in (({"max_iters": "50"}, 50), ({"lr_decay_iters": "70"}, 70)):
        asked = settings.apply_flags(laptop(), {**flags, "warmup_iters": "5"})
        model = GPT(ModelShape(1, 2, 16, 8, 20, bias=True)).init_weights(0)
        trainer = Trainer(model, asked, Machine(torch.device("cpu"), "float32"))
        assert trainer.resolved.optim.lr_decay_iters == end


def test_a_longer_stable_phase_begins_as_the_shorter_one():
    """So that a run is extended by naming a later end, with nothing to do anew."""
    short = config(lr_schedule="wsd", lr_decay_fraction=0.2)
    longer = replace(short, lr_decay_iters=1000)
    lrs = [[optim.learning_rate(s, c) for s in range(89)] for c in (short, longer)]
    assert lrs[0] == lrs[1]


def small() -> GPT:
    return GPT(ModelShape(1, 2, 16, 8, 20, bias=True)).init_weights(0)


def test_only_matrices_decay():
    model = small()
    decayed, plain = optim.make_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"]) and all(p.ndim < 2 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("limit", [0.0, 0.5, 1e6])
def test_clipping(limit, fused):
    """The first moment after one step is (1 - beta1) times the clipped gradient."""
    model = small()
    model(*(torch.randint(20, (2, 8)) for _ in range(2))).backward()
    before = [p.grad.clone() for p in model.parameters()]
    norm = math.sqrt(sum(g.double().square().sum().item() for g in before))
    optimizer = optim.make_optimizer(model, OptimConfig())
    assert optim.fused(optimizer)
    if not fused:
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=False)
        assert not optim.fused(optimizer)
    zero = torch.zeros(())
    norms = optim.gradient_norms(model)
    found, divisor = clip_and_check_finite(norms, zero, zero, zero, limit, of_loss_alone=False)
    assert found.item() == pytest.approx(norm, rel=1e-5) and (divisor is None) == (limit == 0)
    if divisor is not None:
        optim.divide_gradients(optimizer, model, divisor)
    optimizer.step()
    factor = min(1.0, limit / norm) if limit else 1.0
    for p, g in zip(model.parameters(), before, strict=True):
        moment = optimizer.state[p]["exp_avg"]
        torch.testing.assert_close(moment, 0.1 * g * factor, rtol=1e-4, atol=1e-7)


def test_state_goes_through_flat_tensors():
    model, other = small(), small()
    a, b = (optim.make_optimizer(m, OptimConfig()) for m in (model, other))
    idx = torch.randint(20, (2, 8))
    for _ in range(3):
        model(idx, idx).backward()
        a.step()
        a.zero_grad()
    other.load_state_dict(model.state_dict())
    optim.load_state_tensors(b, other, optim.state_tensors(a, model))
    for m, o in ((model, a), (other, b)):
        m(idx, idx).backward()
        o.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def judged(
    norms,
    loss,
    bad=0.0,
    steps=0.0,
    max_norm=1.0,
    of_loss_alone=False,
    function=clip_and_check_finite,
):
    """(norm, divisor, bad, bad steps) as numbers."""
    guard = torch.tensor(bad), torch.tensor(steps)
    found = function([*torch.tensor(norms)], torch.tensor(loss), *guard, max_norm, of_loss_alone)
    return tuple(None if x is None else x.item() for x in (*found, *guard))


@pytest.fixture(params=["plain", "compiled"])
def function(request):
    """As it stands, and traced as on a GPU, where it is one kernel."""
    if request.param == "plain":
        return clip_and_check_finite
    torch._dynamo.reset()
    return torch.compile(clip_and_check_finite, backend="aot_eager", fullgraph=True)


def test_of_sound_numbers(function):
    assert judged([3.0, 4.0], 2.0, function=function) == pytest.approx((5, 5, 0, 0), rel=1e-5)
    assert judged([0.3, 0.4], 2.0, function=function) == pytest.approx((0.5, 1, 0, 0), rel=1e-5)
    assert judged([3.0, 4.0], 2.0, max_norm=0, function=function) == (5, None, 0, 0)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_of_a_loss_that_is_not_finite(loss, function):
    for of_loss_alone in (False, True):
        found = judged([3.0], loss, of_loss_alone=of_loss_alone, function=function)
        assert found[2:] == (1, 1)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_of_a_norm_that_is_not_finite(norm, function):
    assert judged([3.0, norm], 2.0, function=function)[2:] == (1, 1)
    assert judged([3.0, norm], 2.0, of_loss_alone=True, function=function)[2:] == (0, 0)


def test_bad_is_not_forgotten(function):
    assert judged([3.0], 2.0, bad=1.0, steps=4.0, function=function)[2:] == (1, 5)
