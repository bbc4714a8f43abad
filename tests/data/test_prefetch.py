import threading
import time

import numpy as np
import pytest
import torch

from fastgpt.data.prefetch import Prefetcher

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
