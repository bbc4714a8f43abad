"""linear and mlp on a GPU with TMA: GPT-2's layers at their own size, repeatability, graphs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt_kernels import launch, linear, mlp, reference
from fastgpt_kernels.ops.matmul.configs import runs_on
from tests.kernels.helpers import check_op, forward_backward

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        torch.cuda.is_available() and not runs_on(launch.arch(0)), reason="a GPU without TMA"
    ),
]
CUDA = torch.device("cuda", 0)
TOKENS = 8192
# (features in, features out) of the layers of GPT-2 124M and 1558M; the second has odd tile counts.
LAYERS = [(768, 2304), (768, 768), (768, 3072), (3072, 768), (1600, 4800), (6400, 1600)]


@pytest.fixture(autouse=True)
def poison() -> None:
    """Not here: filling gigabytes with NaN hides nothing that the small tests do not show."""


def layer(K: int, N: int, dtype: torch.dtype, rows: int = TOKENS) -> tuple[list[Any], Tensor]:
    """([x, weight, bias], dy); parameters in fp32, of values that 16 bits hold."""
    x, weight, bias, dy = (
        torch.randn(s, device=CUDA) for s in ((rows, K), (N, K), (N,), (rows, N))
    )
    return [x.to(dtype), (weight / K**0.5).to(dtype).float(), bias], dy.to(dtype)


@pytest.mark.parametrize(("K", "N"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layers_of_gpt2(K: int, N: int, dtype: torch.dtype) -> None:
    inputs, dy = layer(K, N, dtype)
    check_op(linear, reference.linear, inputs, (dy,))


@pytest.mark.parametrize("rows", [1, 127, 129, 4097])
def test_rows_that_fill_no_tile(rows: int) -> None:
    inputs, dy = layer(768, 768, torch.bfloat16, rows)
    check_op(linear, reference.linear, inputs, (dy,))


@pytest.mark.parametrize("C", [768, 1600])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_mlp_of_gpt2(C: int, approximate: str) -> None:
    (x, fc, fc_bias), _ = layer(C, 4 * C, torch.bfloat16)
    (_, proj, proj_bias), dy = layer(4 * C, C, torch.bfloat16)
    check_op(mlp, reference.mlp, (x, fc, fc_bias, proj, proj_bias, approximate), (dy,))


def steps() -> list[tuple[Callable[..., Tensor], list[Any], Tensor]]:
    inputs, dy = layer(768, 768, torch.bfloat16)  # the fewest tiles: dW is split
    (x, fc, fc_bias), _ = layer(768, 3072, torch.bfloat16)
    (_, proj, proj_bias), d_mlp = layer(3072, 768, torch.bfloat16)
    return [(linear, inputs, dy), (mlp, [x, fc, fc_bias, proj, proj_bias], d_mlp)]


def test_the_same_bits_each_time() -> None:
    for op, inputs, dy in steps():
        first, second = (sum(forward_backward(op, inputs, (dy,)), []) for _ in range(2))
        assert all(map(torch.equal, first, second))


def test_cuda_graph_replays_it() -> None:
    for op, inputs, dy in steps():
        plain = sum(forward_backward(op, inputs, (dy,)), [])
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            forward_backward(op, inputs, (dy,))
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = sum(forward_backward(op, inputs, (dy,)), [])
        graph.replay()
        assert all(map(torch.equal, plain, captured))


def test_compiled_by_inductor() -> None:
    for op, inputs, dy in steps():
        plain = sum(forward_backward(op, inputs, (dy,)), [])
        compiled = sum(forward_backward(torch.compile(op, fullgraph=True), inputs, (dy,)), [])
        assert all(map(torch.equal, plain, compiled))


def test_fp32_is_left_to_cublas() -> None:
    inputs, dy = layer(768, 768, torch.float32, 64)
    ours = sum(forward_backward(linear, inputs, (dy,)), [])
    wanted = sum(forward_backward(reference.linear, inputs, (dy,)), [])
    assert all(map(torch.equal, ours, wanted))
