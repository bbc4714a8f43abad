"""Launch configs of the layer norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fastgpt_kernels.launch import Config, Table

# Key: the width C. A tile is ROWS x TILE, or more rows of fewer columns if C is narrower; a row is
# the tiles that C takes. Not measured: 8 elements of a tile a thread are one 128-bit access in
# 2-byte dtypes. Up to 2048 columns a warp has a row of the forward to itself, and a program is one
# warp that does STEPS tiles of rows. In the backward up to 1024; PROGRAMS_PER_SM of its programs
# fit an SM together, no more, since each does the same share of the rows.
FORWARD: Table = {
    "default": {
        2048: Config({"TILE": 256, "ROWS": 1, "STEPS": 4}, num_warps=1),
        4096: Config({"TILE": 1024, "ROWS": 1, "STEPS": 2}, num_warps=4),
        8192: Config({"TILE": 2048, "ROWS": 1, "STEPS": 1}, num_warps=8),
    },
}


# An iteration asks for the rows of three tensors. ptxas moves the loads of the third down to where
# it is used, which spares registers and waits three times (on an H200, 768 columns, 69 us where 42
# are DRAM's). As copies to shared memory, two iterations ahead, they stay where they are: on sm_90,
# where no fewer programs fit an SM with that. Not measured.
def _ahead(entries: Mapping[int, Config]) -> dict[int, Config]:
    return {C: replace(c, num_stages=3) if C <= 2048 else c for C, c in entries.items()}


_BACKWARD = {
    768: Config({"TILE": 256, "ROWS": 4, "PROGRAMS_PER_SM": 3}, num_warps=4),
    1024: Config({"TILE": 256, "ROWS": 4, "PROGRAMS_PER_SM": 2}, num_warps=4),
    2048: Config({"TILE": 512, "ROWS": 2, "PROGRAMS_PER_SM": 2}, num_warps=4),
    4096: Config({"TILE": 2048, "ROWS": 1, "PROGRAMS_PER_SM": 2}, num_warps=8),
    8192: Config({"TILE": 4096, "ROWS": 1, "PROGRAMS_PER_SM": 1}, num_warps=16),
}
# With the sums of a third gradient: more warps a row, or fewer programs.
_BACKWARD_X_BIAS = {
    512: Config({"TILE": 256, "ROWS": 4, "PROGRAMS_PER_SM": 3}, num_warps=4),
    768: Config({"TILE": 256, "ROWS": 4, "PROGRAMS_PER_SM": 2}, num_warps=4),
    1024: Config({"TILE": 512, "ROWS": 2, "PROGRAMS_PER_SM": 3}, num_warps=4),
    1536: Config({"TILE": 512, "ROWS": 2, "PROGRAMS_PER_SM": 2}, num_warps=4),
    2048: Config({"TILE": 1024, "ROWS": 1, "PROGRAMS_PER_SM": 2}, num_warps=4),
    4096: Config({"TILE": 2048, "ROWS": 1, "PROGRAMS_PER_SM": 1}, num_warps=8),
    8192: Config({"TILE": 4096, "ROWS": 1, "PROGRAMS_PER_SM": 1}, num_warps=16),
}
BACKWARD: Table = {"default": _BACKWARD, "sm_90": _ahead(_BACKWARD)}
BACKWARD_X_BIAS: Table = {"default": _BACKWARD_X_BIAS, "sm_90": _ahead(_BACKWARD_X_BIAS)}
