"""linear_cross_entropy against the fp64 oracle, in the interpreter or on a GPU."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastgpt_kernels import launch, linear_cross_entropy, reference
from tests.kernels.helpers import assert_accurate, check_op, forward_backward, module_of

pytestmark = pytest.mark.usefixtures("small_tiles")
module = module_of("linear_cross_entropy")
REDUCTIONS = ["mean", "sum", "none"]


def problem(
    n_rows: int, n_features: int, n_cols: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x (M, C), weight (V, C) and targets (M,), every fifth row ignored."""
    x = torch.randn(n_rows, n_features, device=device).to(dtype)
    weight = (torch.randn(n_cols, n_features, device=device) * n_features**-0.5).to(dtype)
    targets = torch.randint(n_cols, (n_rows,), device=device)
    targets[1::5] = -1
    return x, weight, targets


def upstream(reduction: str, n_rows: int, device: torch.device) -> Tensor:
    return torch.randn(n_rows if reduction == "none" else (), device=device)


def check(inputs: tuple[Tensor, Tensor, Tensor], reduction: str, *options: Any) -> None:
    dloss = upstream(reduction, inputs[0].shape[0], inputs[0].device)
    arguments = (*inputs, -1, reduction, *options)
    check_op(linear_cross_entropy, reference.linear_cross_entropy, arguments, (dloss,))


def run(
    x: Tensor, weight: Tensor, targets: Tensor, dloss: Tensor, op: Any = linear_cross_entropy,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the loss, dx and dW."""
    function = lambda x, w: op(x, w, targets, **options)  # noqa: E731
    (loss,), (dx, dw) = forward_backward(function, (x, weight), [dloss])
    return loss, dx, dw


SHAPES = {(1, 1, 1): None, (2, 3, 2): 1, (5, 16, 7): 2, (5, 16, 65): 5, (4, 33, 257): 3}
SHAPES |= {(6, 64, 320): 4, (3, 31, 127): 1000}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("shape", "chunk_tokens"), SHAPES.items(), ids=str)
def test_against_oracle(
    shape: tuple[int, int, int], chunk_tokens: int | None, reduction: str, dtype: torch.dtype,
    device: torch.device,
) -> None:  # fmt: skip
    check(problem(*shape, dtype, device), reduction, None, chunk_tokens)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_padded_vocabulary(reduction: str, device: torch.device) -> None:
    """Rows of the weight past vocab_size get no probability and no gradient."""
    x, weight, targets = problem(4, 16, 100, torch.float32, device)
    targets.clamp_(max=69)
    weight[70:] = 100.0
    check((x, weight, targets), reduction, 70, 3)
    options = {"reduction": reduction, "vocab_size": 70, "chunk_tokens": 3}
    *_, dweight = run(x, weight, targets, upstream(reduction, 4, device), **options)
    assert (dweight[70:] == 0).all()


def test_large_logits(dtype: torch.dtype, device: torch.device) -> None:
    x, weight, targets = problem(3, 32, 150, dtype, device)
    check(((x * 1000).to(dtype), weight, targets), "none", None, 2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_strides(reduction: str, device: torch.device) -> None:
    x, weight, targets = problem(4, 24, 100, torch.float32, device)
    columns = torch.randn(24, 8, device=device).t()[::2]
    check((columns, weight, targets), reduction, None, 3)
    check((x[:1].expand(4, 24), weight, targets), reduction, None, 3)
    strided = weight.t().contiguous().t(), targets.repeat_interleave(2)[::2]
    check((x, *strided), reduction, None, 3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("n_rows", [0, 3])
def test_nothing_to_learn_from(n_rows: int, reduction: str, device: torch.device) -> None:
    """All rows ignored, or none at all: the mean is NaN as PyTorch's, the gradients zero."""
    x, weight, _ = problem(n_rows, 8, 20, torch.float32, device)
    targets = torch.full((n_rows,), -1, device=device)
    dloss = upstream(reduction, n_rows, device)
    loss, *gradients = run(x, weight, targets, dloss, reduction=reduction)
    wanted = reference.linear_cross_entropy(x, weight, targets, reduction=reduction)
    torch.testing.assert_close(loss, wanted, equal_nan=True)
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("needs", ["x", "weight", "nothing", "no_grad"])
def test_only_what_is_needed(
    needs: str, reduction: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matmuls and gradients that nothing needs are not computed, the logits not overwritten."""
    x, weight, targets = problem(4, 16, 50, torch.float32, device)
    one = torch.ones((), device=device)
    _, *wanted = run(x, weight, targets, one, reduction=reduction)
    x.requires_grad_(needs in ("x", "no_grad"))
    weight.requires_grad_(needs in ("weight", "no_grad"))
    mm, launch = mock.Mock(wraps=torch.mm), mock.Mock(wraps=module.launch_cross_entropy)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(module, "launch_cross_entropy", launch)
    with torch.set_grad_enabled(needs != "no_grad"):
        loss = linear_cross_entropy(x, weight, targets, reduction=reduction)
    assert loss.requires_grad == (needs in ("x", "weight"))
    assert [c.args[5] is not None for c in launch.call_args_list] == [loss.requires_grad]
    assert mm.call_count == 1 + loss.requires_grad
    if loss.requires_grad:
        loss.backward()
        assert mm.call_count == 2
        got, gradient = (x, wanted[0]) if needs == "x" else (weight, wanted[1])
        torch.testing.assert_close(got.grad, gradient)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_fp32_weight_gets_a_gradient_that_was_never_rounded(
    reduction: str, device: torch.device
) -> None:
    """16-bit activations and an fp32 weight: factors in 16 bits, sums in fp32 from row to .grad."""
    half = torch.float16
    x, master, targets = problem(40, 16, 30, half, device)
    master = master.float() + torch.randn(30, 16, device=device) * 1e-4  # not numbers of fp16
    targets[:] = targets.clamp(min=0)
    dloss = torch.full((), 3.0, device=device)
    loss, dx, dw = run(x, master, targets, dloss, reduction=reduction, chunk_tokens=7)
    assert (dx.dtype, dw.dtype) == (half, torch.float32)
    assert (dw != dw.half().float()).float().mean() > 0.9
    # By hand, on the numbers that the product sees.
    logits = x.double() @ master.half().double().t()
    dz = (logits.softmax(1) - F.one_hot(targets, 30)) * (3.0 / (40 if reduction == "mean" else 1))
    assert (dw - dz.t() @ x.double()).norm() < 1e-3 * dw.norm()
    wanted = F.cross_entropy(logits, targets, reduction=reduction)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("op", ["triton", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_add_up_where_they_lie(op: str, reduction: str, device: torch.device) -> None:
    """main_grad: dW is added there, by however many passes, and the weight has no gradient."""
    *inputs, targets = problem(12, 16, 30, torch.float32, device)
    function = linear_cross_entropy if op == "triton" else reference.linear_cross_entropy
    three = torch.full((), 3.0, device=device)
    _, dx, dw = run(*inputs, targets, three, function, reduction=reduction)
    x, weight = (t.requires_grad_() for t in inputs)
    before = torch.randn_like(dw)
    total = before.clone()
    for _ in range(2):
        (function(x, weight, targets, reduction=reduction, main_grad=total) * 3).backward()
    torch.testing.assert_close(total, before + 2 * dw)
    torch.testing.assert_close(x.grad, 2 * dx)
    assert weight.grad is None


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_batches_of_rows(reduction: str, device: torch.device) -> None:
    """(B, T, C) with (B, T): the losses by row have the targets' shape."""
    x, weight, targets = problem(6, 16, 50, torch.float32, device)
    dloss = upstream(reduction, 6, device)
    plain, batch = run(x, weight, targets, dloss, reduction=reduction), x.view(2, 3, 16)
    batch_dloss = dloss.view(2, 3) if reduction == "none" else dloss
    for op in (linear_cross_entropy, reference.linear_cross_entropy):
        loss, dx, dw = run(batch, weight, targets.view(2, 3), batch_dloss, op, reduction=reduction)
        assert loss.shape == batch_dloss.shape
        found = loss.view_as(plain[0]), dx.view(6, 16), dw
        torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_two_backwards(reduction: str, device: torch.device) -> None:
    x, weight, targets = problem(4, 16, 50, torch.float32, device)
    loss = linear_cross_entropy(x.requires_grad_(), weight, targets, reduction=reduction).sum()
    first = torch.autograd.grad(loss * 3, x, retain_graph=True)[0]
    torch.testing.assert_close(first, torch.autograd.grad(loss, x)[0] * 3)


# fmt: off
CHUNKS = [  # rows, columns, bytes per element, GiB, rows of a chunk
    (0, 50304, 2, 2, 0), (1, 50304, 2, 2, 1),
    (16384, 50304, 2, 2, 16384), (65536, 50304, 2, 2, 16384),  # 1.65 GB
    (65536, 50304, 2, 7, 65536), (65536, 50304, 2, 6, 32768),  # 6.6 GB in one pass, or two
    (65536, 50304, 4, 2, 9472),  # 7 chunks of 1.9 GB
    (65536, 128256, 2, 2, 8192), (1 << 20, 256, 2, 2, 1 << 20),
    (65536, 50304, 2, 0, 1024),  # never below
]
# fmt: on


@pytest.mark.parametrize(("n_rows", "n_cols", "itemsize", "gib", "wanted"), CHUNKS)
def test_chunk_rows(n_rows: int, n_cols: int, itemsize: int, gib: int, wanted: int) -> None:
    """As many chunks as memory asks for, and no more."""
    assert module.chunk_rows(n_rows, n_cols, itemsize, most_bytes=gib << 30) == wanted
    assert module.chunk_rows(n_rows, n_cols, itemsize, chunk_tokens=100) == min(100, n_rows)


def test_chunks_are_a_share_of_the_device() -> None:
    """Not of what is free of it: a resumed run has to round as the straight one."""
    with mock.patch.object(torch.cuda, "get_device_properties") as properties:
        properties.return_value.total_memory = 84 << 30
        assert module.chunk_bytes(torch.device("cuda", 99)) == 7 << 30
    assert module.chunk_bytes(torch.device("cpu")) == 2 << 30


@pytest.mark.quick("aot_eager-*")
@pytest.mark.parametrize(
    ("backend", "reduction"),
    [("inductor", "mean"), ("aot_eager", "sum"), ("aot_eager", "none")],
)
def test_compiled_equals_eager(backend: str, reduction: str, device: torch.device) -> None:
    *inputs, targets = problem(5, 16, 300, torch.float32, device)
    dloss, targets = upstream(reduction, 5, device), targets.clamp(max=289)

    def loss_of(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, targets, -1, reduction, 290, 2)

    compiled = torch.compile(loss_of, fullgraph=True, backend=backend)
    eager = forward_backward(loss_of, inputs, [dloss])
    torch.testing.assert_close(forward_backward(compiled, inputs, [dloss]), eager)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), eager[0][0])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_weight_copy_is_what_is_read(reduction: str, device: torch.device) -> None:
    """The same bits as rounding it on the way in."""
    x, weight, targets = problem(40, 16, 50, torch.float16, device)
    results = []
    for rounded in (None, weight.half()):
        leaves = x.clone().requires_grad_(), weight.float().requires_grad_()
        loss = linear_cross_entropy(*leaves, targets, reduction=reduction, weight_bf16=rounded)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    assert all(map(torch.equal, *results)) and results[1][2].dtype == torch.float32


@pytest.mark.parametrize(
    ("reduction", "forward", "backward"), [("mean", 3, 0), ("sum", 3, 0), ("none", 1, 2)]
)
def test_flops(reduction: str, forward: int, backward: int, device: torch.device) -> None:
    """In matmuls of 2 M V C; the chunks do not change them."""
    x, weight, targets = problem(4, 16, 50, torch.float32, device)
    options: dict[str, Any] = {"reduction": reduction, "chunk_tokens": 3}

    def flops(step: Callable[[], Tensor]) -> tuple[float, Tensor]:
        with FlopCounterMode(display=False) as counter:
            result = step()
        return counter.get_total_flops() / (2 * 4 * 16 * 50), result

    leaves = x.requires_grad_(), weight.requires_grad_()
    found, loss = flops(lambda: linear_cross_entropy(*leaves, targets, **options))
    assert found == forward
    assert flops(lambda: loss.sum().backward())[0] == backward
    with torch.no_grad():
        assert flops(lambda: linear_cross_entropy(*leaves, targets, **options))[0] == 1


X, WEIGHT, TARGETS = torch.zeros(3, 4), torch.zeros(8, 4), torch.zeros(3, dtype=torch.int64)
# fmt: off
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": X[0, 0]}, ValueError, "x must have shape (..., C), got ()"),
    ({"x": X[0]}, ValueError, "targets must have shape (), got (3,)"),
    ({"weight": WEIGHT.t()}, ValueError, "weight must have shape (*, 4), got (4, 8)"),
    ({"weight": WEIGHT.half()}, TypeError, "weight must be of dtype float32, float32, got float16"),
    ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu, got meta"),
    ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
    ({"targets": TARGETS[:2]}, ValueError, "targets must have shape (3), got (2,)"),
    ({"targets": TARGETS.float()}, TypeError, "targets must be of dtype int64, got float32"),
    ({"reduction": "max"}, ValueError, "reduction must be 'mean', 'sum' or"),
    ({"vocab_size": 9}, ValueError, "vocab_size must be in [1, 8], got 9"),
    ({"chunk_tokens": 0}, ValueError, "chunk_tokens must be at least 1"),
    ({"chunk_tokens": 2.0}, TypeError, "chunk_tokens must be an int"),
    ({"weight_bf16": WEIGHT[:3]}, ValueError, "weight_bf16 must have shape (8, 4), got (3, 4)"),
    ({"main_grad": WEIGHT[:3]}, ValueError, "main_grad must have shape (8, 4), got (3, 4)"),
    ({"main_grad": WEIGHT.half()}, TypeError, "main_grad must be of dtype float32, got float16"),
    ({"main_grad": WEIGHT, "reduction": "none"}, ValueError,
     'main_grad needs reduction "mean" or "sum", got "none"'),
]
# fmt: on


@pytest.mark.parametrize(
    ("arguments", "error", "message"), BAD, ids=lambda x: x[:40] if isinstance(x, str) else None
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"x": X, "weight": WEIGHT, "targets": TARGETS}
    with pytest.raises(error) as raised:
        linear_cross_entropy(**good | arguments)
    assert str(raised.value).startswith(f"linear_cross_entropy: {message}")


def test_targets_are_checked_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"linear_cross_entropy: targets must be in \[0, 8\)"):
        linear_cross_entropy(X, WEIGHT, TARGETS + 8)


# --- On a GPU ---------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("n_cols", "chunk_tokens"), [(50304, None), (50257, 300), (1001, 128)])
def test_real_size(
    n_cols: int, chunk_tokens: int | None, reduction: str, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight, targets = problem(1021, 768, n_cols, dtype, device)
    targets.clamp_(max=n_cols - 41)
    results = []
    for function, compute in (
        (linear_cross_entropy, dtype),
        (reference.linear_cross_entropy, dtype),
        (reference.linear_cross_entropy, torch.float64),
    ):
        leaves = [t.detach().to(compute).requires_grad_() for t in (x, weight)]
        loss = function(*leaves, targets, -1, reduction, n_cols - 40, chunk_tokens)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum() * 0.7, leaves)))
    # Logits are rounded, in an order of its own by each; of the mean of many PyTorch's may cancel.
    n_valid = int((targets != -1).sum())
    rounding = torch.finfo(dtype).eps / n_valid**0.5 if reduction == "mean" else 0.0
    for i, (kernel, same, oracle) in enumerate(zip(*results, strict=True)):
        assert_accurate(kernel, same, oracle, floor=0.0 if i else rounding)


@pytest.mark.cuda
def test_memory_is_one_chunk_and_the_gradients(device: torch.device) -> None:
    n_rows, n_features, n_cols = 32768, 768, 50304
    *inputs, targets = problem(n_rows, n_features, n_cols, torch.bfloat16, device)
    x, weight = (t.requires_grad_() for t in inputs)
    linear_cross_entropy(x, weight, targets).backward()  # cuBLAS's workspace, compiled kernels
    x.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = linear_cross_entropy(x, weight, targets)
    chunk, dx, dw = n_rows * n_cols * 2, n_rows * n_features * 2, n_cols * n_features * 4
    assert torch.cuda.max_memory_allocated() - before < chunk + dx + dw + 2**21
    assert torch.cuda.memory_allocated() - before < dx + dw + 2**21
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < chunk + dx + dw + 2**21
    x.grad = weight.grad = loss = None
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        linear_cross_entropy(x, weight, targets)
    assert torch.cuda.max_memory_allocated() - before < chunk + 2**21
