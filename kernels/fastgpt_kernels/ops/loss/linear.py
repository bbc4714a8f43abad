"""The last linear layer and its cross entropy, chunk by chunk: the logits never exist at once.

    z = x W^T     loss = cross_entropy(z, targets)     dz = softmax(z) - onehot(targets)
    dx_i = s_i sum_v dz_iv W_v     dW_v = sum_i s_i dz_iv x_i

x (M, C), W (V, C), targets (M,); s_i the upstream gradient of row i's loss. For each chunk of rows
cuBLAS writes its logits into one buffer, the cross-entropy kernel turns them into dz in place (see
cross_entropy.py), and two more products consume them. W may be an fp32 master of 16-bit
activations: it is rounded once, on the way in, unless it comes with its copy, and dW, a sum of
products of 16-bit factors, is summed up in fp32 over rows and chunks alike, in place, and handed
out as it is.

For "mean" and "sum" every s_i is the same number s, known only in the backward: the forward does
all the work for s = 1 and the backward multiplies dx and dW by s, which also keeps fp16 within its
range. The mean is a division outside of the op, which torch.compile fuses with its surroundings.
For "none" the s_i differ and dW cannot be rescaled afterwards: the forward computes losses only and
the backward computes the logits again, a fourth product.

Work is 6 M V C FLOPs (8 M V C for "none", 2 without gradients). With b bytes an element, memory
moved is 5 M V b (logits written, read, dz written, read twice), and for n chunks 8 (n - 1) V C to
sum dW in memory and 2 n reads of W. So chunks are as long as memory allows, which is mostly one:
65,536 rows of 50,304 bf16 logits are 6.6 GB. They may take a twelfth of the device's memory: not of
what is free of it, for the number of chunks decides how dW's sum is rounded, and a run that goes on
after a stop must round as the one that was never stopped.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastgpt_kernels import reference
from fastgpt_kernels.checks import check_int, check_tensor, refuse_interpreted_bf16
from fastgpt_kernels.launch import HAS_TRITON, use_kernel
from fastgpt_kernels.linear import accumulate_scaled, add_matmul
from fastgpt_kernels.ops.loss.cross_entropy import check_arguments, check_rows, check_targets
from fastgpt_kernels.register import Op, call_directly, product_flops

CHUNK_BYTES = 2 << 30  # of logits, where no GPU's memory sets the limit
SHARE = 12  # of a GPU's memory a chunk may take 1 / SHARE
MIN_CHUNK_ROWS = 1024  # fewer do not fill a GPU with tiles of the products
PITCH = 64  # rows of the chunk start at multiples of this many elements: aligned for any V


def chunk_rows(
    n_rows: int, n_cols: int, element_size: int, chunk_tokens: int | None = None,
    room: int = CHUNK_BYTES,
) -> int:  # fmt: skip
    """Rows of logits to hold at a time: `chunk_tokens`, or near-equal chunks of `room` bytes."""
    if chunk_tokens is not None:
        return min(chunk_tokens, n_rows)
    limit = max(MIN_CHUNK_ROWS, room // (n_cols * element_size))
    rows = -(-n_rows // max(-(-n_rows // limit), 1))
    return min(-(-rows // 128) * 128, limit, n_rows)  # whole tiles of the matrix products


@functools.cache
def room_on(device: torch.device) -> int:
    """Bytes that a chunk of logits may take on a device."""
    if device.type != "cuda":
        return CHUNK_BYTES
    return torch.cuda.get_device_properties(device).total_memory // SHARE


def _chunks(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, vocab_size: int,
    chunk_tokens: int | None,
    *, weight_bf16: Tensor | None = None, losses: Tensor | None = None, need_dx: bool = False,
    need_dw: bool = False, scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill `losses` (M,) and return dx like x and dW (V, C) fp32, or empty tensors for them.

    `scale` (M,) fp32 is the upstream gradient of the rows' losses, None for 1.
    """
    (n_rows, n_features), n_cols = x.shape, weight.shape[0]
    weight = weight.to(x.dtype) if weight_bf16 is None else weight_bf16
    dx = torch.empty(x.shape if need_dx else 0, dtype=x.dtype, device=x.device)
    dw = torch.empty(weight.shape if need_dw else 0, dtype=torch.float32, device=x.device)
    if n_rows == 0 or n_features == 0:
        dw.zero_()
    pitch, size = -(-n_cols // PITCH) * PITCH, x.element_size()
    rows = chunk_rows(n_rows, pitch, size, chunk_tokens, room_on(x.device))
    buffer = torch.empty(rows, pitch, dtype=x.dtype, device=x.device)
    for start in range(0, n_rows, max(rows, 1)):
        part = slice(start, min(start + rows, n_rows))
        padded = buffer[: part.stop - start]  # columns from n_cols on are padding, too
        logits = padded[:, :n_cols]
        torch.mm(x[part], weight.t(), out=logits)
        launch_cross_entropy(
            padded, targets[part], ignore_index, vocab_size,
            losses=None if losses is None else losses[part],
            gradient=padded if need_dx or need_dw else None,
            scale=None if scale is None else scale[part],
        )  # fmt: skip
        if need_dx:
            torch.mm(logits, weight, out=dx[part])
        if need_dw:
            add_matmul(dw, logits.t(), x[part], first=start == 0)
    return dx, dw


def _with_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, weight_bf16: Tensor | None,
    main_grad: Tensor | None, ignore_index: int, vocab_size: int, chunk_tokens: int | None,
    need_dx: bool, need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum of the losses, its dx and dW, which are empty if not needed.

    `main_grad` is for the backward pass.
    """
    losses = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    dx, dw = _chunks(
        x, weight, targets.contiguous(), ignore_index, vocab_size, chunk_tokens,
        weight_bf16=weight_bf16, losses=losses, need_dx=need_dx, need_dw=need_dw,
    )  # fmt: skip
    return losses.sum(), dx, dw


def _scaled(
    scale: Tensor, dx: Tensor, dw: Tensor, main_grad: Tensor | None, weight_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dx and dW, which the forward pass left for an upstream gradient of 1, times the real one.

    If there is an `main_grad` dW goes there.
    """

    def times(x: Tensor, dtype: torch.dtype) -> Tensor:
        if call_directly(x, scale):
            return launch_scale(x, scale, torch.empty_like(x, dtype=dtype))
        return (x.float() * scale).to(dtype)

    need_dx, need_dw = needs
    if need_dw and main_grad is not None:
        accumulate_scaled(main_grad, dw, scale)
        need_dw = False
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
        lambda x, weight, targets, weight_bf16, main_grad, ignore, vocab, chunk, need_dx, need_dw: (
            x.new_empty((), dtype=torch.float32),
            *_shapes(x, weight, need_dx, need_dw, torch.float32),
        ),
        saves=lambda inputs, results: (results[1:], (inputs[4], inputs[1].dtype)),
        backward=_scaled, gradients=(0, 1), needs=True,
        flops=lambda x, w, *rest, **_: product_flops(x, w, 1 + rest[6] + rest[7]),
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
    weight_bf16: Tensor | None = None,
    main_grad: Tensor | None = None,
) -> Tensor:
    """cross_entropy(x @ weight.T, targets) without ever holding more than a chunk of the logits.

    x (..., C) bf16, fp16 or fp32; weight (V, C) like x or fp32, which is rounded to x's dtype here,
    or by the caller: `weight_bf16`, (V, C) like x; targets (...) int64. The loss and the meaning of
    the other arguments are those of `cross_entropy`; ignore_index is -1 unless given, where
    PyTorch's is -100. `chunk_tokens` is the number of rows of logits held at a time; None makes as
    few chunks as fit into a twelfth of the GPU's memory. Gradients are computed together with the
    loss, unless grad mode is off or neither x nor weight requires them; with reduction "none" in
    the backward, and `weight_bf16` is not read then. dW is summed in fp32 and comes in the dtype of
    `weight`: an fp32 one is never rounded. `main_grad` (V, C) fp32: there the backward pass adds
    dW, in place, and weight gets no gradient; not with reduction "none".

    Wrong shapes and values raise ValueError, wrong types and dtypes TypeError.
    """
    op = "linear_cross_entropy"
    check_rows(op, "x", x, "C")
    check_tensor(
        op, "weight", weight, shape=(None, x.shape[-1]), dtypes=(x.dtype, torch.float32), like=x
    )
    n_cols = weight.shape[0]
    if weight_bf16 is not None:
        check_tensor(op, "weight_bf16", weight_bf16, shape=weight.shape, dtypes=(x.dtype,), like=x)
    if main_grad is not None:
        check_tensor(
            op, "main_grad", main_grad, shape=weight.shape, dtypes=(torch.float32,), like=x
        )
        if reduction == "none":
            raise ValueError(f'{op}: main_grad needs reduction "mean" or "sum", got "none"')
    vocab_size = check_arguments(op, x, n_cols, targets, ignore_index, reduction, vocab_size)
    check_int(op, "chunk_tokens", chunk_tokens, least=1, optional=True)
    if not use_kernel(x):
        check_targets(op, targets, ignore_index, vocab_size)
        return reference.linear_cross_entropy(
            x, weight, targets, ignore_index, reduction, vocab_size, main_grad=main_grad
        )
    refuse_interpreted_bf16(op, x)
    shape = targets.shape
    x, targets = x.reshape(targets.numel(), x.shape[-1]), targets.reshape(-1)
    options = (ignore_index, vocab_size, chunk_tokens)
    if reduction == "none":
        return _rows(x, weight, targets, *options).view(shape)
    enabled = torch.is_grad_enabled()
    needs = (enabled and x.requires_grad, enabled and weight.requires_grad)
    total = _total(x, weight, targets, weight_bf16, main_grad, *options, *needs)
    if reduction == "sum":
        return total
    # The mean over no rows is NaN, as PyTorch's, but its gradient that of a constant: 0.
    count = targets.ne(ignore_index).sum(dtype=torch.float32)
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)
