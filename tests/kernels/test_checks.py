"""Argument errors name op, argument, value and what is wanted."""

import pytest
import torch

from fastgpt_kernels.checks import check_tensor

X = torch.randn(4, 8)


def test_check_tensor_names_what_it_got_and_wants() -> None:
    check_tensor("op", "x", X, ndim=2, shape=(None, 8), dtypes=(torch.float32,), like=X)
    check_tensor("op", "x", None, optional=True)
    with pytest.raises(ValueError, match=r"^op: x must have shape \(\*, 7\), got \(4, 8\)$"):
        check_tensor("op", "x", X, shape=(None, 7))
    with pytest.raises(ValueError, match=r"^op: x must have 3 dimensions, got shape \(4, 8\)$"):
        check_tensor("op", "x", X, ndim=3)
    with pytest.raises(TypeError, match="^op: x must be of dtype int64, got float32$"):
        check_tensor("op", "x", X, dtypes=(torch.int64,))
    with pytest.raises(ValueError, match="^op: x must be on cpu, got meta$"):
        check_tensor("op", "x", X.to("meta"), like=X)
