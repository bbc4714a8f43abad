"""For pytest-benchmark: pytest bench --benchmark-only, --benchmark-compare, as people know them.

Each round waits for the device, so a time here has the launch in it: tens of microseconds on small
sizes. `python -m bench kernels` times the device alone, takes turns, and checks results first.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.kernels import CASES, Pass
from fastgpt.model.device import synchronize

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
PAIRS = [(op, who) for op in CASES for who in ("fastgpt", "eager")]


@pytest.mark.parametrize(("op", "who"), PAIRS, ids=[f"{op}-{who}" for op, who in PAIRS])
def test_forward_and_backward(benchmark: Any, op: str, who: str) -> None:
    torch.manual_seed(0)
    case = CASES[op](DEVICE)
    provider = next(p for p in case.providers if p.name == who)
    one = Pass(case, provider, "both")
    benchmark.group = f"{op}, {case.size}"

    def setup() -> tuple[tuple[Any], dict[str, Any]]:
        given = one.prepare()
        synchronize(DEVICE)
        return (given,), {}

    def run(given: Any) -> None:
        one.run(given)
        synchronize(DEVICE)

    benchmark.pedantic(run, setup=setup, rounds=20, warmup_rounds=3)
    assert benchmark.disabled or benchmark.stats.stats.min > 0
