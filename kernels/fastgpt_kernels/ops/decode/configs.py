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

# Key: rows. A step is BLOCK_K weights of a row, 8 a thread; BYTES and MOST are those of weights in
# flight in a thread's registers (see `repeat_and_ahead`). Not measured.
LINEAR: Table = {
    "default": {8: Config({"BLOCK_K": 256, "BYTES": 128, "MOST": 256}, num_warps=4)},
    # All of a row of 3,072 in flight spills there, by two registers.
    "sm_75": {8: Config({"BLOCK_K": 256, "BYTES": 128, "MOST": 160}, num_warps=4)},
}
