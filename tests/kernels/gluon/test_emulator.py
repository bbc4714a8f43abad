"""The emulator: right kernels pass, planted bugs are found and named, deadlocks tell who waits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastgpt_kernels import attention_hopper
from tests.kernels.gluon import cases, planted, small
from tests.kernels.gluon.emulator import emulated
from tests.kernels.gluon.planted import Bug, instead, without
from tests.kernels.gluon.values import KernelError, Pointer, Scalar, Tensor

SEEDS = 20
ROWS = 5 * 32 + 7  # five tiles and a ragged one through two slots


def doubled(module: Any, seed: int) -> None:
    x = torch.randn(ROWS, 32)
    with emulated(seed=seed):
        assert torch.equal(module.double(x), 2 * x)


def multiplied(module: Any, seed: int) -> None:
    a, b = torch.randn(64, 320).bfloat16(), torch.randn(320, 64).bfloat16()
    with emulated(seed=seed):
        c = module.product(a, b)
    assert (c - a.float() @ b.float()).abs().max() < 1e-4


@pytest.mark.parametrize("run", [doubled, multiplied])
def test_right_kernels_raise_no_alarm(run: Callable[[Any, int], None]) -> None:
    for seed in range(SEEDS):
        run(small, seed)


SMALL = [
    (doubled, without("        fence_async_shared()"), "no fence_async_shared between store of"),
    (doubled, without("        tma.store_wait(pendings=0)"), "race on ring"),
    (doubled, without("        mbarrier.wait(full.index(slot), i // 2 & 1)"), "race on ring"),
    (doubled, instead("32 * 32 * 4", "32 * 32 * 4 + 16"), "deadlock: "),
    (doubled, instead("i // 2 & 1 ^ 1", "i // 2 & 1"), "deadlock: "),
    (doubled, instead("load(x, [i * 32, 0]", "load(x, [i * 32]"), "coordinates"),
    (multiplied, instead("total = warpgroup_mma_wait(1,", "total = warpgroup_mma_wait(2,"), "race"),
    (multiplied, instead("warpgroup_mma_wait(0,", "warpgroup_mma_wait(1,"), "used before its wait"),
    (multiplied, instead("    for i in gl.static_range(3):\n        mbarrier.init", "    for i in gl.static_range(2):\n        mbarrier.init"), "not initialised"),  # noqa: E501
    (multiplied, instead("c + gl.expand_dims(rows, 1) * 64", "c + gl.expand_dims(rows, 1) * 65"), "out of bounds"),  # noqa: E501
]  # fmt: skip


@pytest.mark.parametrize(("run", "bug", "said"), SMALL, ids=[bug.name for _, bug, _ in SMALL])
def test_bugs_of_small_kernels(run: Callable[[Any, int], None], bug: Bug, said: str) -> None:
    """Whatever the seed."""
    with planted.planted(small, bug) as buggy:
        for seed in range(3):
            with pytest.raises(KernelError, match="buggy_small.py:") as error:
                run(buggy, seed)
            assert said in str(error.value)


def test_a_deadlock_tells_who_waits_for_what() -> None:
    bug = without("        mbarrier.arrive(empty.index(slot))")
    with planted.planted(small, bug) as buggy, pytest.raises(KernelError) as error:
        doubled(buggy, 0)
    text = str(error.value)
    assert text.startswith("deadlock: kernel waits for parity 1 of full[0] at buggy_small.py:")
    assert "_bring_rows[1] waits for parity 0 of empty[0] at buggy_small.py:" in text
    assert "(now in phase 1, 1 of 1 arrivals and 0 bytes to come)" in text


ATTENTION = [
    pytest.param(
        section, run, problem, bug,
        id=f"{section}, {bug.name.split(chr(10))[0]}", marks=[pytest.mark.slow] * (i % 4 > 0),
    )
    for section, run, problem, bugs in planted.ALL
    for i, bug in enumerate(bugs)
]  # fmt: skip


@pytest.mark.parametrize(("section", "run", "problem", "bug"), ATTENTION)
def test_bugs_of_attention(section: str, run: Any, problem: Any, bug: Bug) -> None:
    with planted.planted(attention_hopper, bug, section) as buggy:
        assert bug.found_as in (said := cases.found(run, problem, buggy, 1)) != "", said


def test_planted_bugs_are_in_the_kernels() -> None:
    """None of the list has become stale: each text is in its kernel's file, once."""
    assert sum(len(bugs) for *_, bugs in planted.ALL) >= 79
    for section, _, _, bugs in planted.ALL:
        for bug in bugs:
            planted.edited(attention_hopper, bug, section)
    with pytest.raises(ValueError, match="is 0 times in"):
        planted.edited(small, without("    no such line"))


def test_values_alone_tell_many_bugs() -> None:
    """Without clocks: what is read too early is NaN."""
    bug = without("            mbarrier.wait(q_full.index(q_slot), done // 2 & 1)")
    section, run, problem, _ = planted.ALL[0]
    with planted.planted(attention_hopper, bug, section) as buggy:
        said = [cases.found(run, problem, buggy, seed, strict=False) for seed in range(4)]
    assert any("off by nan" in s for s in said), said


def test_products_and_sums_are_rounded_once() -> None:
    """A product that was rounded, taken from the same product, leaves its rounding error."""
    x, c = Tensor(torch.tensor([1e30, 1.1])), 0.1803368800
    rounded = Tensor((x * c).t)
    Tensor.contract = True
    left = (x * c - rounded).t
    exact = x.t.double() * c - rounded.t.double()
    assert left[0] != 0 and torch.equal(left, exact.float())
    Tensor.contract = False
    assert (x * c - rounded).t.abs().max() == 0
    Tensor.contract = True


def test_scalars_and_pointers() -> None:
    assert isinstance(3 * Scalar(2) + 1, Scalar) and (Scalar(7) // 2).to(None) == 3
    data = torch.arange(6.0)
    _, offsets, _ = (1 + Pointer(data) + Tensor(torch.arange(3))).locate(None)
    assert offsets.tolist() == [1, 2, 3]
    with pytest.raises(KernelError, match="out of bounds"):
        (Pointer(data) + Tensor(torch.arange(7))).locate(None)
