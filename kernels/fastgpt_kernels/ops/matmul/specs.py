"""The matrix products for the tools."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fastgpt_kernels.configs import Config, entries
from fastgpt_kernels.ops.matmul import configs
from fastgpt_kernels.ops.matmul.configs import MATMUL, MATMUL_GELU, MATMUL_REDUCE, runs_on
from fastgpt_kernels.ops.matmul.kernels import (
    COST,
    ONES,
    SUM_ROWS,
    SUM_WARPS,
    matmul_kernel,
    matmul_sum_kernel,
)
from fastgpt_kernels.ops.matmul.record import RECORDS
from fastgpt_kernels.record import Sizes
from fastgpt_kernels.specs import AotSpec, Tunable, tunable

# Launches by name: the flags that are set and the optional tensors that are there.
VARIANTS = {
    "y": {"bias_ptr"},
    "y gelu": {"bias_ptr", "slope"},
    "dx": {"B_TRANSPOSED"},
    "dx slope": {"B_TRANSPOSED", "factor_ptr"},
    "dW": {"A_TRANSPOSED", "B_TRANSPOSED", "column_sums_ptr", "SHARES"},
    "dW shared": {"A_TRANSPOSED", "B_TRANSPOSED", "column_sums_ptr", "SHARES", "partials"},
    "dW added": {"A_TRANSPOSED", "B_TRANSPOSED", "SHARES", "partials", "ACCUMULATE"},
}
FLAGS = ("A_TRANSPOSED", "B_TRANSPOSED", "SHARES", "ACCUMULATE")
OPTIONAL = ("bias_ptr", "slope", "factor_ptr", "partials", "column_sums_ptr")


def _spec(name: str, config: Config, given: set[str], form: str | None = "tanh.approx") -> AotSpec:
    m, n, k, halves = (config.blocks[x] for x in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SUBTILES"))
    boxes = {
        "a": f"bf16[{k},{m}]" if "A_TRANSPOSED" in given else f"bf16[{m},{k}]",
        "b": f"bf16[{k},{n}]" if "B_TRANSPOSED" in given else f"bf16[{n},{k}]",
        "out": f"{'fp32' if 'A_TRANSPOSED' in given else 'bf16'}[{m},{n // halves}]",
        "slope": f"bf16[{m},{n // halves}]",
        "partials": f"fp32[{m},{n // halves}]",
    }
    types = dict.fromkeys(OPTIONAL, "*fp32") | {"factor_ptr": "*bf16"}
    types |= {name: f"tensordesc<{box}>" for name, box in boxes.items()}
    flags: dict[str, object] = {flag: flag in given for flag in FLAGS}
    flags |= {"FORM": form if "slope" in given else None}
    return AotSpec.of(
        f"matmul {name} {m}x{n}x{k}", matmul_kernel, config, types,
        flags | {"PRECISION": "tf32", "ONES": ONES, "COST": COST},
        absent=set(OPTIONAL) - given, aligned="MNK", expect_wgmma=True,
    )  # fmt: skip


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """The three products, with and without what an epilogue adds, on every config."""
    if not runs_on(arch):
        return
    for name, given in VARIANTS.items():
        table = MATMUL_REDUCE if "A_TRANSPOSED" in given else MATMUL
        for config in entries(table, arch).values():
            yield _spec(name, config, given)
    for config in entries(MATMUL_GELU, arch).values():
        for form in ("tanh", "erf"):
            yield _spec(f"y gelu {form}", config, VARIANTS["y gelu"], form)
    pointers = dict.fromkeys(("out_ptr", "partials_ptr", "column_sums_ptr", "sums_ptr"), "*fp32")
    for config in entries(MATMUL_REDUCE, arch).values():
        config = replace(config, num_warps=SUM_WARPS, num_stages=1)
        yield AotSpec.of(
            "matmul sum", matmul_sum_kernel, config, pointers,
            {"ROWS": SUM_ROWS, "COST": COST}, aligned="MNK",
        )  # fmt: skip


def tunables(arch: str) -> Iterator[Tunable]:
    """GPT-2's c_attn, of 65,536 tokens: y for MATMUL, dx and dW for MATMUL_REDUCE; its MLP by erf.

    N = 768, which has the fewest tiles, is tuned by itself once the tables have an entry for it.
    """
    if not runs_on(arch):
        return
    candidates = [
        configs.matmul(m, n, 64, warps, stages, per_sm, halves)
        for m, n, warps, stages, per_sm in (
            (128, 256, 8, 3, 1), (128, 256, 8, 4, 1), (256, 128, 8, 3, 1), (256, 128, 8, 4, 1),
            (128, 128, 4, 3, 2), (128, 128, 4, 2, 2), (128, 128, 8, 3, 2), (128, 128, 8, 4, 1),
            (64, 256, 4, 3, 2),
        )
        for halves in (1, 2)
    ]  # fmt: skip
    for table, backward in (("MATMUL", False), ("MATMUL_REDUCE", True)):
        for key in entries(getattr(configs, table), arch):
            yield tunable(
                RECORDS["linear"], arch, table, key, Sizes(64, 1024), candidates, backward=backward
            )
    for key in entries(MATMUL_GELU, arch):
        yield tunable(
            RECORDS["mlp"], arch, "MATMUL_GELU", key, Sizes(64, 1024), candidates,
            approximate="none",
        )  # fmt: skip
