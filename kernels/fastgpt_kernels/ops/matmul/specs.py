"""The matrix products for the tools."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastgpt_kernels.configs import Config, entries
from fastgpt_kernels.ops.matmul import configs
from fastgpt_kernels.ops.matmul.configs import MATMUL, MATMUL_REDUCE, runs_on
from fastgpt_kernels.ops.matmul.kernels import ONES, matmul_kernel
from fastgpt_kernels.ops.matmul.record import RECORDS
from fastgpt_kernels.record import Sizes
from fastgpt_kernels.specs import AotSpec, Tunable, tunable

# What a launch may be: (transposed operands, flags, pointers that are there, dtype written).
VARIANTS: dict[str, dict[str, Any]] = {
    "y": {"bias": True},
    "y gelu": {"bias": True, "gelu": True},
    "dx": {"b_transposed": True},
    "dx slope": {"b_transposed": True, "slope": True},
    "dW": {"a_transposed": True, "b_transposed": True, "out": "fp32", "column_sums": True},
    "dW split": {
        "a_transposed": True, "b_transposed": True, "out": "fp32", "column_sums": True,
        "split": True,
    },
}  # fmt: skip


def _spec(name: str, config: Config, given: dict[str, Any], dtype: str = "bf16") -> AotSpec:
    def flag(key: str) -> bool:
        return bool(given.get(key))

    blocks = dict(config.blocks)
    blocks.pop("PROGRAMS_PER_SM")
    m, n, k = blocks["BLOCK_M"], blocks["BLOCK_N"], blocks["BLOCK_K"]
    box = f"{m},{n // blocks['SUBTILES']}"
    optional = {
        "bias_ptr": ("*fp32", flag("bias")),
        "z": (f"tensordesc<{dtype}[{box}]>", flag("gelu") or flag("slope")),
        "partials_ptr": ("*fp32", flag("slope")),
        "column_sums_ptr": ("*fp32", flag("column_sums")),
    }
    types = {
        "a": f"tensordesc<{dtype}[{f'{k},{m}' if flag('a_transposed') else f'{m},{k}'}]>",
        "b": f"tensordesc<{dtype}[{f'{k},{n}' if flag('b_transposed') else f'{n},{k}'}]>",
        "out": f"tensordesc<{given.get('out', dtype)}[{box}]>",
        **{name: kind for name, (kind, _) in optional.items()},
    }
    flags = {
        **{name: None for name, (_, there) in optional.items() if not there},
        "A_TRANSPOSED": flag("a_transposed"),
        "B_TRANSPOSED": flag("b_transposed"),
        "SPLIT": flag("split"),
        "GELU": flag("gelu"),
        "SLOPE": flag("slope"),
        "TANH": True,
        "PRECISION": "tf32",
        "ONES": ONES,
        **blocks,
    }
    name = f"matmul {name} {m}x{n}x{k}"
    return AotSpec.of(name, matmul_kernel, config, types, flags, aligned="MNK", expect_wgmma=True)


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """The three products, with and without what an epilogue adds, on every config."""
    if not runs_on(arch):
        return
    for name, given in VARIANTS.items():
        table = MATMUL_REDUCE if given.get("a_transposed") else MATMUL
        for config in entries(table, arch).values():
            yield _spec(name, config, given)


def tunables(arch: str) -> Iterator[Tunable]:
    """GPT-2's c_attn, of 65,536 tokens: y for MATMUL, dx and dW for MATMUL_REDUCE.

    N = 768, which has the fewest tiles, is tuned by itself once the tables have an entry for it.
    """
    if not runs_on(arch):
        return
    candidates = [
        configs.matmul(m, n, 64, warps, stages, per_sm, halves)
        for m, n, warps, stages, per_sm in (
            (128, 256, 8, 3, 1),
            (128, 256, 8, 4, 1),
            (256, 128, 8, 3, 1),
            (256, 128, 8, 4, 1),
            (128, 128, 4, 3, 2),
            (128, 128, 4, 2, 2),
            (128, 128, 8, 3, 2),
            (128, 128, 8, 4, 1),
            (64, 256, 4, 3, 2),
        )
        for halves in (1, 2)
    ]
    for table, backward in (("MATMUL", False), ("MATMUL_REDUCE", True)):
        for key in entries(getattr(configs, table), arch):
            yield tunable(
                RECORDS["linear"], arch, table, key, Sizes(64, 1024), candidates, backward=backward
            )
