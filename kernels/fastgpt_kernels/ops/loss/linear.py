"""The last linear layer and its cross entropy, chunk by chunk: the logits never exist at once.

    z = x W^T     loss = cross_entropy(z, targets)     dz = softmax(z) - onehot(targets)
    dx_i = s_i sum_v dz_iv W_v     dW_v = sum_i s_i dz_iv x_i

x (M, C), W (V, C), targets (M,); s_i the upstream gradient of row i's loss. For each chunk of rows
cuBLAS writes its logits into one buffer, the cross-entropy kernel turns them into dz in place (see
cross_entropy.py), and two more products consume them, dW summing up in fp32. For "mean" and "sum"
every s_i is the same number s, known only in the backward: the forward does all the work for s = 1
and the backward multiplies dx and dW by s, which also keeps fp16 within its range. For "none" the
s_i differ and dW cannot be rescaled afterwards: the forward computes losses only and the backward
computes the logits again, a fourth product.

Work is 6 M V C FLOPs (8 M V C for "none", 2 without gradients). With b bytes an element, memory
moved is 5 M V b (logits written, read, dz written, read twice), and for n chunks 8 (n - 1) V C to
sum dW in memory and 2 n reads of W. So chunks should be long: as long as 2 GiB of logits allow and
never below 4,096 rows. 65,536 rows of 50,304 bf16 logits make 4 chunks of 16,384, 1.65 GB each; at
C = 768 the sums of dW then add 3 % to the bytes; with chunks of 512 rows they would double them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt_kernels import reference
from fastgpt_kernels.host import (
    FLOAT_DTYPES,
    HAS_TRITON,
    check_int,
    check_tensor,
    refuse_interpreted_bf16,
    use_kernel,
)
from fastgpt_kernels.ops.loss.cross_entropy import check_arguments, check_targets
from fastgpt_kernels.register import Op, call_directly, product_flops

CHUNK_BYTES = 2 << 30  # of logits, if that is MIN_CHUNK_ROWS or more
MIN_CHUNK_ROWS = 4096
PITCH = 64  # rows of the chunk start at multiples of this many elements: aligned for any V


def chunk_rows(n_rows: int, n_cols: int, element_size: int, chunk_tokens: int | None = None) -> int:
    """Rows of logits to hold at a time: `chunk_tokens`, or near-equal chunks from the shapes."""
    if chunk_tokens is not None:
        return min(chunk_tokens, n_rows)
    limit = max(MIN_CHUNK_ROWS, CHUNK_BYTES // (n_cols * element_size))
    n_chunks = -(-n_rows // limit)
    while n_chunks > 1 and n_rows // n_chunks < MIN_CHUNK_ROWS:
        n_chunks -= 1
    rows = -(-n_rows // max(n_chunks, 1))
    return min(-(-rows // 128) * 128, n_rows)  # whole tiles of the matrix products


def _chunks(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, vocab_size: int,
    chunk_tokens: int | None,
    *, losses: Tensor | None = None, need_dx: bool = False, need_dw: bool = False,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill `losses` (M,) and return dx like x and dW (V, C) fp32, or empty tensors for them.

    `scale` (M,) fp32 is the upstream gradient of the rows' losses, None for 1.
    """
    (n_rows, n_features), n_cols = x.shape, weight.shape[0]
    rows = chunk_rows(n_rows, n_cols, x.element_size(), chunk_tokens)
    pitch = -(-n_cols // PITCH) * PITCH
    buffer = torch.empty(rows, pitch, dtype=x.dtype, device=x.device)
    dx = torch.empty(x.shape if need_dx else 0, dtype=x.dtype, device=x.device)
    dw = torch.empty(weight.shape if need_dw else 0, dtype=torch.float32, device=x.device)
    if n_rows == 0 or n_features == 0:
        dw.zero_()
    for start in range(0, n_rows, max(rows, 1)):
        part = slice(start, min(start + rows, n_rows))
        logits = buffer[: part.stop - start, :n_cols]
        torch.mm(x[part], weight.t(), out=logits)
        launch_cross_entropy(
            logits, targets[part], ignore_index, vocab_size,
            losses=None if losses is None else losses[part],
            gradient=logits if need_dx or need_dw else None,
            scale=None if scale is None else scale[part],
        )  # fmt: skip
        if need_dx:
            torch.mm(logits, weight, out=dx[part])
        if need_dw:
            _add_product(dw, logits.t(), x[part], first=start == 0)
    return dx, dw


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b in fp32, or total = a @ b, by a product that adds in its epilogue."""
    if a.dtype == torch.float32:
        if first:
            torch.mm(a, b, out=total)
        else:
            torch.addmm(total, a, b, out=total)
    elif a.is_cuda and torch.version.hip is None:
        if first:
            torch.mm(a, b, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:  # PyTorch has 16-bit products with an fp32 result on CUDA only: round each chunk's once
        product = torch.mm(a, b)
        total.copy_(product) if first else total.add_(product)


def _with_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, vocab_size: int,
    chunk_tokens: int | None, mean: bool, need_dx: bool, need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, dx and dW of the losses' sum (None if not needed), and what divides these two."""
    losses = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    targets = targets.contiguous()
    dx, dw = _chunks(
        x, weight, targets, ignore_index, vocab_size, chunk_tokens,
        losses=losses, need_dx=need_dx, need_dw=need_dw,
    )  # fmt: skip
    total = losses.sum()
    if not mean:
        return total, dx, dw, torch.empty(0, dtype=torch.float32, device=x.device)
    count = targets.ne(ignore_index).sum(dtype=torch.float32)
    # The mean over no rows is NaN, but its gradient is that of a constant: 0 / 1.
    return total / count, dx, dw, count.clamp(min=1)


def _scaled(
    dloss: Tensor, dx: Tensor, dw: Tensor, divisor: Tensor, weight_dtype: torch.dtype,
    mean: bool, needs: list[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dx and dW, which the forward pass left for an upstream gradient of 1, times the real one."""
    scale = dloss / divisor if mean else dloss

    def times(x: Tensor, dtype: torch.dtype) -> Tensor:
        if call_directly(x, scale):
            return launch_scale(x, scale, torch.empty_like(x, dtype=dtype))
        return (x.float() * scale).to(dtype)

    need_dx, need_dw = needs
    return times(dx, dx.dtype) if need_dx else None, times(dw, weight_dtype) if need_dw else None


def _row_losses(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, vocab_size: int,
    chunk_tokens: int | None,
) -> Tensor:  # fmt: skip
    losses = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    options = (ignore_index, vocab_size, chunk_tokens)
    _chunks(x, weight, targets.contiguous(), *options, losses=losses)
    return losses


def _row_gradients(
    dlosses: Tensor, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int,
    vocab_size: int, chunk_tokens: int | None, needs: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx and dW of sum_i dlosses_i loss_i; the logits are computed again."""
    need_dx, need_dw = needs
    dx, dw = _chunks(
        x, weight, targets.contiguous(), ignore_index, vocab_size, chunk_tokens,
        need_dx=need_dx, need_dw=need_dw, scale=dlosses,
    )  # fmt: skip
    return dx, dw.to(weight.dtype)


def _shapes(x, weight, need_dx, need_dw, dtype):
    dx = x.new_empty(x.shape if need_dx else (0,))
    return dx, x.new_empty(weight.shape if need_dw else (0,), dtype=dtype)


if HAS_TRITON:
    from fastgpt_kernels.ops.loss.kernels import launch_cross_entropy, launch_scale

    _total = Op(
        "linear_cross_entropy", _with_gradients,
        lambda x, weight, targets, ignore, vocab, chunk, mean, need_dx, need_dw: (
            x.new_empty((), dtype=torch.float32),
            *_shapes(x, weight, need_dx, need_dw, torch.float32),
            x.new_empty(() if mean else (0,), dtype=torch.float32),
        ),
        saves=lambda inputs, results: (results[1:], (inputs[1].dtype, inputs[6])),
        backward=_scaled, gradients=(0, 1), needs=True,
        flops=lambda x, w, *rest, **_: product_flops(x, w, 1 + rest[5] + rest[6]),
    )  # fmt: skip
    _rows = Op(
        "linear_cross_entropy_rows", _row_losses,
        lambda x, *_: x.new_empty(x.shape[0], dtype=torch.float32),
        saves=lambda inputs, losses: (inputs[:3], inputs[3:]),
        backward=Op(
            "linear_cross_entropy_rows_backward", _row_gradients,
            lambda dlosses, x, weight, targets, ignore, vocab, chunk, needs: _shapes(
                x, weight, needs[0], needs[1], weight.dtype
            ),
            flops=lambda dlosses, x, w, *rest, **_: product_flops(x, w, 1 + sum(rest[4])),
        ),
        gradients=(0, 1), needs=True,
        flops=lambda x, w, *_, **__: product_flops(x, w, 1),
    )  # fmt: skip


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -1,
    reduction: str = "mean",
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """cross_entropy(x @ weight.T, targets) without ever holding more than a chunk of the logits.

    x (M, C) and weight (V, C) of one dtype, bf16, fp16 or fp32; targets (M,) int64. The loss and
    the meaning of the other arguments are those of `cross_entropy`. `chunk_tokens` is the number of
    rows of logits held at a time; None chooses it from the shapes. Gradients are computed together
    with the loss, unless grad mode is off or neither x nor weight requires them; with reduction
    "none" in the backward. dW is summed in fp32 and comes in the dtype of `weight`.

    Wrong shapes and values raise ValueError, wrong types and dtypes TypeError.
    """
    op = "linear_cross_entropy"
    check_tensor(op, "x", x, ndim=2, dtypes=FLOAT_DTYPES)
    check_tensor(op, "weight", weight, shape=(None, x.shape[1]), like=x)
    n_cols = weight.shape[0]
    vocab_size = check_arguments(op, x, n_cols, targets, ignore_index, reduction, vocab_size)
    check_int(op, "chunk_tokens", chunk_tokens, least=1, optional=True)
    if not use_kernel(x):
        check_targets(op, targets, ignore_index, vocab_size)
        return reference.linear_cross_entropy(
            x, weight, targets, ignore_index, reduction, vocab_size
        )
    refuse_interpreted_bf16(op, x)
    options = (ignore_index, vocab_size, chunk_tokens)
    if reduction == "none":
        return _rows(x, weight, targets, *options)
    enabled = torch.is_grad_enabled()
    needs = (enabled and x.requires_grad, enabled and weight.requires_grad)
    return _total(x, weight, targets, *options, reduction == "mean", *needs)
