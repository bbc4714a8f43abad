"""layer_norm and add_layer_norm against the fp64 oracle, in the interpreter or on a GPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt_kernels import add_layer_norm, layer_norm, reference
from fastgpt_kernels.launch import Config
from tests.kernels.helpers import (
    LAYOUTS,
    broadcast,
    check_op,
    errors,
    forward_backward,
    module_of,
    strided,
)

module = module_of("layer_norm")

# Sizes one, odd, prime, powers of two and one off; more rows than one step of the backward's loop.
SHAPES = [(1, 1), (5, 2), (3, 7), (2, 3, 31), (37, 64), (9, 127), (19, 257), (7, 768), (2, 1025)]


def tensors(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Returns x, residual, weight, bias."""
    C = shape[-1]
    sizes = (shape, shape, (C,), (C,))
    x, residual, weight, bias = (torch.randn(s, device=device).to(dtype) for s in sizes)
    return [x * 2 + 1, residual, weight, bias]


def check_both(inputs: list[Any], floor: float = 0.0) -> None:
    x, _, weight, bias = inputs
    dy, d_residual_out = torch.randn_like(x), torch.randn_like(x)
    check_op(layer_norm, reference.layer_norm, (x, weight, bias), (dy,), floor=floor)
    check_op(
        add_layer_norm, reference.add_layer_norm, tuple(inputs), (dy, d_residual_out), floor=floor
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_oracle(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    check_both(tensors(shape, dtype, device))


@pytest.mark.parametrize("parameters", ["fp32 masters", "half", "no bias"])
def test_parameters_in_another_dtype(parameters: str, device: torch.device) -> None:
    x, residual, weight, bias = tensors((11, 96), torch.float16, device)
    if parameters == "fp32 masters":
        check_both([x, residual, weight.float(), bias.float()])
    elif parameters == "half":
        check_both([x.float(), residual.float(), weight, bias.float()])
    else:
        check_both([x, residual, weight, None])


@pytest.mark.quick("*-(1,*", "*-(3,*", "*-both-0.3")
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("biases", ["both", "own", "none"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 40), (19, 257)], ids=str)
def test_the_end_of_a_branch(
    shape: tuple[int, ...], biases: str, dropout_p: float, dtype: torch.dtype, device: torch.device
) -> None:
    """The bias before the addition, and dropout, with the mask of the specification."""
    x, residual, weight, bias = tensors(shape, dtype, device)
    x_bias = torch.randn_like(weight) if biases != "none" else None
    inputs = (x, residual, weight, bias if biases == "both" else None, x_bias)
    dys = torch.randn_like(x), torch.randn_like(x)
    arguments = {"dropout_p": dropout_p, "seed": 2**40 + 3} if dropout_p else {}
    check_op(
        partial(add_layer_norm, **arguments), partial(reference.add_layer_norm, **arguments),
        inputs, dys,
    )  # fmt: skip


@pytest.mark.slow
def test_the_share_that_is_dropped(device: torch.device) -> None:
    x = torch.ones(200, 300, device=device)
    weight = torch.ones(300, device=device)
    _, a = add_layer_norm(x, torch.zeros_like(x), weight, dropout_p=0.2, seed=5)
    _, b = add_layer_norm(x, torch.zeros_like(x), weight, dropout_p=0.2, seed=6)
    kept = [(t != 0).float() for t in (a, b)]
    for t in kept:
        assert abs(t.mean().item() - 0.8) < 0.01
        assert (t.mean(0) - 0.8).abs().max() < 0.15 and (t.mean(1) - 0.8).abs().max() < 0.12
    assert abs((kept[0] * kept[1]).mean().item() - 0.64) < 0.01, "seeds draw apart"
    assert torch.equal(a[a != 0], torch.full_like(a[a != 0], 65536 / (65536 - 13107)))


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_large_and_small_values(scale: float, dtype: torch.dtype, device: torch.device) -> None:
    x, residual, weight, bias = tensors((6, 80), dtype, device)
    check_both([x * scale, residual * scale, weight, bias])


def test_statistics_survive_a_large_mean(device: torch.device) -> None:
    """One-pass variance, E[x^2] - E[x]^2, would lose every digit here."""
    x = torch.randn(4, 256, device=device) + 3e3
    y = layer_norm(x, torch.ones(256, device=device))
    oracle = reference.layer_norm(x.double(), torch.ones(256, device=device).double())
    assert errors(y, oracle)[0] < 1e-3


def test_identical_values_give_the_bias(device: torch.device) -> None:
    x = torch.full((3, 50), 7.0, device=device)
    bias = torch.randn(50, device=device)
    assert torch.equal(layer_norm(x, torch.randn(50, device=device), bias), bias.expand(3, 50))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_contiguous(layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    x, residual, weight, bias = tensors((4, 5, 48), torch.float32, device)
    x, residual, dy = layout(x), layout(residual), layout(torch.randn_like(x))
    check_op(layer_norm, reference.layer_norm, (x, strided(weight), bias), (dy,))
    inputs = (x, residual, weight, strided(bias))
    check_op(add_layer_norm, reference.add_layer_norm, inputs, (dy, broadcast(dy)))


@pytest.mark.parametrize("used", ["y", "residual_out"])
def test_one_output_unused(used: str, device: torch.device) -> None:
    inputs = tensors((6, 40), torch.float32, device)
    index = ("y", "residual_out").index(used)
    leaves = [t.requires_grad_() for t in inputs]
    wanted = leaves if used == "y" else leaves[:2]
    found = torch.autograd.grad(add_layer_norm(*leaves)[index].square().sum(), wanted)
    want = torch.autograd.grad(reference.add_layer_norm(*leaves)[index].square().sum(), wanted)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_no_rows(device: torch.device) -> None:
    inputs = tensors((0, 3, 16), torch.float32, device)
    outputs, gradients = forward_backward(add_layer_norm, inputs, [inputs[0], inputs[0]])
    assert [t.shape for t in outputs] == [(0, 3, 16)] * 2
    assert torch.equal(gradients[2], torch.zeros_like(gradients[2]))
    assert torch.equal(gradients[3], torch.zeros_like(gradients[3]))


@pytest.mark.parametrize("stages", [1, 3])
def test_rows_of_many_programs(
    stages: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More programs than a GPU has room for, the last with one row; rows copied ahead."""
    config = Config({"TILE": 32, "ROWS": 2, "STEPS": 2, "PROGRAMS_PER_SM": 37}, 1, stages)
    monkeypatch.setattr(module, "lookup", lambda *_: config)
    check_both(tensors((149, 40), torch.float32, device))


def test_residual_out_is_the_rounded_sum(dtype: torch.dtype, device: torch.device) -> None:
    x, residual, weight, bias = tensors((5, 33), dtype, device)
    assert torch.equal(add_layer_norm(x, residual, weight, bias)[1], x + residual)


X, W = torch.zeros(2, 8), torch.zeros(8)
BAD = [
    ((3, W), TypeError, "x must be a tensor, got int"),
    ((torch.zeros(()), W), ValueError, r"x must have shape \(\.\.\., C\)"),
    ((torch.zeros(2, 0), torch.zeros(0)), ValueError, r"x must .* 1 <= C <= 8192, got \(2, 0\)"),
    ((torch.zeros(1, 8193), W), ValueError, r"x must .* 1 <= C <= 8192, got \(1, 8193\)"),
    ((X, None), TypeError, "weight must be a tensor, got NoneType"),
    ((X, W[:7]), ValueError, r"weight must have shape \(8\), got \(7,\)"),
    ((X, W.double()), TypeError, "weight must be of dtype"),
    ((X, W.to("meta")), ValueError, "weight must be on cpu, got meta"),
    ((X, W, X), ValueError, r"bias must have shape \(8\), got \(2, 8\)"),
    ((X, W, W.int()), TypeError, "bias must be of dtype .*, got int32"),
]
BAD_BRANCH = [
    ({"residual": None}, TypeError, "residual must be a tensor, got NoneType"),
    ({"residual": X[:1]}, ValueError, r"residual must have shape \(2, 8\), got \(1, 8\)"),
    ({"residual": X.half()}, TypeError, "residual must be of dtype float32, got float16"),
    ({"x_bias": W[:3]}, ValueError, r"x_bias must have shape \(8\), got \(3,\)"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    ({"dropout_p": "a"}, TypeError, "dropout_p must be a float, got str"),
    ({"dropout_p": 0.1, "seed": 2**63}, ValueError, "seed must fit in 64 bits"),
    ({"dropout_p": 0.1, "seed": 0.5}, TypeError, "seed must be an int, a tensor or None"),
]


@pytest.mark.parametrize(("args", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_arguments(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^layer_norm: " + message):
        layer_norm(*args)


@pytest.mark.parametrize(("args", "error", "message"), BAD_BRANCH, ids=[m for *_, m in BAD_BRANCH])
def test_bad_branch(args: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^add_layer_norm: {message}"):
        add_layer_norm(**{"x": X, "residual": X, "weight": W, **args})


@pytest.mark.cuda
@pytest.mark.parametrize("parameters", ["fp32", "same"])
@pytest.mark.parametrize(
    "C", [1, 100, 255, 256, 512, 768, 1024, 1280, 1600, 2048, 4095, 4096, 8192]
)
def test_on_a_gpu(C: int, parameters: str, dtype: torch.dtype, device: torch.device) -> None:
    """More rows than all programs of the backward take in one step of their loops."""
    x, residual, weight, bias = tensors((5003, C), dtype, device)
    if parameters == "fp32":
        weight, bias = weight.float(), bias.float()
    # Of a single column the gradient is 0, except for the rounding of dy * weight times rstd, which
    # is 1 / sqrt(eps).
    floor = 2**-22 * weight.abs().max().item() * 1e-5**-0.5 if C == 1 else 0.0
    check_both([x, residual, weight, bias], floor)
