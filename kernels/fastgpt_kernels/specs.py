"""What an op's room tells the tools: the calls to compile (aot) and the configs to try (plans).

A room's `specs.py` defines

    def uses(m: Model) -> Iterator[Use]                     how a model calls its ops, if that is
                                                            not just what their records say
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import OPS
from fastgpt_kernels.registry import ExampleInputs, OpSpec, Sizes, differentiate


@dataclass(frozen=True)
class Model(Sizes):
    """A model whose tensors the gate makes on the meta device: shapes without data."""

    name: str = ""
    dtype: torch.dtype = torch.bfloat16

    def activation(self, *shape: int) -> Tensor:
        """Of the model's dtype, with a gradient."""
        return torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True)

    def parameter(self, *shape: int) -> Tensor:
        """An fp32 master, with a gradient."""
        return torch.empty(shape, device="meta", requires_grad=True)

    def optional(self, *shape: int) -> Tensor | None:
        """A parameter that only models with biases have."""
        return self.parameter(*shape) if self.bias else None


# The presets of fastgpt, 124M with 65,536 tokens too: each as it trains, without biases; with them,
# as GPT-2's own weights have them; with dropout; and with both. Its tests compare them with what it
# launches.
_SIZES = {
    "gpt2": Sizes(64, 1024, 12, 768),
    "gpt2_batch32": Sizes(32, 1024, 12, 768),
    "gpt2_medium": Sizes(16, 1024, 16, 1024),
    "gpt2_large": Sizes(8, 1024, 20, 1280),
    "gpt2_xl": Sizes(4, 1024, 25, 1600),
    "shakespeare_char": Sizes(64, 256, 6, 384, 65, 128, gelu="erf"),
    "laptop": Sizes(12, 64, 4, 128, 65, 128, gelu="erf"),
}


def models(arch: str, names: Iterable[str] = ()) -> list[Model]:
    """Those of these presets, in the dtype that `arch` trains in.

    By default all on sm_90; elsewhere two whose kernels differ as much as any others'.
    """
    dtype = torch.float16 if arch == "sm_75" else torch.bfloat16
    found = []
    for name in names or (_SIZES if arch == "sm_90" else ("gpt2", "shakespeare_char")):
        for suffix, bias, dropout in (
            ("", False, 0.0),
            (" bias", True, 0.0),
            (" dropout", False, 0.2),
            (" bias dropout", True, 0.2),
        ):
            sizes = replace(_SIZES[name], bias=bias, dropout=dropout)
            found.append(Model(**vars(sizes), name=name + suffix, dtype=dtype))
    return found


@dataclass(frozen=True)
class Use:
    """One call of an op, as the trainer, evaluation or decoding makes it.

    op      its name
    call    () -> results; makes its own tensors with the model's `activation` and `parameter`
    trains  gradients are computed too
    sizes   what the op's limits and work are asked about, if not the model
    often   how many times a training step makes it
    moved   bytes, if not those of the tensors among a kernel's arguments
    """

    op: str
    call: Callable[[], Any]
    trains: bool = True
    sizes: Sizes | None = None
    often: int = 0
    moved: int = 0


def uses(module: str, m: Model) -> Iterator[Use]:
    """The uses of the ops of a room, `module` being its specs."""
    room = importlib.import_module(module)
    if hasattr(room, "uses"):
        yield from room.uses(m)
        return
    for op in importlib.import_module(module.rpartition(".")[0] + ".record").SPECS.values():
        yield from recorded(op, m)


def recorded(op: OpSpec, m: Model, rows: int = 1) -> Iterator[Use]:
    """The calls that an op's record names; of an op of generation with this many rows."""
    sizes = m if op.few_tokens else replace(m, batch_size=rows)
    often = op.calls_per_step
    for case in op.example_inputs(sizes, lambda *shape: torch.empty(shape, device="meta")):
        trains = case.gradients and op.run is differentiate
        yield Use(op.name, partial(_call, op, m, case), trains, sizes, often * trains)
        often *= not trains  # the work is the first call's


def _call(op: OpSpec, m: Model, case: ExampleInputs) -> Any:
    dtypes = [torch.float32 if i in case.fp32_inputs else m.dtype for i in range(len(case.inputs))]
    inputs = [
        None if x is None else torch.empty_like(x, dtype=dtype, requires_grad=case.gradients)
        for x, dtype in zip(case.inputs, dtypes, strict=True)
    ]
    if op.run is differentiate:
        return case.call(op.triton, inputs)
    return op.run(op.triton, replace(case, inputs=inputs))


def spec_modules(only: Iterable[str] = ()) -> list[str]:
    """The `specs.py` of every room, or of the rooms of the ops that `only` names (ValueError)."""
    for op in only:
        if op not in OPS:
            raise ValueError(f"no op {op!r}: there are {', '.join(OPS)}")
    rooms = dict.fromkeys(e.path.rpartition(".")[0] for op, e in OPS.items() if "." in e.module)
    return [f"{room}.specs" for room in rooms]


def configs_of(module: str) -> Any:
    """The module of a room's config tables, beside its specs."""
    return importlib.import_module(module.rpartition(".")[0] + ".configs")
