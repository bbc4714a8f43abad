import hashlib
import threading
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data.loader import Batches, Prefetcher, eval_batches, shuffled
from fastgpt.data.token_files import TokenFile, TokenSplit, header
from fastgpt.errors import UserError


def split_of(folder, *lengths) -> TokenSplit:
    """Returns a split whose token at position i is i."""
    at, files = 0, []
    for k, n in enumerate(lengths):
        path = folder / f"x_train_{k:06d}.bin"
        path.write_bytes(header(n, np.dtype("<u4")) + np.arange(at, at + n, dtype="<u4").tobytes())
        files.append(TokenFile(path))
        at += n
    return TokenSplit("train", files)


@pytest.fixture
def split(tmp_path):
    return split_of(tmp_path, 500, 40, 9, 333)


def batches(split, **changes):
    return Batches(split, **{"rows_per_step": 6, "block_size": 8, "seed": 1337, **changes})


@pytest.mark.parametrize("sampling", ["random", "epochs"])
def test_a_step_depends_on_seed_and_step_alone(split, sampling):
    b = batches(split, sampling=sampling)
    want = [b.tokens(step) for step in range(40)]
    again = batches(split, sampling=sampling)
    for step in (39, 0, 17, 17, 3):
        assert np.array_equal(again.tokens(step), want[step])
        parts = [again.tokens(step, slice(r, None, 3)) for r in range(3)]
        assert np.array_equal(np.stack(parts, 1).reshape(6, 9), want[step])
    seen = {
        tuple(batches(split, seed=seed, sampling=sampling).starts(step).tolist())
        for seed in (0, 1, -1, 2**40)
        for step in range(10)
    }
    assert len(seen) == 40


# The stream of batches is a promise: a run resumed with a later version must not change its data.
PROMISED = {"random": "d74ddfd2", "epochs": "9794c093", "eval": "b4f0584e"}


@pytest.mark.parametrize("kind", PROMISED)
def test_the_stream_is_the_promised_one(split, kind):
    if kind == "eval":
        rows = list(eval_batches(split, n_batches=5, batch_size=4, block_size=8, seed=1))
    else:
        rows = [batches(split, sampling=kind).tokens(step) for step in range(50)]
    digest = hashlib.sha256(np.concatenate(rows).astype("<i8").tobytes()).hexdigest()
    assert digest[:8] == PROMISED[kind]


@pytest.mark.parametrize("lengths", [(500,), (500, 40, 9, 333), (17, 17), (9,), (16, 15, 8, 10)])
@pytest.mark.parametrize("rows", [1, 7, 50])
def test_an_epoch_takes_each_window_once(tmp_path, lengths, rows):
    b = batches(split_of(tmp_path, *lengths), rows_per_step=rows, sampling="epochs")
    w = b.rows_per_epoch
    assert w >= max(1, sum(n // 8 - 1 for n in lengths))
    starts = np.concatenate([b.starts(s) for s in range(-(-3 * w // rows))])
    epochs = [np.sort(starts[e * w : (e + 1) * w]) for e in range(3)]
    assert all((np.diff(epoch) >= 8).all() for epoch in epochs), "windows overlap"
    if sum(lengths) > 100:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3, "the grid does not move"


def test_evaluation_windows_are_fixed(split):
    with pytest.raises(UserError, match="499"):
        next(eval_batches(split, n_batches=1, batch_size=1, block_size=500, seed=0))
    one, two, other = (
        list(eval_batches(split, n_batches=n, batch_size=3, block_size=8, seed=seed))
        for n, seed in ((4, 0), (9, 0), (4, 1))
    )
    assert len(one) == 4 and one[0].shape == (3, 9) and one[0].dtype == np.int64
    assert np.array_equal(one, two[:4]) and not np.array_equal(one, other)
    assert (np.diff(np.concatenate(one)) == 1).all()


# --- random words and orders

U64 = st.integers(0, 2**64 - 1)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 100) | st.integers(1, 5000), U64, U64)
def test_every_number_once(n, seed, epoch):
    order = shuffled(np.arange(n), n, seed, 3, epoch)
    assert np.array_equal(np.sort(order), np.arange(n))
    some = np.arange(0, n, 37)
    assert np.array_equal(shuffled(some, n, seed, 3, epoch), order[some])


def test_a_long_order_is_the_promised_one():
    n = 10**13 + 7  # takes no memory
    assert shuffled(np.arange(n - 1, n), n, 3).tolist() == [3951720760461]


# --- reading ahead


class Fake:
    """Batches whose tokens say which step and row they are; `fail` steps raise."""

    def __init__(self, fail=()):
        self.asked, self.fail = [], fail

    def tokens(self, step, row_slice=slice(None)):
        self.asked.append(step)
        if step in self.fail:
            raise OSError(f"disk died at {step}")
        return (step * 1000 + np.arange(24).reshape(6, 4))[row_slice].astype(np.int64)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.mark.parametrize("depth", [None, 0, 1, 2, 5])
def test_steps_come_in_order_and_keep_their_values(depth):
    with closing(Prefetcher(Fake(), "cpu", start_step=5, depth=depth)) as p:
        kept = [p.get(step) for step in range(5, 30)]
        for wrong in (29, 31):
            with pytest.raises(ValueError, match=f"step {wrong}, the next one is 30"):
                p.get(wrong)
    assert all(t.dtype == torch.int64 and t.shape == (6, 4) for t in kept)
    assert [int(t[0, 0]) for t in kept] == [1000 * step for step in range(5, 30)]
    rows = slice(1, None, 2)
    with closing(Prefetcher(Fake(fail=(1,)), "cpu", row_slice=rows, depth=depth)) as p:
        assert p.get(0)[:, 0].tolist() == [4, 12, 20]
        with pytest.raises(OSError, match="disk died at 1"):
            p.get(1)
    if depth:  # read ahead, but not far
        assert p.batches.asked[-1] <= 1 + depth + 1


@pytest.mark.cuda
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_steps_on_the_device(depth):
    """Queues kernels of changing length, so that memory would be reused too early."""
    busy = torch.randn(2000, 2000, device="cuda")
    want, got = [], []
    with closing(Prefetcher(Fake(), "cuda", depth=depth)) as p:
        for step in range(40):
            for _ in range(step % 5):
                busy = busy @ busy / 50
            batch = p.get(step)
            assert batch.is_cuda and batch.dtype == torch.int64
            got.append(batch * 2)
            want.append(Fake().tokens(step) * 2)
            del batch
    assert np.array_equal(torch.stack(got).cpu().numpy(), want)
