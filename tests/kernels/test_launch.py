"""Helpers of launchers: where kernels run, row views, argument errors."""

import pytest
import torch

from fastgpt_kernels import launch
from fastgpt_kernels.checks import check_tensor, refuse_interpreted_bf16
from fastgpt_kernels.launch import row_view

X = torch.randn(4, 8)


def test_meta_tensors_pretend_to_lie_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    x = torch.empty(2, device="meta", dtype=torch.bfloat16)
    with launch.pretend("sm_89"):
        assert launch.use_kernel(x) and not launch.use_kernel(X)
        assert (launch.arch_of(x), launch.multiprocessors(x)) == ("sm_89", 128)
        refuse_interpreted_bf16("op", x)
    assert not launch.use_kernel(x)
    assert (launch.arch_of(x), launch.multiprocessors(x)) == ("cpu", 2)


@pytest.mark.parametrize(
    ("x", "copied"),
    [
        (torch.randn(3, 4, 8), False),
        (torch.randn(3, 4, 16)[..., :8], False),
        (torch.randn(8).expand(5, 8), False),
        (torch.randn(4, 3, 8).transpose(0, 1), True),
        (torch.randn(8, 5).t(), True),
        (torch.randn(6, 1).expand(6, 8), True),
    ],
)
def test_row_view_copies_only_where_it_must(x: torch.Tensor, copied: bool) -> None:
    rows = row_view(x)
    assert rows.stride(1) == 1
    assert torch.equal(rows, x.reshape(-1, x.shape[-1]))
    assert (rows.data_ptr() != x.data_ptr()) == copied


def test_check_tensor_names_what_it_got_and_wants() -> None:
    check_tensor("op", "x", X, ndim=2, shape=(None, 8), dtypes=(torch.float32,), like=X)
    with pytest.raises(ValueError, match=r"^op: x must have shape \(\*, 7\), got \(4, 8\)$"):
        check_tensor("op", "x", X, shape=(None, 7))
    with pytest.raises(ValueError, match=r"^op: x must have 3 dimensions, got shape \(4, 8\)$"):
        check_tensor("op", "x", X, ndim=3)
