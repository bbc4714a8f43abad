"""The matrix products for the tools."""

from __future__ import annotations

from collections.abc import Iterator

from fastgpt_kernels.configs import entries
from fastgpt_kernels.ops.matmul import configs
from fastgpt_kernels.ops.matmul.configs import runs_on
from fastgpt_kernels.ops.matmul.record import RECORDS
from fastgpt_kernels.record import Sizes
from fastgpt_kernels.specs import Tunable, tunable


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
    for key in entries(configs.MATMUL_GELU, arch):
        yield tunable(
            RECORDS["mlp"], arch, "MATMUL_GELU", key, Sizes(64, 1024), candidates,
            approximate="none",
        )  # fmt: skip
