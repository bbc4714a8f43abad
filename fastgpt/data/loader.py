"""Batches of tokens, pure functions of seed and step, read ahead while the device computes.

Restarts, the number of GPUs and NumPy's version do not change them, since random numbers and orders
are functions of keys. Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011) makes words from a key and a counter. NumPy promises these, but not its distributions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch

from fastgpt.data.token_files import TokenSplit

# The second half of Philox's key differs per use, so that no two uses share words.
_STARTS, _OFFSETS, _ORDER, _EVAL = 1, 2, 3, 4


class Batches:
    """Training batches of a split, of `rows_per_step` windows of `block_size` + 1 tokens.

    "random" draws windows with replacement from all positions, as nanoGPT does. "epochs" cuts the
    shards into windows that lie end to end (a window's last target is the next one's first input)
    and takes each once per epoch, in a fresh order. Each epoch moves the cuts by a fresh offset,
    and leaves out up to two windows per shard.

    start  a step and the rows seen before it, which other batch sizes may have made before a resume
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        rows_per_step: int,
        block_size: int,
        seed: int,
        sampling: Literal["random", "epochs"] = "random",
        start: tuple[int, int] = (0, 0),
    ):
        split.require(block_size)
        self.split, self.rows_per_step, self.block_size = split, rows_per_step, block_size
        self.seed, self.sampling = seed, sampling
        self._start_step, self._start_row = start
        counts = np.array([file.count for file in split.shards], np.int64)
        windows = np.maximum(counts // block_size - 1, counts > block_size)
        self._n_offsets = counts - windows * block_size  # at each, all windows and a target fit
        self._first = np.cumsum(counts) - counts
        self._ends = np.cumsum(windows)
        self._before = self._ends - windows
        self.rows_per_epoch = int(self._ends[-1])  # of "epochs"

    def starts(self, step: int) -> np.ndarray:
        """Returns (rows_per_step,) int64 positions of the windows of `step` (>= 0)."""
        rows = self.rows_per_step
        if self.sampling == "random":
            return _random_starts(self.split, rows, self.block_size, self.seed, _STARTS, step)
        row = self._start_row + (step - self._start_step) * rows + np.arange(rows, dtype=np.int64)
        epoch, place = np.divmod(row, self.rows_per_epoch)
        epochs = range(int(epoch[0]), int(epoch[-1]) + 1)
        return np.concatenate([self._epoch_starts(e, place[epoch == e]) for e in epochs])

    def _epoch_starts(self, epoch: int, place: np.ndarray) -> np.ndarray:
        window = shuffled(place, self.rows_per_epoch, self.seed, _ORDER, epoch)
        words = random_words(len(self._n_offsets), self.seed, _OFFSETS, epoch)
        shard = np.searchsorted(self._ends, window, side="right")
        in_shard = (window - self._before[shard]) * self.block_size
        return self._first[shard] + below(words, self._n_offsets)[shard] + in_shard

    def tokens(self, step: int, row_slice: slice = slice(None)) -> np.ndarray:
        """Returns (rows, block_size + 1) int64 tokens; `row_slice` picks this rank's rows."""
        starts = self.starts(step)[row_slice]
        return self.split.gather(starts, self.block_size + 1).astype(np.int64)


def eval_batches(
    split: TokenSplit, *, n_batches: int, batch_size: int, block_size: int, seed: int
) -> Iterator[np.ndarray]:
    """Yields `n_batches` fixed (batch_size, block_size + 1) int64 arrays of tokens to evaluate on.

    They are drawn from all positions like "random" training batches.
    """
    split.require(block_size)
    for i in range(n_batches):
        starts = _random_starts(split, batch_size, block_size, seed, _EVAL, i)
        yield split.gather(starts, block_size + 1).astype(np.int64)


def _random_starts(split: TokenSplit, n: int, block_size: int, *key: int) -> np.ndarray:
    """Returns (n,) int64 positions, drawn with replacement from all starts of windows."""
    index = below(random_words(n, *key), split.n_starts(block_size))
    return split.positions(index, block_size)


def random_words(n: int, *key: int) -> np.ndarray:
    """Returns (n,) uint64 words for a key of up to five integers, modulo 2**64.

    Two integers are Philox's key. Three go into its counter above the words' own 64 bits, so
    that sequences of different keys never overlap.
    """
    k = [part % (1 << 64) for part in key] + [0] * (5 - len(key))
    words = np.array(k, np.uint64)
    counter = np.concatenate([np.zeros(1, np.uint64), words[2:]])
    return np.atleast_1d(np.random.Philox(key=words[:2], counter=counter).random_raw(n))


def below(words: np.ndarray, n: int | np.ndarray) -> np.ndarray:
    """Returns int64 numbers in 0 .. n-1, the high 64 bits of uint64 word * n (n < 2**63).

    As in Lemire, "Fast random integer generation in an interval", 2019, but without the rejection.
    No number is likelier than another by more than a factor of 1 + n / 2**64.
    """
    products = words.astype(object) * np.asarray(n).astype(object)  # 128 bits, as Python's integers
    return (products >> 64).astype(np.int64)


def shuffled(places: np.ndarray, n: int, *key: int) -> np.ndarray:
    """Returns the int64 numbers at int64 `places` of a random order of 0 .. n-1.

    It takes no memory. A balanced Feistel network permutes the smallest power of four >= n (Luby
    and Rackoff, 1988); numbers outside are sent through again until they are inside (cycle walking:
    Black and Rogaway, "Ciphers with arbitrary finite domains", 2002), less than four times.
    """
    bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << bits) - np.uint64(1)
    round_keys = random_words(8, *key)
    x = places.astype(np.uint64)
    outside = np.arange(len(x))
    while outside.size:
        left, right = x[outside] >> bits, x[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        x[outside] = (left << bits) | right
        outside = outside[x[outside] >= n]
    return x.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Returns SplitMix64's finalizer of x, which mixes all bits (Steele, Lea, Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Prefetcher:
    """Reader of batches ahead, of which `get(step)` returns start_step, start_step + 1, and so on.

    `row_slice` picks this rank's rows. A thread keeps `depth` batches ready (on CUDA 2 by default).
    With 0, the default on a CPU, `get` reads at once. To CUDA the thread copies int64 on a stream
    of its own, so the training stream has no cast to launch.
    """

    def __init__(
        self,
        batches: Batches,
        device: torch.device | str,
        *,
        start_step: int = 0,
        row_slice: slice = slice(None),
        depth: int | None = None,
    ):
        self.batches, self.device, self.row_slice = batches, torch.device(device), row_slice
        self._next = start_step
        self._stream: torch.cuda.Stream | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[Future[tuple[torch.Tensor, torch.cuda.Event | None]]] = deque()
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
            self.device = self._stream.device
        self._depth = depth if depth is not None else 2 if self._stream else 0
        if self._depth:
            self._pool = ThreadPoolExecutor(1, "prefetch")
            if self._stream:
                # Without a thread's own device, pinning memory would wake the first GPU.
                self._pool.submit(torch.cuda.set_device, self.device)
            for step in range(start_step, start_step + self._depth + 1):  # one more is being read
                self._ahead.append(self._pool.submit(self._read, step))

    def get(self, step: int) -> torch.Tensor:
        """Returns (rows, block_size + 1) int64 tokens of `step` on the device.

        On CUDA the tensor is ready for work queued on the current stream. Raises ValueError out
        of order, and errors of reading as themselves.
        """
        if step != self._next:
            raise ValueError(f"asked for step {step}, the next one is {self._next}")
        if self._pool is None:
            tokens, copied = self._read(step)
        else:
            self._ahead.append(self._pool.submit(self._read, step + self._depth + 1))
            tokens, copied = self._ahead.popleft().result()
        self._next += 1
        if copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            tokens.record_stream(stream)  # its memory came from the copying stream's pool
        return tokens

    def close(self) -> None:
        """Ends the thread. Further calls have no effect."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _read(self, step: int) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        tokens = torch.from_numpy(self.batches.tokens(step, self.row_slice))
        if self._stream is None:
            return tokens.to(self.device), None
        with torch.cuda.stream(self._stream):
            # PyTorch reuses pinned memory once the copy from it is done.
            on_device = tokens.pin_memory().to(self.device, non_blocking=True)
            return on_device, self._stream.record_event()
