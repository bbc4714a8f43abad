"""Gradients that add up in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastgpt_kernels import accumulate
from fastgpt_kernels.accumulate import add_product, adds_product, adds_rows, adds_scaled
from fastgpt_kernels.ops.matmul.record import eager_linear, eager_mlp
from fastgpt_kernels.reference import AddsTo
from tests.kernels.helpers import registered


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_add_product_is_summed_in_fp32(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dW's product: exact but for fp32 sums, in place, in slices of the widened factor or whole."""
    monkeypatch.setattr(accumulate, "WIDENED_ROWS", 4)
    a, b = torch.randn(50, 10, device=device).to(dtype).t(), torch.randn(50, 7, device=device)
    b = b.to(dtype)
    total = torch.full((10, 7), float("nan"), device=device)
    exact = a.double() @ b.double()
    for times in (1, 2):
        add_product(total, a, b, first=times == 1)
        torch.testing.assert_close(total.double(), times * exact, rtol=1e-5, atol=1e-5)


def calls(device: torch.device) -> dict[str, tuple[Tensor, ...]]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    rows = torch.tensor([3, 0, 3, 9, 3], device=device)
    return {
        "add_product": (random(10, 7), random(10, 50).half(), random(50, 7).half()),
        "add_scaled": (random(10, 7), random(10, 7), random()),
        "add_rows": (random(10, 7), rows, random(5, 7)),
    }


def test_add_in_place(device: torch.device) -> None:
    given = calls(device)
    for op, name in ((adds_product, "add_product"), (adds_scaled, "add_scaled"),
                     (adds_rows, "add_rows")):  # fmt: skip
        total, x, y = given[name]
        wanted = total.double()
        if name == "add_rows":
            for row, values in zip(x.tolist(), y, strict=True):
                wanted[row] += values
        else:
            wanted += x.double() @ y.double() if name == "add_product" else x * y
        assert op(total, x, y) is None
        torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["add_product", "add_scaled", "add_rows"])
def test_opcheck(name: str, device: torch.device) -> None:
    torch.library.opcheck(registered(name), calls(device)[name])


def test_a_gradient_goes_elsewhere() -> None:
    x, total = torch.randn(4, requires_grad=True), torch.ones(4)
    for _ in range(2):
        (AddsTo.apply(x, total) * 3).sum().backward()
    assert x.grad is None and torch.equal(total, torch.full((4,), 7.0))


def test_layers_add_their_weights_gradients() -> None:
    """Of 16-bit activations: as autograd's, but not rounded."""
    x = torch.randn(2, 5, 8).bfloat16()
    fc, proj, bias = torch.randn(16, 8), torch.randn(8, 16), torch.randn(16)
    dy = torch.randn(2, 5, 8).bfloat16()
    weights = [w.requires_grad_() for w in (fc, proj)]
    eager_mlp(x, fc, bias, proj, None).backward(dy)
    wanted = [w.grad for w in weights]
    for w in weights:
        w.grad = None
    sums = torch.zeros_like(fc), torch.zeros_like(proj)
    copies = fc.detach().bfloat16(), proj.detach().bfloat16()
    for _ in range(2):
        eager_mlp(x, fc, bias, proj, None, rounded=copies, add_to=sums).backward(dy)
    for w, total, dw in zip(weights, sums, wanted, strict=True):
        assert w.grad is None
        torch.testing.assert_close(total, 2 * dw, rtol=1e-2, atol=1e-2 * dw.abs().max().item())
    total = torch.zeros(8, 8)
    square = torch.randn(8, 8, requires_grad=True)
    eager_linear(x, square, add_to=total).backward(dy)
    exact = dy.flatten(0, 1).double().t() @ x.flatten(0, 1).double()
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-5)
