"""Random numbers and random orders that are functions of their keys alone.

Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) makes 64-bit
words from a key and a counter. Only the raw words are used: NumPy promises these, but not what its
distributions make of them.
"""

from __future__ import annotations

import numpy as np

_MASK32 = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


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
