"""Launch configs of attention."""

from __future__ import annotations

from fastgpt_kernels.launch import Config, Table


def _attention(m: int, n: int, warps: int, stages: int = 1, tma: int | None = None) -> Config:
    """BLOCK_M query rows by BLOCK_N keys; `tma`: dq summed by TMA reduction rather than atomics."""
    blocks = {"BLOCK_M": m, "BLOCK_N": n}
    return Config(blocks if tma is None else {**blocks, "TMA_REDUCE": tma}, warps, stages)


# Attention. Key: the head dim. Not measured: by register count, the largest tiles with which no
# variant (causal or full, ragged T, padded head dim) spills with Triton 3.6, 3.7 or 3.9. Dropout
# and fp32 have tables of their own (`forward.pick`). "default" fits 99 KB of shared memory (sm_86,
# sm_89, sm_120); Turing (sm_75) has none: see the record's limits. Head dim 32 has entries where
# with Triton 3.6 the products of 64's tile would wait for one another.
FORWARD: Table = {
    "default": {64: _attention(128, 64, 8, 3), 128: _attention(128, 32, 8, 3)},
    "sm_90": {64: _attention(128, 64, 4, 3), 128: _attention(128, 64, 8, 3)},
    "sm_100": {64: _attention(128, 64, 8, 3), 128: _attention(128, 64, 8, 2)},
    "gfx942": {64: _attention(128, 64, 4), 128: _attention(128, 32, 4)},
}
FORWARD_DROPOUT: Table = {
    "default": {64: _attention(128, 64, 8, 3), 128: _attention(128, 32, 8, 3)},
    "sm_90": {64: _attention(128, 64, 8, 3), 128: _attention(128, 64, 8, 3)},
    "sm_100": {64: _attention(128, 64, 8, 3), 128: _attention(128, 64, 8, 2)},
    "gfx942": {64: _attention(64, 64, 4), 128: _attention(128, 32, 4)},
}
# dk, dv and dq in one pass.
BACKWARD: Table = {
    "default": {64: _attention(32, 128, 8, 2, tma=0), 128: _attention(32, 64, 8, 2, tma=0)},
    "sm_90": {64: _attention(64, 128, 8, 2, tma=1), 128: _attention(32, 128, 8, 2, tma=1)},
    "sm_100": {64: _attention(32, 128, 8, 2, tma=1), 128: _attention(32, 128, 8, 2, tma=1)},
    "gfx942": {64: _attention(32, 64, 4, tma=0), 128: _attention(32, 64, 4, tma=0)},
}
BACKWARD_DROPOUT: Table = {
    "default": {64: _attention(32, 64, 8, 2, tma=0), 128: _attention(32, 64, 8, 2, tma=0)},
    "sm_90": {
        32: _attention(64, 64, 4, 2, tma=1),
        64: _attention(32, 128, 8, 2, tma=1),
        128: _attention(32, 64, 8, 2, tma=1),
    },
    "sm_100": {64: _attention(64, 64, 8, 2, tma=1), 128: _attention(32, 128, 8, 2, tma=1)},
    "sm_120": {64: _attention(32, 64, 8, 2, tma=1), 128: _attention(32, 64, 8, 2, tma=1)},
    "gfx942": {64: _attention(32, 64, 4, tma=0), 128: _attention(32, 32, 4, tma=0)},
}
# Two passes: dk and dv, then dq. Head dim 64 of sm_90 is measured: see TWO_PASSES.
KEY_VALUE: Table = {
    "default": {64: _attention(32, 128, 8, 2, tma=0), 128: _attention(32, 64, 8, 2, tma=0)},
    "sm_90": {64: _attention(64, 64, 4, 2, tma=0), 128: _attention(32, 128, 8, 2, tma=0)},
    "sm_100": {64: _attention(64, 128, 8, 2, tma=0), 128: _attention(32, 128, 8, 2, tma=0)},
    "gfx942": {64: _attention(64, 64, 4, tma=0), 128: _attention(32, 64, 4, tma=0)},
}
KEY_VALUE_DROPOUT: Table = {
    "default": {64: _attention(32, 64, 4, 2, tma=0), 128: _attention(32, 64, 8, 2, tma=0)},
    "sm_90": {64: _attention(32, 128, 8, 2, tma=0), 128: _attention(32, 64, 8, 2, tma=0)},
    "sm_100": {64: _attention(64, 128, 8, 2, tma=0), 128: _attention(32, 128, 8, 2, tma=0)},
    "gfx942": {64: _attention(32, 64, 4, tma=0), 128: _attention(32, 32, 4, tma=0)},
}
QUERY: Table = {
    "default": {64: _attention(128, 64, 8, 2), 128: _attention(128, 32, 8, 2)},
    "sm_90": {64: _attention(128, 64, 8, 2), 128: _attention(128, 64, 8, 2)},
    "sm_100": {64: _attention(128, 64, 8, 2), 128: _attention(128, 64, 8, 2)},
    "gfx942": {64: _attention(128, 32, 4), 128: _attention(64, 32, 4)},
}
QUERY_DROPOUT: Table = {
    "default": {64: _attention(128, 32, 8, 2), 128: _attention(128, 32, 8, 2)},
    "sm_90": {64: _attention(128, 64, 8, 2), 128: _attention(128, 64, 8, 2)},
    "sm_100": {64: _attention(128, 64, 8, 2), 128: _attention(128, 64, 8, 2)},
    "gfx942": {64: _attention(64, 32, 4), 128: _attention(64, 32, 4)},
}
# Architectures and head dims of which two passes are faster than one where sums need not be the
# same every time, in 16 bits and without dropout. Measured on an H200, Triton 3.6, 384 causal heads
# of 1,024 x 64, microseconds (bench/results/nvidia-h200/20261126-kernels.csv):
#   one pass     64 x 128, 8 warps 692    64 x 64, 4 warps 678, with atomics 672    32 x 128 755
#   two passes   dk and dv: 64 x 128, 8 warps 401 and dq 209; 64 x 64, 4 warps 342 and dq 227, in a
#                run at a lower clock: its forward pass took 191 in place of 174
# dq's addends to memory cost more than the two products that are computed twice.
TWO_PASSES = frozenset({("sm_90", 64)})
# True fp32 products do not run on tensor cores: Triton loads whole rows of both operands into
# registers. At 64 nothing spills; at 128 the backward kernels do, by a few hundred bytes a thread.
FORWARD_FP32: Table = {"default": {64: _attention(32, 32, 8), 128: _attention(16, 32, 8)}}
BACKWARD_FP32: Table = {
    "default": {64: _attention(32, 32, 8, tma=0), 128: _attention(16, 32, 8, tma=0)},
}
KEY_VALUE_FP32, QUERY_FP32 = BACKWARD_FP32, FORWARD_FP32
# delta and dq's zeros before the backward pass, dq's rounding after it: bound by memory.
ROWS: Table = {"default": {64: Config({"BLOCK_T": 64}, 4), 128: Config({"BLOCK_T": 32}, 4)}}
