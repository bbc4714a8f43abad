"""The kernels of decoding and their launchers; attention.py, linear.py and layers.py explain them.

All are put together from three parts: `_linear_tile`, a few outputs of a matrix-vector product;
`_attend`, a chunk of one head's cache; and `_signal` and `_wait_for`, by which programs of one
launch hand results on. Whoever waits for others drew its ticket after them, so that all
it waits for has begun: no order of programs, and no number of them on the GPU at once, is assumed.
"""

# mypy: disable-error-code="assignment"
# Tiles are gathered in tuples that grow, to which mypy gives the type of their first value, ().
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastgpt_kernels.configs import Config, lookup, options
from fastgpt_kernels.host import arch_of, multiprocessors, on_device
from fastgpt_kernels.ops.decode import configs
from fastgpt_kernels.ops.gelu.kernels import gate_and_slope

PROGRAMS_PER_SM = 4  # of attention; not measured: enough loads in flight to fill the memory system
LOG2_E = 1.4426950408889634
WARPS = 4  # of every kernel; in a matrix-vector product each has rows of its own

# A layer's counters, int32, all zero between launches: tickets drawn, tiles of the first product
# done, heads done, tiles of the last product done, and from _ARRIVED on chunks done, by head.
_FIRST, _HEADS, _LAST, _ARRIVED = (tl.constexpr(n) for n in (1, 2, 3, 4))


@triton.jit
def _wait_before(EARLY: tl.constexpr):
    """Everything the launches before this one wrote is there; the next one may begin to load.

    Only after the wait: a launch then overlaps with the one before it and no other.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _wait_for(counter, count):
    """Until `count` programs have signalled; nothing to wait for if counter is None."""
    if counter is not None:
        while tl.atomic_add(counter, 0, sem="acquire") < count:
            pass


@triton.jit
def _signal(counter):
    """All that this program stored is there for those who wait; how many signalled before it."""
    tl.debug_barrier()  # the atomic is one thread's, the stores are all threads'
    return tl.atomic_add(counter, 1, sem="acq_rel")


@triton.jit
def _end_layer(counters, tiles):
    """A tile of the layer's last product is done; the last program leaves all counters at 0."""
    if _signal(counters + _LAST) == tiles - 1:
        tl.store(counters + tl.arange(0, 4), tl.zeros([4], tl.int32))


@triton.jit
def _weights(
    tile, weight, stride_w, N,
    K: tl.constexpr, WARPS: tl.constexpr, BLOCK_K: tl.constexpr, REPEAT: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """The first AHEAD steps of a tile's rows: REPEAT * AHEAD tiles [WARPS, BLOCK_K]."""
    ws = ()
    for i in tl.static_range(AHEAD):
        for r in tl.static_range(REPEAT):
            ws = ws + (_weight_tile(tile * REPEAT + r, i, weight, stride_w, N, K, WARPS, BLOCK_K),)
    return ws


@triton.jit
def _weight_tile(
    rows, i, weight, stride_w, N, K: tl.constexpr, WARPS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Step i of WARPS rows of weights; rows past the last are the last one's."""
    rows = tl.minimum(rows * WARPS + tl.arange(0, WARPS), N - 1)
    at = i * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    place = weight + rows.to(tl.int64)[:, None] * stride_w + at
    if K % BLOCK_K == 0:
        return tl.load(place)
    else:
        return tl.load(place, mask=at < K, other=0.0)


@triton.jit
def _x_tile(x, i, WARPS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Step i of a row of x or of the norm's parameters, [WARPS, BLOCK_K], the same for all warps.

    Past the L1, which knows nothing of what other programs have just written.
    """
    at = (tl.arange(0, WARPS) * 0)[:, None] + tl.arange(0, BLOCK_K)[None, :] + i * BLOCK_K
    if K % BLOCK_K == 0:
        return tl.load(x + at, cache_modifier=".cg").to(tl.float32)
    else:
        return tl.load(x + at, mask=at < K, other=0.0, cache_modifier=".cg").to(tl.float32)


@triton.jit
def _statistics(xs, first, eps, WARPS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """(mean, rstd), each [WARPS, 1], of the row whose tiles are xs[first] and those behind it."""
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    total = tl.zeros([WARPS, BLOCK_K], tl.float32)
    for i in tl.static_range(STEPS):
        total += xs[first + i]
    mean = tl.sum(total, 1)[:, None] / K
    squares = tl.zeros([WARPS, BLOCK_K], tl.float32)
    for i in tl.static_range(STEPS):
        value = xs[first + i] - mean
        if K % BLOCK_K != 0:
            value = tl.where(tl.arange(0, BLOCK_K)[None, :] + i * BLOCK_K < K, value, 0.0)
        squares += value * value
    return mean, 1.0 / tl.sqrt(tl.sum(squares, 1)[:, None] / K + eps)


@triton.jit
def _few_rows(
    first, tile, ws, biases, x, weight, norm_weight, norm_bias, residual, y,
    stride_x, stride_w, N, B, eps,
    ROWS: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, WARPS: tl.constexpr,
    BLOCK_K: tl.constexpr, REPEAT: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """A tile's outputs for rows first to first + ROWS - 1 of x."""
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    warp = tl.arange(0, WARPS)
    xs, means, rstds = (), (), ()  # only for a norm; without one x is loaded where it is used
    if norm_weight is not None:
        for j in tl.static_range(ROWS):
            row = x + tl.minimum(first + j, B - 1) * stride_x
            for i in tl.static_range(STEPS):
                xs = xs + (_x_tile(row, i, WARPS, K, BLOCK_K),)
        for j in tl.static_range(ROWS):
            mean, rstd = _statistics(xs, j * STEPS, eps, WARPS, K, BLOCK_K)
            means, rstds = means + (mean,), rstds + (rstd,)
    sums = ()
    for _ in tl.static_range(REPEAT * ROWS):
        sums = sums + (tl.zeros([WARPS, BLOCK_K], tl.float32),)
    for i in tl.static_range(STEPS):
        values = ()
        if norm_weight is not None:
            gain = _x_tile(norm_weight, i, WARPS, K, BLOCK_K)
        if norm_bias is not None:
            shift = _x_tile(norm_bias, i, WARPS, K, BLOCK_K)
        for j in tl.static_range(ROWS):
            if norm_weight is not None:
                value = (xs[j * STEPS + i] - means[j]) * rstds[j] * gain
                if norm_bias is not None:
                    value += shift
            else:
                row = x + tl.minimum(first + j, B - 1) * stride_x
                value = _x_tile(row, i, WARPS, K, BLOCK_K)
            values = values + (value,)
        more = ()
        for r in tl.static_range(REPEAT):
            if i < AHEAD:
                w = ws[i * REPEAT + r].to(tl.float32)
            else:
                w = _weight_tile(tile * REPEAT + r, i, weight, stride_w, N, K, WARPS, BLOCK_K)
                w = w.to(tl.float32)
            for j in tl.static_range(ROWS):
                more = more + (sums[r * ROWS + j] + values[j] * w,)
        sums = more
    for r in tl.static_range(REPEAT):
        outputs = (tile * REPEAT + r) * WARPS + warp
        for j in tl.static_range(ROWS):
            out = tl.sum(sums[r * ROWS + j], 1) + biases[r]
            if ACTIVATION != "none":
                gate, _ = gate_and_slope(out, ACTIVATION == "tanh")
                out = out * gate
            mask = (outputs < N) & (first + j < B)
            place = (first + j) * N + outputs
            if residual is not None:
                before = tl.load(residual + place, mask=mask, other=0.0, cache_modifier=".cg")
                out += before.to(tl.float32)
            tl.store(y + place, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _linear_tile(
    tile,  # which WARPS * REPEAT outputs
    x,  # (B, K), rows stride_x apart
    weight,  # (N, K), rows stride_w apart
    bias,  # (N,) or None
    norm_weight, norm_bias,  # (K,) or None
    residual,  # (B, N) contiguous or None
    y,  # (B, N) contiguous, out
    stride_x, stride_w, N, B, eps,
    counter, count,  # x is there when `count` programs have signalled
    ROWS: tl.constexpr, MORE: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr,
    WARPS: tl.constexpr, BLOCK_K: tl.constexpr, REPEAT: tl.constexpr, AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """act(norm(x) @ weight.T + bias) + residual, the weights loaded before anything is waited for.

    Each warp has its own rows of weights and all of x's row, so that sums stay within a warp. The
    weights are for ROWS rows of x; if there are MORE, they are loaded again, from the L1.
    """
    ws = _weights(tile, weight, stride_w, N, K, WARPS, BLOCK_K, REPEAT, AHEAD)
    biases = ()
    for r in tl.static_range(REPEAT):
        outputs = tl.minimum((tile * REPEAT + r) * WARPS + tl.arange(0, WARPS), N - 1)
        if bias is not None:
            biases = biases + (tl.load(bias + outputs).to(tl.float32),)
        else:
            biases = biases + (tl.zeros([WARPS], tl.float32),)
    _wait_before(EARLY)
    _wait_for(counter, count)
    _few_rows(
        0, tile, ws, biases, x, weight, norm_weight, norm_bias, residual, y,
        stride_x, stride_w, N, B, eps,
        ROWS, K, ACTIVATION, WARPS, BLOCK_K, REPEAT, AHEAD,
    )  # fmt: skip
    if MORE:
        for first in range(ROWS, B, ROWS):
            ws = _weights(tile, weight, stride_w, N, K, WARPS, BLOCK_K, REPEAT, AHEAD)
            _few_rows(
                first, tile, ws, biases, x, weight, norm_weight, norm_bias, residual, y,
                stride_x, stride_w, N, B, eps,
                ROWS, K, ACTIVATION, WARPS, BLOCK_K, REPEAT, AHEAD,
            )  # fmt: skip


@triton.jit
def _combine(
    partial, stats, slots, active,
    HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, CHUNKS_PAD: tl.constexpr,
):  # fmt: skip
    """[HEAD_PAD]: what a head's first `active` chunks left from slot `slots` on, put together."""
    parts, columns = tl.arange(0, CHUNKS_PAD), tl.arange(0, HEAD_PAD)
    done = parts < active  # the other chunks wrote nothing
    place = stats + (slots + parts) * 2
    m = tl.load(place, mask=done, other=float("-inf"), cache_modifier=".cg")
    sums = tl.load(place + 1, mask=done, other=0.0, cache_modifier=".cg")
    share = tl.exp2(m - tl.max(m, 0))
    place = partial + (slots + parts)[:, None] * HEAD + columns[None, :]
    mask = done[:, None] & (columns < HEAD)[None, :]
    sum_pv = tl.load(place, mask=mask, other=0.0, cache_modifier=".cg")
    return tl.sum(sum_pv * share[:, None], 0) / tl.sum(sums * share, 0)


@triton.jit
def _attend(
    index,  # head-major: which chunk of which head
    qkv,  # (B, 3 * C), rows stride_qkv apart
    k_cache, v_cache,  # (B, H, S, HEAD), both with strides (stride_b, stride_h, stride_s, 1)
    positions,  # (B,) int64
    y,  # (B, C) contiguous, out
    partial,  # (B * H, chunks, HEAD) fp32: sum of p v, p = exp2(score - m)
    stats,  # (B * H, chunks, 2) fp32: m, sum of p
    arrived,  # (B * H,) int32, 0 before and after
    stride_qkv, stride_b, stride_h, stride_s, n_head, S, chunk, chunks, scale_log2,
    counter, count,  # qkv is there when `count` programs have signalled
    finished,  # is told of every head that is done, if not None
    HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, CHUNKS_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One chunk of one head's cache; the last chunk of a head to arrive puts them together."""
    _wait_before(EARLY)
    part, batch_head = index % chunks, index // chunks
    batch, head = batch_head // n_head, batch_head % n_head
    position = tl.load(positions + batch).to(tl.int32)
    position = tl.minimum(tl.maximum(position, 0), S - 1)  # never outside the cache's memory
    first = part * chunk
    if first <= position:
        columns = tl.arange(0, HEAD_PAD)
        real = columns < HEAD
        base = batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
        k_base, v_base = k_cache + base, v_cache + base
        end = tl.minimum(first + chunk, position)
        keys = first + tl.arange(0, BLOCK_N)
        offsets = keys.to(tl.int64)[:, None] * stride_s + columns[None, :]
        mask = (keys < end)[:, None] & real[None, :]
        k = tl.load(k_base + offsets, mask=mask, other=0.0)  # [BLOCK_N, HEAD_PAD]
        v = tl.load(v_base + offsets, mask=mask, other=0.0)

        _wait_for(counter, count)
        C = n_head * HEAD
        row = qkv + batch.to(tl.int64) * stride_qkv + head * HEAD + columns
        q = tl.load(row, mask=real, other=0.0, cache_modifier=".cg").to(tl.float32) * scale_log2
        row_max, row_sum = float("-inf"), 0.0
        acc = tl.zeros([HEAD_PAD], tl.float32)
        if position < first + chunk:  # the new token is this chunk's
            new_k = tl.load(row + C, mask=real, other=0.0, cache_modifier=".cg")
            new_v = tl.load(row + 2 * C, mask=real, other=0.0, cache_modifier=".cg")
            at = position.to(tl.int64) * stride_s
            tl.store(k_base + at + columns, new_k, mask=real)
            tl.store(v_base + at + columns, new_v, mask=real)
            row_max, row_sum = tl.sum(q * new_k.to(tl.float32)), 1.0
            acc = new_v.to(tl.float32)

        for n in range(first, end, BLOCK_N):
            scores = tl.sum(k.to(tl.float32) * q[None, :], 1)
            scores = tl.where(n + tl.arange(0, BLOCK_N) < end, scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 0))
            decay, p = tl.exp2(row_max - new_max), tl.exp2(scores - new_max)
            row_sum = row_sum * decay + tl.sum(p, 0)
            acc = acc * decay + tl.sum(p[:, None] * v.to(tl.float32), 0)
            row_max = new_max
            k_base += BLOCK_N * stride_s
            v_base += BLOCK_N * stride_s
            mask = (n + BLOCK_N + tl.arange(0, BLOCK_N) < end)[:, None] & real[None, :]
            k = tl.load(k_base + offsets, mask=mask, other=0.0)
            v = tl.load(v_base + offsets, mask=mask, other=0.0)

        out = y + batch.to(tl.int64) * C + head * HEAD + columns
        active = position // chunk + 1  # chunks with work to do
        if active == 1:
            tl.store(out, (acc / row_sum).to(y.dtype.element_ty), mask=real)
            if finished is not None:
                _signal(finished)
        else:
            slots = batch_head.to(tl.int64) * chunks
            tl.store(partial + (slots + part) * HEAD + columns, acc, mask=real)
            tl.store(stats + (slots + part) * 2, row_max)
            tl.store(stats + (slots + part) * 2 + 1, row_sum)
            if _signal(arrived + batch_head) == active - 1:
                tl.store(arrived + batch_head, 0)
                acc = _combine(partial, stats, slots, active, HEAD, HEAD_PAD, CHUNKS_PAD)
                tl.store(out, acc.to(y.dtype.element_ty), mask=real)
                if finished is not None:
                    _signal(finished)


@triton.jit(do_not_specialize=["n_head", "S", "chunk", "chunks"])
def decode_attention_kernel(
    qkv, k_cache, v_cache, positions, y, partial, stats, arrived,
    stride_qkv, stride_b, stride_h, stride_s, n_head, S, chunk, chunks, scale_log2,
    HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, CHUNKS_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    _attend(
        tl.program_id(0), qkv, k_cache, v_cache, positions, y, partial, stats, arrived,
        stride_qkv, stride_b, stride_h, stride_s, n_head, S, chunk, chunks, scale_log2,
        None, 0, None, HEAD, HEAD_PAD, CHUNKS_PAD, BLOCK_N, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "B"])
def decode_linear_kernel(
    x, weight, bias, norm_weight, norm_bias, residual, y, stride_x, stride_w, N, B, eps,
    ROWS: tl.constexpr, MORE: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr,
    WARPS: tl.constexpr, BLOCK_K: tl.constexpr, REPEAT: tl.constexpr, AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    _linear_tile(
        tl.program_id(0), x, weight, bias, norm_weight, norm_bias, residual, y,
        stride_x, stride_w, N, B, eps, None, 0,
        ROWS, MORE, K, ACTIVATION, WARPS, BLOCK_K, REPEAT, AHEAD, EARLY,
    )  # fmt: skip


@triton.jit(do_not_specialize=["B", "n_head", "S", "chunk", "chunks"])
def decode_attention_layer_kernel(
    x, norm_weight, norm_bias, qkv_weight, qkv_bias, k_cache, v_cache, positions,
    proj_weight, proj_bias, qkv, attended, partial, stats, y, counters,
    stride_x, stride_b, stride_h, stride_s, B, n_head, S, chunk, chunks, scale_log2, eps,
    C: tl.constexpr, ROWS: tl.constexpr, MORE: tl.constexpr, HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr, CHUNKS_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    WARPS: tl.constexpr, BLOCK_K: tl.constexpr,
    QKV_REPEAT: tl.constexpr, PROJ_REPEAT: tl.constexpr, QKV_AHEAD: tl.constexpr,
    PROJ_AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    qkv_tiles: tl.constexpr = (3 * C + WARPS * QKV_REPEAT - 1) // (WARPS * QKV_REPEAT)
    proj_tiles: tl.constexpr = (C + WARPS * PROJ_REPEAT - 1) // (WARPS * PROJ_REPEAT)
    heads = B * n_head
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    if ticket < qkv_tiles:
        _linear_tile(
            ticket, x, qkv_weight, qkv_bias, norm_weight, norm_bias, None, qkv,
            stride_x, C, 3 * C, B, eps, None, 0,
            ROWS, MORE, C, "none", WARPS, BLOCK_K, QKV_REPEAT, QKV_AHEAD, EARLY,
        )  # fmt: skip
        _signal(counters + _FIRST)
    elif ticket < qkv_tiles + heads * chunks:
        _attend(
            ticket - qkv_tiles, qkv, k_cache, v_cache, positions, attended, partial, stats,
            counters + _ARRIVED, 3 * C, stride_b, stride_h, stride_s, n_head, S, chunk, chunks,
            scale_log2, counters + _FIRST, qkv_tiles, counters + _HEADS,
            HEAD, HEAD_PAD, CHUNKS_PAD, BLOCK_N, EARLY,
        )  # fmt: skip
    else:
        _linear_tile(
            ticket - qkv_tiles - heads * chunks, attended, proj_weight, proj_bias, None, None,
            x, y, C, C, C, B, eps, counters + _HEADS, heads,
            ROWS, MORE, C, "none", WARPS, BLOCK_K, PROJ_REPEAT, PROJ_AHEAD, EARLY,
        )  # fmt: skip
        _end_layer(counters, proj_tiles)


@triton.jit(do_not_specialize=["B"])
def decode_mlp_layer_kernel(
    x, norm_weight, norm_bias, fc_weight, fc_bias, proj_weight, proj_bias, hidden, y, counters,
    stride_x, B, eps,
    C: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, MORE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WARPS: tl.constexpr, BLOCK_K: tl.constexpr, FC_REPEAT: tl.constexpr, PROJ_REPEAT: tl.constexpr,
    FC_AHEAD: tl.constexpr, PROJ_AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    fc_tiles: tl.constexpr = (HIDDEN + WARPS * FC_REPEAT - 1) // (WARPS * FC_REPEAT)
    proj_tiles: tl.constexpr = (C + WARPS * PROJ_REPEAT - 1) // (WARPS * PROJ_REPEAT)
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    if ticket < fc_tiles:
        _linear_tile(
            ticket, x, fc_weight, fc_bias, norm_weight, norm_bias, None, hidden,
            stride_x, C, HIDDEN, B, eps, None, 0,
            ROWS, MORE, C, ACTIVATION, WARPS, BLOCK_K, FC_REPEAT, FC_AHEAD, EARLY,
        )  # fmt: skip
        _signal(counters + _FIRST)
    else:
        _linear_tile(
            ticket - fc_tiles, hidden, proj_weight, proj_bias, None, None, x, y,
            HIDDEN, HIDDEN, C, B, eps, counters + _FIRST, fc_tiles,
            ROWS, MORE, HIDDEN, "none", WARPS, BLOCK_K, PROJ_REPEAT, PROJ_AHEAD, EARLY,
        )  # fmt: skip
        _end_layer(counters, proj_tiles)


def chunk_size(S: int, heads: int, sms: int, block: int) -> int:
    """Positions a program works on: a multiple of `block`, and PROGRAMS_PER_SM programs an SM."""
    chunks = min(triton.cdiv(S, block), max(1, triton.cdiv(PROGRAMS_PER_SM * sms, heads)))
    return triton.cdiv(triton.cdiv(S, chunks), block) * block


def repeat_and_ahead(N: int, K: int, itemsize: int, config: Config, sms: int) -> tuple[int, int]:
    """(REPEAT, AHEAD) of a product with weights (N, K): rows a warp, and steps loaded at once.

    More rows a warp share the work on x, as long as there are two programs an SM. A thread has up
    to "BYTES" of weights in flight, or one row's up to "MOST"; the steps beyond are loaded as they
    come.
    """
    steps = triton.cdiv(K, config.blocks["BLOCK_K"])
    step_bytes = config.blocks["BLOCK_K"] * itemsize // 32
    repeat = 1
    while (
        repeat < 4
        and 2 * repeat * steps * step_bytes <= config.blocks["BYTES"]
        and 2 * WARPS * (2 * repeat) * sms <= N
    ):
        repeat *= 2
    return repeat, min(steps, config.blocks["MOST"] // (repeat * step_bytes))


def _launch_options(x: Tensor, early: bool) -> dict[str, Any]:
    """EARLY, and what only NVIDIA's compiler knows: registers, and beginning before the end.

    128 registers let four programs on an SM, 168 three, 255 two; with two rows, or 1,024 columns or
    more, 128 spill, and with two rows on sm_100 so do 168 with Triton 3.9.
    """
    arch = arch_of(x)
    if not arch.startswith("sm_"):
        return {"EARLY": False, **options(WARPS)}
    early = early and int(arch[3:]) >= 90
    registers = 128 if x.shape[0] == 1 and x.shape[1] < 1024 else 168
    if arch == "sm_100" and x.shape[0] > 1:
        registers = 255
    return {"EARLY": early, "launch_pdl": early, "maxnreg": registers, **options(WARPS)}


def attention_constants(
    B: int, H: int, S: int, D: int, config: Config, sms: int
) -> tuple[tuple[int, int], dict[str, int]]:
    """(positions a chunk, chunks), and the kernels' constants."""
    chunk = chunk_size(S, B * H, sms, config.blocks["BLOCK_N"])
    chunks = triton.cdiv(S, chunk)
    return (chunk, chunks), {
        "HEAD": D,
        "HEAD_PAD": max(16, triton.next_power_of_2(D)),
        "CHUNKS_PAD": triton.next_power_of_2(chunks),
        "BLOCK_N": config.blocks["BLOCK_N"],
    }


def product_constants(B: int, config: Config) -> dict[str, int | bool]:
    """What all products of a launch have in common."""
    return {
        "ROWS": min(B, 2), "MORE": B > 2, "WARPS": WARPS, "BLOCK_K": config.blocks["BLOCK_K"],
    }  # fmt: skip


def _attention_plan(
    k_cache: Tensor, config: Config | None
) -> tuple[tuple[int, int], dict[str, int], tuple[Tensor, Tensor]]:
    """`attention_constants`, and room for what the chunks leave."""
    B, H, S, D = k_cache.shape
    config = config or lookup(configs.ATTENTION, arch_of(k_cache), D)
    chunks, constants = attention_constants(B, H, S, D, config, multiprocessors(k_cache))
    partial = torch.empty((B * H, chunks[1], D), dtype=torch.float32, device=k_cache.device)
    stats = torch.empty((B * H, chunks[1], 2), dtype=torch.float32, device=k_cache.device)
    return chunks, constants, (partial, stats)


def _unit_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def launch_attention(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, scale: float,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """qkv (B, 3*C) -> y (B, C); writes the new keys and values into the caches."""
    B, H, S, D = k_cache.shape
    qkv = _unit_rows(qkv)
    y = torch.empty((B, H * D), dtype=qkv.dtype, device=qkv.device)
    if y.numel() == 0:
        return y
    (chunk, chunks), sizes, rooms = _attention_plan(k_cache, config)
    allocate = torch.zeros if chunks > 1 else torch.empty
    arrived = allocate(B * H, dtype=torch.int32, device=qkv.device)
    with on_device(qkv):
        decode_attention_kernel[(B * H * chunks,)](
            qkv, k_cache, v_cache, positions, y, *rooms, arrived,
            qkv.stride(0), *k_cache.stride()[:3], H, S, chunk, chunks, scale * LOG2_E,
            **sizes, **options(WARPS),
        )  # fmt: skip
    return y


def launch_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, residual: Tensor | None, activation: str, eps: float, early: bool,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """x (B, K) and weight (N, K) -> y (B, N), all in x's dtype but for the norm's parameters."""
    (B, K), N = x.shape, weight.shape[0]
    x, weight = _unit_rows(x), _unit_rows(weight)
    residual = None if residual is None else residual.contiguous()
    y = torch.empty((B, N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    config = config or lookup(configs.LINEAR, arch_of(x), B)
    repeat, ahead = repeat_and_ahead(N, K, x.element_size(), config, multiprocessors(x))
    with on_device(x):
        decode_linear_kernel[(triton.cdiv(N, WARPS * repeat),)](
            x, weight, bias, norm_weight, norm_bias, residual, y,
            x.stride(0), weight.stride(0), N, B, eps,
            K=K, ACTIVATION=activation, REPEAT=repeat, AHEAD=ahead, **product_constants(B, config),
            **_launch_options(x, early),
        )  # fmt: skip
    return y


def launch_attention_layer(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, qkv_weight: Tensor,
    qkv_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None, k_cache: Tensor,
    v_cache: Tensor, positions: Tensor, counters: Tensor, scale: float, eps: float, early: bool,
) -> Tensor:  # fmt: skip
    """x (B, C) -> x + proj(attention(qkv(norm(x)))); the new keys and values go to the caches."""
    (B, C), (_, H, S, _) = x.shape, k_cache.shape
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    qkv = torch.empty((B, 3 * C), dtype=x.dtype, device=x.device)
    attended = torch.empty_like(y)
    (chunk, chunks), sizes, rooms = _attention_plan(k_cache, None)
    config = lookup(configs.LINEAR, arch_of(x), B)
    sms, itemsize = multiprocessors(x), x.element_size()
    qkv_repeat, qkv_ahead = repeat_and_ahead(3 * C, C, itemsize, config, sms)
    repeat, ahead = repeat_and_ahead(C, C, itemsize, config, sms)
    tiles = triton.cdiv(3 * C, WARPS * qkv_repeat) + triton.cdiv(C, WARPS * repeat)
    with on_device(x):
        decode_attention_layer_kernel[(tiles + B * H * chunks,)](
            x, norm_weight, norm_bias, qkv_weight, qkv_bias, k_cache, v_cache, positions,
            proj_weight, proj_bias, qkv, attended, *rooms, y, counters,
            x.stride(0), *k_cache.stride()[:3], B, H, S, chunk, chunks, scale * LOG2_E, eps,
            C=C, QKV_REPEAT=qkv_repeat, PROJ_REPEAT=repeat, QKV_AHEAD=qkv_ahead, PROJ_AHEAD=ahead,
            **sizes, **product_constants(B, config), **_launch_options(x, early),
        )  # fmt: skip
    return y


def launch_mlp_layer(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, fc_weight: Tensor,
    fc_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None, counters: Tensor,
    activation: str, eps: float, early: bool,
) -> Tensor:  # fmt: skip
    """x (B, C) -> x + proj(act(fc(norm(x))))."""
    (B, C), hidden_size = x.shape, fc_weight.shape[0]
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    hidden = torch.empty((B, hidden_size), dtype=x.dtype, device=x.device)
    config = lookup(configs.LINEAR, arch_of(x), B)
    sms, itemsize = multiprocessors(x), x.element_size()
    fc_repeat, fc_ahead = repeat_and_ahead(hidden_size, C, itemsize, config, sms)
    repeat, ahead = repeat_and_ahead(C, hidden_size, itemsize, config, sms)
    tiles = triton.cdiv(hidden_size, WARPS * fc_repeat) + triton.cdiv(C, WARPS * repeat)
    with on_device(x):
        decode_mlp_layer_kernel[(tiles,)](
            x, norm_weight, norm_bias, fc_weight, fc_bias, proj_weight, proj_bias, hidden, y,
            counters, x.stride(0), B, eps,
            C=C, HIDDEN=hidden_size, ACTIVATION=activation, FC_REPEAT=fc_repeat,
            PROJ_REPEAT=repeat, FC_AHEAD=fc_ahead, PROJ_AHEAD=ahead,
            **product_constants(B, config), **_launch_options(x, early),
        )  # fmt: skip
    return y
