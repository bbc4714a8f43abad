"""Launch configs: static tables by (architecture, size), nothing searched while a model runs.

A table maps an architecture ("sm_90", "gfx942", or "default") to entries keyed by a size bound (a
head dim, a row width): the entry with the smallest key at or above the size is used.
The tables lie in the ops' rooms (`ops/*/configs.py`). An entry that nobody has timed says so: it
was chosen by register and shared-memory counts from `python -m fastgpt_kernels.tools.aot`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Architectures for which every kernel is compiled and inspected in CI.
ARCHITECTURES = (
    "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942",
)  # fmt: skip


def options(num_warps: int, num_stages: int = 1) -> dict[str, int | bool]:
    """What every launch says about its compilation, as keywords of `kernel[grid](...)`.

    a * b + c becomes one instruction, which rounds once: Triton's default for that is about to
    change, and half of the kernels' speed and the last bits of their results hang on it.
    """
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Config:
    """One launch: the kernel's tile sizes by parameter name, warps a program, pipeline stages."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int = 1

    @property
    def options(self) -> dict[str, int | bool]:
        """Keyword arguments for `kernel[grid](...)` but for the tiles."""
        return options(self.num_warps, self.num_stages)

    def kwargs(self) -> dict[str, int | bool]:
        """Keyword arguments for `kernel[grid](...)`: the tiles, and the options."""
        return {**self.blocks, **self.options}

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "blocks": dict(self.blocks)}


Table = Mapping[str, Mapping[int, Config]]


def lookup(table: Table, arch: str, key: int) -> Config:
    """The entry for `key` on `arch`: the smallest key at or above it, else the largest one.

    An architecture without entries of its own uses "default". Keys must be in rising order.
    """
    found = entries(table, arch)
    bound = next((b for b in found if key <= b), max(found))
    return found[bound]


def entries(table: Table, arch: str) -> Mapping[int, Config]:
    """All entries that `lookup` can return on `arch`; what `tunables` go through."""
    return table.get(arch) or table["default"]
