"""Sound numbers, and how far gradients are scaled down."""

from __future__ import annotations

import math

import pytest
import torch

from fastgpt.train.optim import clip_and_check_finite


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
