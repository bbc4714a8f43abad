"""The matrix products for the tools."""

from __future__ import annotations

from collections.abc import Iterator

from fastgpt_kernels.configs import Config, entries
from fastgpt_kernels.ops.matmul import configs
from fastgpt_kernels.ops.matmul.configs import MATMUL, MATMUL_REDUCE, runs_on
from fastgpt_kernels.ops.matmul.kernels import ONES, matmul_kernel
from fastgpt_kernels.ops.matmul.record import RECORDS
from fastgpt_kernels.record import Sizes
from fastgpt_kernels.specs import AotSpec, Tunable, tunable

# Launches by name: the flags that are set and the optional tensors that are there.
VARIANTS = {
    "y": {"bias_ptr"},
    "y gelu": {"bias_ptr", "GELU", "z"},
    "dx": {"B_TRANSPOSED"},
    "dx slope": {"B_TRANSPOSED", "SLOPE", "z", "partials_ptr"},
    "dW": {"A_TRANSPOSED", "B_TRANSPOSED", "column_sums_ptr"},
    "dW split": {"A_TRANSPOSED", "B_TRANSPOSED", "column_sums_ptr", "SPLIT"},
}
FLAGS = ("A_TRANSPOSED", "B_TRANSPOSED", "SPLIT", "GELU", "SLOPE")
OPTIONAL = ("bias_ptr", "z", "partials_ptr", "column_sums_ptr")


def _spec(name: str, config: Config, given: set[str]) -> AotSpec:
    m, n, k, halves = (config.blocks[x] for x in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SUBTILES"))
    boxes = {
        "a": f"bf16[{k},{m}]" if "A_TRANSPOSED" in given else f"bf16[{m},{k}]",
        "b": f"bf16[{k},{n}]" if "B_TRANSPOSED" in given else f"bf16[{n},{k}]",
        "out": f"{'fp32' if 'A_TRANSPOSED' in given else 'bf16'}[{m},{n // halves}]",
        "z": f"bf16[{m},{n // halves}]",
    }
    types = dict.fromkeys(OPTIONAL, "*fp32")
    types |= {name: f"tensordesc<{box}>" for name, box in boxes.items()}
    flags = {flag: flag in given for flag in FLAGS}
    return AotSpec.of(
        f"matmul {name} {m}x{n}x{k}", matmul_kernel, config, types,
        flags | {"TANH": True, "PRECISION": "tf32", "ONES": ONES},
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


def tunables(arch: str) -> Iterator[Tunable]:
    """GPT-2's c_attn, of 65,536 tokens: y for MATMUL, dx and dW for MATMUL_REDUCE.

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
