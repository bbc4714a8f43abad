"""The MLP's fused implementations on a GPU: real sizes, repeatability, graphs, compilation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt_kernels import launch, reference
from fastgpt_kernels.registry import Sizes, spec
from tests.kernels.helpers import assert_accurate, captured, forward_backward

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda", 0)
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(params=["hopper", "cublaslt"])
def fused(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    mlp = spec("mlp").implementations[request.param]
    if reason := mlp.unsupported_reason(Sizes(), torch.bfloat16, launch.arch(0)):
        pytest.skip(reason)
    return mlp.function


def inputs(M: int, C: int, dtype: torch.dtype, bias: bool = True) -> list[Any]:
    """Returns x (M, C), W1, b1, W2, b2, and dy (M, C); weights and biases are fp32."""
    shapes = (M, C), (4 * C, C), (4 * C,), (C, 4 * C), (C,), (M, C)
    x, fc, fc_bias, proj, proj_bias, dy = (torch.randn(s, device=CUDA) for s in shapes)
    biases = (fc_bias, proj_bias) if bias else (None, None)
    weights = fc * C**-0.5, biases[0], proj * (4 * C) ** -0.5, biases[1]
    return [x.to(dtype), *weights, dy.to(dtype)]


@HALF
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("M", "C"), [(32768, 768), (1021, 768), (129, 1600), (300, 72), (1, 768)])
def test_accuracy(
    M: int, C: int, bias: bool, dtype: torch.dtype, fused: Callable[..., Tensor]
) -> None:
    """y, and the gradients of x, the weights and the biases, against fp64."""
    *given, dy = inputs(M, C, dtype, bias)
    exact = [None if t is None else t.double() for t in given]
    results = [
        forward_backward(f, arguments, [dy.to(arguments[0].dtype)])
        for f, arguments in ((fused, given), (reference.mlp, given), (reference.mlp, exact))
    ]
    for part in (0, 1):
        for x, same, oracle in zip(*(result[part] for result in results), strict=True):
            assert_accurate(x, same, oracle, name=str(tuple(oracle.shape)))


def step_of(fused: Callable[..., Tensor], given: list[Any]) -> Callable[[], list[Tensor]]:
    """Returns a function that computes y and all gradients, in main_grads those of weights."""
    *tensors, dy = given
    leaves = [t.requires_grad_() for t in tensors]
    copies = leaves[1].detach().to(dy.dtype), leaves[3].detach().to(dy.dtype)
    main_grads = torch.zeros_like(leaves[1]), torch.zeros_like(leaves[3])

    def step() -> list[Tensor]:
        for total in main_grads:
            total.zero_()
        y = fused(*leaves, weights_bf16=copies, main_grads=main_grads)
        gradients = torch.autograd.grad(y, [leaves[0], leaves[2], leaves[4]], dy)
        return [y.detach(), *gradients, *main_grads]

    return step


@HALF
def test_twenty_runs_are_the_same_to_the_bit(
    dtype: torch.dtype, fused: Callable[..., Tensor]
) -> None:
    step = step_of(fused, inputs(8192, 768, dtype))
    wanted = [t.clone() for t in step()]
    for _ in range(20):
        assert all(map(torch.equal, step(), wanted))


def test_a_graph_replays(fused: Callable[..., Tensor]) -> None:
    """On other values than those that were captured."""
    given = inputs(2048, 768, torch.bfloat16)
    step = step_of(fused, given)
    graph, found = captured(step)
    with torch.no_grad():
        given[0].copy_(torch.randn_like(given[0]))
    graph.replay()
    found = [t.clone() for t in found]
    assert all(map(torch.equal, found, step()))


def test_compiled(fused: Callable[..., Tensor]) -> None:
    *given, dy = inputs(2048, 768, torch.bfloat16)
    compiled = torch.compile(lambda *a: fused(*a) * 2, fullgraph=True)
    found = forward_backward(compiled, given, [dy])
    wanted = forward_backward(lambda *a: fused(*a) * 2, given, [dy])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
