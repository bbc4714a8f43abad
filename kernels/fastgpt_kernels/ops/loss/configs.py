"""Launch configs of the cross entropy."""

from __future__ import annotations

from fastgpt_kernels.launch import Config, Table

# Key: the row's width in 2-byte elements (an fp32 row counts double). BLOCK is in the same unit:
# 8 elements, 128 bits, a thread. A row of up to BLOCK * TILES stays in registers, one of more is
# walked twice by TILES tiles at a time, in 16 warps of up to 128 registers: all that an SM has, for
# one row an SM stays in the L2 until it is read again. Not measured, by register count: GPT-2's
# vocabulary takes 255 registers a thread with 8 warps, and has 100 KB of loads in flight. On sm_100
# and gfx942 that spills: they walk twice, the second time through caches of 126 and 256 MB.
_CROSS_ENTROPY_NARROW = {
    256: Config({"BLOCK": 256, "TILES": 1}, num_warps=1),
    1024: Config({"BLOCK": 1024, "TILES": 1}, num_warps=4),
    4096: Config({"BLOCK": 1024, "TILES": 4}, num_warps=4),
    16384: Config({"BLOCK": 2048, "TILES": 8}, num_warps=8),
}
_CROSS_ENTROPY_WALK = Config({"BLOCK": 4096, "TILES": 3}, num_warps=16)
# Rows that do not begin at multiples of 16 bytes are loaded an element at a time, each into a
# register of its own: wider ones than this are walked whatever the table says.
WIDEST_UNALIGNED = 16384
CROSS_ENTROPY: Table = {
    "default": {
        **_CROSS_ENTROPY_NARROW,
        51200: Config({"BLOCK": 2048, "TILES": 25}, num_warps=8),
        1 << 31: _CROSS_ENTROPY_WALK,
    },
    "sm_100": {
        **_CROSS_ENTROPY_NARROW,
        51200: _CROSS_ENTROPY_WALK,
        1 << 31: _CROSS_ENTROPY_WALK,
    },
    # 16 warps of 64 lanes are the most a program can have.
    "gfx942": {
        **_CROSS_ENTROPY_NARROW,
        51200: Config({"BLOCK": 8192, "TILES": 2}, num_warps=16),
        1 << 31: Config({"BLOCK": 8192, "TILES": 2}, num_warps=16),
    },
}
