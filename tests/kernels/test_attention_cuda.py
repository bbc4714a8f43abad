"""attention on a GPU: real sizes, bitwise repeatability, races, graphs, memory, huge tensors."""

import pytest
import torch
from torch import Tensor

from fastgpt_kernels import attention, reference
from fastgpt_kernels.ops.attention.backward import launch_backward
from fastgpt_kernels.ops.attention.forward import launch_forward
from tests.kernels.attention_cases import check_attention, random_qkv
from tests.kernels.helpers import captured

pytestmark = pytest.mark.cuda
HALF = [torch.bfloat16, torch.float16]
BACKWARDS = pytest.mark.parametrize("deterministic", [False, True], ids=["one_pass", "two_pass"])
CUDA = torch.device("cuda", 0)


@BACKWARDS
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("T", [1024, 1023, 1000, 385, 63])
def test_gpt2_sizes(T: int, causal: bool, dtype: torch.dtype, deterministic: bool) -> None:
    qkv = random_qkv(2, T, 12, 64, dtype, CUDA)
    check_attention(qkv, 12, causal=causal, deterministic=deterministic)


@BACKWARDS
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["", "dropout"])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("T", [512, 300])
def test_head_dims(T: int, head_dim: int, dropout_p: float, deterministic: bool) -> None:
    qkv = random_qkv(2, T, 5, head_dim, torch.bfloat16, CUDA)
    for causal in (True, False):
        check_attention(
            qkv, 5, causal=causal, dropout_p=dropout_p, seed=99, deterministic=deterministic
        )


@BACKWARDS
def test_fp32_is_true_fp32(deterministic: bool) -> None:
    check_attention(
        random_qkv(1, 700, 3, 64, torch.float32, CUDA), 3, causal=True, deterministic=deterministic
    )


@BACKWARDS
@pytest.mark.parametrize("T", [1024, 1000])
def test_the_bias_gets_the_sum_over_all_rows(T: int, deterministic: bool) -> None:
    """192 heads, so that dq's sums wait for their slots; 16 T addends an output."""
    grad_y, qkv, y, lse, seed, *sizes = problem(0.0, T)
    dqkv, sums = launch_backward(grad_y, qkv, y, lse, seed, *sizes, deterministic, True)
    exact = dqkv.double().sum((0, 1))
    rounding = dqkv.double().square().sum((0, 1)).sqrt().max() * 2**-8
    assert sums is not None and (sums - exact).abs().max() < 4 * rounding


@BACKWARDS
def test_long_sequence(deterministic: bool) -> None:
    qkv = random_qkv(1, 8192, 2, 64, torch.bfloat16, CUDA)
    check_attention(qkv, 2, causal=True, deterministic=deterministic)


def gradient(*args, **options) -> Tensor:
    """Of qkv, without the bias's."""
    return launch_backward(*args, False, **options)[0]


def problem(dropout_p: float, T: int = 1000) -> tuple[Tensor, ...]:
    """Arguments of `launch_backward` but `deterministic`, from a forward pass.

    192 heads: more than dq's ring has slots.
    """
    qkv = random_qkv(16, T, 12, 64, torch.bfloat16, CUDA)
    seed = torch.tensor([2024], device=CUDA) if dropout_p else None
    y, lse = launch_forward(qkv, 12, True, dropout_p, seed, 0.125)
    return torch.randn_like(y), qkv, y, lse, seed, 12, True, dropout_p, 0.125


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["", "dropout"])
def test_deterministic_to_the_bit_in_1000_runs(dropout_p: float) -> None:
    args = problem(dropout_p)
    grad_y, qkv, y, lse, seed, n_head, causal, _, scale = args
    first = gradient(*args, True)
    differing = torch.zeros((), dtype=torch.int64, device=CUDA)
    for _ in range(1000):
        again, again_lse = launch_forward(qkv, n_head, causal, dropout_p, seed, scale)
        differing += (again != y).sum() + (again_lse != lse).sum()
        differing += (gradient(*args, True) != first).sum()
    assert differing.item() == 0


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["", "dropout"])
def test_one_pass_backward_has_no_race(dropout_p: float) -> None:
    """dk and dv are sums in a fixed order; dq may differ by the order of fp32 additions only."""
    args = problem(dropout_p)
    C = args[1].shape[2] // 3
    exact = gradient(*args, True)
    first = gradient(*args, False)
    differing = torch.zeros((), dtype=torch.int64, device=CUDA)
    worst = torch.zeros((), device=CUDA)
    for _ in range(1000):
        again = gradient(*args, False)
        differing += (again[..., C:] != first[..., C:]).sum()
        worst = torch.maximum(worst, (again[..., :C].float() - exact[..., :C].float()).abs().max())
    assert differing.item() == 0
    # Two bf16 roundings of values that agree to fp32 precision: neighbours, at the largest value.
    assert worst.item() <= 2 * torch.finfo(torch.bfloat16).eps * exact[..., :C].abs().max().item()


@BACKWARDS
def test_more_than_2_31_elements(deterministic: bool) -> None:
    """The last batch entry, past 2**31 elements of qkv, is computed like a batch of its own."""
    n_head, T = 16, 1024
    width = 3 * n_head * 64
    batch = 2**31 // (T * width) + 2
    qkv = torch.empty(batch, T, width, device=CUDA, dtype=torch.bfloat16).normal_()
    assert qkv[:-1].numel() > 2**31
    grad_y = torch.empty(batch, T, width // 3, device=CUDA, dtype=torch.bfloat16).normal_()
    y, lse = launch_forward(qkv, n_head, True, 0.0, None, 0.125)
    dqkv = gradient(grad_y, qkv, y, lse, None, n_head, True, 0.0, 0.125, deterministic)
    for i in (0, batch // 2, batch - 1):
        one_y, one_lse = launch_forward(qkv[i : i + 1], n_head, True, 0.0, None, 0.125)
        one = gradient(
            grad_y[i : i + 1], qkv[i : i + 1], one_y, one_lse, None, n_head, True, 0.0, 0.125, True
        )
        assert torch.equal(y[i], one_y[0])
        assert torch.equal(lse[i * n_head : (i + 1) * n_head], one_lse)
        torch.testing.assert_close(dqkv[i].float(), one[0].float(), atol=2e-2, rtol=2e-2)
        if deterministic:
            assert torch.equal(dqkv[i], one[0])
    assert not dqkv.isnan().any()


@BACKWARDS
def test_offsets_past_2_31_within_a_batch_entry(deterministic: bool) -> None:
    """Positions far apart: T * stride is past 2**31 though the tensor's own size is not."""
    T, stride = 1024, 2**21 + 2**20
    storage = torch.zeros((T - 1) * stride + 192, device=CUDA, dtype=torch.bfloat16)
    qkv = storage.as_strided((1, T, 192), (storage.numel(), stride, 1))
    qkv.normal_()
    assert qkv.stride(1) * (T - 1) > 2**31
    grad_y = torch.randn(1, T, 64, device=CUDA, dtype=torch.bfloat16)
    results = []
    for x in (qkv, qkv.contiguous()):
        y, lse = launch_forward(x, 1, True, 0.0, None, 0.125)
        dqkv = gradient(grad_y, x, y, lse, None, 1, True, 0.0, 0.125, deterministic)
        results.append((y, dqkv))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=2e-2, rtol=2e-2)


@BACKWARDS
def test_cuda_graph_replays_with_fresh_masks(deterministic: bool) -> None:
    seed = torch.tensor([1], device=CUDA)
    qkv = random_qkv(2, 256, 4, 64, torch.bfloat16, CUDA).requires_grad_()
    dy = torch.randn(2, 256, 256, device=CUDA, dtype=torch.bfloat16)

    def step() -> tuple[Tensor, Tensor]:
        y = attention(qkv, 4, dropout_p=0.3, seed=seed, deterministic=deterministic)
        return y, torch.autograd.grad(y, qkv, dy)[0]

    graph, (y, dqkv) = captured(step)
    outputs = []
    for value in (5, 6):
        seed.fill_(value)
        graph.replay()
        eager_y, eager_dqkv = step()
        assert torch.equal(y, eager_y)
        torch.testing.assert_close(dqkv, eager_dqkv, atol=2e-2, rtol=2e-2)
        outputs.append(y.clone())
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("seed", [None, 3])
def test_no_host_synchronisation(seed: int | None) -> None:
    qkv = random_qkv(2, 128, 4, 64, torch.bfloat16, CUDA).requires_grad_()
    dy = torch.ones(2, 128, 256, device=CUDA, dtype=torch.bfloat16)

    def step() -> None:
        torch.autograd.grad(attention(qkv, 4, dropout_p=0.1, seed=seed), qkv, dy)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@BACKWARDS
def test_memory(deterministic: bool) -> None:
    """Forward: y and lse. Backward: the packed gradient, lse and delta, in one pass dq's ring.

    The ring is a fraction of dq at fp32: four programs an SM, whatever the batch.
    """
    batch, T, n_head, head_dim = 32, 1024, 12, 64
    qkv = random_qkv(batch, T, n_head, head_dim, torch.bfloat16, CUDA)
    rows, tokens = batch * n_head * T * 4, batch * T * n_head * head_dim

    def peak(f):
        f()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = f()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result

    used, (y, lse) = peak(lambda: launch_forward(qkv, n_head, True, 0.0, None, 0.125))
    assert used == tokens * 2 + rows
    grad_y = torch.randn_like(y)
    used, _ = peak(
        lambda: gradient(grad_y, qkv, y, lse, None, n_head, True, 0.0, 0.125, deterministic)
    )
    programs = 4 * torch.cuda.get_device_properties(CUDA).multi_processor_count
    ring = programs * 128 * head_dim * 4
    extra = used - (tokens * 3 * 2 + 2 * rows)
    assert extra == 0 if deterministic else 0 < extra <= ring + T * head_dim * 4 + 4096


def test_dropout_mask_on_the_gpu_is_the_cpu_s() -> None:
    masks = [
        reference.attention_dropout_mask(torch.tensor([2**61 + 1], device=d), 5, 300, 0.3).cpu()
        for d in ("cpu", "cuda")
    ]
    assert torch.equal(*masks)
