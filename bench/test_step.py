"""The whole training step for pytest-benchmark, by each way that `fastgpt train` can take.

At the presets' own sizes on a GPU, at a small one elsewhere; each round waits for the device.
`python -m bench step` measures back to back, in turns, and beside peers.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from bench import setup
from bench.variants import Variant, build, contenders
from fastgpt.model.device import synchronize

GPU = torch.cuda.is_available()
NAMES = "eager,compile,kernels+compile" if GPU else "eager"
VARIANTS = contenders(NAMES, "", GPU)[0]


@pytest.fixture(autouse=True)
def _the_device_is_empty() -> None:
    """Before each test: nothing compiled, and no model of the test before."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("preset", ["gpt2", "shakespeare_char"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_step(benchmark: Any, preset: str, variant: Variant) -> None:
    config, vocab_size = setup.configure(preset, {})
    device = torch.device(config.system.device)
    benchmark.group = f"{preset}: {setup.describe(config, vocab_size)}"
    generator = torch.Generator().manual_seed(0)
    size = (config.optim.rows, config.model.block_size + 1)
    tokens = torch.randint(vocab_size, size, generator=generator).to(device)
    with setup.one_thread(device):
        stepper = build(variant, config, vocab_size)
        stepper.warm_up(tokens)
        before = stepper.evaluate(tokens).item()
        steps = iter(range(10**9))

        def run() -> None:
            stepper.step(next(steps), tokens)
            synchronize(device)

        benchmark.pedantic(run, rounds=20, warmup_rounds=3)
        assert stepper.evaluate(tokens).item() < before, "steps that learn nothing"
