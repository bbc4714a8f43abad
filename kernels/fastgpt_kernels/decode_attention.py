"""Attention of one new token a row against a cache of keys and values, for generation.

For row b with its new q, k, v (D) a head, at position t = positions[b] of a cache of S positions:

    k_cache[b, :, t] = k,  v_cache[b, :, t] = v
    y = sum over j <= t of p_j v_cache[b, :, j],   p = softmax over j <= t of scale * q k_cache[j]

Each key and value is used once, so this is bound by memory: 4*D*(t+1) bytes a head in a 2-byte
dtype, and no tensor cores. One row has few heads (12 in GPT-2 124M, of a GPU's 132 SMs), therefore
the cache is cut into chunks that programs work on side by side ("flash-decoding", Dao et al. 2023):
each leaves a running maximum m, a sum l and an unnormalised fp32 y, which a second, small kernel
puts together. How many chunks there are follows from the cache's size S, not from what it holds, so
that a step is the same launch every time and fits into a CUDA graph; chunks past t end at once.

The new key and value are stored by the one program whose chunk holds t, which takes them from qkv:
no program reads what another writes.
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
    multiprocessors,
    on_device,
    refuse_interpreted_bf16,
    use_kernel,
)
from fastgpt_kernels.configs import Config
from fastgpt_kernels.specs import AotSpec

MAX_HEAD_DIM = 256
PROGRAMS_PER_SM = 4  # not measured: enough loads in flight to fill the memory system
LOG2_E = 1.4426950408889634

# ---------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["n_head", "S", "chunk"])
def decode_kernel(
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
def combine_kernel(
    partial, stats,  # as decode_kernel leaves them
    positions, y, n_head, S, chunk, chunks,
    HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, CHUNKS_PAD: tl.constexpr,
):  # fmt: skip
    batch_head = tl.program_id(0)
    batch, head = batch_head // n_head, batch_head % n_head
    position = tl.load(positions + batch).to(tl.int32)
    position = tl.minimum(tl.maximum(position, 0), S - 1)
    parts, columns = tl.arange(0, CHUNKS_PAD), tl.arange(0, HEAD_PAD)
    done = parts * chunk <= position  # the others ended without a word
    slots = batch_head.to(tl.int64) * chunks + parts
    m = tl.load(stats + slots * 2, mask=done, other=float("-inf"))
    sums = tl.load(stats + slots * 2 + 1, mask=done, other=0.0)
    weight = tl.exp2(m - tl.max(m, 0))
    mask = done[:, None] & (columns < HEAD)[None, :]
    acc = tl.load(partial + slots[:, None] * HEAD + columns[None, :], mask=mask, other=0.0)
    out = tl.sum(acc * weight[:, None], 0) / tl.sum(sums * weight, 0)
    row = y + batch.to(tl.int64) * n_head * HEAD + head * HEAD + columns
    tl.store(row, out.to(y.dtype.element_ty), mask=columns < HEAD)


# --------------------------------------------------------------------------------------- launcher


def chunk_size(S: int, heads: int, sms: int, block: int) -> int:
    """Positions a program works on: a multiple of `block`, and PROGRAMS_PER_SM programs an SM."""
    chunks = min(triton.cdiv(S, block), max(1, triton.cdiv(PROGRAMS_PER_SM * sms, heads)))
    return triton.cdiv(triton.cdiv(S, chunks), block) * block


def launch(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, scale: float,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """qkv (B, 3*C) -> y (B, C); writes the new keys and values into the caches."""
    B, H, S, D = k_cache.shape
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    y = torch.empty((B, H * D), dtype=qkv.dtype, device=qkv.device)
    if y.numel() == 0:
        return y
    config = config or configs.lookup(configs.DECODE_ATTENTION, arch_of(qkv), D)
    chunk = chunk_size(S, B * H, multiprocessors(qkv), config.blocks["BLOCK_N"])
    chunks = triton.cdiv(S, chunk)
    partial, stats = y, y
    if chunks > 1:
        partial = torch.empty((B * H, chunks, D), dtype=torch.float32, device=qkv.device)
        stats = torch.empty((B * H, chunks, 2), dtype=torch.float32, device=qkv.device)
    head = {"HEAD": D, "HEAD_PAD": max(16, triton.next_power_of_2(D))}
    with on_device(qkv):
        decode_kernel[(chunks, B * H)](
            qkv, k_cache, v_cache, positions, y, partial, stats,
            qkv.stride(0), *k_cache.stride()[:3], H, S, chunk, scale * LOG2_E,
            **head, SPLIT=chunks > 1, **config.kwargs(),
        )  # fmt: skip
        if chunks > 1:
            combine_kernel[(B * H,)](
                partial, stats, positions, y, H, S, chunk, chunks,
                **head, CHUNKS_PAD=triton.next_power_of_2(chunks), num_warps=4,
            )  # fmt: skip
    return y


# ------------------------------------------------------------------------------------- the op


@torch.library.custom_op("fastgpt::decode_attention", mutates_args=("k_cache", "v_cache"))
def decode_attention_op(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, scale: float
) -> Tensor:
    return launch(qkv, k_cache, v_cache, positions, scale)


@decode_attention_op.register_fake
def _(qkv, k_cache, v_cache, positions, scale):
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] // 3))


def decode_attention(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attention of each row's new token to its cache, which takes up that token's key and value.

    qkv               (B, 3*C), bf16, fp16 or fp32, straight from the projection of one token a row
    k_cache, v_cache  (B, H, S, D) of qkv's dtype, C = H * D, D up to 256, changed in place; with
                      the same strides, the last of which is 1
    positions         (B,) int64: where the new token of each row goes, 0 to S - 1; row b attends to
                      positions 0 to positions[b] of its own cache
    scale             of the logits, > 0; default 1 / sqrt(D)

    Returns y (B, C), contiguous, dtype of qkv. For inference: not differentiable. Positions are
    read on the device only, so a replayed CUDA graph follows them. On a CPU tensor
    `reference.decode_attention` runs. Raises TypeError/ValueError naming the argument.
    """
    _check(qkv, k_cache, v_cache, positions, scale)
    if not use_kernel(qkv):
        return reference.decode_attention(qkv, k_cache, v_cache, positions, scale=scale)
    refuse_interpreted_bf16("decode_attention", qkv)
    scale = k_cache.shape[3] ** -0.5 if scale is None else scale
    run = launch if call_directly(qkv, k_cache, v_cache, positions) else decode_attention_op
    return run(qkv, k_cache, v_cache, positions, scale)


def _check(qkv, k_cache, v_cache, positions, scale) -> None:
    op = "decode_attention"
    dtypes = FLOAT_DTYPES if use_kernel(qkv) else (*FLOAT_DTYPES, torch.float64)
    check_tensor(op, "qkv", qkv, ndim=2, dtypes=dtypes)
    same = {"dtypes": (qkv.dtype,), "device": qkv.device}
    check_tensor(op, "k_cache", k_cache, ndim=4, **same)
    B, H, S, D = k_cache.shape
    if not 1 <= D <= MAX_HEAD_DIM or S < 1:
        raise ValueError(
            f"{op}: k_cache must have shape (B, H, S >= 1, D in 1 .. {MAX_HEAD_DIM}), "
            f"got {tuple(k_cache.shape)}"
        )
    check_tensor(op, "v_cache", v_cache, shape=k_cache.shape, **same)
    check_tensor(op, "qkv", qkv, shape=(B, 3 * H * D))
    check_tensor(op, "positions", positions, shape=(B,), dtypes=(torch.int64,), device=qkv.device)
    if k_cache.stride() != v_cache.stride() or k_cache.stride(3) != 1:
        raise ValueError(
            f"{op}: k_cache and v_cache must have the same strides, the last 1, "
            f"got {k_cache.stride()} and {v_cache.stride()}"
        )
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"{op}: scale must be finite and > 0, got {scale}")


# ---------------------------------------------------------------------------------- for the tools


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """Both kernels at every entry of the table, and with a padded head dim."""
    pointers = {"qkv": "*bf16", "k_cache": "*bf16", "v_cache": "*bf16", "positions": "*i64"}
    pointers |= {"y": "*bf16", "partial": "*fp32", "stats": "*fp32"}
    strides = ("stride_qkv", "stride_b", "stride_h", "stride_s")
    for name, D in (
        ("chunk", 64), ("chunk", 80), ("chunk", 128), ("chunk", 256), ("combine", 64),
        ("combine", 256),
    ):  # fmt: skip
        config = configs.lookup(configs.DECODE_ATTENTION, arch, D)
        constexprs: dict[str, object] = {"HEAD": D, "HEAD_PAD": triton.next_power_of_2(D)}
        if name == "chunk":
            kernel, warps, stages = decode_kernel, config.num_warps, config.num_stages
            constexprs |= {"SPLIT": True, **config.blocks}
        else:
            kernel, warps, stages = combine_kernel, 4, 1
            constexprs |= {"CHUNKS_PAD": 64}
        types = {"scale_log2": "fp32", **pointers}
        signature = {n: types.get(n, "i32") for n in kernel.arg_names if n not in constexprs}
        yield AotSpec(
            name=f"decode_attention {name} D={D}",
            kernel=kernel,
            signature=signature,
            constexprs=constexprs,
            num_warps=warps,
            num_stages=stages,
            divisible_by_16=tuple(n for n in signature if n in pointers or n in strides),
        )
