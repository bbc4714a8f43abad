"""python -m bench waterfall [PRESET]: where every millisecond of a training step goes.

    python -m bench waterfall gpt2 --sustained --markdown
    python -m bench waterfall --redraw=FILE.json

The trainer's step, without a CUDA graph, is timed and traced on random tokens. The picture goes
from the peak down to the measured step. Each rung adds a part's time beyond that of its FLOPs at
the measured matmul peak, 6N + 12LCT per token in all. The table of kernels, lower bounds and gaps
adds up to the step. --markdown prints the ten largest gaps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench import results, setup, step, trace
from bench.interleave import roofs
from bench.processes import Measured, Seat
from bench.trace import ATTENTION, GAPS, HEAD, LINEAR, MEMORY, PARTS, Context, Row
from bench.variants import Variant
from fastgpt.config import settings
from fastgpt.config.schema import Config
from fastgpt.errors import UserError
from fastgpt.model.build import sizes_of

TURNS = 3  # before the trace, and as many after it
MAX_RESIDUAL, SHOWN = 0.01, 30
HEADER = "kernel", "part", "pass", "shape", "launches", "µs", "ms", "bound ms", "bound", "gap ms"
COLOURS = PARTS | {"matmul peak": "#7f8c9b", GAPS: "#56b4e9", "residual": "#b0b0b0"}
INK, SOFT, GOOD = "#1b2733", "#66727f", "#2e7d4f"


def traced(seat: Seat, count: int) -> list[dict[str, Any]]:
    """Returns the events of a trace of `count` steps."""
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (seat.device.type == "cuda")]
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=kinds, record_shapes=True) as profiler:
            for _ in range(count):
                with record_function(trace.STEP):
                    seat.run(1)
            seat.park()
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_bytes())["traceEvents"]
    return [e for e in events if e.get("ph") == "X" and "dur" in e]


def rungs_of(
    rows: Sequence[Row], idle_ms: float, step_ms: float, ideal_ms: float, flops: float, c: Context
) -> list[dict[str, Any]]:
    """Returns the rungs, which add up to `step_ms`. `flops` take `ideal_ms` at 100 % MFU."""
    tokens, C = c.sizes.tokens * c.micro_batches, c.sizes.n_embd
    credits = {
        LINEAR: 72.0 * c.n_layer * C * C * tokens,
        ATTENTION: 12.0 * c.n_layer * C * c.sizes.block_size * tokens,
        HEAD: 6.0 * c.sizes.padded_vocab_size * C * tokens,
    }
    credits[MEMORY] = flops - sum(credits.values())
    found: list[dict[str, Any]] = []

    def add(name: str, ms: float, **more: Any) -> None:
        before = found[-1]["mfu_after"] if found else 100.0
        after = 100 * ideal_ms / (sum(r["ms"] for r in found) + ms)
        mfu = {"mfu_points": before - after, "mfu_after": after}
        found.append({"name": name, "ms": ms, **mfu, **more})

    add("100 % of the peak", ideal_ms)
    if abs(lost := flops / c.matmul_flops * 1e3 - ideal_ms) > 1e-3 * ideal_ms:
        add("matmul peak", lost, bound_ms=lost)
    for part in PARTS:
        own, credit = [r for r in rows if r.part == part], credits.get(part, 0.0)
        if own or credit:
            takes, credit = sum(r.ms for r in own), credit / c.matmul_flops * 1e3
            bound = sum(r.bound_ms for r in own)
            add(part, takes - credit, takes_ms=takes, credit_ms=credit, bound_ms=bound)
    add(GAPS, idle_ms, takes_ms=idle_ms)
    add("residual", step_ms - sum(r["ms"] for r in found))
    return found


def budget(rows: Sequence[Row], idle_ms: float, step_ms: float) -> list[list[str]]:
    """Returns the lines of a table that adds up to the step, kernels first."""

    def total(name: str, ms: float, some: Sequence[Row] = ()) -> Row:
        ms += sum(r.ms for r in some)
        return Row("", name, "", "", ms=ms, bound_ms=sum(r.bound_ms for r in some))

    idle, more, kernels = total("idle", idle_ms), rows[SHOWN:], total("all kernels", 0.0, rows)
    gap = total("not explained", step_ms - idle_ms - kernels.ms)
    step = total("step", step_ms - kernels.ms, rows)
    lines = []
    for r in (*rows[:SHOWN], total(f"{len(more)} more", 0.0, more), kernels, idle, gap, step):
        each = [f"{r.launches:.0f}", f"{1e3 * r.ms / r.launches:.1f}"] if r.launches else ["", ""]
        numbers = f"{r.ms:.3f}", f"{r.bound_ms:.3f}", r.bound, f"{r.ms - r.bound_ms:.3f}"
        lines.append([r.kernel, r.part, r.kind, r.shape, *each, *numbers])
    return lines


def problems_of(rows: Sequence[Row], residual_ms: float, step_ms: float) -> list[str]:
    """Returns sentences on bounds above the measured time and on time that is not explained."""
    text = "error in the bound of {0.kernel} {0.shape}: {0.bound_ms:.3f} ms, it took {0.ms:.3f}"
    found = [text.format(r) for r in rows if r.bound_ms > r.ms > 1e-3 * step_ms]
    if abs(residual_ms) > MAX_RESIDUAL * step_ms:
        found.append(f"kernels and gaps miss the measured step by {residual_ms / step_ms:+.1%}")
    return found


def measure(args: argparse.Namespace, config: Config, vocab_size: int) -> results.Row:
    """Times and traces the step. Returns a row of `step` with a waterfall: rungs and budget."""
    seat = Seat(Variant("as trained", {"cuda_graph": False}), settings.to_dict(config), vocab_size)
    measured, machine = Measured(seat.variant, seat.build()), setup.machine(config)
    sizes, itemsize = sizes_of(config, vocab_size), machine.torch_dtype.itemsize
    # A copy as large as the activations, since small ones stay in caches
    copied = max(1 << 20, min(1 << 30, sizes.tokens * sizes.n_embd * itemsize))
    micro_batches = config.optim.gradient_accumulation_steps
    rates = roofs(machine.device, machine.torch_dtype, copied)
    c = Context(sizes, config.model.n_layer, micro_batches, itemsize, *rates)
    count = max(2, round(args.seconds / 2 / TURNS * 1e3 / seat.turn(1, 0.0)["ms"]))
    measured.turns = [seat.turn(count, args.sustained) for _ in range(TURNS)]
    rows, traced_ms = trace.rows_of(traced(seat, args.traced_steps), c)
    measured.turns += [seat.turn(count, args.sustained) for _ in range(TURNS)]
    (row,) = step.rows_of([measured], args.preset, config, vocab_size)
    step_ms, peak = row["median_ms"], machine.peak
    # The profiler slows a CPU's ops alike, and not a GPU's kernels.
    for r in rows if seat.device.type == "cpu" else ():
        r.ms *= step_ms / traced_ms
    idle_ms = max(0.0, step_ms - sum(r.ms for r in rows))
    rows.sort(key=lambda r: r.bound_ms - r.ms)
    ideal_ms = row["mfu"] * step_ms
    rungs = rungs_of(rows, idle_ms, step_ms, ideal_ms, ideal_ms * 1e-3 * peak.flops, c)
    row["waterfall"] = {
        "format": "fastgpt-waterfall", "version": 2, "device": seat.device.type, "peak": str(peak),
        "step_ms": step_ms, "idle_ms": idle_ms, "matmul_flops": c.matmul_flops,
        "copy_bytes": c.copy_bytes, "rungs": rungs, "budget": [asdict(r) for r in rows],
        "millions": setup.flops_per_token(config, vocab_size)["mfu_6n"] / 6e6,
    }  # fmt: skip
    return row


# --- the picture ---------------------------------------------------------------------------------


def draw(data: dict[str, Any], path: Path) -> None:
    """Writes PNG and SVG of a waterfall's result beside `path`. Raises UserError for another."""
    import matplotlib
    from matplotlib.figure import Figure

    if data["name"] != "waterfall":
        raise UserError(f"{path}: a result of {data['name']}, not of waterfall")
    (row,), where, state = data["rows"], data["environment"], data["settings"]["state"]
    drawn, mfu, step_ms = row["waterfall"], 100 * row["mfu"], row["waterfall"]["step_ms"]
    title = f"{row['preset']}, {drawn['millions']:.3g}M parameters, on {where['device']}"
    line = f"{step_ms:.4g} ms per step, {mfu:.1f} % MFU: where {100 - mfu:.1f} points go"
    line += " · a CPU picture, which shows no GPU's speed" * (drawn["device"] == "cpu")
    run = where["device"], f"{row['tokens']:,} tokens per step, {state}", f"torch {where['torch']}"
    source = data["date"][:10], f"commit {where['commit']}", data["command"]
    footer = f"100 % is {drawn['peak']}\n{' · '.join([*run, *source])}"
    rungs = [r for r in drawn["rungs"] if abs(r["ms"]) >= 5e-4 * step_ms]
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "DejaVu Sans"}):
        height = 2.2 + 0.56 * (len(rungs) + 1)
        figure = Figure(figsize=(12, height), facecolor="white")
        bars(figure.add_axes((0.17, 0.72 / height, 0.68, 1 - 2.02 / height)), rungs, step_ms, mfu)
        left: Any = {"x": 0.015, "va": "center", "color": SOFT}
        figure.text(y=1 - 0.36 / height, s=title, size=17, weight="bold", **left | {"color": INK})
        figure.text(y=1 - 0.72 / height, s=line, size=12, **left)
        figure.text(y=0.2 / height, s=footer, size=8.5, **left)
        for kind in ("png", "svg"):
            figure.savefig(path.with_suffix(f".{kind}"), dpi=130)


def bars(axes: Any, rungs: Sequence[dict[str, Any]], step_ms: float, mfu: float) -> None:
    """Draws a line per rung, top down. Each bar starts where the one above ended."""
    width = max(step_ms, *accumulate(r["ms"] for r in rungs))
    left: Any = {"transform": axes.get_yaxis_transform(), "va": "center", "color": INK}

    def line(row: int, name: str, end: float, label: str, mfu: float, bold: str = "normal") -> None:
        axes.text(end + 0.008 * width, row, label, va="center", size=10, color=INK, weight=bold)
        axes.text(-0.015, row, name, ha="right", size=10.5, weight=bold, **left)
        axes.text(1.0, row, f"{mfu:.1f} %", ha="left", size=11, weight=bold, **left)

    at = 0.0
    for row, r in enumerate(rungs):
        ms, bound = r["ms"], r.get("bound_ms", 0.0)
        end, colour = at + ms, COLOURS.get(r["name"], GOOD)
        pale = min(ms, max(0.0, bound - r.get("credit_ms", 0.0)))  # beyond the FLOPs above
        axes.barh(row, pale, left=at, height=0.62, color=colour, alpha=0.35, lw=0)
        axes.barh(row, ms - pale, left=at + pale, height=0.62, color=colour, lw=0)
        axes.plot([end, end], [row + 0.31, row + 0.69], color="#9aa5b1", lw=1)
        label = f"{ms:+.3g} ms   {-r['mfu_points']:+.1f} pt" if row else f"{ms:.3g} ms"
        line(row, r["name"], max(at, end), label, r["mfu_after"])
        if bound and (takes := r.get("takes_ms")):
            share = f"{bound / takes:.0%}" if bound <= takes else "error"
            axes.text(1.1, row, share, size=10, **left)
        at = end
    last = len(rungs)
    axes.barh(last, step_ms, color=INK, height=0.62)
    line(last, "measured step", step_ms, f"{step_ms:.4g} ms", mfu, "bold")
    legend = "solid: above the lower bound · pale: the lower bound on this device"
    for x, text in ((0.0, legend), (1.0, "MFU so far"), (1.1, "bound / time")):
        axes.text(x, -0.85, text, size=9, **left | {"color": SOFT})
    axes.set(xlim=(0, width * 1.24), ylim=(last + 0.6, -0.6), yticks=[], axisbelow=True)
    axes.set_xlabel("ms per step", color=SOFT, size=9, labelpad=1)
    axes.tick_params(axis="x", colors=SOFT, labelsize=9, length=0)
    axes.grid(axis="x", color="#e4e8ec", lw=0.8)
    axes.spines[:].set_visible(False)


def main(argv: list[str]) -> int:
    gpu = torch.cuda.is_available()
    parser = setup.Parser("waterfall", __doc__)
    parser.add_argument("preset", nargs="?", default="gpt2" if gpu else "laptop")
    parser.add_argument("--seconds", type=float, default=5.0 if gpu else 2.0, help="of timing")
    parser.add_argument("--traced-steps", type=setup.at_least(1), default=3)
    parser.add_sustained()
    parser.add_argument("--markdown", action="store_true", help="print the ten largest gaps")
    parser.add_argument("--redraw", type=Path, help="draw this result again, without measuring")
    args, flags = parser.parse(argv)
    if args.redraw:
        draw(data := results.load(args.redraw), args.redraw)
        print(*data["problems"], f"drawn: {args.redraw.with_suffix('.png')} and .svg", sep="\n")
        return 0
    state = "sustained" if args.sustained else "short"
    result = results.Result("waterfall", argv, {"flags": flags, "state": state})
    config, vocab_size = setup.configure(args.preset, flags, whole=True)
    row = measure(args, config, vocab_size)
    result.rows.append(row)
    drawn, path = row["waterfall"], result.save(args.out)
    rows = [Row(**r) for r in drawn["budget"]]
    print(f"{args.preset}, {state}: {setup.describe(config, vocab_size)}; peak {drawn['peak']}")
    matmul, copy = drawn["matmul_flops"] / 1e12, drawn["copy_bytes"] / 1e9
    print(f"measured here: matmuls {matmul:.4g} TFLOP/s, copies {copy:,.0f} GB/s")
    step.show([row])
    lines = budget(rows, drawn["idle_ms"], drawn["step_ms"])
    print(results.table(HEADER, lines))
    result.data["problems"] = problems_of(rows, drawn["rungs"][-1]["ms"], drawn["step_ms"])
    print(*result.data["problems"], sep="\n")
    if args.markdown:
        print(results.table(HEADER, lines[:10], markdown=True))
    draw(result.data, path)
    return result.end(args.out, ", .png and .svg")
