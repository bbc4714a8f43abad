"""The self-check lets right ops through and names what is wrong with others."""

from __future__ import annotations

import pytest
import torch

from fastgpt.model import ops
from fastgpt.model.selfcheck import disagreement
from tests.model.test_ops import CPU, interpreted


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/kernels run them for real")
@pytest.mark.parametrize("op", list(ops.EAGER))
def test_selfcheck_passes_the_kernels(op, monkeypatch):
    interpreted(monkeypatch)
    function = ops._implementation(op, "triton")
    assert disagreement(op, function, ops.EAGER[op], CPU, torch.float32, 32) == ""


def broken_gradient(op):
    """The op with a right result and gradients that are 1 % off; the optimizer's moment is."""
    if op == "adamw":
        return lambda groups, **options: ops.adamw(groups, **{**options, "betas": (0.899, 0.95)})

    def function(*args, **kwargs):
        out = ops.EAGER[op](*args, **kwargs)
        return (
            tuple(o * 1.01 - o.detach() * 0.01 for o in out)
            if isinstance(out, tuple)
            else (out * 1.01 - out.detach() * 0.01)
        )

    return function


@pytest.mark.parametrize("op", list(ops.EAGER))
def test_selfcheck_sees_what_is_wrong(op):
    eager = ops.EAGER[op]

    def check(function):
        return disagreement(op, function, eager, CPU, torch.float32, 32)

    def refuses(*args, **kwargs):
        raise RuntimeError("PassManager::run failed\nand more")

    assert check(eager) == ""
    assert "is off by 0.0" in check(broken_gradient(op))
    assert check(refuses) == "does not run here (PassManager::run failed)"


@pytest.mark.parametrize("op", list(ops.EAGER))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_eager_rows_are_right_in_low_precision(op, dtype):
    assert disagreement(op, ops.EAGER[op], ops.EAGER[op], CPU, dtype, 32) == ""
