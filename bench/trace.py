"""Where the time of traced training steps went: a torch.profiler trace -> ms a step by category.

Every instant of the traced window belongs to exactly one piece of work, or to none (a gap), so the
parts add up to the window whatever overlaps:

- On a GPU the pieces are kernels, copies and sets, each with the ops and scopes around its launch
  (the trace links them by correlation id). If several streams work at once the instant goes to
  the first of `CATEGORIES` among them: a copy beside a kernel costs nothing.
- On a CPU they are the ops' own times, without those of the ops inside them. Main thread and
  autograd thread work in turn; if they do overlap, the instant counts once.

The traced loop marks each step with the scope `bench.step`, and reading its batch with
`bench.data`. The first and the last marked step only bound the window: it runs from the first
piece of the second step to the first piece of the last, over whole steps in a steady state.
"""

from __future__ import annotations

import gzip
import heapq
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.categories import CATEGORIES, GEMM_OPS, Dims, Named, Sizes, categorize, gemm_shape

STEP_SCOPE = "bench.step"
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCH = ("cuda_runtime", "cuda_driver")
_HOST = ("cpu_op", "user_annotation", *_LAUNCH)
_BACKWARD = "autograd::engine::evaluate_function"


class TraceError(ValueError):
    """The trace does not hold what is needed; the message says what."""


@dataclass(frozen=True)
class Op:
    """An op, a scope or a launch on the host; times in us."""

    name: str
    start: float
    end: float
    index: int
    dims: Dims = ()


@dataclass(frozen=True)
class Piece:
    """Work that took [start, end) us: what ran, and the ops around it, outermost first."""

    start: float
    end: float
    stack: tuple[Op, ...]
    kernel: str = ""
    launched: float = 0.0  # when the host asked for it; on a CPU: start


@dataclass(frozen=True)
class Gemm:
    """All matrix products of one shape and kind, per step."""

    part: str  # forward, dX, dW; or head
    m: int
    n: int
    k: int
    count: float
    ms: float
    flops: float


@dataclass
class Breakdown:
    """ms a step by (category, item), the step's length in the trace, and details of some parts."""

    device: str  # "cuda" or "cpu"
    steps: int
    step_ms: float
    parts: dict[tuple[str, str], float]
    gemms: list[Gemm] = field(default_factory=list)
    others: dict[str, float] = field(default_factory=dict)  # unknown kernels by name, ms a step

    def ms(self, category: str) -> float:
        """Of a whole category."""
        return sum(ms for (c, _), ms in self.parts.items() if c == category)

    def items(self, category: str) -> dict[str, float]:
        found = {item: ms for (c, item), ms in self.parts.items() if c == category}
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def load(path: Path) -> list[dict[str, Any]]:
    """The complete events of a trace as torch.profiler exports it (.json or .json.gz)."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    events = json.loads(data)["traceEvents"]
    return [e for e in events if e.get("ph") == "X" and "dur" in e]


def breakdown(events: Iterable[dict[str, Any]], sizes: Sizes) -> Breakdown:
    """Attribute the traced steps. Raises TraceError if fewer than three steps are marked."""
    events = list(events)
    marks = sorted(
        (e["ts"], e["ts"] + e["dur"])
        for e in events
        if e["name"] == STEP_SCOPE and e.get("cat") == "user_annotation"
    )
    if len(marks) < 3:
        raise TraceError(f"{len(marks)} steps marked {STEP_SCOPE!r} in the trace, 3 are needed")
    on_gpu = any(e.get("cat") in _DEVICE for e in events)
    pieces = list((_device_pieces if on_gpu else _host_pieces)(events))
    start, end = (_first_of(pieces, mark) if on_gpu else mark[0] for mark in (marks[1], marks[-1]))
    steps = len(marks) - 2
    backward_ends = [_backward_end(events, mark) for mark in marks]

    named = [_named(piece, marks, backward_ends) for piece in pieces]
    found = [categorize(n, sizes, host=not on_gpu) for n in named]
    ranks = [CATEGORIES.index(category) for category, _ in found]
    shares = exclusive([(p.start, p.end) for p in pieces], ranks, start, end)

    parts: dict[tuple[str, str], float] = defaultdict(float)
    others: dict[str, float] = defaultdict(float)
    for (category, item), share in zip(found, shares, strict=True):
        if category == "other":
            others[item], item = others[item] + share / 1000 / steps, "not recognised"
        parts[category, item] += share / 1000 / steps
    covered = sum(shares)
    parts["gaps", "idle"] += (end - start - covered) / 1000 / steps
    return Breakdown(
        device="cuda" if on_gpu else "cpu",
        steps=steps,
        step_ms=(end - start) / 1000 / steps,
        parts={key: ms for key, ms in parts.items() if ms > 0},
        gemms=_gemms(pieces, found, shares, (start, end), steps),
        others={k: v for k, v in sorted(others.items(), key=lambda pair: -pair[1]) if v > 0},
    )


def exclusive(
    spans: Sequence[tuple[float, float]], ranks: Sequence[int], start: float, end: float
) -> list[float]:
    """The time of [start, end) that each span gets when every instant counts once.

    If spans overlap the one of the lowest rank gets the instant, of equals the earlier one.
    """
    order = sorted(range(len(spans)), key=lambda i: spans[i][0])
    shares = [0.0] * len(spans)
    running: list[tuple[int, float, int]] = []  # heap of (rank, start, which)
    now, i = start, 0
    while now < end:
        while i < len(order) and spans[order[i]][0] <= now:
            which = order[i]
            heapq.heappush(running, (ranks[which], spans[which][0], which))
            i += 1
        while running and spans[running[0][2]][1] <= now:
            heapq.heappop(running)
        until = min(end, spans[order[i]][0]) if i < len(order) else end
        if running:
            which = running[0][2]
            until = min(until, spans[which][1])
            shares[which] += until - now
        now = until
    return shares


# --- pieces --------------------------------------------------------------------------------------


def _threads(events: Iterable[dict[str, Any]]) -> list[list[Op]]:
    """The host's events by thread, each before those inside it."""
    threads: dict[Any, list[Op]] = defaultdict(list)
    for index, e in enumerate(events):
        if e.get("cat") in _HOST:
            given = e.get("args", {}).get("Input Dims", ())
            dims = tuple(tuple(d) for d in given if d and isinstance(d[0], int))
            op = Op(e["name"], e["ts"], e["ts"] + e["dur"], index, dims)
            threads[e["pid"], e["tid"]].append(op)
    return [sorted(ops, key=lambda op: (op.start, -op.end, op.index)) for ops in threads.values()]


def _walk(ops: Sequence[Op]) -> Iterator[tuple[float, float, tuple[Op, ...]]]:
    """(start, end, stack) of every stretch in which one op is the innermost of a thread."""
    stack: list[Op] = []
    at = 0.0
    for op in [*ops, None]:
        while stack and (op is None or stack[-1].end <= op.start):
            if stack[-1].end > at:
                yield at, stack[-1].end, tuple(stack)
                at = stack[-1].end
            stack.pop()
        if op is None:
            return
        if stack and op.start > at:
            yield at, op.start, tuple(stack)
        stack.append(op)
        at = op.start


def _host_pieces(events: Sequence[dict[str, Any]]) -> Iterator[Piece]:
    for ops in _threads(events):
        for start, end, stack in _walk(ops):
            yield Piece(start, end, stack, launched=start)


def _device_pieces(events: Sequence[dict[str, Any]]) -> Iterator[Piece]:
    stacks: dict[int, tuple[Op, ...]] = {}  # of the launches, by their event's index
    for ops in _threads(events):
        for _, _, stack in _walk(ops):
            stacks.setdefault(stack[-1].index, stack)
    by_correlation: dict[int, int] = {}
    by_external_id: dict[int, int] = {}
    for index, e in enumerate(events):
        args = e.get("args", {})
        if e.get("cat") in _LAUNCH and "correlation" in args:
            by_correlation[args["correlation"]] = index
        elif e.get("cat") == "cpu_op" and "External id" in args:
            by_external_id[args["External id"]] = index
    for e in events:
        if e.get("cat") not in _DEVICE:
            continue
        args = e.get("args", {})
        index = by_correlation.get(args.get("correlation", -1), -1)
        if index not in stacks:
            index = by_external_id.get(args.get("External id", -1), -1)
        launched = events[index]["ts"] if index >= 0 else e["ts"]
        yield Piece(e["ts"], e["ts"] + e["dur"], stacks.get(index, ()), e["name"], launched)


def _first_of(pieces: Sequence[Piece], mark: tuple[float, float]) -> float:
    """When the device began with the work launched in `mark`, by its thread if that is known."""
    inside = [p for p in pieces if mark[0] <= p.launched < mark[1]]
    if any(op.name == STEP_SCOPE for p in pieces for op in p.stack):
        scope = (STEP_SCOPE, mark[0])
        inside = [p for p in inside if any((op.name, op.start) == scope for op in p.stack)]
    if not inside:
        raise TraceError("a traced step launched no kernel: was the GPU traced?")
    return min(p.start for p in inside)


def _backward_end(events: Sequence[dict[str, Any]], mark: tuple[float, float]) -> float:
    """When the host was done with the step's last gradient; without one: the step's end."""
    ends = [
        e["ts"] + e["dur"]
        for e in events
        if e["name"].startswith(_BACKWARD) and mark[0] <= e["ts"] < mark[1]
    ]
    return max(ends, default=mark[1])


def _named(piece: Piece, marks: Sequence[tuple[float, float]], ends: Sequence[float]) -> Named:
    gemm = _gemm_of(piece)
    # A compiled region's inputs say nothing of the kernels in it: ATen's ops only.
    ops = (op for op in reversed(piece.stack) if op.name.startswith("aten::"))
    dims = next((op.dims for op in ops if op.dims), ())
    names = tuple(op.name for op in piece.stack if op.name != STEP_SCOPE)
    step = sum(mark[0] <= piece.launched for mark in marks) - 1
    after = step >= 0 and ends[step] <= piece.launched < marks[step][1]
    return Named(
        names=(*names, piece.kernel) if piece.kernel else names,
        gemm=gemm[1] if gemm else (),
        dims=dims,
        backward=any(name.startswith(_BACKWARD) for name in names),
        after_backward=after,
    )


def _gemm_of(piece: Piece) -> tuple[Op, Dims] | None:
    """The innermost matrix product around a piece, and the sizes of its two operands."""
    for op in reversed(piece.stack):
        if op.name in GEMM_OPS:
            first = GEMM_OPS[op.name]
            operands = op.dims[first : first + 2]
            return (op, operands) if all(len(d) >= 2 for d in operands) and operands else None
    return None


def _gemms(
    pieces: Sequence[Piece],
    found: Sequence[tuple[str, str]],
    shares: Sequence[float],
    window: tuple[float, float],
    steps: int,
) -> list[Gemm]:
    """Matrix products of the linear layers and the head by shape, if the trace has shapes."""
    us: dict[tuple[str, int, int, int], float] = defaultdict(float)
    calls: dict[tuple, set[int]] = defaultdict(set)
    batches: dict[tuple, int] = {}
    for piece, (category, item), share in zip(pieces, found, shares, strict=True):
        if category not in ("linear", "head"):
            continue
        gemm = _gemm_of(piece)
        if gemm is None or not window[0] <= piece.start < window[1]:
            continue
        op, operands = gemm
        m, n, k, batch = gemm_shape(operands)
        key = (item if category == "linear" else "head", m, n, k)
        us[key] += share
        calls[key].add(op.index)
        batches[key] = batch
    return [
        Gemm(
            *key,
            count=(count := len(calls[key]) / steps),
            ms=time / 1000 / steps,
            flops=2.0 * math.prod(key[1:]) * batches[key] * count,
        )
        for key, time in sorted(us.items(), key=lambda pair: -pair[1])
    ]
