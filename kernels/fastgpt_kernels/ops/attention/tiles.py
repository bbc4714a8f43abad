"""What the attention kernels of both directions share: program order, tile loads, dropout mask.

Program order. A flat grid of batch * heads * tiles programs is unfolded here: `group` heads at a
time, few enough that what they read stays in the L2 cache; within a group first the longest tile of
every head, then the next. Long programs start early, so that the last wave of the grid is made of
short ones, and a head's keys come from memory once.

Dropout. Whether entry (row, column) of a head's T x T matrix is kept depends on nothing but the
seed, the head's number b * n_head + h, row and column, so that every kernel, whatever its tiles,
and the reference agree to the bit. One Philox 4x32 call makes 128 bits, 16 for each of eight
entries: rows r and r + 8 by columns c, c + 8, c + 16, c + 24. In the accumulator layout of NVIDIA's
matrix instructions these eight belong to one thread, so the mask is computed where it is used and
(unless the tile is transposed) never passes through shared memory: about ten instructions an entry
on sm_90, counted in its SASS.

Seven rounds of Philox are the fewest that pass BigCrush (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3", table 2).
"""

import triton
import triton.language as tl


@triton.jit
def locate(tile_count, head_count, group):
    """Program id -> (rank of its tile within its head, longest first; batch * n_head + head)."""
    pid = tl.program_id(0)
    first = pid // (group * tile_count) * group
    heads = min(group, head_count - first)
    rest = pid - first * tile_count
    return rest // heads, first + rest % heads


@triton.jit
def head_offset(batch_head, n_head, stride_batch, HEAD: tl.constexpr):
    """Offset in elements (int64) of position 0 of a head in a (B, T, n * H * HEAD) tensor."""
    batch = batch_head // n_head
    return batch.to(tl.int64) * stride_batch + (batch_head % n_head) * HEAD


@triton.jit
def load_tile(
    pointers, rows, columns, T, CHECK_T: tl.constexpr, CHECK_HEAD: tl.constexpr,
    EVICT_FIRST: tl.constexpr = False,
):  # fmt: skip
    """A tile; reads nothing, and has zeros, past T (if CHECK_T) and past CHECK_HEAD (unless 0).

    EVICT_FIRST: no other program reads it, so it may leave the L2 cache first.
    """
    policy: tl.constexpr = "evict_first" if EVICT_FIRST else ""
    if CHECK_T and CHECK_HEAD:
        mask = (rows < T)[:, None] & (columns < CHECK_HEAD)[None, :]
        return tl.load(pointers, mask=mask, other=0.0, eviction_policy=policy)
    elif CHECK_T:
        return tl.load(pointers, mask=(rows < T)[:, None], other=0.0, eviction_policy=policy)
    elif CHECK_HEAD:
        mask = (columns < CHECK_HEAD)[None, :]
        return tl.load(pointers, mask=mask, other=0.0, eviction_policy=policy)
    else:
        return tl.load(pointers, eviction_policy=policy)


@triton.jit
def store_tile(
    pointers, tile, rows, columns, T, CHECK_T: tl.constexpr, CHECK_HEAD: tl.constexpr,
    EVICT_FIRST: tl.constexpr = False,
):  # fmt: skip
    """Counterpart of `load_tile`, rounding to the dtype stored."""
    policy: tl.constexpr = "evict_first" if EVICT_FIRST else ""
    tile = tile.to(pointers.dtype.element_ty)
    if CHECK_T and CHECK_HEAD:
        mask = (rows < T)[:, None] & (columns < CHECK_HEAD)[None, :]
        tl.store(pointers, tile, mask=mask, eviction_policy=policy)
    elif CHECK_T:
        tl.store(pointers, tile, mask=(rows < T)[:, None], eviction_policy=policy)
    elif CHECK_HEAD:
        tl.store(pointers, tile, mask=(columns < CHECK_HEAD)[None, :], eviction_policy=policy)
    else:
        tl.store(pointers, tile, eviction_policy=policy)


@triton.jit
def kept(seed, batch_head, row, column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] bool: which entries from (row, column) on survive dropout.

    An entry is dropped when its 16 random bits are below `threshold` = round(p * 65536). row must
    be a multiple of 16 and column of 32.
    """
    # Counter of an entry: 8 * (column // 32) + column % 8, 8 * (row // 16) + row % 8, head, 0.
    columns = column // 4 + tl.arange(0, COLUMNS // 4)
    rows = row // 2 + tl.arange(0, ROWS // 2)
    a, b, c, d = tl.philox(seed, columns[None, :], rows[:, None], batch_head, 0, n_rounds=7)
    # [ROWS/2, COLUMNS/4, 2, 2]: word k at [k // 2, k % 2]
    words = tl.join(tl.join(a, c), tl.join(b, d))
    halves = tl.join(words & 0xFFFF, words >> 16)
    halves = halves.reshape(ROWS // 16, 8, COLUMNS // 32, 8, 4, 2)  # row+8's half is the last axis
    halves = halves.permute(0, 5, 1, 2, 4, 3).reshape(ROWS, COLUMNS)
    return halves >= threshold
