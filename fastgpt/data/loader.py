"""Which tokens are step s: a pure function of (seed, s) and of nothing else.

Neither earlier steps, nor restarts, nor the number of GPUs, nor NumPy's version change it: random
numbers and orders are functions of their keys alone. Philox4x64-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011) makes 64-bit words from a key and a counter. Only the raw
words are used: NumPy promises these, but not what its distributions make of them.

Reading the next batches while the device computes.

On CUDA a thread copies step s + 1, s + 2, ... into pinned buffers and from there, on a stream of
its own, to the device, as int64: 8 bytes a token are 4 MB for half a million tokens, 0.2 ms of a
copy that overlaps with compute, and the training stream then has no cast to launch.

On the CPU `get` reads on the spot by default: measured beside a training step on two cores, a small
batch takes as long to read (0.4 ms for 12 rows of 64) as to take over from a thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch

from fastgpt.data.token_files import TokenSplit

Sampling = Literal["random", "epochs"]

# What random words are drawn for: the second half of Philox's key, so that no two uses meet.
_STARTS, _OFFSETS, _ORDER, _EVAL = 1, 2, 3, 4
_MASK32 = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


class Batches:
    """The training batches of a split: `rows_per_step` windows of `block_size` + 1 tokens a step.

    "random" draws windows with replacement from all positions, as nanoGPT does. "epochs" cuts the
    shards into windows that lie end to end (a window's last target is the next one's first input)
    and takes each once per epoch, in a fresh order; a fresh offset of the grid in each epoch lets
    the cuts fall elsewhere. Up to two windows a shard are left out of an epoch.

    start  a step and the rows seen before it, which other batch sizes may have made before a resume
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        rows_per_step: int,
        block_size: int,
        seed: int,
        sampling: Sampling = "random",
        start: tuple[int, int] = (0, 0),
    ):
        if sampling not in ("random", "epochs"):
            raise ValueError(f"sampling is 'random' or 'epochs', not {sampling!r}")
        if rows_per_step < 1 or block_size < 1:
            raise ValueError(
                f"rows_per_step {rows_per_step} and block_size {block_size} must be >= 1"
            )
        split.require(block_size)
        self.split, self.rows_per_step, self.block_size = split, rows_per_step, block_size
        self.seed, self.sampling = seed, sampling
        self._start_step, self._start_row = start
        counts = np.array([file.count for file in split.shards], np.int64)
        # So many whole windows (and one token more) fit at any offset in 0 .. room - 1.
        windows = np.maximum(counts // block_size - 1, counts > block_size)
        self._room = counts - windows * block_size
        self._first = np.cumsum(counts) - counts
        self._ends = np.cumsum(windows)
        self._before = self._ends - windows

    @property
    def rows_per_epoch(self) -> int:
        """Windows in an epoch of "epochs"."""
        return int(self._ends[-1])

    def starts(self, step: int) -> np.ndarray:
        """(rows_per_step,) int64 positions of the windows of `step` (>= 0)."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        rows = self.rows_per_step
        if self.sampling == "random":
            words = random_words(rows, self.seed, _STARTS, step)
            index = below(words, self.split.n_starts(self.block_size))
            return self.split.positions(index, self.block_size)
        row = self._start_row + (step - self._start_step) * rows + np.arange(rows, dtype=np.int64)
        epoch, place = np.divmod(row, self.rows_per_epoch)
        epochs = range(int(epoch[0]), int(epoch[-1]) + 1)
        return np.concatenate([self._epoch_starts(e, place[epoch == e]) for e in epochs])

    def _epoch_starts(self, epoch: int, place: np.ndarray) -> np.ndarray:
        window = Permutation(self.rows_per_epoch, self.seed, _ORDER, epoch)(place)
        offset = below(random_words(len(self._room), self.seed, _OFFSETS, epoch), self._room)
        shard = np.searchsorted(self._ends, window, side="right")
        in_shard = (window - self._before[shard]) * self.block_size
        return self._first[shard] + offset[shard] + in_shard

    def tokens(self, step: int, row_slice: slice = slice(None)) -> np.ndarray:
        """(rows, block_size + 1) int64 tokens of `step`; `row_slice` picks this rank's rows."""
        starts = self.starts(step)[row_slice]
        return self.split.gather(starts, self.block_size + 1).astype(np.int64)


def eval_batches(
    split: TokenSplit, *, n_batches: int, batch_size: int, block_size: int, seed: int
) -> Iterator[np.ndarray]:
    """Yield `n_batches` fixed (batch_size, block_size + 1) int64 arrays of tokens to evaluate on.

    Drawn from all positions like "random" training batches, but the same at every evaluation.
    """
    split.require(block_size)
    n = split.n_starts(block_size)
    for i in range(n_batches):
        index = below(random_words(batch_size, seed, _EVAL, i), n)
        starts = split.positions(index, block_size)
        yield split.gather(starts, block_size + 1).astype(np.int64)


def random_words(n: int, *key: int) -> np.ndarray:
    """(n,) uint64 words for a key of up to five integers; negative ones count modulo 2**64.

    Two integers are Philox's key, three go into its counter above the words' own 64 bits, so
    that sequences of different keys never overlap.
    """
    k = [part % (1 << 64) for part in key] + [0] * (5 - len(key))
    words = np.array(k, np.uint64)
    counter = np.concatenate([np.zeros(1, np.uint64), words[2:]])
    return np.atleast_1d(np.random.Philox(key=words[:2], counter=counter).random_raw(n))


def below(words: np.ndarray, n: int | np.ndarray) -> np.ndarray:
    """int64 numbers in 0 .. n-1 from uint64 words: the high 64 bits of word * n (n < 2**63).

    Lemire, "Fast random integer generation in an interval", 2019, without the rejection: no
    number is likelier than another by more than a factor 1 + n / 2**64.
    """
    n = np.asarray(n, np.uint64)
    hi, lo, n_hi, n_lo = words >> _32, words & _MASK32, n >> _32, n & _MASK32
    middle = hi * n_lo + ((lo * n_lo) >> _32)
    carry = lo * n_hi + (middle & _MASK32)
    return (hi * n_hi + (middle >> _32) + (carry >> _32)).astype(np.int64)


class Permutation:
    """A random order of 0 .. n-1 in no memory: `order(i)` is the number at place i.

    A balanced Feistel network permutes the smallest power of four >= n (Luby and Rackoff, 1988);
    numbers that fall outside are sent through again until they are inside, which permutes
    0 .. n-1 (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). It
    takes fewer than four passes on average.
    """

    ROUNDS = 8

    def __init__(self, n: int, *key: int):
        self.n = n
        self._bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._bits)) - 1)
        self._keys = random_words(self.ROUNDS, *key)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """int64 numbers at int64 `places`, each in 0 .. n-1."""
        x = np.asarray(places).astype(np.uint64)
        if x.size and int(x.max()) >= self.n:
            raise IndexError(f"place {int(x.max())} not in 0 .. {self.n - 1}")
        x = self._pass(x)
        outside = np.flatnonzero(x >= self.n)
        while outside.size:
            x[outside] = self._pass(x[outside])
            outside = outside[x[outside] >= self.n]
        return x.astype(np.int64)

    def _pass(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._bits, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._bits) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea, Flood, 2014): every bit depends on every other."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Prefetcher:
    """`get(step)` for step = start_step, start_step + 1, ... in this order.

    `row_slice` picks this rank's rows; `depth` batches are read ahead. `background=None` chooses
    by device. Use as a context manager, or call `close`.
    """

    def __init__(
        self,
        batches: Batches,
        device: torch.device | str,
        *,
        start_step: int = 0,
        row_slice: slice = slice(None),
        depth: int = 2,
        background: bool | None = None,
    ):
        if depth < 1:
            raise ValueError(f"depth {depth} must be >= 1")
        self.batches, self.device, self.row_slice = batches, torch.device(device), row_slice
        cuda = self.device.type == "cuda"
        if cuda and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._next = start_step
        self._depth = depth
        self._copier: _CudaCopier | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[Future[tuple[torch.Tensor, torch.cuda.Event | None]]] = deque()
        if cuda if background is None else background:
            self._pool = ThreadPoolExecutor(1, "prefetch")
            if cuda:
                self._copier = _CudaCopier(self.device, depth)
                # Set per thread; without it, pinning memory would wake the first GPU.
                self._pool.submit(torch.cuda.set_device, self.device)
            for step in range(start_step, start_step + depth + 1):  # one more is being read
                self._ahead.append(self._pool.submit(self._read, step))

    def get(self, step: int) -> torch.Tensor:
        """(rows, block_size + 1) int64 tokens of `step` on the device.

        On CUDA the tensor is ready for work queued on the current stream. ValueError out of
        order; an error while reading is raised here, as itself.
        """
        if step != self._next:
            raise ValueError(f"asked for step {step}, the next one is {self._next}")
        if self._pool is None:
            tokens, copied = self._read(step)
        elif not self._ahead:
            raise RuntimeError("the prefetcher is closed")
        else:
            self._ahead.append(self._pool.submit(self._read, step + self._depth + 1))
            try:
                tokens, copied = self._ahead.popleft().result()
            except BaseException:
                self.close()
                raise
        self._next += 1
        if copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            tokens.record_stream(stream)  # its memory came from the copying stream's pool
        return tokens

    def close(self) -> None:
        """End the thread. May be called at any time, more than once."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._ahead.clear()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read(self, step: int) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        tokens = torch.from_numpy(self.batches.tokens(step, self.row_slice))
        return self._copier(tokens) if self._copier else (tokens.to(self.device), None)


class _CudaCopier:
    """Copies host tensors to the device on a stream of its own, through reused pinned buffers."""

    def __init__(self, device: torch.device, n_buffers: int):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.buffers: list[torch.Tensor | None] = [None] * n_buffers
        self.copied = [torch.cuda.Event() for _ in range(n_buffers)]
        self.turn = 0

    def __call__(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        i, self.turn = self.turn, (self.turn + 1) % len(self.buffers)
        buffer = self.buffers[i]
        if buffer is None:
            buffer = self.buffers[i] = torch.empty_like(tokens, pin_memory=True)
        self.copied[i].synchronize()  # the copy that last read this buffer
        buffer.copy_(tokens)
        with torch.cuda.stream(self.stream):
            on_device = buffer.to(self.device, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self.stream)
        self.copied[i] = done
        return on_device, done
