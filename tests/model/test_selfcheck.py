"""The self-check lets right ops through and names what is wrong with others."""

from __future__ import annotations

import pytest
import torch

from fastgpt.model.selfcheck import disagreement, few_rows
from fastgpt.train.adamw import FusedAdamW
from fastgpt_kernels import OPS
from fastgpt_kernels.record import Sizes, record
from tests.model.test_ops import CPU, interpreted

SMALL = Sizes(3, 40, 2, 64, 300, 384)
FLAGGED = [name for name, op in OPS.items() if op.chosen_by]


def check(op, function, dtype=torch.float32):
    return disagreement(record(op), function, CPU, dtype, SMALL)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/kernels run them for real")
@pytest.mark.parametrize("op", FLAGGED)
def test_selfcheck_passes_the_kernels(op, monkeypatch):
    interpreted(monkeypatch)
    assert check(op, FusedAdamW if op == "adamw" else record(op).ours) == ""


def broken(op):
    """The op with gradients that are 1 % off, or if it has none with such a result."""
    eager, chosen_by = record(op).eager, OPS[op].chosen_by
    if op == "adamw":
        return lambda groups, **options: eager(groups, **{**options, "betas": (0.899, 0.95)})

    def function(*args, **kwargs):
        out = eager(*args, **kwargs)
        if chosen_by == "inference":
            return out * 1.01
        return (
            tuple(o * 1.01 - o.detach() * 0.01 for o in out)
            if isinstance(out, tuple)
            else (out * 1.01 - out.detach() * 0.01)
        )

    return function


@pytest.mark.parametrize("op", FLAGGED)
def test_selfcheck_sees_what_is_wrong(op):
    def refuses(*args, **kwargs):
        raise RuntimeError("PassManager::run failed\nand more")

    assert check(op, record(op).eager) == ""
    assert "is off by 0.0" in check(op, broken(op))
    assert check(op, refuses) == "does not run here (PassManager::run failed)"


@pytest.mark.parametrize("op", FLAGGED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_eager_rows_are_right_in_low_precision(op, dtype):
    assert check(op, record(op).eager, dtype) == ""


def test_a_check_is_of_the_same_model_on_few_rows():
    sizes = few_rows(Sizes(64, 1024, 25, 1600))
    assert (sizes.n_head, sizes.n_embd, sizes.vocab_size) == (25, 1600, 50257)
    assert sizes.tokens < 2000 and sizes.block_size % 16
