"""FLOPs against the known figures of GPT-2 and against what PyTorch counts."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastgpt.config.presets import PRESETS
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.train import metrics
from tests.fakes import FakeTensorMode, fake_model

SIZES = {(12, 12, 768): 854.8, (24, 16, 1024): 2423, (36, 20, 1280): 5200, (48, 25, 1600): 10275}


@pytest.mark.parametrize(("size", "mega"), SIZES.items())
def test_flops_per_token_of_gpt2(size, mega, monkeypatch):
    for layer in (torch.nn.Linear, torch.nn.Embedding):  # initialising takes most of the time
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    with torch.device("meta"):
        model = GPT(ModelShape(*size, block_size=1024, vocab_size=50257, bias=False))
    flops = metrics.flops_per_token(model)
    assert flops.mfu / 1e6 == pytest.approx(mega, rel=1e-3)
    scores = 6 * size[0] * size[2] * 1024
    assert flops.mfu - flops.mfu_causal == scores and flops.mfu_causal - flops.mfu_6n == scores
    assert flops.mfu_6n == 6 * model.n_params()


@pytest.mark.quick("gpt2", "finetune_shakespeare", "shakespeare_char")
@pytest.mark.parametrize("preset", [p for p in PRESETS if p not in ("desktop", "laptop")])
def test_presets_run_the_matmuls_that_are_counted(preset, monkeypatch):
    """torch's count of the matmuls that run, at full size, is ours: 6N + 12 L C T."""
    m = PRESETS[preset]().model
    shape = ModelShape.of(m, 50257)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(shape, None, monkeypatch)
        idx = torch.zeros(1, m.block_size, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(idx, idx).backward()
    # All of the scores are computed here; the rows that pad the vocabulary are not.
    padding = (shape.padded_vocab_size - shape.vocab_size) * m.n_embd
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    want = metrics.flops_per_token(model).mfu - 6 * (vectors + padding)
    assert counter.get_total_flops() == pytest.approx(want * m.block_size, rel=1e-9)


def test_count_agrees_with_what_pytorch_runs():
    """torch counts the matmuls, all of the scores included: ours without what vectors add to N."""
    s = ModelShape(2, 2, 64, 32, 128, bias=False)
    model = GPT(s).init_weights(0)
    idx = torch.randint(128, (2, 32))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(idx, idx).backward()
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    want = metrics.flops_per_token(model).mfu - 6 * vectors
    assert counter.get_total_flops() == want * idx.numel()
