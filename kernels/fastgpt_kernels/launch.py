"""Launching of kernels: Triton, architectures, launch configs, and helpers that op files share.

Launch configs are static tables by architecture and size, so nothing is searched while a model
runs. A table maps an architecture ("sm_90", or "default") to entries keyed by a bound of a size,
such as a row's width. The entry with the smallest key at or above the size is used.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

# --- Triton -----------------------------------------------------------------------------------

try:
    HAS_TRITON = find_spec("triton") is not None
except ImportError:
    HAS_TRITON = False
# True if kernels are interpreted: `triton.jit` reads the variable when it decorates. A plain bool,
# since torch.compile can read that and cannot trace Triton's settings.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")
# Loading Triton takes a tenth of a second, so it is left out where no kernel can run.
KERNELS = HAS_TRITON and ("triton" in sys.modules or INTERPRETED or torch.cuda.is_available())


class _NoTriton:
    """Stand-in for Triton's modules where no kernel can run."""

    @staticmethod
    def jit(function: Any = None, **_: Any) -> Any:
        return function or (lambda function: function)

    @staticmethod
    def constexpr(value: Any) -> Any:
        return value


if TYPE_CHECKING or KERNELS:
    import triton
    import triton.language as tl
else:
    triton = tl = _NoTriton

# --- Architectures ----------------------------------------------------------------------------

# SMs of an A100, 3090, 4090, H100, B200 and 5090, for launches that are only recorded.
SMS = {"sm_80": 108, "sm_86": 82, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170}
_PRETENDED = ""


@contextmanager
def pretend(arch: str) -> Iterator[None]:
    """Makes ops launch their kernels for meta tensors too, as on a GPU of this architecture.

    Meta tensors have no data, so the caller's driver must launch nothing.
    """
    global _PRETENDED
    before, _PRETENDED = _PRETENDED, arch
    try:
        yield
    finally:
        _PRETENDED = before


def pretending() -> bool:
    """Returns True inside `pretend`."""
    return _PRETENDED != ""


def use_kernel(x: Tensor) -> bool:
    """Returns True if the kernel itself runs: on a GPU, or anywhere under TRITON_INTERPRET=1."""
    return KERNELS and (x.is_cuda or INTERPRETED or (_PRETENDED != "" and x.is_meta))


@functools.cache
def arch_on(device: torch.device) -> str:
    """Returns the architecture of a GPU, such as "sm_90", or the type of another device."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def arch_of(x: Tensor) -> str:
    """Returns the architecture that holds x, or "cpu" for the interpreter."""
    return arch_on(x.device) if x.is_cuda else _PRETENDED or "cpu"


def is_gpu(arch: str) -> bool:
    """Returns True if an architecture is a GPU's."""
    return arch.startswith(("sm_", "gfx"))


@functools.cache
def _multiprocessors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def multiprocessors(x: Tensor) -> int:
    """Returns the SMs of the GPU that holds x, or 2 for the interpreter."""
    return _multiprocessors(x.device.index) if x.is_cuda else SMS.get(_PRETENDED, 2)


# --- Launch configs ---------------------------------------------------------------------------


def options(num_warps: int, num_stages: int = 1) -> dict[str, int | bool]:
    """Returns the options of a launch, as keywords of `kernel[grid](...)`.

    With enable_fp_fusion a * b + c is one instruction, which rounds once. Triton's default for it
    is about to change, and kernels' speed and the last bits of their results depend on it.
    """
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Config:
    """Launch config: tile sizes by the kernel's parameter names, warps, pipeline stages."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int = 1

    @property
    def options(self) -> dict[str, int | bool]:
        return options(self.num_warps, self.num_stages)

    def kwargs(self) -> dict[str, int | bool]:
        """Returns the tile sizes and the options, as keywords of `kernel[grid](...)`."""
        return {**self.blocks, **self.options}


Table = dict[str, dict[int, Config]]


def lookup(table: Table, arch: str, key: int) -> Config:
    """Returns the entry with the smallest key at or above `key`, else the one with the largest.

    An architecture without entries of its own uses "default". Keys are in rising order.
    """
    entries = table.get(arch) or table["default"]
    return entries[next((bound for bound in entries if key <= bound), max(entries))]


# --- Tensors ----------------------------------------------------------------------------------


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of x the current one, on which Triton launches."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def row_view(x: Tensor) -> Tensor:
    """Returns x (..., C) as (M, C) with contiguous rows, copied only if its strides require it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def rows_and_stride(x: Tensor | None) -> tuple[Tensor | None, int]:
    """Returns `row_view` of x and the distance of its rows, or (None, 0)."""
    if x is None:
        return None, 0
    rows = row_view(x)
    return rows, rows.stride(0)


def contiguous(x: Tensor | None) -> Tensor | None:
    """Returns x contiguous, or None."""
    return None if x is None else x.contiguous()
