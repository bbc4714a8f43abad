"""Kernels for pytest-benchmark. Unlike those of bench kernels its times include the launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import setup
from bench.kernels import Case
from fastgpt.model.build import sizes_of
from fastgpt.model.device import synchronize
from fastgpt_kernels.registry import Sizes, specs

RUNS = {f"{op.name}-{kind}": (op, kind) for op in specs() for kind in op.cost(Sizes(), 2)}


@pytest.mark.parametrize("who", ["triton", "eager"])
@pytest.mark.parametrize("run", RUNS)
def test_kernel(benchmark: Any, run: str, who: str) -> None:
    torch.set_num_threads(1)
    config, vocab_size = setup.configure("gpt2", {})
    machine, (op, kind) = setup.machine(config), RUNS[run]
    case = Case.of(op, sizes_of(config, vocab_size), machine.device, machine.torch_dtype)
    functions, skipped = case.functions()
    if who not in functions:
        pytest.skip(skipped.get(who, "not an implementation of it"))
    judged = case.judge({"eager": op.reference, who: functions[who]})
    assert judged[who]["problem"] == "", "a wrong result gets no time"
    make = case.calls(functions[who], kind)
    benchmark.group = f"{op.name} {kind}, {case.label}"
    timed = lambda call: (call(), synchronize(machine.device))  # noqa: E731
    benchmark.pedantic(timed, setup=lambda: ((make(),), {}), rounds=20, warmup_rounds=3)
