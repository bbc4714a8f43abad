"""cross_entropy against the fp64 oracle, in the interpreter or on a GPU, and what it overwrites."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import cross_entropy, launch, reference
from fastgpt_kernels.launch import SMS, Config, lookup
from tests.kernels.helpers import assert_accurate, check_op, forward_backward, module_of

module = module_of("cross_entropy")
WIDTHS = [1, 2, 7, 63, 64, 65, 127, 256, 257, 601]
REDUCTIONS = ["mean", "sum", "none"]


def problem(
    n_rows: int,
    n_cols: int,
    dtype: torch.dtype,
    device: torch.device,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns logits (M, V) and targets (M,), every fifth row ignored."""
    logits = (torch.randn(n_rows, n_cols, device=device) * 3).to(dtype)
    targets = torch.randint(vocab_size or n_cols, (n_rows,), device=device)
    targets[1::5] = -1
    return logits, targets


def upstream(reduction: str, n_rows: int, device: torch.device) -> Tensor:
    return torch.randn(n_rows if reduction == "none" else (), device=device)


def check(
    logits: Tensor, targets: Tensor, *options: Any, reduction: str = "mean", leaf: bool = False
) -> None:
    """The gradient replaces the logits, which an op made, unless they are a `leaf`."""
    check_op(
        lambda z, t, *o: cross_entropy(z if leaf else z * 1, t, *o),
        reference.cross_entropy,
        (logits, targets, -1, reduction, *options),
        (upstream(reduction, logits.shape[0], logits.device),),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("n_cols", WIDTHS)
def test_against_oracle(
    n_cols: int, reduction: str, dtype: torch.dtype, device: torch.device, small_tiles: None
) -> None:
    check(*problem(3, n_cols, dtype, device), reduction=reduction)


@pytest.mark.parametrize("n_cols", [65, 1000, 4099, 16384, 50304, 107000])
def test_shipped_configs(n_cols: int, device: torch.device) -> None:
    check(*problem(2, n_cols, torch.float16, device), reduction="sum")
    check(*problem(1, n_cols, torch.float32, device), reduction="sum", leaf=True)


@pytest.mark.parametrize(("n_cols", "vocab_size"), [(64, 63), (200, 130), (520, 300), (9, 1)])
def test_padded_columns(
    n_cols: int, vocab_size: int, dtype: torch.dtype, device: torch.device, small_tiles: None
) -> None:
    """They get no probability and gradient zero, whatever they hold."""
    logits, targets = problem(3, n_cols, dtype, device, vocab_size)
    check(logits, targets, vocab_size)
    logits[:, vocab_size:] = float("nan")
    (loss,), (gradient,) = forward_backward(
        lambda z: cross_entropy(z * 1, targets, vocab_size=vocab_size),
        (logits,),
        (torch.ones((), device=device),),
    )
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[:, vocab_size:] == 0).all()


@pytest.mark.parametrize("kind", ["large", "one large", "identical", "very negative", "masked"])
def test_extreme_logits(
    kind: str, dtype: torch.dtype, device: torch.device, small_tiles: None
) -> None:
    for n_cols in (150, 400):
        logits, targets = problem(3, n_cols, dtype, device)
        if kind == "large":
            logits = (logits.sign() * 1e4).to(dtype)
        elif kind == "one large":
            logits[:, n_cols // 2] = 1e4
        elif kind == "identical":
            logits.fill_(-7.25)
        elif kind == "very negative":
            logits -= 1e4
        else:
            logits[:, ::2] = -float("inf")
            targets = torch.where(targets < 0, targets, targets // 2 * 2 + 1).clamp(max=n_cols - 1)
        check(logits[:1], targets[:1], reduction="mean")  # one row: no sum of large losses to round
        check(logits, targets, reduction="none")


@pytest.mark.parametrize("n_cols", [4, 150, 400])
def test_limits_of_fp32(n_cols: int, device: torch.device, small_tiles: None) -> None:
    """A row of the least number has the loss log(V); one logit near the limits has it all."""
    least = torch.finfo(torch.float32).min
    logits = torch.full((4, n_cols), least, device=device)
    logits[1, 2], logits[2, 2], logits[3] = 2.5e38, -least, 0.0
    logits[3, 2] = -least
    targets = torch.tensor([1, 2, 2, 1], device=device)
    losses, (gradient,) = forward_backward(
        lambda z: cross_entropy(z * 1, targets, reduction="none"),
        (logits,),
        [torch.ones(4, device=device)],
    )
    log_v = torch.tensor(float(n_cols)).log().item()
    want = torch.tensor([log_v, 0.0, 0.0, -least], device=device)
    torch.testing.assert_close(losses[0], want)
    exact = torch.zeros_like(gradient)
    exact[0], exact[3, 2] = 1 / n_cols, 1.0
    exact[0, 1] -= 1
    exact[3, 1] = -1.0
    torch.testing.assert_close(gradient, exact)


def test_properties_of_the_gradient(device: torch.device, small_tiles: None) -> None:
    logits, targets = problem(4, 333, torch.float32, device)
    one = torch.ones((), device=device)
    (loss,), (gradient,) = forward_backward(
        lambda z: cross_entropy(z * 1, targets), (logits,), [one]
    )
    (moved,), (shifted,) = forward_backward(
        lambda z: cross_entropy(z + 100.0, targets), (logits,), [one]
    )
    assert gradient.sum(1).abs().max() < 1e-7, "rows of the gradient sum to zero"
    torch.testing.assert_close(moved, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shifted, gradient, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("ignore_index", [-1, -100, 5])
def test_ignored_rows_may_hold_anything(
    ignore_index: int, dtype: torch.dtype, device: torch.device, small_tiles: None
) -> None:
    logits, targets = problem(6, 300, dtype, device)
    targets[targets < 0] = 7
    targets[2] = targets[4] = ignore_index
    logits[2] = float("nan")
    for reduction in REDUCTIONS:
        dloss = upstream(reduction, 6, device)
        (loss,), (gradient,) = forward_backward(
            lambda z, r=reduction: cross_entropy(z * 1, targets, ignore_index, r),
            (logits,),
            [dloss],
        )
        assert loss.isfinite().all()
        assert (gradient[[2, 4]] == 0).all()
        clean = logits.nan_to_num(0.0)
        (wanted,), _ = forward_backward(
            lambda z, r=reduction: reference.cross_entropy(z, targets, ignore_index, r),
            (clean,),
            [dloss],
        )
        torch.testing.assert_close(loss, wanted)


def test_all_rows_ignored(device: torch.device, small_tiles: None) -> None:
    """As PyTorch: the mean over nothing is NaN, its gradient zero."""
    logits = torch.randn(3, 130, device=device)
    targets = torch.full((3,), -1, device=device)
    for reduction, wanted in (("mean", float("nan")), ("sum", 0.0), ("none", [0.0] * 3)):
        (loss,), (gradient,) = forward_backward(
            lambda z, r=reduction: cross_entropy(z * 1, targets, -1, r),
            (logits,),
            [upstream(reduction, 3, device)],
        )
        torch.testing.assert_close(loss.cpu(), torch.tensor(wanted), equal_nan=True)
        assert (gradient == 0).all()


def test_no_rows(device: torch.device) -> None:
    targets = torch.empty(0, dtype=torch.int64, device=device)
    for reduction in REDUCTIONS:
        logits = torch.zeros(0, 50, device=device, requires_grad=True)
        loss = cross_entropy(logits * 1, targets, reduction=reduction)
        wanted = F.cross_entropy(logits, targets, reduction=reduction)
        torch.testing.assert_close(loss, wanted, equal_nan=True)
        loss.sum().backward()
        assert logits.grad is not None and logits.grad.shape == (0, 50)


def test_target_out_of_range_is_nan(device: torch.device, small_tiles: None) -> None:
    """The kernel cannot raise: the row's loss and gradient are NaN, the others are untouched."""
    logits, targets = problem(5, 200, torch.float32, device)
    targets[:] = torch.tensor([3, 150, 200, -2, 149], device=device)
    (loss,), (gradient,) = forward_backward(
        lambda z: cross_entropy(z * 1, targets, -1, "none", 150),
        (logits,),
        [torch.ones(5, device=device)],
    )
    assert loss.isnan().tolist() == [False, True, True, True, False]
    assert gradient[:, :150].isnan().any(1).tolist() == [False, True, True, True, False]
    good = [0, 4]
    assert_accurate(
        loss[good],
        F.cross_entropy(logits[good, :150], targets[good], reduction="none"),
        F.cross_entropy(logits[good, :150].double(), targets[good], reduction="none"),
    )


@pytest.mark.parametrize("layout", ["transposed", "columns", "rows", "expanded", "flipped targets"])
def test_any_strides(layout: str, device: torch.device, small_tiles: None) -> None:
    logits, targets = problem(3, 150, torch.float32, device)
    if layout == "transposed":
        logits = logits.t().contiguous().t()
    elif layout == "columns":
        logits = torch.randn(3, 200, device=device)[:, 7:157]
    elif layout == "rows":
        logits = torch.randn(6, 150, device=device)[::2]
    elif layout == "expanded":
        logits = logits[:1].expand(3, 150)
    else:
        targets = targets.repeat_interleave(2)[::2]
    for reduction in REDUCTIONS:
        check(logits, targets, reduction=reduction)


def test_gradient_in_padded_rows(device: torch.device, small_tiles: None) -> None:
    """Logits that an op made, whose rows are a slice: the columns around them are not touched."""
    x, targets = problem(3, 150, torch.float32, device)
    x.requires_grad_()
    wide = F.pad(x, (3, 5), value=7.0)
    cross_entropy(wide[:, 3:153], targets).backward(torch.full((), 0.5, device=device))
    (wanted,) = torch.autograd.grad(reference.cross_entropy(x, targets) / 2, x)
    torch.testing.assert_close(x.grad, wanted)
    assert (wide[:, :3] == 7).all() and (wide[:, 153:] == 7).all()


def test_wide_unaligned_rows_are_walked(
    device: torch.device, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded an element at a time, they would not fit in registers."""
    monkeypatch.setattr(module, "WIDEST_UNALIGNED", 100)
    keys = []

    def watched(table: Any, arch: str, key: int) -> Config:
        keys.append(key)
        return lookup(table, arch, key)

    monkeypatch.setattr(module, "lookup", watched)
    wide, targets = problem(3, 212, torch.float32, device)
    for logits in (wide[:, :200], wide[:, 1:201], wide[:, 1:41], wide[:, :200].contiguous()):
        check(logits, targets.clamp(max=39), leaf=True)
    # fp32 counts double; forward, and the leaf's gradient with it.
    assert keys == [400, 1 << 31, 80, 400]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_takes_the_place_of_the_logits(
    reduction: str, dtype: torch.dtype, device: torch.device, small_tiles: None
) -> None:
    leaf = torch.randn(4, 150, device=device).to(dtype).requires_grad_()
    logits, targets = leaf * 1, torch.arange(4, device=device)
    before = logits.detach().clone()
    loss = cross_entropy(logits, targets, reduction=reduction)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    functional = reduction == "none" or dtype == torch.float16
    assert torch.equal(logits.detach(), before) == functional
    assert (gradient.data_ptr() == logits.data_ptr()) == (not functional)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_is_left_alone(reduction: str, device: torch.device, small_tiles: None) -> None:
    """Leaves, views of leaves, and logits that need no gradient."""
    targets = torch.arange(4, device=device)
    leaf = torch.randn(4, 150, device=device, requires_grad=True)
    before = leaf.detach().clone()
    for logits in (leaf, leaf.view(2, 2, 150).view(4, 150), leaf.detach()):
        loss = cross_entropy(logits, targets, reduction=reduction)
        if logits.requires_grad:
            loss.sum().backward()
        assert torch.equal(leaf.detach(), before)
    with torch.no_grad():
        logits = leaf * 1
        cross_entropy(logits, targets, reduction=reduction)
        assert torch.equal(logits, before)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_misuse_is_an_error(reduction: str, device: torch.device, small_tiles: None) -> None:
    targets = torch.arange(4, device=device)
    leaf = torch.randn(4, 150, device=device, requires_grad=True)
    loss = cross_entropy(leaf * 1, targets, reduction=reduction)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="cross_entropy: a second backward"):
        loss.backward()
    logits = torch.tanh(leaf)  # saves its output for its backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy(logits, targets, reduction=reduction).backward()


@pytest.mark.parametrize(
    ("reduction", "compute"),
    [
        ("mean", torch.float32),
        ("mean", torch.float16),
        ("sum", torch.float32),
        ("none", torch.float32),
    ],
)
def test_compiled_equals_eager(
    reduction: str, compute: torch.dtype, device: torch.device, small_tiles: None
) -> None:
    # Inductor's C++ compiler takes seconds on the CPU: there linear_cross_entropy's test has it.
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    logits, targets = problem(5, 300, compute, device, 290)
    targets[:] = -1 if reduction == "sum" else targets  # where every row is ignored, too
    dloss = upstream(reduction, 5, device)

    def loss_of(z: Tensor) -> Tensor:
        return cross_entropy(z * 1, targets, -1, reduction, 290)

    compiled = torch.compile(loss_of, fullgraph=True, backend=backend)
    ours = forward_backward(compiled, (logits,), [dloss])
    eager = forward_backward(loss_of, (logits,), [dloss])
    torch.testing.assert_close(ours[0], eager[0])
    torch.testing.assert_close(ours[1], eager[1])


def test_compiled_keeps_the_logits(device: torch.device, small_tiles: None) -> None:
    """A graph's ops are functional: a model may return its logits beside the loss."""
    x, targets = problem(5, 130, torch.float32, device)
    x.requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = x * 2
        return logits, cross_entropy(logits, targets)

    logits, loss = model(x)
    loss.backward()
    torch.testing.assert_close(logits, x * 2)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_batches_of_rows(reduction: str, device: torch.device, small_tiles: None) -> None:
    """(B, T, V) with (B, T), and one row alone: the losses by row have the targets' shape."""
    logits, targets = problem(6, 150, torch.float32, device)
    targets.clamp_(max=139)
    dloss = upstream(reduction, 6, device)
    plain = forward_backward(
        lambda z: cross_entropy(z * 1, targets, -1, reduction, 140), (logits,), [dloss]
    )
    for shape in ((2, 3), (3, 1, 2)):
        batch, batch_targets = logits.view(*shape, 150), targets.view(shape)
        batch_dloss = dloss.view(shape) if reduction == "none" else dloss
        for op in (cross_entropy, reference.cross_entropy):
            (loss,), (gradient,) = forward_backward(
                lambda z, o=op, t=batch_targets: o(z * 1, t, -1, reduction, 140),
                (batch,),
                [batch_dloss],
            )
            assert loss.shape == batch_dloss.shape
            torch.testing.assert_close(loss.flatten(), plain[0][0].flatten())
            torch.testing.assert_close(gradient, plain[1][0].view_as(batch))
    # Logits that an op made are overwritten, batch or not.
    made = logits.view(2, 3, 150).clone().requires_grad_() * 1
    (gradient,) = torch.autograd.grad(cross_entropy(made, targets.view(2, 3)), made)
    assert gradient.data_ptr() == made.data_ptr()
    one = cross_entropy(logits[0], targets[0], reduction=reduction)
    torch.testing.assert_close(one, F.cross_entropy(logits[0], targets[0]))


LOGITS, TARGETS = torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((LOGITS[0, 0], TARGETS), ValueError, "logits must have shape (..., V), got ()"),
        ((LOGITS[0], TARGETS), ValueError, "targets must have shape (), got (3,)"),
        ((LOGITS.long(), TARGETS), TypeError, "logits must be of dtype bfloat16, float16, float32"),
        (([1.0], TARGETS), TypeError, "logits must be a tensor, got list"),
        ((LOGITS, TARGETS[:2]), ValueError, "targets must have shape (3), got (2,)"),
        ((LOGITS, TARGETS.int()), TypeError, "targets must be of dtype int64, got int32"),
        ((LOGITS, TARGETS.to("meta")), ValueError, "targets must be on cpu, got meta"),
        ((LOGITS, TARGETS, None), TypeError, "ignore_index must be an int, got None"),
        ((LOGITS, TARGETS, 1.0), TypeError, "ignore_index must be an int, got float"),
        (
            (LOGITS, TARGETS, -1, "avg"),
            ValueError,
            "reduction must be 'mean', 'sum' or",
        ),
        ((LOGITS, TARGETS, -1, "mean", 0), ValueError, "vocab_size must be in [1, 8], got 0"),
        ((LOGITS, TARGETS, -1, "mean", 9), ValueError, "vocab_size must be in [1, 8], got 9"),
        ((LOGITS, TARGETS, -1, "mean", True), TypeError, "vocab_size must be an int, got bool"),
        ((LOGITS[:, :0], TARGETS), ValueError, "vocab_size must be in [1, 0], got 0"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        cross_entropy(*arguments)
    assert str(raised.value).startswith("cross_entropy: ")
    assert message in str(raised.value)


def test_on_the_cpu_it_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    logits, targets = problem(5, 30, torch.bfloat16, torch.device("cpu"))
    logits.requires_grad_()
    loss = cross_entropy(logits * 1, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), targets, ignore_index=-1))
    loss.backward()
    for target in (30, -2):
        targets[0] = target
        with pytest.raises(ValueError, match=rf"targets must be in \[0, 30\).*got {target}"):
            cross_entropy(logits, targets)


@pytest.mark.parametrize("arch", SMS)
def test_configs_fit_the_kernel(arch: str) -> None:
    """128 bits per thread and access, and no more threads than a program may have."""
    table = module.CROSS_ENTROPY
    for bound, config in table.get(arch, table["default"]).items():
        threads = 32 * config.num_warps
        assert threads <= 1024 and config.blocks["BLOCK"] % (threads * 8) == 0, bound


# --- On a GPU ---------------------------------------------------------------------------------


class Owned(torch.autograd.Function):
    """A copy that an op made, which the gradient may overwrite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy


@pytest.mark.cuda
@pytest.mark.parametrize("n_cols", [65, 1000, 5000, 32000, 50257, 50304, 128256])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_real_size(n_cols: int, reduction: str, dtype: torch.dtype, device: torch.device) -> None:
    logits, targets = problem(509, n_cols, dtype, device, n_cols - 3)
    check(logits, targets, n_cols - 3, reduction=reduction)


@pytest.mark.cuda
def test_past_two_to_the_31_elements(device: torch.device) -> None:
    """GPT-2's micro-step of 48 x 1024 tokens: offsets must be 64 bits wide."""
    n_rows, n_cols = 49152, 50304
    logits, targets = problem(n_rows, n_cols, torch.bfloat16, device)
    rows = torch.tensor([0, 1, n_rows // 2, 42_700, n_rows - 2, n_rows - 1], device=device)
    targets[rows] = 50_000
    few = logits[rows].float().requires_grad_()
    owned = Owned.apply(logits.requires_grad_())
    (gradient,) = torch.autograd.grad(cross_entropy(owned, targets, reduction="sum"), owned)
    loss = reference.cross_entropy(few, targets[rows], reduction="sum")
    (wanted,) = torch.autograd.grad(loss, few)
    torch.testing.assert_close(gradient[rows].float(), wanted, rtol=1e-2, atol=1e-7)


@pytest.mark.cuda
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_memory_is_that_of_the_logits(scale: float, device: torch.device) -> None:
    """Forward and backward allocate a few numbers per row, and no second set of logits."""
    logits, targets = problem(8192, 50304, torch.bfloat16, device)
    owned = Owned.apply(logits.requires_grad_())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    (gradient,) = torch.autograd.grad(cross_entropy(owned, targets) * scale, owned)
    torch.cuda.synchronize()
    assert gradient.data_ptr() == owned.data_ptr()
    assert torch.cuda.max_memory_allocated() - before < 2**20
