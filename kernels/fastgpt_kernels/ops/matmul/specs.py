"""The matrix products for the tools."""

from __future__ import annotations

from collections.abc import Iterator

from fastgpt_kernels.configs import entries
from fastgpt_kernels.ops.matmul import configs
from fastgpt_kernels.ops.matmul.configs import runs_on
from fastgpt_kernels.specs import Tunable


def tunables(arch: str) -> Iterator[Tunable]:
    """All three tables."""
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
    for table in ("MATMUL", "MATMUL_REDUCE"):
        for key in entries(getattr(configs, table), arch):
            yield Tunable(table, key, candidates)
    for key in entries(configs.MATMUL_GELU, arch):
        yield Tunable("MATMUL_GELU", key, candidates)
