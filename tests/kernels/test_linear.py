"""Linear layers of fp32 weights: 16-bit weight copies, and gradients that accumulate in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt_kernels import linear as module
from fastgpt_kernels.linear import (
    accumulate_matmul,
    accumulate_rows,
    accumulate_scaled,
    add_matmul,
    linear,
    tied_embedding,
)
from fastgpt_kernels.reference import AddsTo


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_add_matmul_sums_in_fp32(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact except for fp32 sums, in place, in slices of the widened factor or whole."""
    monkeypatch.setattr(module, "WIDENED_ROWS", 4)
    a, b = torch.randn(50, 10, device=device).to(dtype).t(), torch.randn(50, 7, device=device)
    b = b.to(dtype)
    total = torch.full((10, 7), float("nan"), device=device)
    exact = a.double() @ b.double()
    for times in (1, 2):
        add_matmul(total, a, b, first=times == 1)
        torch.testing.assert_close(total.double(), times * exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", [accumulate_matmul, accumulate_scaled, accumulate_rows], ids=str)
def test_accumulating_ops(op, device: torch.device) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    total = random(10, 7)
    x, y = {
        accumulate_matmul: (random(10, 50).half(), random(50, 7).half()),
        accumulate_scaled: (random(10, 7), random()),
        accumulate_rows: (torch.tensor([3, 0, 3, 9, 3], device=device), random(5, 7)),
    }[op]
    torch.library.opcheck(op, (total.clone(), x, y))
    wanted = total.double()
    if op is accumulate_rows:
        for row, values in zip(x.tolist(), y, strict=True):
            wanted[row] += values
    else:
        wanted += x.double() @ y.double() if op is accumulate_matmul else x * y
    assert op(total, x, y) is None
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_gradient_goes_elsewhere() -> None:
    x, total = torch.randn(4, requires_grad=True), torch.ones(4)
    for _ in range(2):
        (AddsTo.apply(x, total) * 3).sum().backward()
    assert x.grad is None and torch.equal(total, torch.full((4,), 7.0))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_is_pytorchs(dtype: torch.dtype, bias: bool) -> None:
    """An fp32 weight, rounded here or by the caller; its gradient is not rounded."""
    x, weight = torch.randn(2, 5, 8).to(dtype).requires_grad_(), torch.randn(6, 8)
    b, dy = (torch.randn(6) if bias else None), torch.randn(2, 5, 6).to(dtype)
    want = F.linear(x, weight.to(dtype), None if b is None else b.to(dtype))
    (dx,) = torch.autograd.grad(want, x, dy)
    dw = dy.flatten(0, 1).double().t() @ x.detach().flatten(0, 1).double()
    for copy in (None, weight.to(dtype)):
        w = weight.clone().requires_grad_()
        y = linear(x, w, b, copy)
        found = torch.autograd.grad(y, (x, w), dy)
        assert torch.equal(y, want) and torch.equal(found[0], dx) and found[1].dtype == w.dtype
        torch.testing.assert_close(found[1].double(), dw, rtol=1e-2, atol=1e-2)


def test_linear_accumulates_in_main_grad() -> None:
    """Each pass adds its gradient, which is not rounded, and the weight has none."""
    x, weight = torch.randn(2, 5, 8).bfloat16(), torch.randn(6, 8, requires_grad=True)
    dy, total = torch.randn(2, 5, 6).bfloat16(), torch.zeros(6, 8)
    for _ in range(2):
        linear(x, weight, None, weight.detach().bfloat16(), total).backward(dy)
    assert weight.grad is None
    exact = dy.flatten(0, 1).double().t() @ x.flatten(0, 1).double()
    torch.testing.assert_close(total.double(), 2 * exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("accumulate", [True, False])
def test_tied_embedding(accumulate: bool) -> None:
    """The rows' gradients and the head's are one."""
    weight, idx = torch.randn(10, 4, requires_grad=True), torch.randint(10, (2, 3))
    d_rows, d_head = torch.randn(2, 3, 4), torch.randn(10, 4)
    total = torch.zeros(10, 4) if accumulate else None
    rows, head = tied_embedding(weight, idx, total)
    assert torch.equal(rows, weight[idx]) and torch.equal(head, weight)
    torch.autograd.backward((rows, head), (d_rows, d_head))
    found = weight.grad if total is None else weight.grad + total
    torch.testing.assert_close(found, d_head.index_put((idx,), d_rows, accumulate=True))


def test_second_derivatives_raise() -> None:
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(6, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="^linear: has no second derivative"):
        torch.autograd.grad(linear(x, weight).sum(), weight, create_graph=True)
    rows, head = tied_embedding(weight, torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="^tied_embedding: has no second derivative"):
        torch.autograd.grad(rows.sum() + head.sum(), weight, create_graph=True)
