"""The model against GPT-2 written out once more, plainly."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.model.kernels import Kernels, Selected, select
from fastgpt_kernels.registry import spec
from tests.models import gpt2_logits


def shape(**changes) -> ModelShape:
    default = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 65}
    return ModelShape(**{**default, "bias": True, "gelu": "tanh", **changes})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
@pytest.mark.parametrize("t", [1, 7, 16])
def test_is_gpt2(bias, gelu, t):
    s = shape(bias=bias, gelu=gelu)
    model = GPT(s, dtype=torch.float64).init_weights(3).double()
    with torch.no_grad():
        for p in model.parameters():  # biases and norms away from 0 and 1, where mistakes hide
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    idx = torch.randint(65, (3, t))
    want = gpt2_logits(dict(model.state_dict()), s, idx)
    torch.testing.assert_close(model(idx), want, rtol=1e-10, atol=1e-10)
    targets = torch.randint(65, (3, t))
    loss = F.cross_entropy(want.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(idx, targets), loss, rtol=1e-10, atol=1e-10)


def test_padding_gets_no_probability_no_gradient_and_no_weight():
    s = shape(vocab_size=65)
    assert s.padded_vocab_size == 128
    model = GPT(s).init_weights(0)
    wte = model.transformer.wte.weight
    assert wte.shape[0] == 128 and not wte[65:].any()
    idx = torch.randint(65, (2, 16))
    assert model(idx).shape == (2, 16, 65)
    loss = model(idx, idx)
    with torch.no_grad():
        wte[65:] = 100.0  # whatever stands there
    assert model(idx, idx).item() == loss.item()
    loss = model(idx, idx)
    loss.backward()
    assert wte.grad is not None and not wte.grad[65:].any() and wte.grad[:65].any()


def test_initialisation_is_gpt2s():
    s = shape(n_layer=8, n_embd=128, vocab_size=4096)
    model, again, other = (GPT(s).init_weights(seed) for seed in (0, 0, 1))
    for name, p in model.named_parameters():
        assert torch.equal(p, again.get_parameter(name)), "a seed is a model"
        assert torch.equal(p, other.get_parameter(name)) == (p.ndim == 1), name
        if p.ndim == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        else:
            want = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(want, rel=0.05), name
            assert abs(p.mean().item()) < want / 10, name


def test_targets_of_minus_one_do_not_count_and_long_ones_do_not_fit():
    model, idx = GPT(shape()).init_weights(0), torch.randint(65, (1, 16))
    targets = torch.where(torch.arange(16) < 8, idx, -1)
    want = F.cross_entropy(model(idx)[0, :8], idx[0, :8])
    torch.testing.assert_close(model(idx, targets), want)
    with pytest.raises(ValueError, match="17 tokens do not fit block_size=16"):
        model(torch.zeros(1, 17, dtype=torch.int64))


def test_dropout_is_everywhere_gpt2_has_it(monkeypatch):
    """Embedding, attention weights and both residual branches of every block, each at the rate."""
    rates = []
    table = select(torch.device("cpu"))
    eager = table.attention

    def attention(qkv, n_head, *, dropout_p):
        rates.append(("attention", dropout_p))
        return eager(qkv, n_head, dropout_p=dropout_p)

    def dropout(x, p, training):
        rates.append(("dropout", p if training else 0.0))
        return x

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(table, "attention", attention)
    model = GPT(shape(n_layer=2), 0.3, table)
    idx = torch.randint(65, (2, 16))
    model(idx)
    block = [("attention", 0.3), ("dropout", 0.3), ("dropout", 0.3)]
    assert rates == [("dropout", 0.3), *block, *block]
    rates.clear()
    model.eval()(idx)
    assert {p for _, p in rates} == {0.0}


def test_parameter_names_and_counts_are_nanogpts():
    model = GPT(shape(n_layer=1, vocab_size=128))
    block = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    layers = [*(f"h.0.{layer}" for layer in block), "ln_f"]
    names = ["wte.weight", "wpe.weight", *(f"{x}.{k}" for x in layers for k in ("weight", "bias"))]
    assert set(model.state_dict()) == {f"transformer.{name}" for name in names}
    with torch.device("meta"):
        model = GPT(ModelShape(12, 12, 768, 1024, 50257, bias=True))
    padding = (50304 - 50257) * 768
    assert model.n_params(position_embeddings=True) - padding == 124_439_808
    assert model.n_params(position_embeddings=True) - model.n_params() == 1024 * 768


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_only_the_kernel_gets_a_dropout_seed(implementation):
    """Eager attention draws by PyTorch's generator: a specified mask would be of size T x T."""
    given = []

    def attention(qkv, n_head, **options):
        given.append(options.get("seed"))
        return qkv[..., : qkv.shape[-1] // 3]

    kernels = select(torch.device("cpu"))
    functions = {s.op: getattr(kernels, s.op) for s in kernels.selected} | {"attention": attention}
    functions["add_layer_norm"] = spec("add_layer_norm").triton
    chosen = [Selected("attention", implementation, ""), Selected("add_layer_norm", "triton", "")]
    model = GPT(ModelShape(1, 1, 32, 8, 20, bias=True), 0.5, Kernels(functions, chosen))
    model.init_weights(0)(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
    assert (given[0] is None) == (implementation == "eager")
