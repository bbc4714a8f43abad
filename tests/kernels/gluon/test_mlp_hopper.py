"""The MLP's kernels for Hopper in the emulator; the op around them is in ../test_mlp.py."""

from dataclasses import replace

import pytest
import torch

from fastgpt_kernels import mlp_hopper
from tests.kernels.gluon import cases, planted
from tests.kernels.gluon.mlp_cases import BUGS, PROBLEMS, Problem, results, run


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 103), marks=pytest.mark.slow)])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.M}x{p.N}x{p.K}-{p.dtype}")
def test_values_and_order_hold(problem: Problem, seeds: range) -> None:
    for seed in seeds:
        assert run(problem, seed) == "", f"seed {seed}"


def test_results_are_the_same_to_the_bit() -> None:
    """Whatever the schedule is, and however many programs there are."""
    problem = Problem(384, 520, 72)
    wanted = results(problem, 0)
    for seed in range(1, 6):
        found = results(replace(problem, programs=1 + seed % 3), seed)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


SOME = [
    pytest.param(bug, id=bug.name.strip(), marks=[pytest.mark.slow] * (i % 4 > 0))
    for i, bug in enumerate(BUGS)
]


@pytest.mark.parametrize("bug", SOME)
def test_planted_bugs_are_noticed(bug: planted.Bug) -> None:
    problem = Problem(384, 512, 192)
    with planted.planted(mlp_hopper, bug) as buggy:
        for seed in range(2):
            said = cases.found(run, problem, buggy, seed)
            assert said and bug.found_as in said, said


def test_planted_bugs_are_in_the_kernels() -> None:
    for bug in BUGS:
        planted.edited(mlp_hopper, bug)
