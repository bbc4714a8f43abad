import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data.permutation import Permutation, below, random_words

U64 = st.integers(0, 2**64 - 1)


def test_words_are_philox():
    """The first known answers of Philox4x64-10 in Random123: counter 0 key 0, and all ones."""
    # NumPy counts up before it draws, so its first words come from counter 1.
    ours = random_words(4, 0, 0)
    assert [hex(w) for w in ours.tolist()] == [hex(w) for w in philox([1, 0, 0, 0], [0, 0])]
    ones = 2**64 - 1
    assert philox([ones] * 4, [ones] * 2)[0] == 0x87B092C3013FE90B
    assert philox([0] * 4, [0] * 2)[0] == 0x16554D9ECA36314C


def philox(counter, key):
    """Philox4x64-10 after the paper, in plain integers."""
    mask = 2**64 - 1
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [(b >> 64) ^ c[1] ^ k[0], b & mask, (a >> 64) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return c


@given(st.tuples(U64, U64, U64), st.integers(1, 20))
def test_words_follow_the_key(key, n):
    words = random_words(n, *key)
    want = [w for i in range(1, 6) for w in philox([i, key[2], 0, 0], key[:2])][:n]
    assert words.tolist() == want


def test_different_keys_give_different_words():
    keys = [(), (1,), (0, 1), (0, 0, 1), (0, 0, 0, 1), (-1,), (2**63,)]
    assert len({tuple(random_words(4, *key).tolist()) for key in keys}) == len(keys)


@given(st.lists(U64, min_size=1, max_size=20), st.integers(1, 2**63 - 1))
def test_below_is_the_high_half_of_the_product(words, n):
    got = below(np.array(words, np.uint64), n)
    assert got.tolist() == [word * n >> 64 for word in words]


def test_below_takes_a_bound_for_each():
    words = random_words(3, 9)
    got = below(words, np.array([1, 10, 2**40]))
    assert got.tolist() == [int(w) * n >> 64 for w, n in zip(words, (1, 10, 2**40), strict=True)]


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1023, 1024, 1025, 4097, 100_003])
def test_every_number_once(n):
    order = Permutation(n, 5, 1, 2)(np.arange(n))
    assert np.array_equal(np.sort(order), np.arange(n))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3000), U64, U64)
def test_every_number_once_for_any_key(n, seed, epoch):
    order = Permutation(n, seed, 3, epoch)(np.arange(n))
    assert len(set(order.tolist())) == n and order.max() == n - 1


def test_places_can_be_asked_one_by_one():
    p = Permutation(1000, 1)
    whole = p(np.arange(1000))
    assert [int(p(np.array([i]))[0]) for i in range(0, 1000, 37)] == whole[::37].tolist()


def test_huge_domains_take_no_memory():
    n = 10**13 + 7
    got = Permutation(n, 3)(np.arange(n - 1000, n))
    assert len(set(got.tolist())) == 1000 and got.min() >= 0 and got.max() < n


def test_orders_look_random():
    """Uniform over places and values, neighbours and keys unrelated."""
    n, buckets = 4096, 16
    counts = np.zeros((buckets, buckets))
    for key in range(20):
        order = Permutation(n, key)(np.arange(n))
        np.add.at(counts, (np.arange(n) * buckets // n, order * buckets // n), 1)
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / n**0.5
        assert abs(np.corrcoef(order, Permutation(n, key + 1)(np.arange(n)))[0, 1]) < 5 / n**0.5
    expected = 20 * n / buckets**2
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 225 + 6 * (2 * 225) ** 0.5, chi2  # 15 x 15 degrees of freedom


def test_all_orders_of_three_occur():
    seen = {tuple(Permutation(3, key)(np.arange(3)).tolist()) for key in range(200)}
    assert len(seen) == 6


def test_places_outside_are_refused():
    with pytest.raises(IndexError):
        Permutation(10, 1)(np.array([10]))
