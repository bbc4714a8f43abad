from __future__ import annotations

import hashlib
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data.loader import Batches, Permutation, Prefetcher, below, eval_batches, random_words
from fastgpt.data.token_files import TokenSplit, header, inspect
from fastgpt.errors import UserError

from .conftest import python


def split_of(folder, *lengths) -> TokenSplit:
    """A split whose token at position i is i."""
    at, files = 0, []
    for k, n in enumerate(lengths):
        path = folder / f"x_train_{k:06d}.bin"
        path.write_bytes(header(n, np.dtype("<u4")) + np.arange(at, at + n, dtype="<u4").tobytes())
        files.append(inspect(path))
        at += n
    return TokenSplit("train", files, folder)


@pytest.fixture
def split(tmp_path):
    return split_of(tmp_path, 500, 40, 9, 333)


def batches(split, **changes):
    options = {"rows_per_step": 6, "block_size": 8, "seed": 1337, **changes}
    return Batches(split, **options)


@pytest.mark.parametrize("sampling", ["random", "epochs"])
def test_windows_are_consecutive_tokens_of_one_shard(split, sampling):
    b = batches(split, sampling=sampling)
    ends = np.cumsum([500, 40, 9, 333])
    for step in range(60):
        starts, tokens = b.starts(step), b.tokens(step)
        assert tokens.shape == (6, 9) and tokens.dtype == np.int64 and starts.dtype == np.int64
        assert (tokens == starts[:, None] + np.arange(9)).all()
        shard = np.searchsorted(ends, tokens, side="right")
        assert (shard == shard[:, :1]).all()


@pytest.mark.parametrize("sampling", ["random", "epochs"])
def test_a_step_does_not_depend_on_history_or_ranks(split, sampling):
    b = batches(split, sampling=sampling)
    want = [b.tokens(step) for step in range(40)]
    again = batches(split, sampling=sampling)
    for step in (39, 0, 17, 17, 3):
        assert np.array_equal(again.tokens(step), want[step])
        parts = [again.tokens(step, slice(r, None, 3)) for r in range(3)]
        assert np.array_equal(np.stack(parts, 1).reshape(6, 9), want[step])


@pytest.mark.parametrize("sampling", ["random", "epochs"])
def test_seeds_and_steps_differ(split, sampling):
    seen = {
        tuple(batches(split, seed=seed, sampling=sampling).starts(step).tolist())
        for seed in (0, 1, -1, 2**40)
        for step in range(10)
    }
    assert len(seen) == 40


# The stream of batches is a promise: a run resumed with a later version must not change its data.
PROMISED = {
    "random": "d74ddfd2",
    "epochs": "9794c093",
    "eval": "b4f0584e",
}


def digest_of(kind, split) -> str:
    if kind == "eval":
        rows = list(eval_batches(split, n_batches=5, batch_size=4, block_size=8, seed=1))
    else:
        rows = [batches(split, sampling=kind).tokens(step) for step in range(50)]
    return hashlib.sha256(np.concatenate(rows).astype("<i8").tobytes()).hexdigest()[:8]


@pytest.mark.parametrize("kind", PROMISED)
def test_the_stream_is_the_promised_one(split, kind):
    assert digest_of(kind, split) == PROMISED[kind]


def test_the_smallest_orders_are_the_promised_ones():
    """Of the smallest power of four, so that few numbers are sent through again."""
    orders = [Permutation(n, 3)(np.arange(n)).tolist() for n in (2, 3, 4, 5)]
    assert orders == [[1, 0], [2, 0, 1], [2, 3, 1, 0], [2, 1, 3, 4, 0]]


def test_another_process_draws_the_same(split, tmp_path):
    code = """
import sys; from pathlib import Path
from fastgpt.data.loader import Batches
from fastgpt.data.token_files import inspect
from fastgpt.data.token_files import TokenSplit
d = Path(sys.argv[1])
s = TokenSplit("train", [inspect(p) for p in sorted(d.glob("*.bin"))], d)
print(Batches(s, rows_per_step=6, block_size=8, seed=1337).starts(7).tolist())
"""
    out, err = python(code, str(tmp_path)).communicate(timeout=60)
    assert out.strip() == str(batches(split).starts(7).tolist()), err


def test_random_covers_all_positions_evenly(tmp_path):
    split = split_of(tmp_path, 60, 30)
    b = batches(split, rows_per_step=1000)
    counts = np.zeros(90, int)
    for step in range(50):
        np.add.at(counts, b.starts(step), 1)
    allowed = np.r_[0:52, 60:82]
    assert counts[allowed].sum() == 50_000
    expected = 50_000 / len(allowed)
    assert abs(counts[allowed] - expected).max() < 6 * expected**0.5


@pytest.mark.parametrize("lengths", [(500,), (500, 40, 9, 333), (17, 17), (9,), (16, 15, 8, 10)])
@pytest.mark.parametrize("rows", [1, 7, 50])
def test_an_epoch_takes_each_window_once(tmp_path, lengths, rows):
    b = batches(split_of(tmp_path, *lengths), rows_per_step=rows, sampling="epochs")
    w = b.rows_per_epoch
    assert w >= sum(max(0, n // 8 - 1) for n in lengths) and w > 0
    starts = np.concatenate([b.starts(s) for s in range(-(-3 * w // rows))])
    grids = set()
    for e in range(3):
        mine = np.sort(starts[e * w : (e + 1) * w])
        gaps = np.diff(mine)
        assert (gaps >= 8).all(), "windows overlap"
        grids.add(tuple(mine.tolist()))
    if sum(lengths) > 100:
        assert len(grids) == 3, "the grid does not move"
        assert w * 8 > sum(lengths) - 2 * 8 * len(lengths)


def test_over_epochs_every_token_is_seen(tmp_path):
    b = batches(split_of(tmp_path, 100), rows_per_step=b_rows(100), sampling="epochs")
    seen = np.unique(np.concatenate([b.tokens(s).ravel() for s in range(60)]))
    assert seen.tolist() == list(range(100))


def b_rows(n):
    return n // 8 - 1


def test_epochs_of_a_huge_split_need_no_memory(split, monkeypatch):
    """10 billion tokens: only the counts matter."""

    class Huge:
        class File:
            count = 10**8

        shards = [File()] * 100
        require = staticmethod(lambda block_size: None)

    b = Batches(Huge(), rows_per_step=480, block_size=1024, seed=1, sampling="epochs")
    assert b.rows_per_epoch == 100 * (10**8 // 1024 - 1)
    starts = b.starts(b.rows_per_epoch // 480)  # across the end of an epoch
    assert len(np.unique(starts)) == 480 and starts.max() < 10**10


@pytest.mark.parametrize(
    "changes",
    [{"rows_per_step": 0}, {"block_size": 0}, {"sampling": "sorted"}],
)
def test_bad_arguments(split, changes):
    with pytest.raises(ValueError, match="rows_per_step|sampling"):
        batches(split, **changes)


def test_negative_steps_are_refused(split):
    with pytest.raises(ValueError, match="-1"):
        batches(split).starts(-1)


def test_too_long_blocks_are_refused(split):
    batches(split, block_size=499)
    with pytest.raises(UserError, match="499"):
        batches(split, block_size=500)
    with pytest.raises(UserError, match="499"):
        next(eval_batches(split, n_batches=1, batch_size=1, block_size=500, seed=0))


def test_evaluation_windows_are_fixed(split):
    def rows(**changes):
        options = {"n_batches": 4, "batch_size": 3, "block_size": 8, "seed": 0, **changes}
        return list(eval_batches(split, **options))

    one = rows()
    assert len(one) == 4 and one[0].shape == (3, 9) and one[0].dtype == np.int64
    assert np.array_equal(one, rows()) and not np.array_equal(one, rows(seed=1))
    assert np.array_equal(one, rows(n_batches=9)[:4])
    assert (np.diff(np.concatenate(one)) == 1).all()


# --- random words and orders


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


cuda = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


class Fake:
    """Batches whose tokens say which step and row they are; `fail` steps raise."""

    def __init__(self, fail=(), delay=0.0):
        self.asked, self.fail, self.delay = [], fail, delay

    def tokens(self, step, row_slice=slice(None)):
        time.sleep(self.delay)
        self.asked.append(step)
        if step in self.fail:
            raise OSError(f"disk died at {step}")
        return (step * 1000 + np.arange(24).reshape(6, 4))[row_slice].astype(np.int64)


def alive():
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not alive()


@pytest.mark.parametrize(("device", "background"), [("cpu", False), ("cpu", True), ("cpu", None)])
def test_steps_come_in_order(device, background):
    with Prefetcher(Fake(), device, start_step=5, background=background) as p:
        for step in range(5, 30):
            got = p.get(step)
            assert got.dtype == torch.int64 and got.shape == (6, 4)
            assert got[0, 0] == step * 1000


@pytest.mark.parametrize("device", [cuda])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_steps_on_the_device(device, depth):
    """With kernels of changing length queued between, so that buffers would be reused too early."""
    busy = torch.randn(2000, 2000, device=device)
    want, got = [], []
    with Prefetcher(Fake(), device, depth=depth) as p:
        for step in range(40):
            for _ in range(step % 5):
                busy = busy @ busy / 50
            batch = p.get(step)
            assert batch.is_cuda and batch.dtype == torch.int64
            got.append(batch * 2)
            want.append(Fake().tokens(step) * 2)
            del batch
    assert np.array_equal(torch.stack(got).cpu().numpy(), want)


@pytest.mark.parametrize("background", [False, True])
def test_rows_of_a_rank(background):
    with Prefetcher(Fake(), "cpu", row_slice=slice(1, None, 2), background=background) as p:
        assert p.get(0)[:, 0].tolist() == [4, 12, 20]


def test_reads_ahead_but_not_far():
    fake = Fake()
    with Prefetcher(fake, "cpu", depth=3, background=True) as p:
        p.get(0)
        deadline = time.monotonic() + 20
        while len(fake.asked) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert fake.asked == [0, 1, 2, 3, 4]  # one taken, three waiting, one in hand


def test_batches_keep_their_values():
    """A batch that is kept is not overwritten by later ones."""
    with Prefetcher(Fake(), "cpu", background=True) as p:
        kept = [p.get(step) for step in range(20)]
    assert [int(t[0, 0]) for t in kept] == [1000 * step for step in range(20)]


@pytest.mark.parametrize("background", [False, True])
def test_out_of_order_is_refused(background):
    with Prefetcher(Fake(), "cpu", start_step=3, background=background) as p:
        for wrong in (2, 4):
            with pytest.raises(ValueError, match=f"step {wrong}, the next one is 3"):
                p.get(wrong)
        p.get(3)
        with pytest.raises(ValueError, match="next one is 4"):
            p.get(3)


@pytest.mark.parametrize("background", [False, True])
def test_errors_surface_as_themselves(background):
    with Prefetcher(Fake(fail=(2,)), "cpu", background=background) as p:
        p.get(0)
        p.get(1)
        with pytest.raises(OSError, match="disk died at 2"):
            p.get(2)


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_close_ends_the_thread_whatever_it_does(taken):
    p = Prefetcher(Fake(delay=0.01), "cpu", background=True)
    for step in range(taken):
        p.get(step)
    p.close()
    p.close()
    assert not alive()
    with pytest.raises(RuntimeError, match="closed"):
        p.get(taken)


def test_close_after_an_error():
    p = Prefetcher(Fake(fail=(0,)), "cpu", background=True)
    with pytest.raises(OSError):
        p.get(0)
    p.close()
    with pytest.raises(RuntimeError, match="closed"):
        p.get(0)


def test_depth_is_at_least_one():
    with pytest.raises(ValueError, match="depth 0"):
        Prefetcher(Fake(), "cpu", depth=0)
