"""cross_entropy against the fp64 oracle, in the interpreter or on a GPU."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import cross_entropy, launch, reference
from fastgpt_kernels.launch import SMS, Config, lookup
from tests.kernels.helpers import assert_accurate, check_op, forward_backward, module_of

module = module_of("cross_entropy")
small_tiles = pytest.mark.usefixtures("small_tiles")
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


def run(
    logits: Tensor, targets: Tensor, reduction: str = "mean", *, function: Any = cross_entropy,
    ignore_index: int = -1, vocab_size: int | None = None, dloss: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns the loss and the gradient, for an upstream gradient of ones by default."""
    shape = targets.shape if reduction == "none" else ()
    dloss = torch.ones(shape, device=logits.device) if dloss is None else dloss
    (loss,), (gradient,) = forward_backward(
        lambda z: function(z, targets, ignore_index, reduction, vocab_size), (logits,), [dloss]
    )
    return loss, gradient


def check(logits: Tensor, targets: Tensor, *options: Any, reduction: str = "mean") -> None:
    dloss = upstream(reduction, logits.shape[0], logits.device)
    arguments = (logits, targets, -1, reduction, *options)
    check_op(cross_entropy, reference.cross_entropy, arguments, (dloss,))


@small_tiles
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("n_cols", WIDTHS)
def test_against_oracle(
    n_cols: int, reduction: str, dtype: torch.dtype, device: torch.device
) -> None:
    check(*problem(3, n_cols, dtype, device), reduction=reduction)


@pytest.mark.parametrize("n_cols", [65, 1000, 4099, 16384, 50304, 107000])
def test_shipped_configs(n_cols: int, device: torch.device) -> None:
    check(*problem(2, n_cols, torch.float16, device), reduction="sum")
    check(*problem(1, n_cols, torch.float32, device), reduction="sum")


@small_tiles
@pytest.mark.parametrize(("n_cols", "vocab_size"), [(64, 63), (200, 130), (520, 300), (9, 1)])
def test_padded_columns(
    n_cols: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    """They get no probability and gradient zero, whatever they hold."""
    logits, targets = problem(3, n_cols, dtype, device, vocab_size)
    check(logits, targets, vocab_size)
    logits[:, vocab_size:] = float("nan")
    loss, gradient = run(logits, targets, vocab_size=vocab_size)
    assert loss.isfinite() and gradient.isfinite().all() and (gradient[:, vocab_size:] == 0).all()


@small_tiles
@pytest.mark.parametrize("kind", ["large", "one large", "identical", "very negative", "masked"])
def test_extreme_logits(kind: str, dtype: torch.dtype, device: torch.device) -> None:
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
def test_limits_of_fp32(n_cols: int, device: torch.device) -> None:
    """A row of the least number has the loss log(V); one logit near the limits has it all."""
    least = torch.finfo(torch.float32).min
    logits = torch.full((4, n_cols), least, device=device)
    logits[1, 2], logits[2, 2], logits[3] = 2.5e38, -least, 0.0
    logits[3, 2] = -least
    targets = torch.tensor([1, 2, 2, 1], device=device)
    losses, gradient = run(logits, targets, "none")
    log_v = torch.tensor(float(n_cols)).log().item()
    torch.testing.assert_close(losses, torch.tensor([log_v, 0.0, 0.0, -least], device=device))
    exact = torch.zeros_like(gradient)
    exact[0], exact[3, 2] = 1 / n_cols, 1.0
    exact[0, 1] -= 1
    exact[3, 1] = -1.0
    torch.testing.assert_close(gradient, exact)


@small_tiles
@pytest.mark.parametrize("ignore_index", [-1, -100, 5])
def test_ignored_rows_may_hold_anything(
    ignore_index: int, dtype: torch.dtype, device: torch.device
) -> None:
    logits, targets = problem(6, 300, dtype, device)
    targets[targets < 0] = 7
    targets[2] = targets[4] = ignore_index
    logits[2] = float("nan")
    for reduction in REDUCTIONS:
        loss, gradient = run(logits, targets, reduction, ignore_index=ignore_index)
        assert loss.isfinite().all() and (gradient[[2, 4]] == 0).all()
        clean = logits.nan_to_num(0.0)
        wanted = reference.cross_entropy(clean, targets, ignore_index, reduction)
        torch.testing.assert_close(loss, wanted)


@small_tiles
@pytest.mark.parametrize("n_rows", [0, 3])
def test_no_row_counts(n_rows: int, device: torch.device) -> None:
    """The mean over nothing is NaN and its gradient zero, as in PyTorch."""
    logits = torch.randn(n_rows, 130, device=device)
    targets = torch.full((n_rows,), -1, device=device)
    for reduction in REDUCTIONS:
        loss, gradient = run(logits, targets, reduction)
        wanted = F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)
        torch.testing.assert_close(loss, wanted, equal_nan=True)
        assert gradient.shape == logits.shape and (gradient == 0).all()


@small_tiles
def test_target_out_of_range_is_nan(device: torch.device) -> None:
    """The kernel cannot raise: loss and gradient of the row are NaN, the others are untouched."""
    logits, targets = problem(5, 200, torch.float32, device)
    targets[:] = torch.tensor([3, 150, 200, -2, 149], device=device)
    loss, gradient = run(logits, targets, "none", vocab_size=150)
    assert loss.isnan().tolist() == [False, True, True, True, False]
    assert gradient[:, :150].isnan().any(1).tolist() == [False, True, True, True, False]
    good = [0, 4]
    wanted, exact = (
        F.cross_entropy(z[good, :150], targets[good], reduction="none")
        for z in (logits, logits.double())
    )
    assert_accurate(loss[good], wanted, exact)


@small_tiles
@pytest.mark.parametrize("layout", ["transposed", "columns", "rows", "expanded", "flipped targets"])
def test_any_strides(layout: str, device: torch.device) -> None:
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


@small_tiles
def test_the_gradient_may_take_the_place_of_the_logits(
    dtype: torch.dtype, device: torch.device
) -> None:
    """linear_cross_entropy needs that, in rows of a slice whose surroundings are not touched."""
    x, targets = problem(3, 150, dtype, device)
    scale = torch.randn(3, device=device)
    loss, gradient = run(x, targets, "none", vocab_size=140, dloss=scale)
    wide = F.pad(x, (3, 5), value=7.0)
    rows, losses = wide[:, 3:153], torch.empty(3, device=device)
    module.launch_cross_entropy(rows, targets, -1, 140, losses, rows, scale)
    assert torch.equal(losses, loss) and torch.equal(rows, gradient)
    assert (wide[:, :3] == 7).all() and (wide[:, 153:] == 7).all()


@small_tiles
def test_wide_unaligned_rows_are_walked(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
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
        check(logits, targets.clamp(max=39))
    # fp32 counts double; forward and backward.
    assert keys == [key for key in (400, 1 << 31, 80, 400) for _ in range(2)]


@small_tiles
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_batches_of_rows(reduction: str, device: torch.device) -> None:
    """(B, T, V) with (B, T), and one row alone: the losses by row have the targets' shape."""
    logits, targets = problem(6, 150, torch.float32, device)
    loss, gradient = run(logits, targets, reduction)
    for shape in ((2, 3), (3, 1, 2)):
        for op in (cross_entropy, reference.cross_entropy):
            batch = logits.view(*shape, 150), targets.view(shape)
            batch_loss, batch_gradient = run(*batch, reduction, function=op)
            assert batch_loss.shape == (shape if reduction == "none" else ())
            torch.testing.assert_close(batch_loss.flatten(), loss.flatten())
            torch.testing.assert_close(batch_gradient.view(6, 150), gradient)
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
        ((LOGITS, TARGETS, -1, "avg"), ValueError, "reduction must be 'mean', 'sum' or"),
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
    assert str(raised.value).startswith(f"cross_entropy: {message}")


def test_a_cpus_targets_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    logits, targets = problem(5, 30, torch.bfloat16, torch.device("cpu"))
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
    _, gradient = run(logits, targets, "sum")
    few = logits[rows].float()
    _, wanted = run(few, targets[rows], "sum", function=reference.cross_entropy)
    torch.testing.assert_close(gradient[rows].float(), wanted, rtol=1e-2, atol=1e-7)
