"""Kernels for pytest-benchmark: pytest bench --benchmark-only, --benchmark-compare.

Each op at the size of `python -m bench kernels`, forward and backward apart;
a loss does both at once. Every round waits for the device, so a time here has the launch in it:
tens of microseconds on small sizes. `python -m bench kernels` times the device alone, in turns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench import setup
from bench.cases import CASES, Case, complete
from bench.kernels import Pass, judge
from bench.rivals import TORCH_COMPILE, rivals_of
from fastgpt.model.device import synchronize
from fastgpt_kernels.registry import Sizes, spec

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
RUNS = [
    (op, kind, who)
    for op in CASES
    for kind in spec(op).cost(Sizes(), 2)
    for who in ("fastgpt", "eager", *["torch.compile"] * (TORCH_COMPILE in rivals_of(op)))
]


@pytest.fixture(scope="module")
def case_of() -> Iterator[Callable[[str], Case]]:
    """The case of an op; the device holds one op's tensors at a time."""
    held: dict[str, Case] = {}

    def get(op: str) -> Case:
        if op not in held:
            held.clear()
            torch._dynamo.reset()
            torch.manual_seed(0)
            held[op] = complete(CASES[op](DEVICE))
        return held[op]

    with setup.one_thread(DEVICE):
        yield get


@pytest.mark.parametrize(("op", "kind", "who"), RUNS, ids=["-".join(run) for run in RUNS])
def test_kernel(
    benchmark: Any, case_of: Callable[[str], Case], op: str, kind: str, who: str
) -> None:
    case = copy.copy(case_of(op))
    if who in case.skipped:
        pytest.skip(case.skipped[who])
    case.providers = [p for p in case.providers if p.name in ("eager", who)]
    assert judge(case)[who]["problem"] == "", "a wrong result gets no time"
    one = Pass(case, next(p for p in case.providers if p.name == who), kind)
    benchmark.group = f"{op} {kind}, {case.size}"

    def prepare() -> tuple[tuple[Any], dict[str, Any]]:
        given = one.prepare()
        synchronize(DEVICE)
        return (given,), {}

    def run(given: Any) -> None:
        one.run(given)
        synchronize(DEVICE)

    benchmark.pedantic(run, setup=prepare, rounds=20, warmup_rounds=3)
