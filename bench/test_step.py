"""The whole training step for pytest-benchmark, eager and as `fastgpt train` runs it on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import setup
from bench.variants import Variant, build
from fastgpt.model.device import synchronize

GPU = torch.cuda.is_available()
VARIANTS = [Variant("eager")]
VARIANTS += [Variant("kernels+compile", kernels="triton", compile=True)] if GPU else []


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_step(benchmark: Any, variant: Variant) -> None:
    preset = "shakespeare_char"
    config, vocab_size = setup.configure(preset, {})
    device = torch.device(config.system.device)
    stepper = build(variant, config, vocab_size)
    rows = config.optim.rows
    tokens = torch.randint(vocab_size, (8, rows, config.model.block_size + 1), device=device)
    stepper.warm_up(tokens[0])
    benchmark.group = f"{preset}: {setup.describe(config, vocab_size)}"
    at = iter(range(10**9))

    def run() -> None:
        step = next(at)
        stepper.step(step, tokens[step % 8])
        synchronize(device)

    benchmark.pedantic(run, rounds=20, warmup_rounds=3)
    assert next(at) > (1 if benchmark.disabled else 20) - 1
