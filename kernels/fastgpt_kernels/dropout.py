"""Dropout masks by Philox, with the same bits in kernels and in plain PyTorch, and their seeds.

An entry is dropped if its 16 random bits are below t = round(p 65536), else it is divided by
1 - t / 65536. The bits depend on the seed and the entry's place alone. They come from Philox 4x32
with 7 rounds, the fewest that pass BigCrush (Salmon et al. 2011, "Parallel random numbers: as easy
as 1, 2, 3", table 2). Its key is the seed, and one call makes the bits of eight entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt_kernels.launch import tl, triton


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """Returns a seed as one int64 on a device, drawn there for None without a wait for a GPU."""
    if isinstance(seed, Tensor):
        return seed
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def dropout_threshold(dropout_p: float) -> tuple[int, float]:
    """Returns (t, 1 / (1 - t / 65536))."""
    threshold = min(round(dropout_p * 65536), 65535)
    return threshold, 65536 / (65536 - threshold)


@triton.jit
def keep_attention(seed, head, row, column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns `attention_dropout_mask` [ROWS, COLUMNS] from (row, column), multiples of 16 and 32.

    The eight entries of a call belong to one thread in the accumulator layout of NVIDIA's matrix
    instructions. A mask takes about ten instructions per entry on sm_90.
    """
    columns = column // 4 + tl.arange(0, COLUMNS // 4)
    rows = row // 2 + tl.arange(0, ROWS // 2)
    a, b, c, d = tl.philox(seed, columns[None, :], rows[:, None], head, 0, n_rounds=7)
    # [ROWS/2, COLUMNS/4, 2, 2]: word k at [k // 2, k % 2]
    words = tl.join(tl.join(a, c), tl.join(b, d))
    halves = tl.join(words & 0xFFFF, words >> 16)
    halves = halves.reshape(ROWS // 16, 8, COLUMNS // 32, 8, 4, 2)  # row+8's half is the last axis
    halves = halves.permute(0, 5, 1, 2, 4, 3).reshape(ROWS, COLUMNS)
    return halves >= threshold


def attention_dropout_mask(seed: Tensor, heads: int, T: int, dropout_p: float) -> Tensor:
    """Returns (heads, T, T) bool, True where `attention` keeps softmax's entry of head b H + h."""
    return attention_dropout_bits(seed, heads, T) >= dropout_threshold(dropout_p)[0]


def attention_dropout_bits(seed: Tensor, heads: int, T: int) -> Tensor:
    """Returns (heads, T, T) int64 in [0, 65536), the bits that decide on dropping an entry.

    Entry (row, column) of a head has counter (8 * (column // 32) + column % 8, 8 * (row // 16) +
    row % 8, head, 0) and word column // 8 % 4, of which it takes the low half if row // 8 is even,
    else the high half.
    """
    device = seed.device
    groups_m, groups_n = -(-T // 16), -(-T // 32)
    counter = (
        torch.arange(groups_n * 8, device=device).view(1, 1, -1),
        torch.arange(groups_m * 8, device=device).view(1, -1, 1),
        torch.arange(heads, device=device).view(-1, 1, 1),
        torch.zeros(1, 1, 1, dtype=torch.int64, device=device),
    )
    bits = torch.stack(_philox(seed, *counter), -1)
    bits = torch.stack([bits & 0xFFFF, bits >> 16], -1)  # (heads, T / 2, T / 4, word, half)
    bits = bits.view(heads, groups_m, 8, groups_n, 8, 4, 2).permute(0, 1, 6, 2, 3, 5, 4)
    return bits.reshape(heads, groups_m * 16, groups_n * 32)[:, :T, :T]


@triton.jit
def keep_norm(seed, rows, column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns `norm_dropout_mask` [ROWS, COLUMNS] at rows [ROWS, 1], from a multiple of 8 columns.

    The eight entries of a call are neighbours, which belong to one thread in 16-bit tiles.
    """
    groups = column // 8 + tl.arange(0, COLUMNS // 8)[None, :]
    a, b, c, d = tl.philox(seed, groups, rows, 0, 1, n_rounds=7)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # [ROWS, COLUMNS / 8, 2, 2]: a, b, c, d
    return tl.join(words & 0xFFFF, words >> 16).reshape(ROWS, COLUMNS) >= threshold


def norm_dropout_mask(seed: Tensor, M: int, C: int, dropout_p: float) -> Tensor:
    """Returns (M, C) bool, True where `add_layer_norm` keeps an entry of x, seen as M rows.

    Entry (row, column) has counter (column // 8, row, 0, 1) and word column // 2 % 4, of which it
    takes the low half if column is even, else the high half.
    """
    device = seed.device
    columns, rows = torch.arange(-(-C // 8), device=device), torch.arange(M, device=device)
    zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
    words = torch.stack(_philox(seed, columns[None, :], rows[:, None], zero, zero + 1), -1)
    bits = torch.stack([words & 0xFFFF, words >> 16], -1).view(M, -1)[:, :C]
    return bits >= dropout_threshold(dropout_p)[0]


def _philox(seed: Tensor, *counter: Tensor) -> tuple[Tensor, ...]:
    """Returns the four 32-bit words, as int64."""
    # 32-bit arithmetic in int64. Products wrap modulo 2**64, which leaves both halves right.
    low, words = 0xFFFFFFFF, list(counter)
    key = seed.view(()) & low, (seed.view(()) >> 32) & low
    for i in range(7):
        b, a = 0xCD9E8D57 * words[2], 0xD2511F53 * words[0]
        words = [
            ((b >> 32) & low) ^ words[1] ^ ((key[0] + i * 0x9E3779B9) & low),
            b & low,
            ((a >> 32) & low) ^ words[3] ^ ((key[1] + i * 0xBB67AE85) & low),
            a & low,
        ]
    return torch.broadcast_tensors(*words)
