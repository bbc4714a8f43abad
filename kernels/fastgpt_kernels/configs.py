"""Launch configs: static tables by (architecture, size), nothing searched at run time.

A table maps an architecture ("sm_90", "gfx942", or "default") to entries keyed by a size bound (a
head dim, a row width): the entry with the smallest key at or above the size is used.
`python -m fastgpt_kernels.tune` searches on the GPU at hand and prints tables to paste here. An
entry that nobody has timed says so: it was then chosen by register and shared-memory counts from
`python -m fastgpt_kernels.aot`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Architectures for which every kernel is compiled and inspected in CI.
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Config:
    """One launch: the kernel's tile sizes by parameter name, warps a program, pipeline stages."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int = 1

    def kwargs(self) -> dict[str, int]:
        """Keyword arguments for `kernel[grid](...)`: the tiles, num_warps and num_stages."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


Table = Mapping[str, Mapping[int, Config]]


def lookup(table: Table, arch: str, key: int) -> Config:
    """The entry for `key` on `arch`: the smallest key at or above it, else the largest one.

    An architecture without entries of its own uses "default". Keys must be in rising order.
    """
    entries = table.get(arch) or table["default"]
    for bound, config in entries.items():
        if key <= bound:
            return config
    return config


def entries(table: Table, arch: str) -> Mapping[int, Config]:
    """All entries that `lookup` can return on `arch`; what `aot_specs` enumerates."""
    return table.get(arch) or table["default"]


# Key: the row's width in 2-byte elements (an fp32 row counts double). BLOCK is in the same unit:
# 8 elements, 128 bits, a thread. A row of up to BLOCK * TILES stays in registers, one of more is
# walked twice by TILES tiles at a time. Not measured, by register count: ptxas keeps every element
# in a register of its own, 200 of 255 a thread for GPT-2's vocabulary with 8 warps, which is all
# that an SM has, and 100 KB of loads in flight. (16 warps by 13 tiles of 4096 leave 24 of 128 for
# all else and spill with one of Triton 3.6 and 3.7.) On sm_100 and gfx942 both spill: they walk
# twice, with 126 and 256 MB of cache behind the second time.
_CROSS_ENTROPY_NARROW = {
    256: Config({"BLOCK": 256, "TILES": 1}, num_warps=1),
    1024: Config({"BLOCK": 1024, "TILES": 1}, num_warps=4),
    4096: Config({"BLOCK": 1024, "TILES": 4}, num_warps=4),
    16384: Config({"BLOCK": 2048, "TILES": 8}, num_warps=8),
}
_CROSS_ENTROPY_WALK = Config({"BLOCK": 8192, "TILES": 2}, num_warps=32)
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


def _attention(m: int, n: int, warps: int, stages: int = 1, tma: int | None = None) -> Config:
    """BLOCK_M query rows by BLOCK_N keys; `tma`: dq summed by TMA reduction rather than atomics."""
    blocks = {"BLOCK_M": m, "BLOCK_N": n}
    return Config(blocks if tma is None else {**blocks, "TMA_REDUCE": tma}, warps, stages)


# Attention. Key: the head dim. Not measured: by register count, the largest tiles with which no
# variant (causal or full, ragged T, padded head dim) spills with Triton 3.6 or 3.7. Dropout and
# fp32 have tables of their own (`attention_forward.pick`).
ATTENTION_FORWARD: Table = {
    "default": {64: _attention(128, 64, 8, 3), 128: _attention(128, 32, 8, 3)},
    "sm_90": {64: _attention(128, 64, 4, 3), 128: _attention(128, 64, 8, 3)},
    "sm_100": {64: _attention(128, 64, 4, 3), 128: _attention(128, 64, 8, 2)},
    "gfx942": {64: _attention(128, 64, 4), 128: _attention(128, 32, 4)},
}
ATTENTION_FORWARD_DROPOUT: Table = {
    "default": {64: _attention(128, 64, 8, 3), 128: _attention(128, 32, 8, 3)},
    "sm_90": {64: _attention(128, 64, 8, 3), 128: _attention(128, 64, 8, 3)},
    "sm_100": {64: _attention(128, 64, 8, 3), 128: _attention(128, 64, 8, 2)},
    "gfx942": {64: _attention(64, 64, 4), 128: _attention(128, 32, 4)},
}
# dk, dv and dq in one pass.
ATTENTION_BACKWARD: Table = {
    "default": {64: _attention(32, 128, 8, 2, tma=0), 128: _attention(32, 64, 8, 2, tma=0)},
    "sm_90": {64: _attention(64, 128, 8, 2, tma=1), 128: _attention(32, 128, 8, 2, tma=1)},
    "sm_100": {64: _attention(64, 128, 8, 2, tma=1), 128: _attention(32, 128, 8, 2, tma=1)},
    "gfx942": {64: _attention(64, 64, 4, tma=0), 128: _attention(32, 64, 4, tma=0)},
}
ATTENTION_BACKWARD_DROPOUT: Table = {
    "default": {64: _attention(32, 64, 8, 2, tma=0), 128: _attention(32, 64, 8, 2, tma=0)},
    "sm_90": {64: _attention(32, 128, 8, 2, tma=1), 128: _attention(32, 64, 8, 2, tma=1)},
    "sm_100": {64: _attention(64, 128, 8, 2, tma=1), 128: _attention(32, 128, 8, 2, tma=1)},
    "gfx942": {64: _attention(32, 64, 4, tma=0), 128: _attention(32, 32, 4, tma=0)},
}
# The deterministic pair: dk and dv, then dq.
ATTENTION_KEY_VALUE: Table = {
    "default": {64: _attention(32, 128, 8, 2, tma=0), 128: _attention(32, 64, 8, 2, tma=0)},
    "sm_90": {64: _attention(64, 128, 8, 2, tma=0), 128: _attention(32, 128, 8, 2, tma=0)},
    "sm_100": {64: _attention(64, 128, 8, 2, tma=0), 128: _attention(32, 128, 8, 2, tma=0)},
    "gfx942": {64: _attention(64, 64, 4, tma=0), 128: _attention(32, 64, 4, tma=0)},
}
ATTENTION_KEY_VALUE_DROPOUT: Table = {
    "default": {64: _attention(32, 64, 4, 2, tma=0), 128: _attention(32, 64, 8, 2, tma=0)},
    "sm_90": {64: _attention(32, 128, 8, 2, tma=0), 128: _attention(32, 128, 8, 2, tma=0)},
    "sm_100": {64: _attention(64, 128, 8, 2, tma=0), 128: _attention(32, 128, 8, 2, tma=0)},
    "gfx942": {64: _attention(32, 64, 4, tma=0), 128: _attention(32, 32, 4, tma=0)},
}
ATTENTION_QUERY: Table = {
    "default": {64: _attention(128, 64, 8, 2), 128: _attention(128, 32, 8, 2)},
    "sm_90": {64: _attention(128, 64, 8, 2), 128: _attention(128, 64, 8, 2)},
    "sm_100": {64: _attention(128, 64, 8, 2), 128: _attention(128, 64, 8, 2)},
    "gfx942": {64: _attention(128, 32, 4), 128: _attention(64, 32, 4)},
}
ATTENTION_QUERY_DROPOUT: Table = {
    "default": {64: _attention(128, 32, 8, 2), 128: _attention(128, 32, 8, 2)},
    "sm_90": {64: _attention(128, 64, 8, 2), 128: _attention(128, 64, 8, 2)},
    "sm_100": {64: _attention(128, 64, 8, 2), 128: _attention(128, 64, 8, 2)},
    "gfx942": {64: _attention(64, 32, 4), 128: _attention(64, 32, 4)},
}
# True fp32 products do not run on tensor cores: Triton loads whole rows of both operands into
# registers. At 64 nothing spills; at 128 the backward kernels do, by a few hundred bytes a thread.
ATTENTION_FORWARD_FP32: Table = {
    "default": {64: _attention(32, 32, 8), 128: _attention(16, 32, 8)},
}
ATTENTION_BACKWARD_FP32: Table = {
    "default": {64: _attention(32, 32, 8, tma=0), 128: _attention(16, 32, 8, tma=0)},
}
ATTENTION_KEY_VALUE_FP32: Table = {
    "default": {64: _attention(32, 32, 8, tma=0), 128: _attention(16, 32, 8, tma=0)},
}
ATTENTION_QUERY_FP32: Table = {
    "default": {64: _attention(32, 32, 8), 128: _attention(16, 32, 8)},
}
# delta and dq's zeros before the backward pass, dq's rounding after it: bound by memory.
ATTENTION_ROWS: Table = {
    "default": {64: Config({"BLOCK_T": 64}, 4), 128: Config({"BLOCK_T": 32}, 4)},
}


# Key: the width C. ROWS rows a program, or a step of its loop. Not measured, by register count:
# 16 to 32 elements a thread keep enough loads in flight. The backward's warps span one row, so that
# its sums over rows stay in a thread; PROGRAMS_PER_SM of its programs fit an SM together, no more,
# since each does the same share of the rows; two stages copy the next step's rows ahead.
LAYER_NORM_FORWARD: Table = {
    "default": {
        256: Config({"ROWS": 16}, num_warps=4),
        512: Config({"ROWS": 8}, num_warps=4),
        1024: Config({"ROWS": 4}, num_warps=4),
        2048: Config({"ROWS": 2}, num_warps=4),
        4096: Config({"ROWS": 1}, num_warps=8),
        8192: Config({"ROWS": 1}, num_warps=16),
    },
}
LAYER_NORM_BACKWARD: Table = {
    "default": {
        256: Config({"ROWS": 4, "PROGRAMS_PER_SM": 12}, num_warps=1, num_stages=2),
        512: Config({"ROWS": 2, "PROGRAMS_PER_SM": 8}, num_warps=2, num_stages=2),
        1024: Config({"ROWS": 2, "PROGRAMS_PER_SM": 4}, num_warps=4, num_stages=2),
        2048: Config({"ROWS": 1, "PROGRAMS_PER_SM": 4}, num_warps=4, num_stages=2),
        4096: Config({"ROWS": 1, "PROGRAMS_PER_SM": 2}, num_warps=8, num_stages=2),
        8192: Config({"ROWS": 1, "PROGRAMS_PER_SM": 1}, num_warps=16, num_stages=2),
    },
}

# Key: the width C, though one config does for all. A tile of ROWS x BLOCK_C (rows are traded for
# columns where C is narrower); a program of the forward does one tile, of the backward a column of
# them, and PROGRAMS_PER_SM of these fit an SM together. Not measured: 16 elements a thread, 8 of a
# row, which is one 128-bit access in 2-byte dtypes; 256 columns divide 4C of every GPT-2.
BIAS_GELU_FORWARD: Table = {
    "default": {1 << 31: Config({"ROWS": 8, "BLOCK_C": 256}, num_warps=4)},
}
BIAS_GELU_BACKWARD: Table = {
    "default": {
        1 << 31: Config(
            {"ROWS": 8, "BLOCK_C": 256, "PROGRAMS_PER_SM": 5}, num_warps=4, num_stages=2
        )
    },
}


def matmul(m: int, n: int, k: int, warps: int, stages: int, per_sm: int, halves: int) -> Config:
    """Tiles of m x n, k at a time, `per_sm` programs an SM, the epilogue in `halves` parts."""
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}
    return Config({**blocks, "SUBTILES": halves, "PROGRAMS_PER_SM": per_sm}, warps, stages)


# Key: the output's width N. Not measured: 128 x 256 is the tile with the fewest bytes a product
# that the sums leave registers for (128 a thread of 8 warps), and three stages of 48 KB leave
# shared memory for half of the epilogue. REDUCE is dW, where K is the tokens. For the interpreter,
# which is "default" as no GPU is, tiles are small, so that tests see many.
MATMUL: Table = {
    "default": {1 << 31: matmul(32, 64, 32, 4, 1, 1, 2)},
    "sm_90": {1 << 31: matmul(128, 256, 64, 8, 3, 1, 2)},
    "sm_100": {1 << 31: matmul(128, 256, 64, 8, 3, 1, 2)},
}
MATMUL_REDUCE: Table = {
    "default": {1 << 31: matmul(32, 32, 16, 4, 1, 1, 1)},
    "sm_90": {1 << 31: matmul(128, 256, 64, 8, 3, 1, 2)},
    "sm_100": {1 << 31: matmul(128, 256, 64, 8, 3, 1, 2)},
}


# One entry: the key says nothing. Not measured: 8 elements a thread are two 128-bit loads from each
# of four tensors in flight.
ADAMW: Table = {"default": {1: Config({"BLOCK": 2048}, num_warps=8)}}

# Key: the head dim. BLOCK_N keys and values are in flight at once. Not measured: 32 elements a
# thread of each, half the registers that four programs an SM leave it.
DECODE_ATTENTION: Table = {
    "default": {
        64: Config({"BLOCK_N": 64}, num_warps=4),
        128: Config({"BLOCK_N": 32}, num_warps=4),
        256: Config({"BLOCK_N": 16}, num_warps=4),
    },
}

# Key: rows, a power of two. A program keeps rows x BLOCK_N x BLOCK_K sums, 16 a thread, so that
# registers leave room for several programs an SM; each loads 8 to 16 weights a thread and step.
DECODE_LINEAR: Table = {
    "default": {
        1: Config({"BLOCK_N": 4, "BLOCK_K": 512}, num_warps=4),
        2: Config({"BLOCK_N": 4, "BLOCK_K": 256}, num_warps=4),
        4: Config({"BLOCK_N": 4, "BLOCK_K": 256}, num_warps=8),
        8: Config({"BLOCK_N": 4, "BLOCK_K": 128}, num_warps=8),
    },
}
