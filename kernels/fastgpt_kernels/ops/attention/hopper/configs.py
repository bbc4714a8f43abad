"""Launch configs of attention for Hopper, by head dim.

STAGES are slots of a ring, REGISTERS those of a consumer's thread. Not measured: what does not
spill, with as much shared memory as an SM has.
"""

from __future__ import annotations

from fastgpt_kernels.launch import Config, Table


def _config(**blocks: int) -> Config:
    return Config(blocks, num_warps=4)


FORWARD: Table = {
    "default": {
        64: _config(STAGES=4, REGISTERS=232),
        128: _config(STAGES=2, REGISTERS=232),
    }
}
# ROWS: of a tile of q and of y's gradient; PART: of which so many at a time are in registers.
BACKWARD: Table = {
    "default": {
        64: _config(ROWS=128, PART=64, STAGES=2, REGISTERS=240),
        128: _config(ROWS=64, PART=32, STAGES=2, REGISTERS=240),
    }
}
