"""Launch configs of GELU."""

from __future__ import annotations

from fastgpt_kernels.launch import Config, Table

# Key: the width C, though one config does for all. A tile is ROWS x BLOCK_C, or more rows of fewer
# columns if C is narrower. A program of the forward does one tile, of the backward a column of
# them, and PROGRAMS_PER_SM of these fit an SM together. Not measured: 16 elements a thread, 8 of a
# row, which is one 128-bit access in 2-byte dtypes; 256 columns divide 4C of every GPT-2.
FORWARD: Table = {
    "default": {1 << 31: Config({"ROWS": 8, "BLOCK_C": 256}, num_warps=4)},
}
BACKWARD: Table = {
    "default": {
        1 << 31: Config({"ROWS": 8, "BLOCK_C": 256, "PROGRAMS_PER_SM": 5}, 4, num_stages=2),
    },
}
