"""Sampling text from a model, a token at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastgpt.model import GPT


def next_token(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | None,
) -> int:
    """Draw from logits (V,): scaled by 1/temperature, cut to the top_k likeliest (0: all), then to
    the smallest set holding probability top_p (Holtzman et al. 2020). Temperature 0: the argmax.
    """
    logits = logits.float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    if 0 < top_k < logits.numel():
        logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    probs = logits.softmax(0)
    if top_p < 1:
        ordered, ids = probs.sort(descending=True, stable=True)
        # A token stays if those before it hold less than top_p: the likeliest one always does.
        ordered[ordered.cumsum(0) - ordered >= top_p] = 0.0
        probs = torch.zeros_like(probs).scatter_(0, ids, ordered)
    return int(torch.multinomial(probs, 1, generator=generator))


@torch.no_grad()
def generate(
    model: GPT,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_token: int | None = None,
) -> Iterator[int]:
    """Yield up to max_new_tokens ids that continue the prompt (at least one id).

    Draws happen on the CPU from `seed`, so a seed gives the same text wherever the logits agree.
    The model sees the last block_size tokens. Ends before stop_token where one is given.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        ids = torch.tensor([prompt], dtype=torch.int64, device=device)
        for _ in range(max_new_tokens):
            hidden = model.hidden(ids[:, -model.shape.block_size :])
            token = next_token(
                model.logits(hidden[0, -1]),
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                generator=generator,
            )
            if token == stop_token:
                return
            yield token
            ids = torch.cat((ids, ids.new_tensor([[token]])), dim=1)
    finally:
        model.train(was_training)
