"""A linear layer on a few rows, with the norm before it and what comes after it, for generation.

    y = act(norm(x) @ weight.T + bias) + residual

    x (B, K), B up to 8; weight (N, K); bias (N,); residual and y (B, N)
    norm is a layer norm over K or nothing, act is GELU (tanh or erf) or nothing

One new token makes every matmul of a model a matrix-vector product: each weight is read once and
used B times, so that the time is that of reading weights. Launches are the rest of it, so norm,
bias, GELU and residual ride along, and a layer takes four of these and one decode_attention.

A program makes BLOCK_N outputs: it walks K in steps of BLOCK_K, weights [BLOCK_N, BLOCK_K] times x
[B, BLOCK_K] summed up in fp32 by plain multiply-adds; tensor cores would idle. Rows of weight are
contiguous, so every load is a full line. With a norm each program takes the statistics of the B
rows for itself: x is a few kilobytes that all programs share in the L2, and a launch is saved. What
that is worth on a GPU, `python -m bench generate` shows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import configs, reference
from fastgpt_kernels._host import (
    FLOAT_DTYPES,
    arch_of,
    call_directly,
    check_tensor,
    on_device,
    refuse_interpreted_bf16,
    use_kernel,
)
from fastgpt_kernels.configs import Config
from fastgpt_kernels.gelu_kernels import gate_and_slope
from fastgpt_kernels.specs import AotSpec

MAX_ROWS = 8
ACTIVATIONS = ("none", "tanh", "erf")

# ---------------------------------------------------------------------------------------- kernel


@triton.jit
def decode_linear_kernel(
    x,  # (B, K), rows stride_x apart
    weight,  # (N, K), rows stride_w apart
    bias,  # (N,) or None
    norm_weight, norm_bias,  # (K,) or None
    residual,  # (B, N) contiguous or None
    y,  # (B, N) contiguous, out
    stride_x, stride_w, N, eps,
    B: tl.constexpr, B_PAD: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, B_PAD)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    x_rows = x + rows[:, None] * stride_x
    real = rows[:, None] < B

    mean = tl.zeros([B_PAD], tl.float32)
    rstd = tl.zeros([B_PAD], tl.float32)
    if NORM:
        total = tl.zeros([B_PAD, BLOCK_K], tl.float32)
        for k in range(0, K, BLOCK_K):
            at = k + columns[None, :]
            total += tl.load(x_rows + at, mask=real & (at < K), other=0.0).to(tl.float32)
        mean = tl.sum(total, 1) / K
        squares = tl.zeros([B_PAD, BLOCK_K], tl.float32)
        for k in range(0, K, BLOCK_K):
            at = k + columns[None, :]
            value = tl.load(x_rows + at, mask=real & (at < K), other=0.0).to(tl.float32)
            value = tl.where(at < K, value - mean[:, None], 0.0)
            squares += value * value
        rstd = 1.0 / tl.sqrt(tl.sum(squares, 1) / K + eps)

    acc = tl.zeros([B_PAD, BLOCK_N, BLOCK_K], tl.float32)
    w_rows = weight + outputs.to(tl.int64)[:, None] * stride_w
    for k in range(0, K, BLOCK_K):
        at = k + columns
        inside = at < K
        value = tl.load(x_rows + at[None, :], mask=real & inside[None, :], other=0.0)
        value = value.to(tl.float32)
        if NORM:
            gain = tl.load(norm_weight + at, mask=inside, other=0.0).to(tl.float32)
            value = (value - mean[:, None]) * rstd[:, None] * gain[None, :]
            if norm_bias is not None:
                shift = tl.load(norm_bias + at, mask=inside, other=0.0).to(tl.float32)
                value += shift[None, :]
        mask = (outputs < N)[:, None] & inside[None, :]
        w = tl.load(w_rows + at[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += value[:, None, :] * w[None, :, :]
    out = tl.sum(acc, 2)  # [B_PAD, BLOCK_N]

    if bias is not None:
        out += tl.load(bias + outputs, mask=outputs < N, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION != "none":
        gate, _ = gate_and_slope(out, ACTIVATION == "tanh")
        out = out * gate
    place = rows[:, None] * N + outputs[None, :]
    mask = real & (outputs < N)[None, :]
    if residual is not None:
        out += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, out.to(y.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------- launcher


def launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, residual: Tensor | None, activation: str, eps: float,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """x (B, K) and weight (N, K) -> y (B, N), all in x's dtype but for the norm's parameters."""
    (B, K), N = x.shape, weight.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = torch.empty((B, N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    padded = triton.next_power_of_2(B)
    config = config or configs.lookup(configs.DECODE_LINEAR, arch_of(x), padded)
    with on_device(x):
        decode_linear_kernel[(triton.cdiv(N, config.blocks["BLOCK_N"]),)](
            x, weight, bias, norm_weight, norm_bias, residual, y,
            x.stride(0), weight.stride(0), N, eps,
            B=B, B_PAD=padded, K=K, NORM=norm_weight is not None, ACTIVATION=activation,
            **config.kwargs(),
        )  # fmt: skip
    return y


# ---------------------------------------------------------------------------------------- the op


@torch.library.custom_op("fastgpt::decode_linear", mutates_args=())
def decode_linear_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, residual: Tensor | None, activation: str, eps: float,
) -> Tensor:  # fmt: skip
    return launch(x, weight, bias, norm_weight, norm_bias, residual, activation, eps)


@decode_linear_op.register_fake
def _(x, weight, bias, norm_weight, norm_bias, residual, activation, eps):
    return x.new_empty((x.shape[0], weight.shape[0]))


def decode_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
) -> Tensor:
    """act(norm(x) @ weight.T + bias) + residual for a few rows, as one launch.

    x            (B, K), 1 <= B <= 8, bf16, fp16 or fp32
    weight       (N, K), x's dtype
    bias         (N,), any of these dtypes
    norm_weight  (K,), any of these dtypes: layer-normalise x first, with norm_bias where given
    residual     (B, N), x's dtype, added at the end
    activation   "none", or GELU: "tanh" or "erf"

    Returns y (B, N), contiguous, x's dtype; sums are fp32. For inference: not differentiable. On a
    CPU tensor `reference.decode_linear` runs. Raises TypeError/ValueError naming the argument.
    """
    _check(x, weight, bias, norm_weight, norm_bias, residual, activation)
    arguments = {"norm_weight": norm_weight, "norm_bias": norm_bias, "residual": residual}
    if not use_kernel(x):
        return reference.decode_linear(x, weight, bias, activation=activation, eps=eps, **arguments)
    refuse_interpreted_bf16("decode_linear", x)
    given = (t for t in (bias, norm_weight, norm_bias, residual) if t is not None)
    run = launch if call_directly(x, weight, *given) else decode_linear_op
    return run(x, weight, bias, norm_weight, norm_bias, residual, activation, eps)


def _check(x, weight, bias, norm_weight, norm_bias, residual, activation) -> None:
    op = "decode_linear"
    dtypes = FLOAT_DTYPES if use_kernel(x) else (*FLOAT_DTYPES, torch.float64)
    check_tensor(op, "x", x, ndim=2, dtypes=dtypes)
    B, K = x.shape
    if not 1 <= B <= MAX_ROWS:
        raise ValueError(f"{op}: x must have 1 to {MAX_ROWS} rows, got {B}")
    check_tensor(op, "weight", weight, ndim=2, dtypes=(x.dtype,), device=x.device)
    N = weight.shape[0]
    check_tensor(op, "weight", weight, shape=(N, K))
    for name, vector, size in (
        ("bias", bias, N), ("norm_weight", norm_weight, K), ("norm_bias", norm_bias, K),
    ):  # fmt: skip
        if vector is not None:
            check_tensor(op, name, vector, shape=(size,), dtypes=dtypes, device=x.device)
    if norm_bias is not None and norm_weight is None:
        raise ValueError(f"{op}: norm_bias needs norm_weight")
    if residual is not None:
        check_tensor(op, "residual", residual, shape=(B, N), dtypes=(x.dtype,), device=x.device)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")


# ---------------------------------------------------------------------------------- for the tools


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """The four layers of a block at GPT-2's 768 for one row, and the plainest for more rows."""
    for name, B, K, norm, activation, residual in (
        ("norm", 1, 768, True, "none", False),
        ("norm tanh", 1, 768, True, "tanh", False),
        ("residual", 1, 3072, False, "none", True),
        ("norm", 2, 768, True, "none", False),
        ("norm", 4, 768, True, "none", False),
        ("norm", 8, 768, True, "none", False),
    ):
        config = configs.lookup(configs.DECODE_LINEAR, arch, B)
        constexprs: dict[str, object] = {
            "B": B, "B_PAD": B, "K": K, "NORM": norm, "ACTIVATION": activation, **config.blocks,
        }  # fmt: skip
        types = {n: "*bf16" for n in ("x", "weight", "bias", "residual", "y")}
        types |= {"norm_weight": "*fp32", "norm_bias": "*fp32", "eps": "fp32"}
        if not residual:
            constexprs["residual"] = None
        if not norm:
            constexprs |= {"norm_weight": None, "norm_bias": None}
        signature = {
            n: types.get(n, "i32") for n in decode_linear_kernel.arg_names if n not in constexprs
        }
        yield AotSpec(
            name=f"decode_linear {name} B={B} K={K}",
            kernel=decode_linear_kernel,
            signature=signature,
            constexprs=constexprs,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            divisible_by_16=tuple(n for n in signature if n != "eps" and n != "N"),
        )
