"""attention on a GPU: real sizes, bitwise repeatability, fresh masks, memory, huge tensors."""

import pytest
import torch
from torch import Tensor

from fastgpt_kernels import attention
from fastgpt_kernels.dropout import attention_dropout_mask
from tests.kernels.helpers import captured, module_of
from tests.kernels.test_attention import BOTH, check_attention, random_qkv

pytestmark = pytest.mark.cuda
HALF = [torch.bfloat16, torch.float16]
CUDA = torch.device("cuda", 0)
MODULE = module_of("attention")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@BOTH
@pytest.mark.parametrize("T", [1024, 1023, 1000, 385, 63])
def test_gpt2_sizes(T: int, causal: bool, dtype: torch.dtype) -> None:
    check_attention(random_qkv(2, T, 12, 64, dtype, CUDA), 12, causal=causal)


@BOTH
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["", "dropout"])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("T", [512, 300])
def test_head_dims(T: int, head_dim: int, dropout_p: float, causal: bool) -> None:
    qkv = random_qkv(2, T, 5, head_dim, torch.bfloat16, CUDA)
    check_attention(qkv, 5, causal=causal, dropout_p=dropout_p, seed=99)


def test_fp32_is_true_fp32() -> None:
    check_attention(random_qkv(1, 700, 3, 64, torch.float32, CUDA), 3, causal=True)


def test_long_sequence() -> None:
    check_attention(random_qkv(1, 8192, 2, 64, torch.bfloat16, CUDA), 2, causal=True)


def passes(
    qkv: Tensor, n_head: int, grad_y: Tensor, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, lse and dqkv of the launchers; causal."""
    seed = torch.tensor([2024], device=CUDA) if dropout_p else None
    y, lse = MODULE.forward(qkv, None, n_head, True, dropout_p, seed, 0.125, False)
    rest = seed, n_head, True, dropout_p, 0.125, False, False
    return y, lse, MODULE.backward(grad_y, qkv, y, lse, *rest)[0]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["", "dropout"])
def test_the_same_to_the_bit_in_1000_runs(dropout_p: float) -> None:
    qkv = random_qkv(16, 1000, 12, 64, torch.bfloat16, CUDA)
    grad_y = torch.randn(16, 1000, 768, device=CUDA, dtype=torch.bfloat16)
    first = passes(qkv, 12, grad_y, dropout_p)
    differing = torch.zeros((), dtype=torch.int64, device=CUDA)
    for _ in range(1000):
        again = passes(qkv, 12, grad_y, dropout_p)
        for a, b in zip(again, first, strict=True):
            differing += (a != b).sum()
    assert differing.item() == 0


def test_more_than_2_31_elements() -> None:
    """Batch entries past 2**31 elements of qkv are computed like a batch of their own."""
    n_head, T = 16, 1024
    width = 3 * n_head * 64
    batch = 2**31 // (T * width) + 2
    qkv = torch.empty(batch, T, width, device=CUDA, dtype=torch.bfloat16).normal_()
    assert qkv[:-1].numel() > 2**31
    grad_y = torch.empty(batch, T, width // 3, device=CUDA, dtype=torch.bfloat16).normal_()
    y, lse, dqkv = passes(qkv, n_head, grad_y)
    for i in (0, batch // 2, batch - 1):
        one_y, one_lse, one = passes(qkv[i : i + 1], n_head, grad_y[i : i + 1])
        assert torch.equal(y[i], one_y[0]) and torch.equal(dqkv[i], one[0])
        assert torch.equal(lse[i * n_head : (i + 1) * n_head], one_lse)
    assert not dqkv.isnan().any()


def test_offsets_past_2_31_within_a_batch_entry() -> None:
    """Positions far apart: T * stride is past 2**31 though the tensor's own size is not."""
    T, stride = 1024, 2**21 + 2**20
    storage = torch.zeros((T - 1) * stride + 192, device=CUDA, dtype=torch.bfloat16)
    qkv = storage.as_strided((1, T, 192), (storage.numel(), stride, 1))
    qkv.normal_()
    assert qkv.stride(1) * (T - 1) > 2**31
    grad_y = torch.randn(1, T, 64, device=CUDA, dtype=torch.bfloat16)
    assert all(map(torch.equal, passes(qkv, 1, grad_y), passes(qkv.contiguous(), 1, grad_y)))


def test_cuda_graph_replays_with_fresh_masks() -> None:
    seed = torch.tensor([1], device=CUDA)
    qkv = random_qkv(2, 256, 4, 64, torch.bfloat16, CUDA).requires_grad_()
    dy = torch.randn(2, 256, 256, device=CUDA, dtype=torch.bfloat16)

    def step() -> tuple[Tensor, Tensor]:
        y = attention(qkv, 4, dropout_p=0.3, seed=seed)
        return y, torch.autograd.grad(y, qkv, dy)[0]

    graph, found = captured(step)
    outputs = []
    for value in (5, 6):
        seed.fill_(value)
        graph.replay()
        assert all(map(torch.equal, found, step()))
        outputs.append(found[0].clone())
    assert not torch.equal(*outputs)


def test_memory() -> None:
    """Forward: y and lse. Backward: the packed gradient, lse and delta."""
    batch, T, n_head, head_dim = 32, 1024, 12, 64
    qkv = random_qkv(batch, T, n_head, head_dim, torch.bfloat16, CUDA)
    rows, tokens = batch * n_head * T * 4, batch * T * n_head * head_dim
    given = qkv, None, n_head, True, 0.0, None, 0.125, False
    y, lse = MODULE.forward(*given)
    rest = None, n_head, True, 0.0, 0.125, False, False
    for run, wanted in (
        (lambda: MODULE.forward(*given), tokens * 2 + rows),
        (lambda: MODULE.backward(y, qkv, y, lse, *rest), tokens * 3 * 2 + 2 * rows),
    ):
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = run()
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before == wanted
        del results


def test_dropout_mask_on_the_gpu_is_the_cpu_s() -> None:
    masks = [
        attention_dropout_mask(torch.tensor([2**61 + 1], device=d), 5, 300, 0.3).cpu()
        for d in ("cpu", "cuda")
    ]
    assert torch.equal(*masks)
