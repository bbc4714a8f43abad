"""Cross entropy over a large vocabulary: one read of the logits, and one write over them.

    loss_i      = log(sum_j exp(z_ij)) - z_i,t_i                   j < vocab_size, t_i = targets[i]
    dlogits_ij  = (exp(z_ij) / sum_k exp(z_ik) - [j = t_i]) * s_i  0 for the padded columns

with s_i the row's upstream gradient: 1 / (rows not ignored) for "mean". logits (M, V) in bf16, fp16
or fp32, targets (M,) int64; losses and all arithmetic in fp32. Rows whose target is `ignore_index`
have loss 0 and gradient 0, whatever they hold. A target outside [0, vocab_size) cannot raise
without waiting for the GPU: it makes the row's loss and gradient NaN.

One kernel (kernels.py) reads a row and keeps it until the gradient is written. With
L = the bytes of the logits, forward plus backward move through device memory

    eager, bf16 and fp32, mean or sum    2 L   the forward writes the gradient over the logits, and
                                               the backward only multiplies it by the upstream
                                               scalar: nothing to do for 1, else 2 L more
    reduction="none", or fp16            3 L   the upstream gradient has to come in before rounding,
                                               so the backward reads the logits a second time
    torch.compile                        3 L   the same with the gradient in a new tensor: a graph's
                                               ops must be functional (one that mutates costs a copy
                                               wherever re-inplacing fails, 2 L, as on every tensor
                                               saved for the backward)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import reference
from fastgpt_kernels.checks import FLOAT_DTYPES, check_int, check_tensor, refuse_interpreted_bf16
from fastgpt_kernels.launch import HAS_TRITON, use_kernel
from fastgpt_kernels.register import Op, call_directly

REDUCTIONS = ("mean", "sum", "none")


def _losses(logits: Tensor, targets: Tensor, ignore_index: int, vocab_size: int) -> Tensor:
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    launch_cross_entropy(_rows(logits), targets.contiguous(), ignore_index, vocab_size, losses)
    return losses


def _gradient(
    dlosses: Tensor, logits: Tensor, targets: Tensor, ignore_index: int, vocab_size: int,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows, targets = _rows(logits), targets.contiguous()
    launch_cross_entropy(rows, targets, ignore_index, vocab_size, gradient=out, scale=dlosses)
    return out


class _GradientInForward(torch.autograd.Function):
    """Mean or sum; the gradient is computed with the loss and stored over the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int, vocab_size: int, mean: bool
    ) -> Tensor:
        losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        count = targets.ne(ignore_index).sum() if mean else None
        rows = _rows(logits)
        gradient = _place_for_gradient(logits, rows)
        launch_cross_entropy(rows, targets, ignore_index, vocab_size, losses, gradient, count)
        ctx.save_for_backward(gradient)
        ctx.spent = False
        total = losses.sum()
        return total if count is None else total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        _spend(ctx)
        (gradient,) = ctx.saved_tensors
        launch_scale(gradient, dloss, gradient)
        torch.autograd.graph.increment_version(gradient)
        return gradient, None, None, None, None


class _GradientInBackward(torch.autograd.Function):
    """The losses by row; the backward reads the logits again and stores the gradient over them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.options, ctx.spent = options, False
        return _losses(logits, targets, *options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        _spend(ctx)
        logits, targets = ctx.saved_tensors
        rows = _rows(logits)
        place = _place_for_gradient(logits, rows)
        ignore_index, vocab_size = ctx.options
        gradient = _gradient(dlosses, rows, targets, ignore_index, vocab_size, place)
        return gradient, None, None, None


if HAS_TRITON:
    from fastgpt_kernels.ops.loss.kernels import launch_cross_entropy, launch_scale

    _op = Op(
        "cross_entropy", _losses,
        lambda logits, *_: logits.new_empty(logits.shape[0], dtype=torch.float32),
        saves=lambda inputs, losses: (inputs[:2], inputs[2:]),
        backward=Op(
            "cross_entropy_backward", _gradient,
            lambda dlosses, logits, *_: logits.new_empty(logits.shape),
        ),
        gradients=(0,), direct=_GradientInBackward,
    )  # fmt: skip


def _spend(ctx: Any) -> None:
    if ctx.spent:
        raise RuntimeError(
            "cross_entropy: a second backward is impossible, the gradient took the place of the "
            "logits; call cross_entropy(logits.clone(), ...) to keep them"
        )
    ctx.spent = True


def _rows(logits: Tensor) -> Tensor:
    """`logits` with contiguous, disjoint rows: itself, or a copy."""
    n_rows, n_cols = logits.shape
    if logits.stride(1) == 1 and (logits.stride(0) >= n_cols or n_rows == 1):
        return logits
    return logits.contiguous()


def _place_for_gradient(logits: Tensor, rows: Tensor) -> Tensor:
    """Where the gradient goes: over the logits, unless they are, or lie in, a leaf of the graph.

    A leaf is a tensor that somebody made and may look at again. Logits that autograd recorded as
    the output of an op are overwritten, and their version counter says so: an op that saved them
    for its backward raises PyTorch's "modified by an inplace operation" rather than being wrong.
    """
    if rows is not logits:
        return rows  # a copy, ours already
    base = logits if logits._base is None else logits._base
    if base.grad_fn is None:
        return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    torch.autograd.graph.increment_version(logits)
    return logits.detach()


def check_rows(op: str, name: str, x: Tensor, size: str) -> None:
    """Raise unless x is of shape (..., `size`) and a dtype that the losses take."""
    check_tensor(op, name, x, dtypes=FLOAT_DTYPES)
    if x.ndim == 0:
        raise ValueError(f"{op}: {name} must have shape (..., {size}), got ()")


def check_arguments(
    op: str, x: Tensor, n_cols: int, targets: Tensor, ignore_index: int, reduction: str,
    vocab_size: int | None,
) -> int:  # fmt: skip
    """Check what both losses take besides x (..., C) and n_cols classes; returns vocab_size."""
    check_tensor(op, "targets", targets, shape=x.shape[:-1], dtypes=(torch.int64,), like=x)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if ignore_index is None:
        raise TypeError(f"{op}: ignore_index must be an int, got None")
    check_int(op, "ignore_index", ignore_index)
    check_int(op, "vocab_size", vocab_size, optional=True)
    if vocab_size is None:
        vocab_size = n_cols
    if not 1 <= vocab_size <= n_cols:
        raise ValueError(f"{op}: vocab_size must be in [1, {n_cols}], got {vocab_size}")
    return vocab_size


def check_targets(op: str, targets: Tensor, ignore_index: int, vocab_size: int) -> None:
    """ValueError for a target that is no class; on the CPU only, so as not to wait for a GPU."""
    if not targets.is_cpu or torch.compiler.is_compiling():
        return
    bad = targets[((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)]
    if len(bad):
        raise ValueError(
            f"{op}: targets must be in [0, {vocab_size}) or ignore_index={ignore_index}, "
            f"got {bad[0].item()}"
        )


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -1,
    reduction: str = "mean",
    vocab_size: int | None = None,
) -> Tensor:
    """Cross entropy of logits (..., V) and targets (...) int64; the gradient replaces the logits.

    logits bf16, fp16 or fp32; the loss is fp32: () for "mean" and "sum", like targets for "none".
    Columns from `vocab_size` on are padding: no probability, gradient 0. Rows whose target is
    `ignore_index` count nowhere; if all are, the mean is NaN and the gradient 0, as in PyTorch,
    whose own ignore_index is -100 unless given: here it is -1, and -100 is out of range. A target
    outside [0, vocab_size) raises on the CPU; on a GPU its row is NaN, loss and gradient.

    In eager mode logits that an op computed are overwritten by their gradient (with reduction
    "none" or in fp16, in the backward): do not read them afterwards, and pass `logits.clone()`
    if another op needs them. Leaves, and logits that need no gradient, are left alone. One
    backward only. Scaling the loss (gradient accumulation) costs a pass over the gradient: scale
    the parameters' gradients instead, or use `linear_cross_entropy`, which is free of this.

    Wrong shapes and values raise ValueError, wrong types and dtypes TypeError.
    """
    check_rows("cross_entropy", "logits", logits, "V")
    vocab_size = check_arguments(
        "cross_entropy", logits, logits.shape[-1], targets, ignore_index, reduction, vocab_size
    )
    if not use_kernel(logits):
        check_targets("cross_entropy", targets, ignore_index, vocab_size)
        return reference.cross_entropy(logits, targets, ignore_index, reduction, vocab_size)
    refuse_interpreted_bf16("cross_entropy", logits)
    shape = targets.shape
    logits, targets = logits.reshape(targets.numel(), logits.shape[-1]), targets.reshape(-1)
    # fp16 cannot hold gradients divided by the number of rows before a loss scale is applied.
    in_forward = reduction != "none" and logits.dtype != torch.float16
    wants_gradient = torch.is_grad_enabled() and logits.requires_grad
    if in_forward and wants_gradient and call_directly(logits, targets):
        targets, mean = targets.contiguous(), reduction == "mean"
        return _GradientInForward.apply(logits, targets, ignore_index, vocab_size, mean)
    losses = _op(logits, targets, ignore_index, vocab_size)
    if reduction == "none":
        return losses.view(shape)
    total = losses.sum()
    return total if reduction == "sum" else total / targets.ne(ignore_index).sum()
