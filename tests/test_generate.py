"""Drawing tokens: each cut keeps what its definition keeps, and a seed is a text."""

from __future__ import annotations

import pytest
import torch

from fastgpt.generate import generate, next_token
from fastgpt.model import GPT, ModelShape


def draws(logits, n=400, **cut) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **cut}
    return {next_token(logits, **options, generator=generator) for _ in range(n)}


LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


@pytest.mark.parametrize(
    ("cut", "want"),
    [
        ({}, {0, 1, 2, 3}),
        ({"temperature": 0.0}, {0}),
        ({"top_k": 1}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.01}, {0}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.81}, {0, 1, 2}),
        ({"top_k": 3, "top_p": 0.99}, {0, 1, 2}),
    ],
)
def test_cuts(cut, want):
    before = LOGITS.clone()
    assert draws(LOGITS, **cut) == want
    assert torch.equal(LOGITS, before)


def test_temperature_scales_odds():
    generator = torch.Generator().manual_seed(0)
    options = {"temperature": 0.5, "top_k": 0, "top_p": 1.0, "generator": generator}
    n = sum(next_token(LOGITS[:2], **options) == 0 for _ in range(4000))
    assert n / 4000 == pytest.approx(0.25 / (0.25 + 0.09), abs=0.03)


def model() -> GPT:
    return GPT(ModelShape(1, 2, 16, 8, 30, bias=False), dropout=0.5).init_weights(0)


def test_a_seed_is_a_text_past_the_block_size():
    m = model()
    a, b, c = (list(generate(m, [1, 2], 30, seed=seed)) for seed in (1, 1, 2))
    assert a == b != c and len(a) == 30 and all(0 <= t < 30 for t in a)
    assert m.training, "the mode is given back"


def test_greedy_is_the_argmax_of_the_logits():
    m = model().eval()
    ids = [3]
    for token in generate(m, [3], 12, temperature=0):
        with torch.no_grad():
            assert token == m(torch.tensor([ids[-8:]]))[0, -1].argmax()
        ids.append(token)


def test_stop_token_ends_the_text():
    m = model()
    free = list(generate(m, [1], 40, seed=5))
    stop = free[7]
    assert list(generate(m, [1], 40, seed=5, stop_token=stop)) == free[: free.index(stop)]
