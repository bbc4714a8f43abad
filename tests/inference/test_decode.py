"""The cache gives what the whole context gives, for prompts of any lengths side by side."""

from __future__ import annotations

import pytest
import torch

from fastgpt.inference.decode import Decoder
from fastgpt.model.gpt import GPT, ModelShape


def lively(shape: ModelShape, seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT:
    """A random model whose likeliest token depends on the whole context."""
    model = GPT(shape, dropout=0.5, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.3, generator=generator)
    return model.eval()


def shape(bias: bool = True, gelu: str = "tanh", n_head: int = 2) -> ModelShape:
    return ModelShape(2, n_head, 32, 24, 50, bias, gelu)


@pytest.mark.parametrize(("bias", "gelu", "n_head"), [(True, "tanh", 2), (False, "erf", 1)])
def test_logits_are_those_of_the_whole_context(bias, gelu, n_head):
    """Rows of different lengths: prefill, then steps up to the last position of the cache."""
    model = lively(shape(bias, gelu, n_head))
    texts = torch.randint(50, (4, 24), generator=torch.Generator().manual_seed(1))
    lengths = [1, 5, 12, 20]
    decoder = Decoder(model, 4, 24)
    got = decoder.prefill([texts[r, :n].tolist() for r, n in enumerate(lengths)])
    for extra in range(24 - max(lengths) + 1):
        ends = [n + extra for n in lengths]
        if extra:
            tokens = torch.stack([texts[r, end - 1] for r, end in enumerate(ends)])
            got = decoder.step(tokens, max(ends))
        with torch.no_grad():
            want = torch.stack([model(texts[r : r + 1, :end])[0, -1] for r, end in enumerate(ends)])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_limit_on_the_cache_changes_nothing():
    model = lively(shape())
    a, b = Decoder(model, 2, 24), Decoder(model, 2, 24)
    prompts = [[3, 4, 5], [6]]
    assert torch.equal(a.prefill(prompts), b.prefill(prompts))
    tokens = torch.tensor([7, 8])
    torch.testing.assert_close(a.step(tokens, 4), b.step(tokens), rtol=1e-5, atol=1e-5)


def test_padding_of_a_shorter_prompt_is_never_seen():
    """A row's logits do not depend on its neighbour, to the bit, nor on what the cache held."""
    model = lively(shape())
    decoder = Decoder(model, 2, 24)
    first = decoder.prefill([[1, 2], list(range(20))])[0]
    then = decoder.step(torch.tensor([9, 9]))[0]
    decoder.prefill([list(range(20)), list(range(20))])
    decoder.cache.fill_(1e6)
    assert torch.equal(decoder.prefill([[1, 2], list(range(20, 40))])[0], first)
    assert torch.equal(decoder.step(torch.tensor([9, 9]))[0], then)


def test_reduced_precision_is_that_of_the_model():
    model = lively(shape(), dtype=torch.bfloat16)
    decoder = Decoder(model, 1, 24)
    got = decoder.prefill([[1, 2, 3]])
    assert decoder.cache.dtype == got.dtype == torch.bfloat16
    with torch.no_grad():
        want = model(torch.tensor([[1, 2, 3]]))[0, -1:]
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("prompts", [[[1]], [[1], []], [[1], [1] * 25]])
def test_prompts_that_do_not_fit(prompts):
    with pytest.raises(ValueError, match="wanted 2, of 1 .. 24"):
        Decoder(lively(shape()), 2, 24).prefill(prompts)


def test_a_cache_longer_than_the_positions():
    with pytest.raises(ValueError, match="max_len=25: wanted 1 .. block_size=24"):
        Decoder(lively(shape()), 1, 25)
