"""Launch configs of the layer norms."""

from __future__ import annotations

from fastgpt_kernels.configs import Config, Table

# Key: the width C. ROWS rows a program, or a step of its loop. Not measured, by register count:
# 16 to 32 elements a thread keep enough loads in flight. The backward's warps span one row, so that
# its sums over rows stay in a thread; PROGRAMS_PER_SM of its programs fit an SM together, no more,
# since each does the same share of the rows; two stages copy the next step's rows ahead.
FORWARD: Table = {
    "default": {
        256: Config({"ROWS": 16}, num_warps=4),
        512: Config({"ROWS": 8}, num_warps=4),
        1024: Config({"ROWS": 4}, num_warps=4),
        2048: Config({"ROWS": 2}, num_warps=4),
        4096: Config({"ROWS": 1}, num_warps=8),
        8192: Config({"ROWS": 1}, num_warps=16),
    },
}
BACKWARD: Table = {
    "default": {
        256: Config({"ROWS": 4, "PROGRAMS_PER_SM": 12}, num_warps=1, num_stages=2),
        512: Config({"ROWS": 2, "PROGRAMS_PER_SM": 8}, num_warps=2, num_stages=2),
        1024: Config({"ROWS": 2, "PROGRAMS_PER_SM": 4}, num_warps=4, num_stages=2),
        2048: Config({"ROWS": 1, "PROGRAMS_PER_SM": 4}, num_warps=4, num_stages=2),
        4096: Config({"ROWS": 1, "PROGRAMS_PER_SM": 2}, num_warps=8, num_stages=2),
        8192: Config({"ROWS": 1, "PROGRAMS_PER_SM": 1}, num_warps=16, num_stages=2),
    },
}
