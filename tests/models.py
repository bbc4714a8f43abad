"""Random models, and GPT-2 written out once more, plainly."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgpt.model.gpt import GPT, ModelShape


def random_model(shape: ModelShape, std: float = 0.3, **options) -> GPT:
    """Returns a model for evaluation whose likeliest token depends on the whole context."""
    model = GPT(shape, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, std, generator=generator)
        model.transformer.wte.weight[shape.vocab_size :] = 0.0
    return model.eval()


def model_with(shape: ModelShape, tensors: dict[str, Tensor]) -> GPT:
    """Returns a model for evaluation that has these weights."""
    model = GPT(shape)
    model.load_state_dict(tensors)
    return model.eval()


def gpt2_logits(w: dict[str, Tensor], s: ModelShape, idx: Tensor) -> Tensor:
    """GPT-2 (Radford et al. 2019) with explicit softmax and masks, no shared code."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
        return y + w[f"{name}.bias"] if s.bias else y

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if s.bias else y

    def gelu(x: Tensor) -> Tensor:
        if s.gelu == "erf":
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    t, d = idx.shape[1], s.n_embd // s.n_head
    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][:t]
    future = torch.ones(t, t, dtype=torch.bool).triu(1)
    for i in range(s.n_layer):
        h = f"transformer.h.{i}"
        q, k, v = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(s.n_embd, dim=-1)
        q, k, v = (a.unflatten(-1, (s.n_head, d)).transpose(1, 2) for a in (q, k, v))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(d)).masked_fill(future, -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        x = x + linear(y, f"{h}.attn.c_proj")
        x = x + linear(gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")), f"{h}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["transformer.wte.weight"][: s.vocab_size].T
