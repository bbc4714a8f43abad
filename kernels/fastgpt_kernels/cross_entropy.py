"""Cross entropy over a large vocabulary, with a kernel that can write the gradient in place.

    loss_i      = log(sum_j exp(z_ij)) - z_i,t_i                   j < vocab_size, t_i = targets[i]
    dlogits_ij  = (exp(z_ij) / sum_k exp(z_ik) - [j = t_i]) s_i    0 for the padded columns

logits z (M, V), targets (M,) int64; losses and all arithmetic are fp32. s_i is the row's upstream
gradient, such as 1 / (rows not ignored). Ignored rows have loss 0 and gradient 0. A program owns a
row and keeps it in registers until the gradient is written. A row that does not fit is walked
twice, backwards the second time, since what was read last is still in the caches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import launch, reference
from fastgpt_kernels.checks import check_int, check_tensor, refuse_interpreted_bf16
from fastgpt_kernels.launch import Config, Table, lookup, row_view, tl, triton
from fastgpt_kernels.library import define_op
from fastgpt_kernels.registry import Cost, ExampleInputs, OpSpec, Sizes, implementations

# --- Launch configs ---------------------------------------------------------------------------

# Key: the row's width in 2-byte elements (an fp32 row counts double). BLOCK is in the same unit: 8
# elements, 128 bits, per thread. A row of up to BLOCK * TILES stays in registers. A wider one is
# walked twice by TILES tiles at a time, in 16 warps of up to 128 registers: all that an SM has, for
# one row per SM stays in the L2 until it is read again. GPT-2's vocabulary takes 255 registers per
# thread with 8 warps, which spill on sm_100 and sm_120.
_NARROW = Config({"BLOCK": 2048, "TILES": 8}, num_warps=8)  # not measured
# measured 2026-11-26, H200: 1,879 µs in the step; alone 1,975, where _WALK took 2,599
_GPT2 = Config({"BLOCK": 2048, "TILES": 25}, num_warps=8)
_WALK = Config({"BLOCK": 4096, "TILES": 3}, num_warps=16)
CROSS_ENTROPY: Table = {
    "default": {16384: _NARROW, 51200: _GPT2, 1 << 31: _WALK},
    "sm_100": {16384: _NARROW, 1 << 31: _WALK},
    "sm_120": {16384: _NARROW, 1 << 31: _WALK},
}
# Rows that do not begin at multiples of 16 bytes are loaded an element at a time, each into a
# register of its own, so wider ones than this are walked.
WIDEST_UNALIGNED = 16384

# --- Kernels ----------------------------------------------------------------------------------

# The padding of the vocabulary costs only the last tiles their masks, and the target only one store
# more: every other column is loaded, and its probability stored, 128 bits at a time.


@triton.jit
def _load_tiles(
    row_ptr, first, lanes, n_cols, vocab_size,
    FULL: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Loads TILES tiles [BLOCK] from column `first` on, unconverted, -inf past the vocabulary.

    FULL of them lie inside it. The others are masked by n_cols, which unlike the vocabulary's size
    is a multiple of 16, as 128 bits per load need.
    """
    tiles = ()
    for i in tl.static_range(TILES):
        cols = first + i * BLOCK + lanes
        if i < FULL:
            x = tl.load(row_ptr + cols)
        else:
            x = tl.load(row_ptr + cols, mask=cols < n_cols, other=-float("inf"))
            x = tl.where(cols < vocab_size, x, -float("inf"))
        tiles = tiles + (x,)  # type: ignore[assignment]
    return tiles


@triton.jit
def _exponential(z, peak):
    """Returns exp(z - peak) in fp32, of logits in the dtype of memory.

    Logits near the limits of fp32 overflow if scaled by log2(e), and their difference does not.
    """
    return tl.exp2((z.to(tl.float32) - peak) * 1.4426950408889634)


@triton.jit
def _accumulate(tiles, peak, total, FRESH: tl.constexpr, TILES: tl.constexpr):
    """Returns the running maximum and sum of exponentials of each lane.

    GROUP tiles at a time, so that the first are worked on while the last are on their way. Each
    group costs a lane one more exponential. FRESH means that the total is still 0.
    """
    GROUP: tl.constexpr = 10
    for first in tl.static_range(0, TILES, GROUP):
        new_peak = peak
        for i in tl.static_range(GROUP):
            if first + i < TILES:
                new_peak = tl.maximum(new_peak, tiles[first + i].to(tl.float32))
        if first > 0 or not FRESH:
            total *= _exponential(peak, new_peak)
        for i in tl.static_range(GROUP):
            if first + i < TILES:
                total += _exponential(tiles[first + i], new_peak)
        peak = new_peak
    return peak, total


@triton.jit
def _store_gradient(
    row_ptr, tiles, first, lanes, n_cols, peak, factor,
    FULL: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Stores the exponentials times `factor` in the row's columns from `first` on."""
    for i in tl.static_range(TILES):
        cols = first + i * BLOCK + lanes
        p = (_exponential(tiles[i], peak) * factor).to(row_ptr.dtype.element_ty)
        if i < FULL:
            tl.store(row_ptr + cols, p)
        else:
            tl.store(row_ptr + cols, p, mask=cols < n_cols)


@triton.jit
def _store_zeros(row_ptr, first, lanes, n_cols, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Stores 0 in TILES tiles from column `first` on."""
    zeros = tl.zeros([BLOCK], row_ptr.dtype.element_ty)
    for i in range(TILES):
        cols = first + i * BLOCK + lanes
        tl.store(row_ptr + cols, zeros, mask=cols < n_cols)


@triton.jit
def cross_entropy_kernel(
    logits_ptr,  # (M, V), rows `stride` apart
    targets_ptr,  # (M,) int64
    losses_ptr,  # (M,) fp32, or None
    gradient_ptr,  # (M, V), rows `gradient_stride` apart, may be logits_ptr; or None
    scale_ptr,  # (M,) fp32, `scale_stride` apart, or None for 1
    n_cols, vocab_size, stride, gradient_stride, scale_stride, ignore_index,  # n_cols: V
    BLOCK: tl.constexpr, TILES: tl.constexpr,  # columns of a tile, tiles in registers at a time
    STEPS: tl.constexpr,  # times TILES to cover the vocabulary; 1: the row stays in registers
    FULL: tl.constexpr,  # tiles of the last step that lie inside the vocabulary
    PADDING: tl.constexpr,  # tiles behind the last step
):  # fmt: skip
    LN2: tl.constexpr = 0.6931471805599453
    STEP: tl.constexpr = BLOCK * TILES
    LAST: tl.constexpr = (STEPS - 1) * STEP  # the first column of the last step
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    lanes = tl.arange(0, BLOCK)
    # Loaded before the target arrives, since two waits would take twice as long. The last step,
    # which alone is ragged, stays in registers until its gradient is stored.
    last = _load_tiles(row_ptr, LAST, lanes, n_cols, vocab_size, FULL, BLOCK, TILES)
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        if losses_ptr is not None:
            tl.store(losses_ptr + row, 0.0)
        if gradient_ptr is not None:
            out_row_ptr = gradient_ptr + row * gradient_stride
            _store_zeros(out_row_ptr, 0, lanes, n_cols, BLOCK, STEPS * TILES + PADDING)
    else:
        # Read before anything is written, and kept apart from the maximum. With logits of 1e4 a
        # log-sum-exp rounded to fp32 would be off by 1e-3.
        in_range = (target >= 0) & (target < vocab_size)
        at_target = tl.load(row_ptr + target, mask=in_range, other=float("nan")).to(tl.float32)
        # The least fp32 number, so that lanes of -inf alone add exp2(-inf) = 0 rather than NaN.
        lane_peak = tl.full([BLOCK], -3.4028234663852886e38, tl.float32)
        lane_total = tl.zeros([BLOCK], tl.float32)
        tiles = last
        for step in range(STEPS - 1):
            following = _load_tiles(
                row_ptr, step * STEP, lanes, n_cols, vocab_size, TILES, BLOCK, TILES
            )
            lane_peak, lane_total = _accumulate(tiles, lane_peak, lane_total, False, TILES)
            tiles = following
        lane_peak, lane_total = _accumulate(tiles, lane_peak, lane_total, STEPS == 1, TILES)
        peak = tl.max(lane_peak, 0)
        total = tl.sum(lane_total * _exponential(lane_peak, peak), 0)
        if losses_ptr is not None:
            tl.store(losses_ptr + row, tl.log2(total) * LN2 - (at_target - peak))
        if gradient_ptr is not None:
            out_row_ptr = gradient_ptr + row * gradient_stride
            scale = 1.0
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + row * scale_stride)
            scale = tl.where(in_range, scale, float("nan"))
            factor = scale / total
            _store_zeros(out_row_ptr, STEPS * STEP, lanes, n_cols, BLOCK, PADDING)
            _store_gradient(
                out_row_ptr, last, LAST, lanes, n_cols, peak, factor, FULL, BLOCK, TILES
            )
            for i in range(STEPS - 1):
                first = LAST - (i + 1) * STEP
                tiles = _load_tiles(row_ptr, first, lanes, n_cols, vocab_size, TILES, BLOCK, TILES)
                _store_gradient(
                    out_row_ptr, tiles, first, lanes, n_cols, peak, factor, TILES, BLOCK, TILES
                )
            # The target's probability less 1, stored after the threads' stores.
            gradient = (_exponential(at_target, peak) - total) * factor
            tl.debug_barrier()
            gradient = gradient.to(gradient_ptr.dtype.element_ty)
            tl.store(out_row_ptr + target, gradient, mask=in_range)


# --- Launchers --------------------------------------------------------------------------------


def launch_cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, vocab_size: int,
    losses: Tensor | None = None, gradient: Tensor | None = None, scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills `losses` (M,) fp32 and `gradient` (M, V), either of which may be None.

    `gradient` may be `logits` itself. `scale` (M,) fp32, of any stride, multiplies it; None is 1.
    Rows must be contiguous.
    """
    n_rows, n_cols = logits.shape
    if n_rows == 0:
        return
    size = logits.element_size()
    key = n_cols * size // 2  # the table counts in 2-byte elements
    if key > WIDEST_UNALIGNED and (logits.data_ptr() | logits.stride(0) * size) % 16:
        key = 1 << 31
    config = lookup(CROSS_ENTROPY, launch.arch_of(logits), key)
    block = config.blocks["BLOCK"] * 2 // size
    tiles = min(config.blocks["TILES"], triton.cdiv(vocab_size, block))
    steps = triton.cdiv(vocab_size, block * tiles)
    full = vocab_size // block - (steps - 1) * tiles
    padding = max(triton.cdiv(n_cols, block) - steps * tiles, 0)
    with launch.on_device(logits):
        cross_entropy_kernel[(n_rows,)](
            logits, targets, losses, gradient, scale, n_cols, vocab_size, logits.stride(0),
            0 if gradient is None else gradient.stride(0),
            0 if scale is None else scale.stride(0), ignore_index,
            block, tiles, steps, full, padding, **config.options,
        )  # fmt: skip


def _losses(logits: Tensor, targets: Tensor, ignore_index: int, vocab_size: int) -> Tensor:
    """Launches the kernel for the losses (M,)."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    launch_cross_entropy(row_view(logits), targets.contiguous(), ignore_index, vocab_size, losses)
    return losses


def _gradient(
    dlosses: Tensor, logits: Tensor, targets: Tensor, ignore_index: int, vocab_size: int
) -> Tensor:
    """Launches the kernel for the gradient (M, V), which reads the logits again."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows, targets = row_view(logits), targets.contiguous()
    launch_cross_entropy(rows, targets, ignore_index, vocab_size, gradient=out, scale=dlosses)
    return out


# --- Registration -----------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], losses: Tensor) -> None:
    logits, targets, *ctx.options = inputs
    ctx.save_for_backward(logits, targets)


_backward_op = define_op(
    "cross_entropy_backward", _gradient,
    lambda dlosses, logits, *_: logits.new_empty(logits.shape),
)  # fmt: skip
_op = define_op(
    "cross_entropy", _losses,
    lambda logits, *_: logits.new_empty(logits.shape[0], dtype=torch.float32),
    setup_context=_setup_context,
    backward=lambda ctx, dlosses: _backward_op(dlosses, *ctx.saved_tensors, *ctx.options),
)  # fmt: skip


def check_arguments(
    op: str, x: Tensor, n_cols: int, targets: Tensor, ignore_index: int, reduction: str,
    vocab_size: int | None,
) -> int:  # fmt: skip
    """Checks the arguments that both losses share; returns vocab_size, by default n_cols.

    Values of targets are checked on a CPU only, since a GPU would have to wait.
    """
    check_tensor(op, "targets", targets, shape=x.shape[:-1], dtypes=(torch.int64,), like=x)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    check_int(op, "ignore_index", ignore_index)
    check_int(op, "vocab_size", vocab_size, optional=True)
    vocab_size = n_cols if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= n_cols:
        raise ValueError(f"{op}: vocab_size must be in [1, {n_cols}], got {vocab_size}")
    if targets.is_cpu and not (launch.use_kernel(x) or torch.compiler.is_compiling()):
        bad = targets[((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)]
        if len(bad):
            wanted = f"in [0, {vocab_size}) or ignore_index={ignore_index}"
            raise ValueError(f"{op}: targets must be {wanted}, got {bad[0].item()}")
    return vocab_size


def reduced(losses: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Returns the sum or mean of the losses (M,), or the losses in the shape of targets."""
    if reduction == "none":
        return losses.view(targets.shape)
    if reduction == "sum":
        return losses.sum()
    # The mean over no rows is NaN, as in PyTorch, and its gradient 0.
    count = targets.ne(ignore_index).sum(dtype=torch.float32)
    return torch.where(count > 0, losses.sum() / count.clamp(min=1), torch.nan)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -1,
    reduction: str = "mean",
    vocab_size: int | None = None,
) -> Tensor:
    """Returns the cross entropy of logits (..., V) and targets (...) int64.

    logits bf16, fp16 or fp32; the loss is fp32: () for "mean" and "sum", like targets for "none".
    Columns from `vocab_size` on are padding with probability and gradient 0. Rows whose target is
    `ignore_index` (default -1, PyTorch's is -100) are left out. If all are, the mean is NaN and the
    gradient 0, as in PyTorch. A target outside [0, vocab_size) raises on a CPU; on a GPU the loss
    and the gradient of its row are NaN.

    `linear_cross_entropy` moves less memory: its gradient takes the place of the logits.

    Raises ValueError for wrong shapes and values, and TypeError for wrong types and dtypes.
    """
    check_tensor("cross_entropy", "logits", logits)
    if logits.ndim == 0:
        raise ValueError("cross_entropy: logits must have shape (..., V), got ()")
    vocab_size = check_arguments(
        "cross_entropy", logits, logits.shape[-1], targets, ignore_index, reduction, vocab_size
    )
    if not launch.use_kernel(logits):
        return reference.cross_entropy(logits, targets, ignore_index, reduction, vocab_size)
    refuse_interpreted_bf16("cross_entropy", logits)
    rows = logits.reshape(targets.numel(), logits.shape[-1])
    losses = _op(rows, targets.reshape(-1), ignore_index, vocab_size)
    return reduced(losses, targets, ignore_index, reduction)


def with_targets(s: Sizes, *inputs: Tensor) -> ExampleInputs:
    """Returns a call with random targets, of which one is ignored."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(s.vocab_size, (s.tokens,), generator=generator)
    targets[s.tokens // 2] = -1
    arguments = {"targets": targets.to(inputs[0].device), "vocab_size": s.vocab_size}
    return ExampleInputs([*inputs], arguments)


def _cost(s: Sizes, itemsize: int) -> dict[str, Cost]:
    """Returns the cost with each tensor moved once, though the op reads the logits twice."""
    return {"both": Cost(0, 2.0 * s.tokens * s.padded_vocab_size * itemsize)}


KERNELS = ("cross_entropy_kernel",)
SPECS = {
    "cross_entropy": OpSpec(
        "cross_entropy", implementations(reference.cross_entropy, cross_entropy),
        lambda s, random: [with_targets(s, random(s.tokens, s.padded_vocab_size))], _cost,
        kernels=KERNELS, category="head", label="cross entropy",
    )
}  # fmt: skip
