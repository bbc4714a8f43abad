"""Launch configs of decoding."""

from __future__ import annotations

from fastgpt_kernels.configs import Config, Table

# Key: the head dim. BLOCK_N keys and values are in flight at once. Not measured: 32 elements a
# thread of each, half the registers that four programs an SM leave it.
ATTENTION: Table = {
    "default": {
        64: Config({"BLOCK_N": 64}, num_warps=4),
        128: Config({"BLOCK_N": 32}, num_warps=4),
        256: Config({"BLOCK_N": 16}, num_warps=4),
    },
}

# Key: rows, a power of two. A program keeps rows x BLOCK_N x BLOCK_K sums, 16 a thread, so that
# registers leave room for several programs an SM; each loads 8 to 16 weights a thread and step.
LINEAR: Table = {
    "default": {
        1: Config({"BLOCK_N": 4, "BLOCK_K": 512}, num_warps=4),
        2: Config({"BLOCK_N": 4, "BLOCK_K": 256}, num_warps=4),
        4: Config({"BLOCK_N": 4, "BLOCK_K": 256}, num_warps=8),
        8: Config({"BLOCK_N": 4, "BLOCK_K": 128}, num_warps=8),
    },
}
