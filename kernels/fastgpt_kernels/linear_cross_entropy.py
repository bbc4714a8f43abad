"""Linear layer and cross entropy, chunk by chunk, so that the logits never exist at once.

    z = x W^T     loss_i = cross_entropy(z_i, targets_i)     dz = softmax(z) - onehot(targets)
    dx_i = s sum_v dz_iv W_v     dW_v = s sum_i dz_iv x_i     s: the upstream gradient of the sum

x (M, C), W (V, C), targets (M,). For each chunk of rows cuBLAS writes the logits into one buffer,
the kernel of cross_entropy.py turns them into dz in place, and two more matmuls read them. Only the
backward knows s, so the forward computes dx and dW for 1 and the backward scales them. With
gradients it takes 6 M V C FLOPs and 5 M V b bytes, b per element; without them 2 M V C FLOPs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import launch, reference
from fastgpt_kernels.checks import check_int, check_tensor, refuse_interpreted_bf16
from fastgpt_kernels.cross_entropy import (
    KERNELS,
    check_arguments,
    cross_entropy,
    launch_cross_entropy,
    reduced,
    with_targets,
)
from fastgpt_kernels.library import define_op, matmul_flops
from fastgpt_kernels.linear import accumulate_scaled, add_matmul, linear
from fastgpt_kernels.registry import Cost, ExampleInputs, OpSpec, Random, Sizes, implementations

CHUNK_BYTES = 2 << 30  # of logits, without a GPU
SHARE = 12  # a chunk may take 1 / SHARE of a GPU's memory
MIN_CHUNK_ROWS = 1024  # fewer do not fill a GPU with tiles of the matmuls
PITCH = 64  # rows of the chunk start at multiples of this many elements, aligned for any V

# --- Chunks -----------------------------------------------------------------------------------


def chunk_rows(
    n_rows: int, n_cols: int, itemsize: int, chunk_tokens: int | None = None,
    most_bytes: int = CHUNK_BYTES,
) -> int:  # fmt: skip
    """Returns the rows of a chunk: `chunk_tokens`, or near-equal chunks of at most `most_bytes`.

    There are as few as memory allows, since n chunks cost 8 (n - 1) V C bytes to sum dW in memory.
    65,536 rows of 50,304 bf16 logits are 6.6 GB.
    """
    if chunk_tokens is not None:
        return min(chunk_tokens, n_rows)
    limit = max(MIN_CHUNK_ROWS, most_bytes // (n_cols * itemsize))
    rows = -(-n_rows // max(-(-n_rows // limit), 1))
    return min(-(-rows // 128) * 128, limit, n_rows)  # whole tiles of the matmuls


@functools.cache
def chunk_bytes(device: torch.device) -> int:
    """Returns the bytes of logits that a chunk may take on a device.

    It is a share of all memory, not of the free memory. The number of chunks decides how dW's sum
    is rounded, and a resumed run must round like an uninterrupted one.
    """
    if device.type != "cuda":
        return CHUNK_BYTES
    return torch.cuda.get_device_properties(device).total_memory // SHARE


def _forward(
    x: Tensor, weight: Tensor, targets: Tensor, weight_bf16: Tensor | None,
    main_grad: Tensor | None, ignore_index: int, vocab_size: int, chunk_tokens: int | None,
    need_dx: bool, need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the losses (M,), and dx (M, C) and fp32 dW (V, C) of their sum, empty if not needed.

    `main_grad` is for the backward pass.
    """
    weight = weight.to(x.dtype) if weight_bf16 is None else weight_bf16
    targets, n_rows, n_cols = targets.contiguous(), x.shape[0], weight.shape[0]
    losses = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    dx = torch.empty(x.shape if need_dx else 0, dtype=x.dtype, device=x.device)
    dw = torch.empty(weight.shape if need_dw else 0, dtype=torch.float32, device=x.device)
    if n_rows == 0:
        dw.zero_()
    pitch, size = -(-n_cols // PITCH) * PITCH, x.element_size()
    rows = chunk_rows(n_rows, pitch, size, chunk_tokens, chunk_bytes(x.device))
    buffer = torch.empty(rows, pitch, dtype=x.dtype, device=x.device)
    for start in range(0, n_rows, max(rows, 1)):
        part = slice(start, min(start + rows, n_rows))
        padded = buffer[: part.stop - start]  # columns from n_cols on are padding, too
        logits = padded[:, :n_cols]
        torch.mm(x[part], weight.t(), out=logits)
        gradient = padded if need_dx or need_dw else None
        launch_cross_entropy(
            padded, targets[part], ignore_index, vocab_size, losses[part], gradient
        )
        if need_dx:
            torch.mm(logits, weight, out=dx[part])
        if need_dw:
            add_matmul(dw, logits.t(), x[part], first=start == 0)
    return losses, dx, dw


# --- Registration -----------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtype, ctx.main_grad = inputs[1].dtype, inputs[4]  # autograd refuses changed saved tensors
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, dlosses: Tensor, *_: None) -> tuple[Tensor | None, Tensor | None]:
    scale = dlosses[:1].sum()  # all are the same number, and there may be none
    dx, dw = ctx.saved_tensors
    dx = _scaled(dx, scale, dx.dtype) if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[1]:
        return dx, None
    if ctx.main_grad is not None:
        accumulate_scaled(ctx.main_grad, dw, scale)
        return dx, None
    return dx, _scaled(dw, scale, ctx.dtype)


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x * scale, rounded once, without an fp32 copy of x on a GPU.

    A 0-dim factor would be rounded to x's dtype first.
    """
    return torch.mul(x, scale.view(1), out=torch.empty_like(x, dtype=dtype))


def _fake(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    losses, *needs = x.new_empty(x.shape[0], dtype=torch.float32), rest[-2], rest[-1]
    dw = x.new_empty(weight.shape if needs[1] else 0, dtype=torch.float32)
    return losses, x.new_empty(x.shape if needs[0] else 0), dw


_op = define_op(
    "linear_cross_entropy", _forward, _fake, setup_context=_setup_context, backward=_gradients,
    flops=lambda x, w, *rest, **_: matmul_flops(x, w, 1 + rest[-2] + rest[-1]),
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
    """Returns cross_entropy(x @ weight.T, targets), with a chunk of the logits at a time.

    x             (..., C) in bf16, fp16 or fp32
    weight        (V, C) like x or fp32; an fp32 one is rounded to x's dtype for the matmuls, and
                  its gradient, summed in fp32, is never rounded
    targets       (...) int64; they and the arguments not listed are those of `cross_entropy`
    chunk_tokens  rows of logits held at a time; by default as few chunks as fit into a twelfth of
                  the GPU's memory
    weight_bf16   (V, C): the weight in x's dtype
    main_grad     (V, C) fp32, to which the backward pass adds dW instead of returning it; not with
                  reduction "none"

    Gradients are computed with the loss, unless grad mode is off or no input requires them. With
    reduction "none" and gradients the logits are kept.

    Raises ValueError for wrong shapes and values, and TypeError for wrong types and dtypes.
    """
    op = "linear_cross_entropy"
    check_tensor(op, "x", x)
    if x.ndim == 0:
        raise ValueError(f"{op}: x must have shape (..., C), got ()")
    dtypes = (x.dtype, torch.float32)
    check_tensor(op, "weight", weight, shape=(None, x.shape[-1]), dtypes=dtypes, like=x)
    for name, tensor, dtype in (
        ("weight_bf16", weight_bf16, x.dtype), ("main_grad", main_grad, torch.float32)
    ):  # fmt: skip
        shape = weight.shape
        check_tensor(op, name, tensor, shape=shape, dtypes=(dtype,), like=x, optional=True)
    if main_grad is not None and reduction == "none":
        raise ValueError(f'{op}: main_grad needs reduction "mean" or "sum", got "none"')
    vocab_size = check_arguments(op, x, len(weight), targets, ignore_index, reduction, vocab_size)
    check_int(op, "chunk_tokens", chunk_tokens, least=1, optional=True)
    if not launch.use_kernel(x):
        return reference.linear_cross_entropy(
            x, weight, targets, ignore_index, reduction, vocab_size,
            weight_bf16=weight_bf16, main_grad=main_grad,
        )  # fmt: skip
    refuse_interpreted_bf16(op, x)
    graded = torch.is_grad_enabled()
    if reduction == "none" and graded and (x.requires_grad or weight.requires_grad):
        logits = linear(x, weight, None, weight_bf16)
        return cross_entropy(logits, targets, ignore_index, reduction, vocab_size)
    losses, _, _ = _op(
        x.reshape(targets.numel(), x.shape[-1]), weight, targets.reshape(-1), weight_bf16,
        main_grad, ignore_index, vocab_size, chunk_tokens,
        graded and x.requires_grad, graded and weight.requires_grad,
    )  # fmt: skip
    return reduced(losses, targets, ignore_index, reduction)


def _example_inputs(s: Sizes, random: Random) -> list[ExampleInputs]:
    """Returns the calls of training and evaluation. Few rows have three chunks, the last short."""
    x, weight = random(s.tokens, s.n_embd), random(s.padded_vocab_size, s.n_embd) * 0.1
    example = with_targets(s, x, weight)
    few = s.tokens <= 8192
    chunks = {"chunk_tokens": -(-s.tokens // 48) * 16} if few else {}  # aligned, as long ones are
    return [
        ExampleInputs([x, weight], example.arguments | chunks, fp32_inputs=(1,)),
        ExampleInputs([x, weight], example.arguments, fp32_inputs=(1,), gradients=False),
    ]


def _cost(s: Sizes, itemsize: int) -> dict[str, Cost]:
    """Returns the cost of three matmuls and of five passes over the logits."""
    logits = 1.0 * s.tokens * s.padded_vocab_size
    return {"both": Cost(6 * logits * s.n_embd, 5 * logits * itemsize)}


SPECS = {
    "linear_cross_entropy": OpSpec(
        "linear_cross_entropy",
        implementations(reference.linear_cross_entropy, linear_cross_entropy),
        _example_inputs, _cost,
        kernels=KERNELS, category="head", label="cross entropy", few_tokens=512, calls_per_step=1,
    )
}  # fmt: skip
