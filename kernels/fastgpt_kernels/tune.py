"""Measurement of the fastest correct implementation of each op on this GPU, kept for later runs.

The implementations that agree with the reference (`self_check.py`) are timed forward and backward
in a child process, in alternating rounds. One that is over 2 % faster than the default wins, or the
default stays. `fastgpt tune` does this for a model's ops, and training reads the results.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import cache
from fastgpt_kernels.launch import arch_on
from fastgpt_kernels.library import tag_compile_caches
from fastgpt_kernels.progress import describe_error, print_line, progress
from fastgpt_kernels.registry import ExampleInputs, OpSpec, Sizes, model_specs, normal, spec
from fastgpt_kernels.self_check import Check, failures
from fastgpt_kernels.worker import TaskFailed, Worker

MARGIN = 0.02  # by which the winner must beat the default
ROUNDS = 20
LIMIT_S = 300.0  # for the timing of one op, compilation included
CALLS = 3  # per round
L2_FLUSH_BYTES = 256 << 20  # more than the L2 of any GPU (B200: 126 MB)
HEAD_START_CYCLES = 2_000_000  # about a millisecond of GPU time, in which launches queue up

Times = dict[str, list[float] | str]  # by implementation: ms per round, or an error


def tuned(
    device: torch.device, dtype: torch.dtype, sizes: Sizes, compile: bool
) -> dict[str, tuple[str, str]]:
    """Returns the stored results for a model's ops: op -> (implementation, reason)."""
    if device.type != "cuda":
        return {}
    kept = cache.load("tune", cache.environment(device))
    found = {}
    for op in model_specs():
        match kept.get(_question(Check.of(op.name, "", device, dtype, sizes), compile)):
            case {"implementation": str(name), "reason": str(reason)} if name in op.implementations:
                found[op.name] = name, reason
    return found


def tune_model(device: torch.device, dtype: torch.dtype, sizes: Sizes, compile: bool) -> None:
    """Measures, stores and prints the fastest implementation of each op of a model."""
    environment = cache.environment(device)
    for op in model_specs():
        check = Check.of(op.name, "", device, dtype, sizes)
        with progress(f"tuning {op.name}"):
            name, reason, figures = _fastest(op, check, compile)
        print_line(f"{op.name}: {name}, {reason}{figures}")
        entry = {"implementation": name, "reason": reason}
        problem = cache.keep("tune", environment, {_question(check, compile): entry})
    where = f"not stored: {problem}" if problem else f"stored in {cache.path('tune')}"
    print_line(f"{where}, for {environment}")


def _question(check: Check, compile: bool) -> str:
    return check.key + " compiled" * compile


# --- The fastest of an op's implementations ------------------------------------------------------


def _fastest(op: OpSpec, check: Check, compile: bool) -> tuple[str, str, str]:
    """Returns the fastest implementation, the reason, and the figures of all."""
    dtype, arch = getattr(torch, check.dtype), arch_on(torch.device(check.device))
    base, _ = op.default(arch, dtype, check.sizes)
    able = [n for n in op.implementations if not op.unsupported_reason(n, arch, dtype, check.sizes)]
    if len(able) == 1:
        return base, "nothing else can run here", ""
    checks = [replace(check, implementation=name) for name in able]
    wrong = {c.implementation: reason for c, reason in failures(checks).items()}
    right = [c for c in checks if c.implementation not in wrong]
    base = next((name for name in (base, op.standard) if name not in wrong), "eager")
    try:
        times = in_child(right, compile) if right else {}
    except TaskFailed as e:
        return base, f"not measured: {e}", ""
    ms = {name: t for name, t in times.items() if isinstance(t, list)}
    wrong |= {name: t for name, t in times.items() if isinstance(t, str)}
    name, reason = winner(ms, base)
    said = [f"{n} {statistics.median(t):.3g} ms" for n, t in ms.items()]
    return name, reason, f": {', '.join([*said, *(f'{n} {r}' for n, r in wrong.items())])}"


def winner(ms: Mapping[str, Sequence[float]], base: str) -> tuple[str, str]:
    """Returns the fastest implementation and the reason, or `base` unless one beats it by MARGIN.

    Times are compared by their ratio to `base` in the same round. An implementation must win in
    both halves of the rounds.
    """
    if base not in ms:
        return base, "could not be timed"
    found = {}
    for name, times in ms.items():
        ratios = [a / b for a, b in zip(times, ms[base], strict=True)]
        half = len(ratios) // 2
        slowest = max(statistics.median(ratios[:half]), statistics.median(ratios[half:]))
        if slowest < 1 - MARGIN:
            found[name] = statistics.median(ratios)
    if not found:
        return base, f"nothing measured more than {MARGIN:.0%} faster"
    name = min(found, key=lambda n: found[n])
    return name, f"measured {1 / found[name]:.2f} times as fast as {base}"


def in_child(checks: Sequence[Check], compile: bool) -> Times:
    """Runs `measure` in a child process. Raises TaskFailed."""
    worker = Worker(measure, quiet=True)
    try:
        return worker.ask([*checks], compile, timeout=LIMIT_S)
    finally:
        worker.close()


def measure(checks: Sequence[Check], compile: bool) -> Times:
    """Returns the milliseconds of all training calls of an op, forward and backward."""
    checks[0].adopt()
    # As in a run, so that an implementation without a deterministic form raises and is left out.
    torch.use_deterministic_algorithms(checks[0].deterministic)
    times: Times = {}
    steps: dict[str, Callable[[], Any]] = {}
    for check in checks:
        try:
            step = _step(check, compile)
            step()
            steps[check.implementation], times[check.implementation] = step, []
        except Exception as e:  # such as too little memory
            times[check.implementation] = describe_error(e)
    for i in range(ROUNDS):
        order = [*steps] if i % 2 else [*steps][::-1]
        for name in order:
            times[name].append(gpu_ms(steps[name]))  # type: ignore[union-attr]
    return times


def gpu_ms(function: Callable[[], Any]) -> float:
    """Returns the mean milliseconds of a few calls on the GPU, each with a cold L2 cache."""
    flush, pairs = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda"), []
    for _ in range(CALLS):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)  # so that the GPU is timed and not Python
        before.record()
        function()
        after.record()
        pairs.append((before, after))
    torch.cuda.synchronize()
    return statistics.fmean(before.elapsed_time(after) for before, after in pairs)


def _step(check: Check, compile: bool) -> Callable[[], None]:
    """Returns a function that makes all training calls of an op."""
    function = spec(check.op).implementations[check.implementation].function
    if compile:
        # The cache of compiled graphs does not know PyTorch's choice of attention.
        tag_compile_caches(f"{check.op}={check.implementation}")
        function = torch.compile(function, fullgraph=True, dynamic=False)
    examples = check.examples(timed=True)
    calls = [_call(function, e) for e in [e for e in examples if e.gradients] or examples]

    def step() -> None:
        for call in calls:
            call()

    return step


def _call(function: Callable[..., Any], example: ExampleInputs) -> Callable[[], Any]:
    """Returns a function that makes one call, forward and backward."""
    leaves = example.leaves()
    wanted = [x for x in leaves if x is not None]

    def forward() -> list[Tensor]:
        return example.outputs(function, leaves)

    if not example.gradients:
        return torch.no_grad()(forward)
    grads = [normal(o.device, seed=i)(*o.shape).to(o.dtype) for i, o in enumerate(forward(), 1)]
    return lambda: torch.autograd.grad(forward(), wanted, grads)
