"""Launch configs of the matrix products."""

from __future__ import annotations

from fastgpt_kernels.launch import Config, Table

ALIGNMENT = 16  # bytes: what TMA wants of addresses and row pitches


def runs_on(arch: str) -> bool:
    """Whether the kernel is for this architecture: one with TMA, or the interpreter ("cpu").

    Elsewhere Triton turns descriptors into addresses, one for each element, which spill.
    """
    return arch == "cpu" or arch.startswith("sm_") and int(arch[3:]) >= 90


def matmul(m: int, n: int, k: int, warps: int, stages: int, per_sm: int, halves: int) -> Config:
    """Tiles of m x n, k at a time, `per_sm` programs an SM, the epilogue in `halves` parts."""
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}
    return Config({**blocks, "SUBTILES": halves, "PROGRAMS_PER_SM": per_sm}, warps, stages)


# Key: the output's width N. Not measured: 128 x 256 is the tile with the fewest bytes a product
# that the sums leave registers for (128 a thread of 8 warps), and three stages of 48 KB leave
# shared memory for half of the epilogue. On sm_100 the sums are not in registers, and an epilogue
# in one piece needs fewer of them; dW's is fp32 and has no room for that. REDUCE is for dW, whose K
# is the tokens. The default is for the interpreter: its tiles are small, so that tests see many.
_HALVES = {1 << 31: matmul(128, 256, 64, 8, 3, 1, 2)}
_WHOLE = {1 << 31: matmul(128, 256, 64, 8, 3, 1, 1)}
MATMUL: Table = {
    "default": {1 << 31: matmul(32, 64, 32, 4, 1, 1, 2)}, "sm_90": _HALVES, "sm_100": _WHOLE,
}  # fmt: skip
# With gelu by an exact tanh or erf, two results of which want registers: half as many sums.
_FEW_SUMS = {1 << 31: matmul(128, 128, 64, 8, 4, 1, 2)}
MATMUL_GELU: Table = {
    "default": {1 << 31: matmul(32, 64, 32, 4, 1, 1, 4)}, "sm_90": _FEW_SUMS, "sm_100": _FEW_SUMS,
}  # fmt: skip
MATMUL_REDUCE: Table = {
    "default": {1 << 31: matmul(32, 32, 16, 4, 1, 1, 1)}, "sm_90": _HALVES, "sm_100": _HALVES,
}  # fmt: skip
