"""Schedule, clipping, and the check for finite values."""

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


def test_schedule_follows_the_cosine():
    want = {step: (step + 1) / 11 for step in range(10)}
    want |= {10 + i: 0.1 + 0.45 * (1 + math.cos(math.pi * i / 100)) for i in range(101)}
    want |= {111: 0.1, 10**6: 0.1}
    assert {step: optim.learning_rate(step, config()) for step in want} == pytest.approx(want)
    assert optim.learning_rate(5, config(decay_lr=False)) == 1.0
    assert optim.learning_rate(10, replace(config(), lr_decay_iters=10)) == 0.1


def test_wsd_is_flat_and_then_linear_to_zero():
    wsd = config(lr_schedule="wsd", lr_decay_fraction=0.2)
    lrs = {s: optim.learning_rate(s, wsd) for s in (0, 9, 10, 50, 88, 99, 110, 500)}
    want = {0: 1 / 11, 9: 10 / 11, 10: 1.0, 50: 1.0, 88: 1.0, 99: 0.5, 110: 0.0, 500: 0.0}
    assert lrs == pytest.approx(want)
    all_of_it = config(lr_schedule="wsd", lr_decay_fraction=1.0)
    assert optim.learning_rate(55, all_of_it) == pytest.approx(0.5)
    longer = replace(wsd, lr_decay_iters=1000)  # a run is extended by a later end alone
    assert all(optim.learning_rate(s, wsd) == optim.learning_rate(s, longer) for s in range(89))


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


@pytest.fixture(params=["plain", "compiled"])
def judged(request):
    """Returns a function that gives (norm, divisor, skip, skipped) as numbers.

    It calls clip_and_check_finite, or traces it as on a GPU, where it is one kernel.
    """
    function = clip_and_check_finite
    if request.param == "compiled":
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager", fullgraph=True)

    def call(norms, loss, skipped=0.0, max_norm=1.0, of_loss_alone=False):
        count = torch.tensor(skipped)
        found = function([*torch.tensor(norms)], torch.tensor(loss), count, max_norm, of_loss_alone)
        return tuple(None if x is None else x.item() for x in (*found, count))

    return call


def test_of_sound_numbers(judged):
    assert judged([3.0, 4.0], 2.0) == pytest.approx((5, 5, 0, 0), rel=1e-5)
    assert judged([0.3, 0.4], 2.0) == pytest.approx((0.5, 1, 0, 0), rel=1e-5)
    assert judged([3.0, 4.0], 2.0, max_norm=0) == (5, None, 0, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_of_what_is_not_finite(value, judged):
    for of_loss_alone in (False, True):
        assert judged([3.0], value, of_loss_alone=of_loss_alone)[2:] == (1, 1)
    assert judged([3.0, value], 2.0)[2:] == (1, 1)
    assert judged([3.0, value], 2.0, of_loss_alone=True)[2:] == (1, 0)
    assert judged([3.0], 2.0, skipped=4.0)[2:] == (1, 5), "it is not forgotten"
