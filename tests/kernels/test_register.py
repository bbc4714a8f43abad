"""What registering an op takes care of besides the op."""

import pytest
import torch

from fastgpt_kernels import register


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.12.1"])
def test_old_inductors_do_not_write_out_an_ops_arguments(version, monkeypatch):
    """They do it eagerly, of all that an argument was computed from: twice as long a layer."""
    from torch._inductor.exc import OperatorIssue

    class Argument:
        def __str__(self) -> str:
            raise AssertionError("written out")

    whole = OperatorIssue.__dict__["operator_str"]
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    try:
        shapes = register._curbed(lambda x: x + 1)
        assert shapes(1) == 2
        assert OperatorIssue.operator_str("fastgpt.op", [Argument()], {}) == "target: fastgpt.op"
    finally:
        OperatorIssue.operator_str = whole  # type: ignore[method-assign]


@pytest.mark.parametrize("version", ["2.13.0", "2.15.0+cu130"])
def test_new_inductors_are_left_alone(version, monkeypatch):
    def shapes(x):
        return x

    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    assert register._curbed(shapes) is shapes
