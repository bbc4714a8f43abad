"""Selection of the implementation of each fused op, made once for a model, with its reason.

    eager    plain PyTorch, right on every device; under torch.compile Inductor fuses it
    triton   fastgpt_kernels, on a GPU
    others   as the op's spec lists them: attention has PyTorch's cudnn and flash

With `--kernels=auto` a GPU gets the implementation that `fastgpt tune` found to be the fastest
there, else the op's default (attention on sm_90: hopper), else Triton. An op runs eager if its
shapes, the versions or the GPU are unsupported. An implementation that fails its check against the
reference on this GPU (`fastgpt_kernels/self_check.py`) gives way to Triton, and that to eager.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastgpt.errors import UserError
from fastgpt_kernels import versions
from fastgpt_kernels.launch import arch_on
from fastgpt_kernels.library import tag_compile_caches
from fastgpt_kernels.progress import EVERY_S, progress
from fastgpt_kernels.registry import OpSpec, Sizes, model_specs, spec

CHECKED_ON = ("cuda",)  # types of devices; Triton's interpreter is not worth the time


@dataclass(frozen=True)
class KernelOptions:
    """Choice of the user: --kernels, and --op.NAME for single ops."""

    kernels: str = "auto"
    ops: Mapping[str, str] | None = None

    def of(self, op: OpSpec) -> tuple[str, str]:
        """Returns (implementation or auto, the flag that says so)."""
        asked = (self.ops or {}).get(op.name, "auto")
        if asked != "auto":
            return asked, f"--op.{op.name}={asked}"
        known = self.kernels in op.implementations  # the MLP has no triton
        return self.kernels if known else "auto", f"--kernels={self.kernels}"


@dataclass(frozen=True)
class Selected:
    """Implementation of an op and its reason, for `doctor`, the run's log and its checkpoints."""

    op: str
    implementation: str
    reason: str


class Kernels:
    """Functions that the model calls, one attribute per op."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]], selected: Sequence[Selected]):
        self.selected = tuple(selected)
        self._triton = {s.op for s in selected if s.implementation in ("triton", "hopper")}
        for name, function in functions.items():
            setattr(self, name, function)

    def uses_triton(self, op: str) -> bool:
        return op in self._triton

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"no op {name!r} was selected")


def describe(selected: Sequence[Selected]) -> str:
    """Returns one line: implementations with the reason and the ops that run on them."""
    groups: dict[tuple[str, str], list[str]] = {}
    for s in selected:
        groups.setdefault((s.implementation, s.reason), []).append(s.op)
    return "; ".join(f"{i} ({r}): {', '.join(ops)}" for (i, r), ops in groups.items())


def select(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    sizes: Sizes | None = None,
    options: KernelOptions | None = None,
    compile: bool = False,
) -> Kernels:
    """Returns the kernels for a device, activations of `dtype`, and a model's sizes.

    Raises UserError if a flag asks for an implementation that cannot run here.
    """
    sizes, options = sizes or Sizes(), options or KernelOptions()
    ops = model_specs()
    faster = {}
    if device.type == "cuda" and options.kernels == "auto":
        from fastgpt_kernels.tune import tuned

        faster = tuned(device, dtype, sizes, compile)
    selected = [_wanted(op, device, dtype, sizes, options, faster.get(op.name)) for op in ops]
    untested = versions.untested()
    if untested and any(s.reason == untested for s in selected):
        _warn_of_versions(untested)
    if device.type in CHECKED_ON:
        selected = _checked(selected, device, dtype, sizes)
    _name_in_caches(selected)
    functions = {
        op.name: op.implementations[s.implementation].function
        for op, s in zip(ops, selected, strict=True)
    }
    return Kernels(functions, selected)


def _wanted(
    op: OpSpec,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes,
    options: KernelOptions,
    faster: tuple[str, str] | None,
) -> Selected:
    """Returns an op's implementation, unchecked. A reason that is a flag is the user's.

    faster: the implementation that `fastgpt tune` found, and by how much. Raises UserError.
    """
    arch = arch_on(device)
    asked, flag = options.of(op)
    if asked != "auto":
        if reason := op.unsupported_reason(asked, arch, dtype, sizes):
            raise UserError(f"{flag}: {reason}")
        return Selected(op.name, asked, flag)
    if faster and not op.unsupported_reason(faster[0], arch, dtype, sizes):
        return Selected(op.name, *faster)
    return Selected(op.name, *op.default(arch, dtype, sizes))


def _checked(
    selected: Sequence[Selected], device: torch.device, dtype: torch.dtype, sizes: Sizes
) -> list[Selected]:
    """Returns the same with an op's standard kernels, else eager, for each op that fails its check.

    Raises UserError for flags.
    """
    from fastgpt_kernels.self_check import Check, failures

    def checks() -> dict[Selected, Check]:
        chosen = [s for s in selected if s.implementation != "eager"]
        return {s: Check.of(s.op, s.implementation, device, dtype, sizes) for s in chosen}

    failed: dict[str, list[str]] = {}  # what failed, by op

    def fall_back(s: Selected, reason: str) -> Selected:
        if s.reason.startswith("--"):
            raise UserError(f"{s.reason}: {reason}")
        failed.setdefault(s.op, []).append(f"{s.implementation}: {reason}")
        standard = spec(s.op).standard
        name = "eager" if s.implementation == standard else standard
        return Selected(s.op, name, "; ".join(failed[s.op]))

    count = len(checks())
    with progress("checking kernels") as elapsed:
        while wrong := failures([*checks().values()]):
            reasons = {s: wrong[c] for s, c in checks().items() if c in wrong}
            selected = [fall_back(s, reasons[s]) if s in reasons else s for s in selected]
    if elapsed() > EVERY_S:
        print(f"checked {count} kernels in {elapsed():.1f}s", flush=True)
    return [*selected]


@functools.cache
def _warn_of_versions(untested: str) -> None:
    print(f"warning: {untested}: eager kernels; --kernels=triton tries the fused ones", flush=True)


def _name_in_caches(selected: Sequence[Selected]) -> None:
    """Tells compiled graphs apart by PyTorch's attention, which their cache does not see."""
    told = [f"{s.op}={s.implementation}" for s in selected]
    tag_compile_caches(*(text for text in told if not text.endswith(("=eager", "=triton"))))
