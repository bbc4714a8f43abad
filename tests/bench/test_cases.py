"""The cases of the kernel comparison: the truth is the reference's, whole or in pieces."""

import pytest
import torch

import fastgpt_kernels as ours
from bench import cases, rivals
from bench.cases import CASES
from fastgpt_kernels.registry import spec

CPU = torch.device("cpu")


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("piece", [1, 3000, 1 << 26])
def test_truth(op: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As autograd finds it for all rows at once; in fp32 inputs and sums are not rounded again."""
    monkeypatch.setattr(cases, "PIECE", piece)
    torch.manual_seed(0)
    case = CASES[op](CPU)
    leaves = [x.double().requires_grad_() for x in case.inputs]
    y = spec(op).reference(*leaves, *case.extras)
    outputs = list(y) if isinstance(y, tuple) else [y]
    gradients = torch.autograd.grad(outputs, leaves, [dy.double() for dy in case.dys])
    whole = case.pick([*(x.detach() for x in outputs), *gradients])
    # add_layer_norm's sum is rounded to fp32 in the truth.
    tolerance = 1e-5 if op == "add_layer_norm" else 1e-11
    found = case.truth()
    assert len(found) == len(whole) == len(outputs) + len(leaves)
    for x, want in zip(found, whole, strict=True):
        assert x.dtype == torch.float64 and x.shape == want.shape
        torch.testing.assert_close(x, want, atol=tolerance, rtol=tolerance)


def test_rows_that_are_kept() -> None:
    torch.manual_seed(0)
    case = CASES["cross_entropy"](CPU)
    loss, gradient = case.truth()
    assert loss.ndim == 0 and gradient.shape == (4, 500)
    x = case.inputs[0].double().requires_grad_()
    (whole,) = torch.autograd.grad(torch.nn.functional.cross_entropy(x, *case.extras), x)
    torch.testing.assert_close(gradient, whole[[0, 1, 32, 63]])


def test_who_computes_an_op() -> None:
    """On a CPU: fastgpt and eager, and of the others a reason."""
    case = cases.complete(CASES["layer_norm"](CPU))
    assert [p.name for p in case.providers] == ["fastgpt", "eager"]
    assert case.skipped["torch.compile"] == "not timed on the CPU"
    y = [p.forward(*case.inputs) for p in case.providers]
    torch.testing.assert_close(y[0], y[1])
    torch.testing.assert_close(y[0], ours.layer_norm(*case.inputs))
    attention = cases.complete(CASES["attention"](CPU))
    assert attention.skipped["fastgpt, hopper"] == attention.skipped["SDPA cuDNN"] == "needs a GPU"
    assert {attention.skipped["FA3"], attention.skipped["FA4"]} == {"not installed"}
    norm = cases.complete(CASES["layer_norm"](CPU), without="eager")
    assert [p.name for p in norm.providers] == ["fastgpt"] and norm.skipped["eager"] == "left out"


def test_flash_attentions_own_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stood in for: q, k and v come as (B, T, H, D), the result may have more with it."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple:
        y = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal
        )
        return y.transpose(1, 2), None

    monkeypatch.setattr(rivals, "imported", lambda path: attend)
    case = CASES["attention"](CPU)
    y = rivals.flash_attention(rivals.FA3, case)(*case.inputs)
    torch.testing.assert_close(y, case.bound()(*case.inputs))
    assert not rivals.installed("no_such.package") and rivals.installed("torch.nn")
