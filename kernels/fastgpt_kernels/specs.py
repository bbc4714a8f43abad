"""What an op's room tells the tools: the kernels to compile (aot) and the configs to try (tune).

A room's `specs.py` defines

    def aot_specs(arch: str) -> Iterator[AotSpec]           every kernel with every config of `arch`
    def tunables(arch: str) -> Iterator[Tunable]            every entry of its config tables
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import OPS
from fastgpt_kernels.configs import Config, entries
from fastgpt_kernels.record import Record, Sizes, normal


@dataclass(frozen=True)
class AotSpec:
    """One kernel as a launcher would specialise it.

    name             for the table and the baseline, e.g. "layer_norm_forward C=1024 bias"
    kernel           the @triton.jit function
    signature        type by argument name, for those that are not constexpr: "*bf16", "i32", "fp32"
    constexprs       value by argument name; a pointer passed as None belongs here too
    divisible_by_16  arguments the launcher guarantees: aligned pointers, strides and sizes
    expect_wgmma     fail if the sm_90 PTX has no wgmma
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    num_warps: int
    num_stages: int
    divisible_by_16: tuple[str, ...] = ()
    expect_wgmma: bool = False

    @classmethod
    def of(
        cls,
        name: str,
        kernel: Any,
        config: Config,
        types: Mapping[str, str],
        flags: Mapping[str, object],
        *,
        absent: Iterable[str] = (),
        aligned: Iterable[str] = (),
        expect_wgmma: bool = False,
    ) -> AotSpec:
        """The spec for the kernel's own arguments: those without a type are "i32".

        constexprs are the config's tiles, `flags` (which replace tiles of the same name) and the
        pointers that are `absent`. All pointers are aligned, and of the other arguments those that
        `aligned` names. What is no argument of this kernel is left out of all but flags and absent.
        """
        blocks = {n: size for n, size in config.blocks.items() if n in kernel.arg_names}
        constexprs = {**blocks, **flags, **dict.fromkeys(absent)}
        arguments = [n for n in kernel.arg_names if n not in constexprs]
        signature = {n: types.get(n, "i32") for n in arguments}
        even = tuple(n for n, kind in signature.items() if kind[0] == "*" or n in aligned)
        warps, stages = config.num_warps, config.num_stages
        return cls(name, kernel, signature, constexprs, warps, stages, even, expect_wgmma)


@dataclass(frozen=True)
class Tunable:
    """One entry of a table of launch configs, the configs to try for it, and how to run one.

    table       the table's name in the room's configs.py, e.g. "FORWARD"
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


def tunable(
    op: Record,
    arch: str,
    table: str,
    key: int,
    sizes: Sizes,
    candidates: Sequence[Config],
    *,
    backward: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    **arguments: Any,
) -> Tunable:
    """An entry of a table that a pass of an op reads, on activations of these sizes."""
    tables = getattr(importlib.import_module(f"{OPS[op.name].room}.configs"), table)

    def inputs(device: torch.device) -> tuple[Any, ...]:
        """The leaves; for the backward pass the results and their gradients too."""
        case = op.case(sizes, normal(device))
        case.arguments.update(arguments)
        leaves = [x.to(dtype) if x.ndim > 1 else x for x in case.inputs]
        leaves = [x.requires_grad_() for x in leaves]
        outs = _tuple(op.ours(*leaves, **case.arguments)) if backward else ()
        return leaves, case.arguments, outs, [normal(device, 1)(*o.shape).to(o) for o in outs]

    def run(given: tuple[Any, ...], config: Config) -> tuple[Tensor, ...]:
        leaves, options, outs, dys = given
        before = dict(tables)
        tables[arch] = {**entries(tables, arch), key: config}
        try:
            if backward:
                return torch.autograd.grad(outs, leaves, dys, retain_graph=True)
            return _tuple(op.ours(*leaves, **options))
        finally:
            tables.clear()
            tables.update(before)

    def exact(given: tuple[Any, ...]) -> tuple[Tensor, ...]:
        leaves, options, _, dys = given
        leaves = [x.detach().float().requires_grad_(backward) for x in leaves]
        outs = _tuple(op.twin(*leaves, **options))
        return torch.autograd.grad(outs, leaves, [dy.float() for dy in dys]) if backward else outs

    return Tunable(table, key, candidates, inputs, run, exact)


def _tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def spec_modules(only: Iterable[str] = ()) -> list[str]:
    """The `specs.py` of every room, or of the rooms of the ops that `only` names (ValueError)."""
    for op in only:
        if op not in OPS:
            raise ValueError(f"no op {op!r}: there are {', '.join(OPS)}")
    rooms = dict.fromkeys(e.room for op, e in OPS.items() if not only or op in only)
    return [f"{room}.specs" for room in rooms]


def configs_of(module: str) -> Any:
    """The module of a room's config tables, beside its specs."""
    return importlib.import_module(module.rpartition(".")[0] + ".configs")
