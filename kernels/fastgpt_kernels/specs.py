"""What an op's file tells the tools: the kernels to compile (aot) and the configs to try (tune).

An op's file takes part by defining

    def aot_specs(arch: str) -> Iterator[AotSpec]           every kernel with every config of `arch`
    def tunables(arch: str) -> Iterator[Tunable]            every entry of its config tables

and imports both types from here, so that importing an op does not load the tools.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels.configs import Config

TOOLS = ("aot", "tune", "specs", "configs", "reference")


@dataclass(frozen=True)
class AotSpec:
    """One kernel as a launcher would specialise it.

    name             for the table and the baseline, e.g. "layer_norm_forward C=1024 bias"
    kernel           the @triton.jit function
    signature        type by argument name, for those that are not constexpr: "*bf16", "i32", "fp32"
    constexprs       value by argument name; a pointer passed as None belongs here too
    divisible_by_16  arguments the launcher guarantees: aligned pointers, strides and sizes
    expect_wgmma     fail where the sm_90 PTX has no wgmma
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    num_warps: int
    num_stages: int
    divisible_by_16: tuple[str, ...] = ()
    expect_wgmma: bool = False


@dataclass(frozen=True)
class Tunable:
    """One entry of a table in `configs`, the configs to try for it, and how to run and check one.

    table       the table's name in configs.py, e.g. "LAYER_NORM_FORWARD"
    key         the entry's key there
    candidates  configs to try; one that cannot be launched is skipped and named
    inputs      device -> the tensors of one problem of realistic size, random, on that device
    run         (inputs, config) -> outputs: the launcher itself, no autograd around it
    reference   inputs -> the same outputs from plain PyTorch, computed in fp32 or better
    """

    table: str
    key: int
    candidates: Sequence[Config]
    inputs: Callable[[torch.device], tuple[Any, ...]]
    run: Callable[[tuple[Any, ...], Config], tuple[Tensor, ...]]
    reference: Callable[[tuple[Any, ...]], tuple[Tensor, ...]]


def op_modules(attribute: str, only: Iterable[str] = ()) -> list[str]:
    """This package's modules that define `attribute`, those of the ops `only` where it names any.

    "gelu" stands for gelu.py and gelu_kernels.py. Raises ValueError for a name nothing begins with.
    """
    package = importlib.import_module("fastgpt_kernels")
    names = [m.name for m in pkgutil.iter_modules(package.__path__)]
    names = [name for name in names if name not in TOOLS and not name.startswith("_")]
    wanted = tuple(only)
    for prefix in wanted:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"no op {prefix!r}: there are {', '.join(names)}")
    modules = [f"fastgpt_kernels.{n}" for n in names if not wanted or n.startswith(wanted)]
    return [m for m in modules if hasattr(importlib.import_module(m), attribute)]
