"""layer_norm, add_layer_norm and bias_gelu on a GPU: real sizes, repeatability, graphs, memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt_kernels import add_layer_norm, bias_gelu, layer_norm, reference
from tests.kernels.helpers import captured, check_op, forward_backward

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda", 0)
WIDTHS = [1, 100, 255, 256, 512, 768, 1024, 1280, 1600, 2048, 4095, 4096, 8192]


@pytest.fixture(autouse=True)
def poison() -> None:
    """Not here: filling gigabytes with NaN hides nothing that the small tests do not show."""


def norm_inputs(rows: int, C: int, dtype: torch.dtype) -> list[Tensor]:
    """x, residual, weight and bias (fp32), dy, d_residual_out."""
    x, residual, dy, d_residual_out = torch.randn(4, rows, C, device=CUDA).to(dtype)
    weight, bias = torch.randn(2, C, device=CUDA)
    return [x, residual, weight, bias, dy, d_residual_out]


@pytest.mark.parametrize("parameters", ["fp32", "same"])
@pytest.mark.parametrize("C", WIDTHS)
def test_norm_widths(C: int, parameters: str, dtype: torch.dtype) -> None:
    """More rows than all programs of the backward take in one step of their loops."""
    x, residual, weight, bias, dy, d_residual_out = norm_inputs(5003, C, dtype)
    if parameters == "same":
        weight, bias = weight.to(dtype), bias.to(dtype)
    # Of a single column the gradient is 0, but for the rounding of dy * weight times rstd, which
    # is 1 / sqrt(eps).
    floor = 2**-24 * (dy * weight).abs().max().item() * 1e-5**-0.5 if C == 1 else 0.0
    check_op(layer_norm, reference.layer_norm, (x, weight, None), (dy,), floor=floor)
    inputs = (x, residual, weight, bias)
    dys = (dy, d_residual_out)
    check_op(add_layer_norm, reference.add_layer_norm, inputs, dys, floor=floor)


def steps() -> dict[str, Callable[[], list[Tensor]]]:
    """Each op at GPT-2's width: outputs and gradients of one forward and backward pass."""
    x, residual, weight, bias, dy, d_residual_out = norm_inputs(16384, 768, torch.bfloat16)
    wide, d_wide = torch.randn(2, 8192, 3072, device=CUDA).bfloat16()
    b = torch.randn(3072, device=CUDA).bfloat16()

    def step(op: Callable[..., Any], inputs: Any, dys: Any) -> Callable[[], list[Tensor]]:
        return lambda: sum(forward_backward(op, inputs, dys), [])

    return {
        "layer_norm": step(layer_norm, (x, weight, bias), (dy,)),
        "add_layer_norm": step(add_layer_norm, (x, residual, weight, bias), (dy, d_residual_out)),
        "bias_gelu": step(bias_gelu, (wide, b), (d_wide,)),
    }


OPS = pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm", "bias_gelu"])


@OPS
def test_a_thousand_repetitions_are_the_same_to_the_bit(op: str) -> None:
    step = steps()[op]
    first = step()
    differing = torch.zeros((), dtype=torch.int64, device=CUDA)
    for _ in range(1000):
        for a, b in zip(step(), first, strict=True):
            differing += (a != b).sum()
    assert differing.item() == 0


@OPS
def test_no_host_synchronisation(op: str) -> None:
    step = steps()[op]
    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@OPS
def test_cuda_graph(op: str) -> None:
    step = steps()[op]
    wanted = step()
    graph, ours = captured(step)
    for t in ours:
        t.fill_(float("nan"))
    graph.replay()
    assert all(map(torch.equal, ours, wanted))


@OPS
def test_allocates_its_results_and_little_else(op: str) -> None:
    """Beyond outputs and gradients: statistics and partial sums, under 5 % of them."""
    step = steps()[op]
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = step()
    torch.cuda.synchronize()
    unique = {t.data_ptr(): t.numel() * t.element_size() for t in results}
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 1.05 * sum(unique.values()) + 2**20, (peak, sum(unique.values()))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_past_two_to_the_31_elements(compiled: bool) -> None:
    """Offsets must be 64 bits wide; the last rows are compared with a small tensor of their own."""
    rows, C = 2**31 // 3072 + 500, 3072
    x = torch.empty(rows, C, device=CUDA, dtype=torch.bfloat16).normal_()
    dy = x.flip(0)
    weight, bias = torch.randn(2, C, device=CUDA)

    def last(op: Callable[..., Any], *inputs: Any) -> None:
        run = torch.compile(op, fullgraph=True) if compiled else op
        (y,), (dx, *_) = forward_backward(run, (x, *inputs), (dy,))
        (want_y,), (want_dx, *_) = forward_backward(op, (x[-300:], *inputs), (dy[-300:],))
        assert torch.equal(y[-300:], want_y)
        assert torch.equal(dx[-300:], want_dx)

    last(layer_norm, weight, bias)
    last(bias_gelu, bias)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_input() -> None:
    x = torch.randn(64, 768, device="cuda:1")
    assert layer_norm(x, torch.ones(768, device="cuda:1")).device == x.device
    assert bias_gelu(x).device == x.device
