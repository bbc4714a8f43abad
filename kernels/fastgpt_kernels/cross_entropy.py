"""Cross entropy over a large vocabulary: one read of the logits, and one write over them.

    loss_i      = log(sum_j exp(z_ij)) - z_i,t_i                   j < vocab_size, t_i = targets[i]
    dlogits_ij  = (exp(z_ij) / sum_k exp(z_ik) - [j = t_i]) s_i    0 for the padded columns

logits z (M, V), targets (M,) int64, losses and all arithmetic in fp32. s_i is the row's upstream
gradient: 1 / (rows not ignored) for "mean". Ignored rows have loss 0 and gradient 0. A program owns
a row and keeps it in registers, in the dtype of memory, until the gradient is written. A row that
does not fit is walked twice, backwards the second time: what was read last is still in the caches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import launch, reference
from fastgpt_kernels.checks import check_int, check_tensor, refuse_interpreted_bf16
from fastgpt_kernels.launch import Config, Table, lookup, tl, triton
from fastgpt_kernels.library import define_op, plain_eager
from fastgpt_kernels.registry import Cost, ExampleInputs, OpSpec, Sizes, implementations

# --- Launch configs ---------------------------------------------------------------------------

# Key: the row's width in 2-byte elements (an fp32 row counts double). BLOCK is in the same unit: 8
# elements, 128 bits, per thread. A row of up to BLOCK * TILES stays in registers. A wider one is
# walked twice by TILES tiles at a time, in 16 warps of up to 128 registers: all that an SM has, for
# one row per SM stays in the L2 until it is read again. Chosen by register count, not timed against
# others: GPT-2's vocabulary takes 255 registers per thread with 8 warps, and has 100 KB of loads in
# flight. On sm_100 and sm_120 that spills, and the row is walked twice.
_NARROW = {
    256: Config({"BLOCK": 256, "TILES": 1}, num_warps=1),
    1024: Config({"BLOCK": 1024, "TILES": 1}, num_warps=4),
    4096: Config({"BLOCK": 1024, "TILES": 4}, num_warps=4),
    16384: Config({"BLOCK": 2048, "TILES": 8}, num_warps=8),
}
_WALK = {1 << 31: Config({"BLOCK": 4096, "TILES": 3}, num_warps=16)}
CROSS_ENTROPY: Table = {
    "default": {**_NARROW, 51200: Config({"BLOCK": 2048, "TILES": 25}, num_warps=8), **_WALK},
    "sm_100": {**_NARROW, **_WALK},
    "sm_120": {**_NARROW, **_WALK},
}
# Rows that do not begin at multiples of 16 bytes are loaded an element at a time, each into a
# register of its own: wider ones than this are walked whatever the table says.
WIDEST_UNALIGNED = 16384
# Rescaling: so few programs that a launch which finds nothing to do takes microseconds.
SCALE_PROGRAMS, SCALE_BLOCK, SCALE_WARPS = 2048, 2048, 8

# --- Kernels ----------------------------------------------------------------------------------

# The padding of the vocabulary costs only the last tiles their masks, and the target only one store
# more: every other column is loaded, and its probability stored, 128 bits at a time.


@triton.jit
def _load_tiles(
    row_ptr, first, lanes, n_cols, vocab_size,
    FULL: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """TILES tiles [BLOCK] from column `first` on, not converted; -inf past the vocabulary.

    FULL of them lie inside it. The others are masked by n_cols, which unlike the vocabulary's size
    is a multiple of 16: 128 bits a load need that.
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
    """exp(z - peak) in fp32, of logits in the dtype of memory.

    Of logits near the limits of fp32 only the difference can be scaled by log2(e). It is exact
    where the exponential is not tiny.
    """
    return tl.exp2((z.to(tl.float32) - peak) * 1.4426950408889634)


@triton.jit
def _accumulate(tiles, peak, total, FRESH: tl.constexpr, TILES: tl.constexpr):
    """Running maximum and sum of exponentials, lane by lane: no exchange between lanes yet.

    GROUP tiles at a time, so that the first are worked on while the last are on their way; each
    group costs a lane one exponential more. FRESH: the total is 0 yet.
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
    """The exponentials times `factor`, over the row's columns from `first` on."""
    for i in tl.static_range(TILES):
        cols = first + i * BLOCK + lanes
        p = (_exponential(tiles[i], peak) * factor).to(row_ptr.dtype.element_ty)
        if i < FULL:
            tl.store(row_ptr + cols, p)
        else:
            tl.store(row_ptr + cols, p, mask=cols < n_cols)


@triton.jit
def _store_zeros(row_ptr, first, lanes, n_cols, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """0 over TILES tiles from column `first` on."""
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
    scale_ptr,  # fp32 per row, `scale_stride` apart; with COUNT one int64, the divisor; or None
    n_cols, vocab_size, stride, gradient_stride, scale_stride, ignore_index,  # n_cols: V
    BLOCK: tl.constexpr, TILES: tl.constexpr,  # columns of a tile, tiles in registers at a time
    STEPS: tl.constexpr,  # times TILES to cover the vocabulary; 1: the row stays in registers
    FULL: tl.constexpr,  # tiles of the last step that lie inside the vocabulary
    PADDING: tl.constexpr,  # tiles behind the last step
    COUNT: tl.constexpr,
):  # fmt: skip
    LN2: tl.constexpr = 0.6931471805599453
    STEP: tl.constexpr = BLOCK * TILES
    LAST: tl.constexpr = (STEPS - 1) * STEP  # the first column of the last step
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    lanes = tl.arange(0, BLOCK)
    # On their way while the target is: waiting for one and then the others would take twice as
    # long. The last step, which alone is ragged, stays in registers until its gradient is stored.
    last = _load_tiles(row_ptr, LAST, lanes, n_cols, vocab_size, FULL, BLOCK, TILES)
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        if losses_ptr is not None:
            tl.store(losses_ptr + row, 0.0)
        if gradient_ptr is not None:
            out_row_ptr = gradient_ptr + row * gradient_stride
            _store_zeros(out_row_ptr, 0, lanes, n_cols, BLOCK, STEPS * TILES + PADDING)
    else:
        # Read before anything is written here, and kept apart from the maximum: with logits of
        # 1e4 a log-sum-exp rounded to fp32 would be off by 1e-3.
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
            if COUNT:
                scale = 1.0 / tl.load(scale_ptr).to(tl.float32)
            elif scale_ptr is not None:
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
            # One probability less 1, once whoever stored it has done so.
            gradient = (_exponential(at_target, peak) - total) * factor
            tl.debug_barrier()
            gradient = gradient.to(gradient_ptr.dtype.element_ty)
            tl.store(out_row_ptr + target, gradient, mask=in_range)


@triton.jit
def cross_entropy_scale_kernel(
    x_ptr, out_ptr,  # rows `stride` apart; may be the same
    scale_ptr,  # one fp32
    n_cols, stride, BLOCK: tl.constexpr, STEPS: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    scale = tl.load(scale_ptr)
    if (not IN_PLACE) or scale != 1.0:  # known to the GPU only: 1 in a plain `loss.backward()`
        offset = tl.program_id(0).to(tl.int64) * stride
        first = tl.program_id(1).to(tl.int64) * (BLOCK * STEPS)
        for step in range(STEPS):
            cols = first + step * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offset + cols, mask=cols < n_cols).to(tl.float32)
            y = (x * scale).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + offset + cols, y, mask=cols < n_cols)


# --- Launchers --------------------------------------------------------------------------------


def launch_cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, vocab_size: int,
    losses: Tensor | None = None, gradient: Tensor | None = None, scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills `losses` (M,) fp32 and `gradient` (M, V), either of which may be None.

    `gradient` may be `logits` itself. `scale` multiplies it: fp32 (M,), any stride; or it divides
    it: one int64, the number of rows that count; None is 1. Rows must be contiguous.
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
    count = scale is not None and scale.dtype == torch.int64
    with launch.on_device(logits):
        cross_entropy_kernel[(n_rows,)](
            logits, targets, losses, gradient, scale, n_cols, vocab_size, logits.stride(0),
            0 if gradient is None else gradient.stride(0),
            0 if scale is None or count else scale.stride(0), ignore_index,
            block, tiles, steps, full, padding, count, **config.options,
        )  # fmt: skip


def launch_scale(x: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """Computes out = x * scale, one fp32 number; does nothing if `out` is `x` and the number is 1.

    `torch.mul` would first round a 0-dim factor to the dtype of x. x and out (M, N) have the same
    strides.
    """
    n_rows, n_cols, stride = *x.shape, x.stride(0)
    if x.numel() == 0:
        return out
    if x.is_contiguous():
        n_rows, n_cols, stride = 1, x.numel(), 0
    steps = triton.next_power_of_2(triton.cdiv(x.numel(), SCALE_BLOCK * SCALE_PROGRAMS))
    with launch.on_device(x):
        cross_entropy_scale_kernel[(n_rows, triton.cdiv(n_cols, SCALE_BLOCK * steps))](
            x, out, scale, n_cols, stride,
            SCALE_BLOCK, steps, out is x, **launch.options(SCALE_WARPS),
        )  # fmt: skip
    return out


def _rows(logits: Tensor) -> Tensor:
    """Returns `logits` with contiguous, disjoint rows: itself, or a copy."""
    n_rows, n_cols = logits.shape
    if logits.stride(1) == 1 and (logits.stride(0) >= n_cols or n_rows == 1):
        return logits
    return logits.contiguous()


def _losses(logits: Tensor, targets: Tensor, ignore_index: int, vocab_size: int) -> Tensor:
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    launch_cross_entropy(_rows(logits), targets.contiguous(), ignore_index, vocab_size, losses)
    return losses


def _gradient(
    dlosses: Tensor, logits: Tensor, targets: Tensor, ignore_index: int, vocab_size: int
) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows, targets = _rows(logits), targets.contiguous()
    launch_cross_entropy(rows, targets, ignore_index, vocab_size, gradient=out, scale=dlosses)
    return out


# --- Registration -----------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], losses: Tensor) -> None:
    logits, targets, *ctx.options = inputs
    ctx.save_for_backward(logits, targets)


# Functional, as a graph's ops must be: the gradient is a new tensor, and the logits are read twice.
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


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return launch_scale(x, scale, torch.empty_like(x, dtype=dtype))


# x * scale in another dtype, rounded once
scaled = define_op(
    "scaled", _scaled, lambda x, scale, dtype: x.new_empty(x.shape, dtype=dtype)
)  # fmt: skip


class _InPlace(torch.autograd.Function):
    """The sum or mean of the losses in eager mode, whose gradient replaces the logits.

    It is computed with the loss, for an upstream gradient of 1. The backward pass multiplies it.
    """

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
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError("cross_entropy: has no second derivative")
        if ctx.spent:
            raise RuntimeError(
                "cross_entropy: a second backward is impossible, the gradient took the place of "
                "the logits; call cross_entropy(logits.clone(), ...) to keep them"
            )
        ctx.spent = True
        (gradient,) = ctx.saved_tensors
        launch_scale(gradient, dloss, gradient)
        torch.autograd.graph.increment_version(gradient)
        return gradient, None, None, None, None


def _place_for_gradient(logits: Tensor, rows: Tensor) -> Tensor:
    """Returns where the gradient goes: over the logits, unless they are, or lie in, a leaf.

    The caller of the op made a leaf, and may look at it again. Logits that autograd recorded as the
    output of an op are overwritten, and their version counter says so: an op that saved them for
    its backward raises PyTorch's "modified by an inplace operation" rather than being wrong.
    """
    if rows is not logits:
        return rows  # a copy that nothing else reads
    base = logits if logits._base is None else logits._base
    if base.grad_fn is None:
        return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    torch.autograd.graph.increment_version(logits)
    return logits.detach()


def check_arguments(
    op: str, x: Tensor, n_cols: int, targets: Tensor, ignore_index: int, reduction: str,
    vocab_size: int | None,
) -> int:  # fmt: skip
    """Checks what both losses take besides x (..., C) and n_cols classes; returns vocab_size."""
    check_tensor(op, "targets", targets, shape=x.shape[:-1], dtypes=(torch.int64,), like=x)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    check_int(op, "ignore_index", ignore_index)
    check_int(op, "vocab_size", vocab_size, optional=True)
    vocab_size = n_cols if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= n_cols:
        raise ValueError(f"{op}: vocab_size must be in [1, {n_cols}], got {vocab_size}")
    return vocab_size


def check_targets(op: str, targets: Tensor, ignore_index: int, vocab_size: int) -> None:
    """Raises ValueError for a target that is no class; on a CPU only: a GPU would have to wait."""
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
    """Returns the cross entropy of logits (..., V) and targets (...) int64.

    logits bf16, fp16 or fp32; the loss is fp32: () for "mean" and "sum", like targets for "none".
    Columns from `vocab_size` on are padding: no probability, gradient 0. Rows whose target is
    `ignore_index` count nowhere; if all are, the mean is NaN and the gradient 0, as in PyTorch,
    whose own ignore_index is -100 unless given: here it is -1, and -100 is out of range. A target
    outside [0, vocab_size) raises on the CPU; on a GPU its row is NaN, loss and gradient.

    In eager mode a sum's or mean's gradient, in bf16 and fp32, overwrites logits that an op
    computed: do not read them afterwards, and pass `logits.clone()` if another op needs them.
    Leaves, and logits that need no gradient, are left alone. One backward only. A scaled loss
    (gradient accumulation) costs a pass over the gradient: scale the parameters' gradients instead,
    or use `linear_cross_entropy`, which is free of this.

    Wrong shapes and values raise ValueError, wrong types and dtypes TypeError.
    """
    check_tensor("cross_entropy", "logits", logits)
    if logits.ndim == 0:
        raise ValueError("cross_entropy: logits must have shape (..., V), got ()")
    vocab_size = check_arguments(
        "cross_entropy", logits, logits.shape[-1], targets, ignore_index, reduction, vocab_size
    )
    if not launch.use_kernel(logits):
        check_targets("cross_entropy", targets, ignore_index, vocab_size)
        return reference.cross_entropy(logits, targets, ignore_index, reduction, vocab_size)
    refuse_interpreted_bf16("cross_entropy", logits)
    shape = targets.shape
    logits, targets = logits.reshape(targets.numel(), logits.shape[-1]), targets.reshape(-1)
    # fp16 cannot hold gradients divided by the number of rows before a loss scale is applied.
    early = reduction != "none" and logits.dtype != torch.float16
    if early and torch.is_grad_enabled() and logits.requires_grad and plain_eager(logits, targets):
        targets, mean = targets.contiguous(), reduction == "mean"
        return _InPlace.apply(logits, targets, ignore_index, vocab_size, mean)
    losses = _op(logits, targets, ignore_index, vocab_size)
    if reduction == "none":
        return losses.view(shape)
    total = losses.sum()
    return total if reduction == "sum" else total / targets.ne(ignore_index).sum()


def with_targets(s: Sizes, *inputs: Tensor) -> ExampleInputs:
    """Returns a call with random classes, of which one row does not count."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(s.vocab_size, (s.tokens,), generator=generator)
    targets[s.tokens // 2] = -1
    arguments = {"targets": targets.to(inputs[0].device), "vocab_size": s.vocab_size}
    return ExampleInputs([*inputs], arguments)


def _cost(s: Sizes, itemsize: int) -> dict[str, Cost]:
    return {"both": Cost(0, 2.0 * s.tokens * s.padded_vocab_size * itemsize)}


KERNELS = ("cross_entropy_kernel", "cross_entropy_scale_kernel")
SPECS = {
    "cross_entropy": OpSpec(
        "cross_entropy", implementations(reference.cross_entropy, cross_entropy),
        lambda s, random: [with_targets(s, random(s.tokens, s.padded_vocab_size))], _cost,
        kernels=KERNELS, category="head", label="cross entropy",
    )
}  # fmt: skip
