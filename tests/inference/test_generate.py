"""Drawing tokens: each cut keeps what its definition keeps, and a seed is a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastgpt.inference.generate import BatchGenerator, Sampling, draw, generate, uniforms
from fastgpt.model.gpt import GPT
from tests.inference.test_decode import lively, shape

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def draws(logits: torch.Tensor, n: int = 400, **cut) -> torch.Tensor:
    return draw(logits.expand(n, -1), torch.rand(n, generator=generator()), Sampling(**cut))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


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
    assert set(draws(LOGITS, **cut).tolist()) == want
    assert torch.equal(LOGITS, before)


def test_tokens_come_as_often_as_their_probability_says():
    shares = draws(LOGITS, n=20_000).bincount() / 20_000
    torch.testing.assert_close(shares, LOGITS.exp(), rtol=0, atol=0.015)


def test_temperature_scales_odds():
    n = (draws(LOGITS[:2], n=20_000, temperature=0.5) == 0).sum().item()
    assert n / 20_000 == pytest.approx(0.25 / (0.25 + 0.09), abs=0.015)


def test_the_ends_of_the_unit_interval():
    """No draw leaves what was kept, not even for the largest number below 1."""
    last = torch.tensor([1 - 2.0**-24])
    for cut, want in (({}, 3), ({"top_k": 2}, 1), ({"top_p": 0.6}, 1)):
        assert draw(LOGITS[None], last, Sampling(**cut)).item() == want
        assert draw(LOGITS[None], torch.zeros(1), Sampling(**cut)).item() == 0
    tail = torch.full((1, 50_000), -30.0).index_fill(1, torch.tensor([7]), 5.0)
    assert draw(tail, last, Sampling(top_k=1)).item() == 7


def test_repetition_penalty_makes_seen_tokens_unlikelier():
    """As CTRL defines it: positive logits shrink, negative ones grow more negative."""
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.2]])
    sampling = Sampling(temperature=0, repetition_penalty=1.5)
    seen = torch.tensor([[True, False, False, False]])
    assert draw(logits, torch.zeros(1), sampling, seen).item() == 1
    assert draw(logits, torch.zeros(1), sampling, ~seen).item() == 0
    low = torch.tensor([[-1.0, -1.2]])
    assert draw(low, torch.zeros(1), sampling, torch.tensor([[True, False]])).item() == 1


def test_a_row_s_numbers_depend_on_its_seed_alone():
    a, b = uniforms([3, 4], 20), uniforms([9, 3], 30)
    assert torch.equal(a[0], b[1, :20]) and not torch.equal(a[0], a[1])


GREEDY = Sampling(temperature=0)


def plain(
    model: GPT, prompt: list[int], n: int, sampling: Sampling = GREEDY, seed: int = 0
) -> list[int]:
    """Text without a cache: the whole of the last block_size tokens for every token."""
    ids, numbers = list(prompt), uniforms([seed], n)
    for i in range(n):
        with torch.no_grad():
            logits = model(torch.tensor([ids[-model.shape.block_size :]]))[:, -1]
        ids.append(int(draw(logits, numbers[:, i], sampling)))
    return ids[len(prompt) :]


PROMPTS = [[1], [2, 3, 4], list(range(23)), list(range(24)), list(range(40))]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(top_k=10)], ids=["greedy", "drawn"])
def test_a_text_is_that_of_the_cache_free_path(sampling):
    """Prompts of many lengths in one batch, far past block_size, token by token."""
    model = lively(shape())
    batch = BatchGenerator(model, len(PROMPTS), 100, sampling)
    for _ in range(2):  # the second time in what the first left behind
        steps = list(batch.stream(PROMPTS, 40, seeds=range(len(PROMPTS))))
        for row, prompt in enumerate(PROMPTS):
            want = plain(model, prompt, 40, sampling, seed=row)
            assert [tokens[row] for tokens in steps] == want
            # Small models soon repeat themselves when greedy.
            assert len(set(want)) > (10 if sampling.top_k else 0)


GOLDEN = json.loads(Path(__file__).with_name("golden_text.json").read_text())


@pytest.mark.parametrize("rows", [[0], [3, 1], [4, 2, 0, 3, 1]], ids=len)
@pytest.mark.parametrize("golden", GOLDEN["generated"], ids=lambda g: g["gelu"])
def test_texts_are_those_of_the_golden_file(golden, rows):
    """Made when a token's attention was computed in fp32 by hand, up to commit 104e7b5."""
    tanh = golden["gelu"] == "tanh"
    model = lively(shape(tanh, golden["gelu"], 2 if tanh else 1))
    batch = BatchGenerator(model, len(rows), 100, Sampling(**golden["sampling"]))
    steps = list(batch.stream([PROMPTS[r] for r in rows], 60, seeds=rows))
    for column, row in enumerate(rows):
        assert [tokens[column] for tokens in steps] == golden["texts"][row]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_row_does_not_depend_on_its_neighbours(penalty):
    model = lively(shape())
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": penalty}
    batch = BatchGenerator(model, len(PROMPTS), 70, Sampling(**options))
    steps = list(batch.stream(PROMPTS, 30, seeds=range(len(PROMPTS))))
    for row, prompt in enumerate(PROMPTS):
        assert [t[row] for t in steps] == list(generate(model, prompt, 30, seed=row, **options))


def test_a_repetition_penalty_counts_prompt_and_text():
    model = lively(shape())
    huge = Sampling(temperature=0, repetition_penalty=1e6)
    steps = BatchGenerator(model, 1, 44, huge).stream([[5, 6, 7]], 30, seeds=[0])
    with torch.no_grad():
        first = model(torch.tensor([[5, 6, 7]]))[0, -1]
    text = [token for (token,) in steps]
    positive = {int(i) for i in (first > 0).nonzero()} - {5, 6, 7}
    assert text[0] in positive and len(set(text)) > 20 and not {5, 6, 7} & set(text[:10])


def test_a_seed_is_a_text_past_the_block_size():
    model = lively(shape()).train()
    a, b, c = (list(generate(model, [1, 2], 40, seed=seed)) for seed in (1, 1, 2))
    assert a == b != c and len(a) == 40 and all(0 <= t < 50 for t in a)
    assert model.training, "the mode is left alone, and dropout is off all the same"


def test_stop_token_ends_the_text_and_only_its_row():
    model = lively(shape())
    free = list(generate(model, [1], 40, seed=5))
    stop = free[7]
    want = free[: free.index(stop)]
    assert list(generate(model, [1], 40, seed=5, stop_token=stop)) == want
    batch = BatchGenerator(model, 2, 41)
    steps = list(batch.stream([[1], [2]], 40, seeds=[5, 6], stop_token=stop))
    assert [t[0] for t in steps if t[0] is not None] == want
    other = list(generate(model, [2], 40, seed=6, stop_token=stop))
    assert [t[1] for t in steps if t[1] is not None] == other
    assert len(steps) == max(len(want), len(other))


def test_the_caller_ends_rows():
    ended: set[int] = set()
    batch = BatchGenerator(lively(shape()), 2, 41)
    seen = []
    for tokens in batch.stream([[1], [2]], 40, seeds=[5, 6], ended=ended):
        seen.append(tokens)
        ended.add(0 if len(seen) < 3 else 1)
    assert [t[0] is None for t in seen] == [False, True, True] and len(seen) == 3


@pytest.mark.parametrize(
    ("prompts", "n", "message"),
    [
        ([[1]], 5, "1 prompts and 2 seeds: wanted 2 of each"),
        ([[1], [1, 2]], 9, "texts of 11 tokens: wanted at most 10"),
        ([[1], []], 5, "wanted at most 10"),
    ],
)
def test_what_does_not_fit(prompts, n, message):
    with pytest.raises(ValueError, match=message):
        list(BatchGenerator(lively(shape()), 2, 10).stream(prompts, n, seeds=[1, 2]))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replayed_graph_is_the_eager_step(dtype):
    model = lively(shape(n_head=1), dtype=dtype).cuda()
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}
    texts = []
    for graph in (False, True):
        batch = BatchGenerator(model, len(PROMPTS), 70, Sampling(**options), graph=graph)
        for _ in range(2):
            texts.append(list(batch.stream(PROMPTS, 30, seeds=range(len(PROMPTS)))))
    assert texts[0] == texts[1] == texts[2] == texts[3]


@pytest.mark.cuda
def test_greedy_text_on_a_gpu_is_the_cache_free_one():
    model = lively(shape(n_head=1)).cuda()
    batch = BatchGenerator(model, len(PROMPTS), 100, Sampling(temperature=0))
    steps = list(batch.stream(PROMPTS, 60, seeds=range(len(PROMPTS))))
    cpu = lively(shape(n_head=1))
    for row, prompt in enumerate(PROMPTS):
        assert [tokens[row] for tokens in steps] == plain(cpu, prompt, 60)
