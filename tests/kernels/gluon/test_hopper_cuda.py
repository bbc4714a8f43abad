"""Attention for Hopper on a GPU of that kind: real sizes, repeatability, races, graphs."""

from functools import partial

import pytest
import torch

from fastgpt_kernels import launch
from fastgpt_kernels.registry import Sizes
from tests.kernels.helpers import captured, module_of
from tests.kernels.test_attention import check_attention, random_qkv

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda", 0)
MODULE = module_of("attention")
hopper_attention = MODULE.hopper_attention
check = partial(check_attention, function=hopper_attention)
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def on_hopper() -> None:
    if reason := MODULE.hopper_unsupported(
        Sizes(), torch.bfloat16, launch.arch_on(torch.device("cuda", 0))
    ):
        pytest.skip(reason)


@HALF
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("T", [1024, 1023, 1000, 385, 128, 63, 1])
def test_accuracy(T: int, head_dim: int, causal: bool, dtype: torch.dtype) -> None:
    check(random_qkv(3, T, 5, head_dim, dtype, CUDA), 5, causal=causal)


def test_long_and_many() -> None:
    """More row tiles than programs, more heads than dq's sum has room for, or than 65,535."""
    check(random_qkv(1, 8192, 2, 64, torch.bfloat16, CUDA), 2, causal=True)
    check(random_qkv(32, 512, 12, 64, torch.bfloat16, CUDA), 12, causal=True)
    check(random_qkv(5500, 2, 12, 64, torch.bfloat16, CUDA), 12, causal=True)


@HALF
@pytest.mark.parametrize("T", [1024, 1000, 385, 128, 1])
def test_backward_by_head(T: int, dtype: torch.dtype) -> None:
    """fp64 error, and 20 runs that are the same to the bit; two heads to some programs."""
    n_head, batch = 12, 18
    assert MODULE.heads_per_program(Sizes(batch, T, n_head)) == 2
    qkv = random_qkv(batch, T, n_head, 64, dtype, CUDA)
    check(qkv, n_head, causal=True)
    qkv.requires_grad_()
    grad = torch.randn(batch, T, n_head * 64, device=CUDA).to(dtype)
    y = hopper_attention(qkv, n_head)
    runs = [torch.autograd.grad(y, qkv, grad, retain_graph=True)[0] for _ in range(20)]
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_thousand_runs_are_alike(head_dim: int) -> None:
    """y, dk and dv to the bit; dq, of fewer heads than SMs, up to the order of fp32 additions."""
    C = 6 * head_dim
    qkv = random_qkv(16, 1000, 6, head_dim, torch.bfloat16, CUDA).requires_grad_()
    grad = torch.randn(16, 1000, C, device=CUDA, dtype=torch.bfloat16)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        y = hopper_attention(qkv, 6)
        return y.detach(), torch.autograd.grad(y, qkv, grad)[0]

    y, first = step()
    differing = torch.zeros((), dtype=torch.int64, device=CUDA)
    worst = torch.zeros((), device=CUDA)
    for _ in range(1000):
        again_y, again = step()
        differing += (again_y != y).sum() + (again[..., C:] != first[..., C:]).sum()
        worst = torch.maximum(worst, (again[..., :C].float() - first[..., :C].float()).abs().max())
    assert differing.item() == 0
    largest = first[..., :C].abs().max().item()
    assert worst.item() <= 2 * torch.finfo(torch.bfloat16).eps * largest


def test_a_graph_replays() -> None:
    qkv = random_qkv(2, 256, 4, 64, torch.bfloat16, CUDA).requires_grad_()
    dy = torch.randn(2, 256, 256, device=CUDA, dtype=torch.bfloat16)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        y = hopper_attention(qkv, 4)
        return y, torch.autograd.grad(y, qkv, dy)[0]

    graph, (y, dqkv) = captured(step)
    with torch.no_grad():
        qkv.copy_(random_qkv(2, 256, 4, 64, torch.bfloat16, CUDA))
    graph.replay()
    eager_y, eager_dqkv = step()
    assert torch.equal(y, eager_y)
    torch.testing.assert_close(dqkv, eager_dqkv, atol=2e-2, rtol=2e-2)


def test_compiled() -> None:
    qkv = random_qkv(2, 256, 4, 64, torch.bfloat16, CUDA).requires_grad_()
    compiled = torch.compile(lambda x: hopper_attention(x, 4) * 2, fullgraph=True)
    y = compiled(qkv)
    assert torch.equal(y, hopper_attention(qkv, 4) * 2)
    (dqkv,) = torch.autograd.grad(y.sum(), qkv)
    assert dqkv.isfinite().all()
