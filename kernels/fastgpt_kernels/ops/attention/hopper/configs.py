"""Launch configs of attention for Hopper, by head dim, and the versions of Triton they were read of.

STAGES are slots of a ring, REGISTERS those of a consumer's thread. Not measured: what does not spill,
with as much shared memory as an SM has.
"""

from __future__ import annotations

import triton

from fastgpt_kernels.configs import Config, Table


def _config(**blocks: int) -> Config:
    return Config(blocks, num_warps=4)


def version() -> tuple[int, int]:
    """Triton's, (3, 7)."""
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


# Two steps of the softmax a loop spare 32 moves, and with 3.9 cost two spilled scalars.
_UNROLL = 2 if version() < (3, 9) else 1
FORWARD: Table = {
    "default": {
        64: _config(STAGES=4, UNROLL=_UNROLL, REGISTERS=232),
        128: _config(STAGES=2, UNROLL=1, REGISTERS=232),
    }
}
# ROWS: of a tile of q and of y's gradient; PART: of which so many at a time are in registers.
BACKWARD: Table = {
    "default": {
        64: _config(ROWS=128, PART=64, STAGES=2, REGISTERS=240),
        128: _config(ROWS=64, PART=32, STAGES=2, REGISTERS=240),
    }
}
