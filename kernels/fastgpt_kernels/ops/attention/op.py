"""Fused multi-head attention on packed projections, forward and backward.

For every batch entry and head, with q, k, v (T, D) its columns of qkv (B, T, 3*C), D = C / H:

    S = scale * q k^T            (causal: S[i, j] = -inf where j > i)
    y = Z * softmax(S) v         Z: 0 with probability p, else 1 / (1 - p); all ones without dropout

q of head h is at columns h*D, k at C + h*D, v at 2*C + h*D; y (B, T, C) has head h at h*D, and the
gradient of qkv is one tensor laid out like qkv: nothing is transposed, split or concatenated around
the op. How it works is told in forward.py (online softmax, one program a tile of rows), backward.py
(dk, dv and dq in one pass, or in two) and tiles.py (program order, tile loads,
the dropout mask).

Head dims 80 and 96 are worked on as 128 wide, with zeros that are not loaded.
The matrix products take the dtype of qkv and sum in fp32 (fp32 inputs: true fp32 products, no
TF32); softmax, log-sum-exp and the dropout scale are fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import reference
from fastgpt_kernels.checks import (
    FLOAT_DTYPES,
    check_dropout,
    check_int,
    check_tensor,
    refuse_interpreted_bf16,
)
from fastgpt_kernels.launch import HAS_TRITON, use_kernel
from fastgpt_kernels.register import Op

HEAD_DIMS = (32, 64, 80, 96, 128)

_OPTIONAL_BOOL, _OPTIONAL_NUMBER = bool | None, int | float | None
_DTYPES = (*FLOAT_DTYPES, torch.float64)


def _save(inputs, results):
    qkv, bias, n_head, causal, dropout_p, seed, scale, deterministic = inputs
    values = n_head, causal, dropout_p, scale, deterministic, bias is not None
    return (qkv, *results, seed), values


def _shapes(qkv, bias, n_head, *_):
    batch, T, width = qkv.shape
    lse = qkv.new_empty((batch * n_head, T), dtype=torch.float32)
    return qkv.new_empty((batch, T, width // 3)), lse


def _gradient_shapes(grad_y, qkv, *values):
    sums = qkv.new_empty(qkv.shape[2], dtype=torch.float32) if values[-1] else None
    return qkv.new_empty(qkv.shape), sums


def _flops(qkv_shape, products: int) -> int:
    """FLOPs of T x T x D products a head. Causal counts in full, as torch counts its own."""
    batch, T, width = qkv_shape
    return products * (2 * batch * T * T * (width // 3))


def declare(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Op:
    """The PyTorch op of an implementation that has these launchers."""
    return Op(
        name, forward, _shapes,
        saves=_save,
        backward=Op(
            f"{name}_backward", backward,
            _gradient_shapes,
            # Five products, as torch counts; two passes do seven.
            flops=lambda grad_shape, qkv_shape, *_, **__: _flops(qkv_shape, 5),
        ),
        gradients=(0, 1),
        flops=lambda qkv_shape, *_, **__: _flops(qkv_shape, 2),
    )  # fmt: skip


_op: Op | None = None  # there is none without Triton, which `use_kernel` knows

if HAS_TRITON:
    from fastgpt_kernels.ops.attention.backward import launch_backward
    from fastgpt_kernels.ops.attention.forward import launch_forward

    def _forward(
        qkv: Tensor, bias: Tensor | None, n_head: int, causal: bool, dropout_p: float,
        seed: Tensor | None, scale: float, deterministic: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(y, lse); bias and `deterministic` are for the backward pass."""
        refuse_interpreted_bf16("attention", qkv)
        return launch_forward(qkv, n_head, causal, dropout_p, seed, scale)

    _op = declare("attention", _forward, launch_backward)


def attention(
    qkv: Tensor,
    n_head: int,
    *,
    bias: Tensor | None = None,
    causal: bool = True,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    scale: float | None = None,
    deterministic: bool | None = None,
) -> Tensor:
    """Multi-head self-attention of packed queries, keys and values (Vaswani et al., 2017).

    qkv            (B, T, 3*C), bf16, fp16 or fp32, straight from the projection; read in place when
                   its last dimension is contiguous, whatever the other strides
    n_head         H; the head dim C / H is 32, 64, 80, 96 or 128
    bias           (3*C,), fp32 or dtype of qkv: the projection's bias, which is in qkv already. It
                   changes no result; its gradient, fp32 sums of qkv's over all rows, comes with
                   that of qkv, without a pass of its own (the projection gets it detached)
    causal         position t sees positions <= t, else all
    dropout_p      probability in [0, 1) with which softmax's entries are dropped, to 2**-16
    seed           of the dropout mask: an int, or one int64 on qkv's device that the kernels
                   read, so that a replayed CUDA graph drops anew when the tensor changes. The mask
                   depends on seed, b * H + h, row and column only, as specified by
                   `reference.attention_dropout_mask`. None draws a seed from torch's generator of
                   the device, without waiting for it
    scale          of the logits, > 0; default 1 / sqrt(C / H)
    deterministic  True: gradients are the same to the bit every time, in two passes, which have 7/5
                   of one's matrix products and are faster all the same where `configs.TWO_PASSES`
                   says so; None: torch.are_deterministic_algorithms_enabled(). The forward pass is
                   always deterministic

    Returns y (B, T, C), contiguous, dtype of qkv. Differentiable once, in qkv and bias. Saves qkv,
    y and one fp32 per row and head; nothing of size T x T. On a CPU tensor `reference.attention`
    runs.

    Raises TypeError/ValueError naming the argument, what it got and what it wants.
    """
    return run(_op, qkv, bias, n_head, causal, dropout_p, seed, scale, deterministic)


def run(op, qkv, bias, n_head, causal, dropout_p, seed, scale, deterministic) -> Tensor:
    """`attention` by an op of `declare`."""
    _check(qkv, bias, n_head, causal, dropout_p, seed, scale, deterministic)
    if not use_kernel(qkv):
        return reference.attention(
            qkv, n_head, bias=bias, causal=causal, dropout_p=dropout_p, seed=seed, scale=scale
        )
    if scale is None:
        scale = 1.0 / math.sqrt(qkv.shape[2] // (3 * n_head))
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    seed = reference.seed_tensor(seed, qkv.device) if dropout_p > 0 else None
    return op(qkv, bias, n_head, causal, dropout_p, seed, scale, deterministic)


def _check(qkv, bias, n_head, causal, dropout_p, seed, scale, deterministic) -> None:
    op = "attention"
    check_tensor(op, "qkv", qkv, ndim=3, dtypes=_DTYPES)
    if qkv.dtype == torch.float64 and use_kernel(qkv):
        check_tensor(op, "qkv", qkv, dtypes=FLOAT_DTYPES)
    check_int(op, "n_head", n_head, least=1)
    T, width = qkv.shape[1:]
    if bias is not None:
        dtypes = (torch.float32, qkv.dtype)
        check_tensor(op, "bias", bias, shape=(width,), dtypes=dtypes, like=qkv)
    if T < 1:
        raise ValueError(f"{op}: qkv must have at least one position, got {tuple(qkv.shape)}")
    if width % (3 * n_head):
        raise ValueError(
            f"{op}: n_head must divide qkv's last dimension into 3 * n_head equal parts, "
            f"got n_head={n_head} and {width} columns"
        )
    if width // (3 * n_head) not in HEAD_DIMS:
        raise ValueError(
            f"{op}: head dim must be one of {', '.join(map(str, HEAD_DIMS))}, "
            f"got {width // (3 * n_head)} ({width} columns of qkv / 3 / n_head={n_head})"
        )
    if not isinstance(causal, bool):
        raise TypeError(f"{op}: causal must be a bool, got {type(causal).__name__}")
    if not isinstance(deterministic, _OPTIONAL_BOOL):
        kind = type(deterministic).__name__
        raise TypeError(f"{op}: deterministic must be a bool or None, got {kind}")
    if isinstance(scale, bool) or not isinstance(scale, _OPTIONAL_NUMBER):
        raise TypeError(f"{op}: scale must be a float or None, got {type(scale).__name__}")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"{op}: scale must be finite and > 0, got {scale}")
    check_dropout(op, dropout_p, seed, qkv)
