"""The kernels of decoding and their launchers; attention.py and linear.py tell how they work."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels.configs import Config, lookup, options
from fastgpt_kernels.host import arch_of, multiprocessors, on_device
from fastgpt_kernels.ops.decode import configs
from fastgpt_kernels.ops.gelu.kernels import gate_and_slope

PROGRAMS_PER_SM = 4  # not measured: enough loads in flight to fill the memory system
LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["n_head", "S", "chunk"])
def decode_attention_kernel(
    qkv,  # (B, 3 * C), rows stride_qkv apart
    k_cache, v_cache,  # (B, H, S, HEAD), both with strides (stride_b, stride_h, stride_s, 1)
    positions,  # (B,) int64
    y,  # (B, C) contiguous, out; with SPLIT instead:
    partial,  # (B * H, chunks, HEAD) fp32, out: sum of p v, p = exp2(score - m)
    stats,  # (B * H, chunks, 2) fp32, out: m, sum of p
    stride_qkv, stride_b, stride_h, stride_s, n_head, S, chunk,
    scale_log2,
    HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    part, batch_head = tl.program_id(0), tl.program_id(1)
    batch, head = batch_head // n_head, batch_head % n_head
    position = tl.load(positions + batch).to(tl.int32)
    position = tl.minimum(tl.maximum(position, 0), S - 1)  # never outside the cache's memory
    first = part * chunk
    if first <= position:
        columns = tl.arange(0, HEAD_PAD)
        real = columns < HEAD
        row = qkv + batch.to(tl.int64) * stride_qkv + head * HEAD + columns
        C = n_head * HEAD
        q = tl.load(row, mask=real, other=0.0).to(tl.float32) * scale_log2
        base = batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
        k_base, v_base = k_cache + base, v_cache + base

        row_max, row_sum = float("-inf"), 0.0
        acc = tl.zeros([HEAD_PAD], tl.float32)
        if position < first + chunk:  # the new token is this chunk's
            k = tl.load(row + C, mask=real, other=0.0)
            v = tl.load(row + 2 * C, mask=real, other=0.0)
            at = position.to(tl.int64) * stride_s
            tl.store(k_base + at + columns, k, mask=real)
            tl.store(v_base + at + columns, v, mask=real)
            row_max, row_sum = tl.sum(q * k.to(tl.float32)), 1.0
            acc = v.to(tl.float32)

        end = tl.minimum(first + chunk, position)
        k_base += first.to(tl.int64) * stride_s
        v_base += first.to(tl.int64) * stride_s
        offsets = tl.arange(0, BLOCK_N)[:, None] * stride_s + columns[None, :]
        for n in range(first, end, BLOCK_N):
            keys = n + tl.arange(0, BLOCK_N)
            mask = (keys < end)[:, None] & real[None, :]
            k = tl.load(k_base + offsets, mask=mask, other=0.0)  # [N, HEAD_PAD]
            v = tl.load(v_base + offsets, mask=mask, other=0.0)
            scores = tl.sum(k.to(tl.float32) * q[None, :], 1)
            scores = tl.where(keys < end, scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 0))
            decay, p = tl.exp2(row_max - new_max), tl.exp2(scores - new_max)
            row_sum = row_sum * decay + tl.sum(p, 0)
            acc = acc * decay + tl.sum(p[:, None] * v.to(tl.float32), 0)
            row_max = new_max
            k_base += BLOCK_N * stride_s
            v_base += BLOCK_N * stride_s

        if SPLIT:
            slot = batch_head.to(tl.int64) * tl.num_programs(0) + part
            tl.store(partial + slot * HEAD + columns, acc, mask=real)
            tl.store(stats + slot * 2, row_max)
            tl.store(stats + slot * 2 + 1, row_sum)
        else:
            out = y + batch.to(tl.int64) * C + head * HEAD + columns
            tl.store(out, (acc / row_sum).to(y.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["n_head", "S", "chunk", "chunks"])
def decode_attention_combine_kernel(
    partial, stats,  # as decode_attention_kernel leaves them
    positions, y, n_head, S, chunk, chunks,
    HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, CHUNKS_PAD: tl.constexpr,
):  # fmt: skip
    batch_head = tl.program_id(0)
    batch, head = batch_head // n_head, batch_head % n_head
    position = tl.load(positions + batch).to(tl.int32)
    position = tl.minimum(tl.maximum(position, 0), S - 1)
    parts, columns = tl.arange(0, CHUNKS_PAD), tl.arange(0, HEAD_PAD)
    done = parts * chunk <= position  # the other chunks wrote nothing
    slots = batch_head.to(tl.int64) * chunks + parts
    m = tl.load(stats + slots * 2, mask=done, other=float("-inf"))
    sums = tl.load(stats + slots * 2 + 1, mask=done, other=0.0)
    weight = tl.exp2(m - tl.max(m, 0))
    mask = done[:, None] & (columns < HEAD)[None, :]
    acc = tl.load(partial + slots[:, None] * HEAD + columns[None, :], mask=mask, other=0.0)
    out = tl.sum(acc * weight[:, None], 0) / tl.sum(sums * weight, 0)
    row = y + batch.to(tl.int64) * n_head * HEAD + head * HEAD + columns
    tl.store(row, out.to(y.dtype.element_ty), mask=columns < HEAD)


def chunk_size(S: int, heads: int, sms: int, block: int) -> int:
    """Positions a program works on: a multiple of `block`, and PROGRAMS_PER_SM programs an SM."""
    chunks = min(triton.cdiv(S, block), max(1, triton.cdiv(PROGRAMS_PER_SM * sms, heads)))
    return triton.cdiv(triton.cdiv(S, chunks), block) * block


def launch_attention(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, scale: float,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """qkv (B, 3*C) -> y (B, C); writes the new keys and values into the caches."""
    B, H, S, D = k_cache.shape
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    y = torch.empty((B, H * D), dtype=qkv.dtype, device=qkv.device)
    if y.numel() == 0:
        return y
    config = config or lookup(configs.ATTENTION, arch_of(qkv), D)
    chunk = chunk_size(S, B * H, multiprocessors(qkv), config.blocks["BLOCK_N"])
    chunks = triton.cdiv(S, chunk)
    partial, stats = y, y
    if chunks > 1:
        partial = torch.empty((B * H, chunks, D), dtype=torch.float32, device=qkv.device)
        stats = torch.empty((B * H, chunks, 2), dtype=torch.float32, device=qkv.device)
    head = {"HEAD": D, "HEAD_PAD": max(16, triton.next_power_of_2(D))}
    with on_device(qkv):
        decode_attention_kernel[(chunks, B * H)](
            qkv, k_cache, v_cache, positions, y, partial, stats,
            qkv.stride(0), *k_cache.stride()[:3], H, S, chunk, scale * LOG2_E,
            **head, SPLIT=chunks > 1, **config.kwargs(),
        )  # fmt: skip
        if chunks > 1:
            decode_attention_combine_kernel[(B * H,)](
                partial, stats, positions, y, H, S, chunk, chunks,
                **head, CHUNKS_PAD=triton.next_power_of_2(chunks), **options(4),
            )  # fmt: skip
    return y


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


def launch_linear(
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
    config = config or lookup(configs.LINEAR, arch_of(x), padded)
    with on_device(x):
        decode_linear_kernel[(triton.cdiv(N, config.blocks["BLOCK_N"]),)](
            x, weight, bias, norm_weight, norm_bias, residual, y,
            x.stride(0), weight.stride(0), N, eps,
            B=B, B_PAD=padded, K=K, NORM=norm_weight is not None, ACTIVATION=activation,
            **config.kwargs(),
        )  # fmt: skip
    return y
