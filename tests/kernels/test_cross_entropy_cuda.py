"""cross_entropy at real size: what only a GPU can show."""

import pytest
import torch
from torch import Tensor

from fastgpt_kernels import cross_entropy, reference
from tests.kernels.helpers import assert_accurate, captured

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def poison() -> None:
    """Not here: filling gigabytes with NaN hides nothing that the small tests do not show."""


def problem(n_rows: int, n_cols: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    logits = torch.randn(n_rows, n_cols, device="cuda", dtype=dtype)
    targets = torch.randint(n_cols, (n_rows,), device="cuda")
    targets[::7] = -1
    return logits, targets


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n_cols", [65, 1000, 5000, 32000, 50257, 50304, 128256])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_real_size(n_cols: int, dtype: torch.dtype, reduction: str) -> None:
    logits, targets = problem(509, n_cols, dtype)
    vocab_size = n_cols - 3
    targets.clamp_(max=vocab_size - 1)
    results = []
    for fn, compute in (
        (cross_entropy, dtype),
        (reference.cross_entropy, dtype),
        (reference.cross_entropy, torch.float64),
    ):
        leaf = logits.detach().to(compute).requires_grad_()
        loss = fn(leaf * 1, targets, -1, reduction, vocab_size)
        loss.sum().backward()
        assert leaf.grad is not None
        results.append((loss.detach(), leaf.grad))
    for ours, same, oracle in zip(*results, strict=True):
        assert_accurate(ours, same, oracle)


def test_past_two_to_the_31_elements() -> None:
    """GPT-2's micro-step of 48 x 1024 tokens: offsets must be 64 bits wide."""
    n_rows, n_cols = 49152, 50304
    assert n_rows * n_cols > 2**31
    logits, targets = problem(n_rows, n_cols)
    rows = torch.tensor([0, 1, n_rows // 2, 42_700, n_rows - 2, n_rows - 1], device="cuda")
    targets[rows] = 50_000
    few = logits[rows].float().requires_grad_()
    # An op that makes the logits without a second copy of them.
    logits.requires_grad_()
    owned = _Owned.apply(logits)
    losses = cross_entropy(owned, targets, reduction="sum")
    (gradient,) = torch.autograd.grad(losses, owned)
    wanted = reference.cross_entropy(few, targets[rows], reduction="sum")
    wanted.backward()
    assert few.grad is not None
    torch.testing.assert_close(gradient[rows].float(), few.grad, rtol=1e-2, atol=1e-7)


class _Owned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy


def test_a_thousand_repetitions_are_the_same_to_the_bit() -> None:
    logits, targets = problem(300, 50304)
    first: tuple[Tensor, Tensor] | None = None
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        leaf = logits.clone().requires_grad_()
        owned = leaf * 1
        loss = cross_entropy(owned, targets)
        (gradient,) = torch.autograd.grad(loss, owned)
        if first is None:
            first = loss.detach().clone(), gradient.clone()
        differ += (loss.detach() != first[0]) + (gradient != first[1]).sum()
    assert differ.item() == 0


def test_no_host_synchronisation() -> None:
    logits, targets = problem(512, 50304)
    leaf = logits.requires_grad_()
    cross_entropy(leaf * 1, targets).backward()  # compiles the kernels
    leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (cross_entropy(leaf * 1, targets) * 0.5).backward()
        cross_entropy(leaf * 1, targets, reduction="none").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cuda_graph(reduction: str) -> None:
    logits, targets = problem(512, 50304)
    static, static_targets = logits.clone().requires_grad_(), targets.clone()

    def step() -> tuple[Tensor, Tensor]:
        owned = static * 1
        loss = cross_entropy(owned, static_targets, reduction=reduction).sum()
        (gradient,) = torch.autograd.grad(loss, owned)
        return loss.detach(), gradient

    graph, (loss, gradient) = captured(step)
    for seed in range(2):
        torch.manual_seed(seed)
        fresh, fresh_targets = problem(512, 50304)
        with torch.no_grad():
            static.copy_(fresh)
            static_targets.copy_(fresh_targets)
        graph.replay()
        replayed = loss.clone(), gradient.clone()
        eager = step()
        assert torch.equal(replayed[0], eager[0])
        assert torch.equal(replayed[1], eager[1])


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_memory_is_that_of_the_logits(scale: float) -> None:
    """Forward and backward allocate a few numbers a row, and no second set of logits."""
    logits, targets = problem(8192, 50304)
    logits.requires_grad_()
    owned = _Owned.apply(logits)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = cross_entropy(owned, targets) * scale
    (gradient,) = torch.autograd.grad(loss, owned)
    torch.cuda.synchronize()
    assert gradient.data_ptr() == owned.data_ptr()
    assert torch.cuda.max_memory_allocated() - before < 2**20
