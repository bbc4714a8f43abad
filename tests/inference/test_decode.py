"""The cache gives what the whole context gives, for prompts of any lengths side by side."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt.inference.decode import Decoder
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt_kernels.record import record
from tests.model.test_ops import interpreted


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


def test_cached_attention_is_the_last_row_of_attention():
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 9, 3 * 32, generator=generator)
    want, cached_attention = record("attention").eager(qkv, 4), record("decode_attention").eager
    k_cache, v_cache = torch.full((2, 3, 4, 16, 8), 7.0).unbind(0)
    for t in range(9):
        got = cached_attention(qkv[:, t], k_cache, v_cache, torch.full((3,), t))
        torch.testing.assert_close(got, want[:, t], rtol=1e-5, atol=1e-5)
    assert (k_cache[:, :, 9:] == 7).all(), "nothing is written past the position"


@pytest.mark.parametrize("prompts", [[[1]], [[1], []], [[1], [1] * 25]])
def test_prompts_that_do_not_fit(prompts):
    with pytest.raises(ValueError, match="wanted 2, of 1 .. 24"):
        Decoder(lively(shape()), 2, 24).prefill(prompts)


def test_a_cache_longer_than_the_positions():
    with pytest.raises(ValueError, match="max_len=25: wanted 1 .. block_size=24"):
        Decoder(lively(shape()), 1, 25)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="chosen by itself on a GPU")
@pytest.mark.parametrize(("bias", "gelu"), [(True, "tanh"), (False, "erf")])
def test_the_kernels_change_nothing_but_rounding(bias, gelu, monkeypatch):
    from fastgpt_kernels import decode_attention_layer, decode_linear, decode_mlp_layer

    model = lively(shape(bias, gelu))  # on eager ops: only those of decoding are in question
    prompts, tokens = [[3, 1, 4], [1, 5]], torch.tensor([[9, 2], [6, 5]])
    plain = Decoder(model, 2, 24)
    interpreted(monkeypatch)
    fused = Decoder(model, 2, 24)
    assert plain.linear is None
    assert fused.linear is decode_linear
    assert fused.halves == (decode_attention_layer, decode_mlp_layer)
    by_layers = Decoder(model, 2, 24)
    by_layers.halves = None
    for decoder in (plain, fused, by_layers):
        decoder.prefill(prompts)
    for token in tokens:
        want = plain.step(token)
        torch.testing.assert_close(fused.step(token), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(by_layers.step(token), want, rtol=1e-4, atol=1e-4)
    assert not fused.counters.any()


class Launches(TorchDispatchMode):
    """Counts what a step does on a GPU: PyTorch's ops that are no view or allocation."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        aliases = any(
            r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
        )
        if not aliases and name not in ("empty", "new_empty", "detach"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="counted without a GPU")
def test_a_token_of_twelve_layers_takes_at_most_40_launches(monkeypatch):
    """Of our kernels, counted where they are launched, and of PyTorch's, by its ops."""
    kernels = importlib.import_module("fastgpt_kernels.ops.decode.kernels")
    model = lively(ModelShape(12, 1, 8, 24, 16, True, "tanh"), dtype=torch.float16)
    interpreted(monkeypatch)
    decoder = Decoder(model, 1, 24)
    decoder.prefill([[3, 1, 4]])
    launched: list[str] = []

    class Counted:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(kernels, name)

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    names = [n for n in vars(kernels) if n.startswith("decode_") and n.endswith("_kernel")]
    for name in names:
        monkeypatch.setattr(kernels, name, Counted(name))
    decoder.step(torch.tensor([5]))
    halves = ["decode_attention_layer_kernel", "decode_mlp_layer_kernel"] * 12
    assert launched == [*halves, "decode_linear_kernel"]
    decoder.linear = decoder.halves = None  # PyTorch's ops around the layers are the same
    monkeypatch.setattr(decoder, "_hidden", lambda x, attend: x.to(decoder.dtype))
    with Launches() as around:
        decoder.step(torch.tensor([5]))
    others = [n for n in around.names if n not in ("mm", "addmm", "linear")]
    assert others == ["clamp", "index", "index", "add", "_to_copy", "add_"]
    assert len(launched) + len(others) <= 40
