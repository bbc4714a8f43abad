"""linear_cross_entropy at real size: what only a GPU can show."""

import pytest
import torch
from torch import Tensor

from fastgpt_kernels import linear_cross_entropy, reference
from tests.kernels.helpers import assert_accurate, captured

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def poison() -> None:
    """Not here: filling gigabytes with NaN hides nothing that the small tests do not show."""


def problem(
    n_rows: int, n_features: int, n_cols: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(n_rows, n_features, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(n_cols, n_features, device="cuda") * 0.02).to(dtype).requires_grad_()
    targets = torch.randint(n_cols, (n_rows,), device="cuda")
    targets[::7] = -1
    return x, weight, targets


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("n_cols", "chunk_tokens"), [(50304, None), (50257, 300), (1001, 128)])
def test_real_size(
    n_cols: int, chunk_tokens: int | None, reduction: str, dtype: torch.dtype
) -> None:
    x, weight, targets = problem(1021, 768, n_cols, dtype)
    vocab_size = n_cols - 40
    targets.clamp_(max=vocab_size - 1)
    n_valid = int((targets != -1).sum())
    results = []
    for fn, compute in (
        (linear_cross_entropy, dtype),
        (reference.linear_cross_entropy, dtype),
        (reference.linear_cross_entropy, torch.float64),
    ):
        leaves = [t.detach().to(compute).requires_grad_() for t in (x, weight)]
        loss = fn(*leaves, targets, -1, reduction, vocab_size, chunk_tokens)
        gradients = torch.autograd.grad(loss.sum() * 0.7, leaves)
        results.append((loss.detach(), *gradients))
    # Logits are rounded, in an order of its own by each; of the mean of many PyTorch's may cancel.
    rounding = torch.finfo(dtype).eps / n_valid**0.5 if reduction == "mean" else 0.0
    for i, (ours, same, oracle) in enumerate(zip(*results, strict=True)):
        assert_accurate(ours, same, oracle, floor=0.0 if i else rounding)


def test_memory_is_one_chunk_and_the_gradients() -> None:
    n_rows, n_features, n_cols = 32768, 768, 50304
    x, weight, targets = problem(n_rows, n_features, n_cols)
    chunk = n_rows * n_cols * 2  # all in one pass: half of the GPU is more
    linear_cross_entropy(x, weight, targets).backward()  # cuBLAS's workspace, compiled kernels
    x.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = linear_cross_entropy(x, weight, targets)
    dx, dw = n_rows * n_features * 2, n_cols * n_features * 4
    assert torch.cuda.max_memory_allocated() - before < chunk + dx + dw + 2**21
    assert torch.cuda.memory_allocated() - before < dx + dw + 2**21
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < chunk + dx + dw + 2**21
    x.grad = weight.grad = loss = None
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        linear_cross_entropy(x, weight, targets)
    assert torch.cuda.max_memory_allocated() - before < chunk + 2**21


def test_no_host_synchronisation() -> None:
    x, weight, targets = problem(1000, 768, 50304)

    def steps() -> None:
        (linear_cross_entropy(x, weight, targets, chunk_tokens=300) * 0.5).backward()
        linear_cross_entropy(x, weight, targets, reduction="none").sum().backward()
        x.grad = weight.grad = None

    steps()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cuda_graph(reduction: str) -> None:
    x, weight, targets = problem(1000, 768, 50304)

    def step() -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(x, weight, targets, reduction=reduction, chunk_tokens=300).sum()
        return loss.detach(), *torch.autograd.grad(loss, (x, weight))

    graph, replayed = captured(step)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        targets.copy_(targets.roll(1))
    graph.replay()
    for ours, eager in zip([t.clone() for t in replayed], step(), strict=True):
        torch.testing.assert_close(ours, eager)


def test_compiled_in_bf16() -> None:
    x, weight, targets = problem(1000, 768, 50304)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    ours = torch.autograd.grad(compiled(x, weight, targets), (x, weight))
    eager = torch.autograd.grad(linear_cross_entropy(x, weight, targets), (x, weight))
    torch.testing.assert_close(ours, eager)
