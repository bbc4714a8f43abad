import hashlib

import numpy as np
import pytest

from fastgpt.data.batches import Batches, eval_batches
from fastgpt.data.token_files import header, inspect
from fastgpt.data.tokens import TokenSplit
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


def test_another_process_draws_the_same(split, tmp_path):
    code = """
import sys; from pathlib import Path
from fastgpt.data.batches import Batches
from fastgpt.data.token_files import inspect
from fastgpt.data.tokens import TokenSplit
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
