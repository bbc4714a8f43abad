"""The op table: which function computes each of the model's fused ops, and why that one.

Chosen once, when the model is made; the model only ever calls `table.attention(...)` and so on. All
implementations of an op have the same signature (that of `fastgpt_kernels`), so a checkpoint never
depends on the choice:

    eager    plain PyTorch, right on every device; under torch.compile Inductor fuses it
    triton   fastgpt_kernels, on a GPU
    others   as the op's record lists them: attention has PyTorch's cudnn and flash

By itself (`--kernels=auto`) a GPU gets Triton if the shapes allow it and the op agrees with its
specification on this very device (`fastgpt_kernels/selfcheck.py`, in a process of its own:
`contact.py`), and everything else gets eager. Ops whose eager implementation is a library's own
kernel (matrix products, the optimizer) are different: they leave it only on GPUs on which ours was
measured faster, or for a flag such as --op.linear=triton.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastgpt.errors import UserError
from fastgpt.model.contact import Task, first_contact
from fastgpt_kernels import launch, versions
from fastgpt_kernels.registry import OpSpec, Sizes, specs
from fastgpt_kernels.telling import EVERY_S, telling

CHECKED_ON = ("cuda",)  # types of devices; Triton's interpreter is not worth the time


@dataclass(frozen=True)
class Choice:
    """One op's implementation and the reason, for `doctor`, the run's log and its checkpoints."""

    op: str
    implementation: str
    reason: str


class OpTable:
    """The functions that the model calls, one attribute an op, and why these."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]], choices: tuple[Choice, ...]):
        self.choices = choices
        self._ours = {c.op for c in choices if c.implementation == "triton"}
        for name, function in functions.items():
            setattr(self, name, function)

    def ours(self, op: str) -> bool:
        """Whether an op runs on the kernel of this package."""
        return op in self._ours

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"the op table has no op {name!r}")


def describe(choices: tuple[Choice, ...]) -> str:
    """One line: implementations with the ops that run on them, and the reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for c in choices:
        groups.setdefault((c.implementation, c.reason), []).append(c.op)
    return "; ".join(f"{i} ({r}): {', '.join(ops)}" for (i, r), ops in groups.items())


@dataclass(frozen=True)
class Wish:
    """What the user asked for: --kernels, and --op.NAME for single ops."""

    kernels: str = "auto"
    ops: Mapping[str, str] | None = None

    def of(self, op: OpSpec) -> tuple[str, str]:
        """(implementation or auto, the flag that says so)."""
        asked = (self.ops or {}).get(op.name, "auto")
        if asked != "auto":
            return asked, f"--op.{op.name}={asked}"
        return self.kernels, f"--kernels={self.kernels}"


def choose(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    sizes: Sizes | None = None,
    wish: Wish | None = None,
) -> OpTable:
    """The table for a device, activations of `dtype`, and a model's sizes.

    Raises UserError if what was asked for cannot run here.
    """
    sizes, wish = sizes or Sizes(), wish or Wish()
    chosen = choose_all(specs("model"), device, dtype, sizes, wish)
    _name_in_caches([choice for choice, _ in chosen.values()])
    functions = {name: function for name, (_, function) in chosen.items()}
    return OpTable(functions, tuple(choice for choice, _ in chosen.values()))


def choose_all(
    ops: Sequence[OpSpec],
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes,
    wish: Wish,
) -> dict[str, tuple[Choice, Callable[..., Any]]]:
    """Choice and function of each op, by name. Raises UserError as `choose` does."""
    wanted = {op.name: _wanted(op, device, dtype, sizes, wish) for op in ops}
    tasks = {}
    for op in ops:
        name, obstacle, *_ = wanted[op.name]
        if name != "eager" and not obstacle and device.type in CHECKED_ON:
            tasks[op.name] = Task.of(op, name, device, dtype, sizes)
    with telling("checking kernels") as elapsed:
        found = dict(zip(tasks, first_contact([*tasks.values()]), strict=True))
    if elapsed() > EVERY_S:
        print(f"checked {len(tasks)} kernels in {elapsed():.1f}s", flush=True)
    if any(obstacle == versions.untested() != "" for _, obstacle, *_ in wanted.values()):
        _warn_of_versions(versions.untested())
    chosen = {}
    for op in ops:
        name, obstacle, flag, reason = wanted[op.name]
        if wrong := found.get(op.name, ""):
            if flag:
                raise UserError(f"{flag}: {wrong}")
            obstacle = f"{name}: {wrong}"
        kind, reason = ("eager", obstacle) if obstacle else (name, reason)
        chosen[op.name] = Choice(op.name, kind, reason), op.implementations[kind].function
    return chosen


@functools.cache
def _warn_of_versions(untested: str) -> None:
    print(f"warning: {untested}: eager kernels; --kernels=triton tries ours", flush=True)


def _wanted(
    op: OpSpec,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes,
    wish: Wish,
) -> tuple[str, str, str, str]:
    """(the implementation to take, why it cannot be, the flag that asks for it or nothing, why it
    is taken).

    Raises UserError if the one that is asked for cannot run here.
    """
    wanted, flag = wish.of(op)
    if wanted == "auto":
        obstacle = _obstacle(op, "triton", device, dtype, sizes)
        obstacle = obstacle or versions.untested()
        return "triton", obstacle, "", "fused kernels"
    if obstacle := _obstacle(op, wanted, device, dtype, sizes):
        raise UserError(f"{flag}: {obstacle}")
    return wanted, "", flag, flag


def _name_in_caches(choices: Sequence[Choice]) -> None:
    """Have compiled graphs told apart by the attention that PyTorch was told to take: their cache
    does not see that.
    """
    told = [f"{c.op}={c.implementation}" for c in choices]
    told = [text for text in told if not text.endswith(("=eager", "=triton"))]
    base = os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "")
    torch.compiler.config.cache_key_tag = " ".join([base, *told]).strip()


def _obstacle(op: OpSpec, name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> str:
    """Why an implementation cannot run here; empty if it can."""
    return op.unsupported_reason(name, launch.arch_on(device), dtype, sizes) or ""
