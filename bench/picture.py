"""The waterfall as a picture, PNG and SVG: from the ideal step down the rungs to the measured."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

from bench.ladder import Ladder, Rung

# Colour-blind safe (Okabe and Ito's), one hue a part; ideal and measured in neutral ink.
_COLOURS = {
    "matmul peak": "#7f8c9b",
    "linear layers": "#0072b2",
    "attention": "#d55e00",
    "head and loss": "#cc79a7",
    "memory-bound ops": "#e69f00",
    "optimizer and casts": "#009e73",
    "Muon": "#004d38",
    "other": "#000000",
    "gaps: launch, data, host": "#56b4e9",
    "residual": "#b0b0b0",
}
_INK, _SOFT, _GOOD = "#1b2733", "#66727f", "#2e7d4f"
FORMATS = ("png", "svg")


def draw(
    ladder: Ladder, title: str, footer: str, paths: Iterable[Path], note: str = ""
) -> list[Path]:
    """Write the picture to every path, in the format of its suffix. Returns the paths.

    `title` names model and device; `footer` says what was measured and when; `note` is put in a
    corner, in colour, not to be overlooked.
    """
    import matplotlib
    from matplotlib.figure import Figure

    paths = list(paths)
    rungs = [
        r for r in ladder.rungs if r.name != "residual" or abs(r.ms) >= 0.0005 * ladder.step_ms
    ]
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "DejaVu Sans"}):
        height = 2.2 + 0.56 * (len(rungs) + 1)
        figure = Figure(figsize=(12, height), facecolor="white")
        top, bottom = 1 - 1.3 / height, 0.72 / height
        _bars(figure.add_axes((0.17, bottom, 0.68, top - bottom)), rungs, ladder)
        subtitle = (
            f"{ladder.step_ms:.4g} ms a step, {ladder.mfu:.1f} % MFU: "
            f"where the other {100 - ladder.mfu:.1f} points go"
        )
        head = 1 - 0.36 / height
        figure.text(0.015, head, title, size=17, weight="bold", color=_INK, va="center")
        figure.text(0.015, 1 - 0.72 / height, subtitle, size=12, color=_SOFT, va="center")
        if note:
            box = {"boxstyle": "round,pad=0.4", "fc": "#b3541e", "ec": "none"}
            style: Any = {"size": 11, "weight": "bold", "color": "white", "bbox": box}
            figure.text(0.985, head, note, ha="right", va="center", **style)
        foot = f"100 % is {ladder.peak}\n{footer}"
        figure.text(0.015, 0.2 / height, foot, size=8.5, color=_SOFT, va="center")
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=130, format=path.suffix.lstrip("."))
    return paths


def _bars(axes: Any, rungs: list[Rung], ladder: Ladder) -> None:
    """One row a rung, top down; each bar starts where the one above ended."""
    width = max(ladder.step_ms, *accumulate(rung.ms for rung in rungs))
    at = 0.0
    for row, rung in enumerate(rungs):
        end = at + rung.ms
        if rung.name == "ideal":
            axes.barh(row, rung.ms, color=_GOOD, height=0.62)
            label = f"{rung.ms:.3g} ms"
        else:
            _split_bar(axes, row, at, rung, _COLOURS.get(rung.name, _INK))
            label = f"{_signed(rung.ms, '.3g')} ms   {_signed(-rung.mfu_points, '.1f')} pt"
        axes.text(max(at, end) + 0.008 * width, row, label, va="center", size=10, color=_INK)
        axes.plot([end, end], [row + 0.31, row + 0.69], color="#9aa5b1", lw=1)
        _margins(axes, row, rung, f"{rung.mfu_after:.1f} %")
        at = end
    last = len(rungs)
    axes.barh(last, ladder.step_ms, color=_INK, height=0.62)
    beside, measured = ladder.step_ms + 0.008 * width, f"{ladder.step_ms:.4g} ms"
    axes.text(beside, last, measured, va="center", size=11, weight="bold", color=_INK)
    _margins(axes, last, Rung("measured step", 0), f"{ladder.mfu:.1f} %", bold=True)
    legend = "solid: still to win · pale: the least that this part costs on this device, its bound"
    for x, text in ((0.0, legend), (1.0, "MFU so far"), (1.1, "bound / time")):
        axes.text(x, -0.85, text, transform=axes.get_yaxis_transform(), size=9, color=_SOFT)
    axes.set_xlim(0, width * 1.24)
    axes.set_ylim(last + 0.6, -0.6)
    axes.set_yticks([])
    axes.set_xlabel("ms a step", color=_SOFT, size=9, labelpad=1)
    axes.tick_params(axis="x", colors=_SOFT, labelsize=9, length=0)
    axes.grid(axis="x", color="#e4e8ec", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _signed(value: float, form: str) -> str:
    """With its sign, but 0 for what is a rounding error of the sums."""
    return format(0.0 if abs(value) < 5e-4 else value, f"+{form}")


def _split_bar(axes: Any, row: int, at: float, rung: Rung, colour: str) -> None:
    """The rung's bar; pale as far as its bound reaches beyond what stands above already."""
    if rung.ms < 0:  # a gain: back towards the left, outlined
        axes.barh(row, rung.ms, left=at, height=0.62, color="white", edgecolor=colour, hatch="///")
        return
    bound = 0.0 if rung.bound_ms is None else rung.bound_ms - rung.credit_ms
    pale = min(rung.ms, max(0.0, bound))
    axes.barh(row, pale, left=at, height=0.62, color=colour, alpha=0.35, lw=0)
    axes.barh(row, rung.ms - pale, left=at + pale, height=0.62, color=colour, lw=0)


def _margins(axes: Any, row: int, rung: Rung, mfu: str, bold: bool = False) -> None:
    """The rung's name on the left and the MFU so far on the right."""
    weight = "bold" if bold else "normal"
    style = {"transform": axes.get_yaxis_transform(), "va": "center", "color": _INK}
    name = "100 % of the peak" if rung.name == "ideal" else rung.name
    axes.text(-0.015, row, name, ha="right", size=10.5, weight=weight, **style)
    axes.text(1.0, row, mfu, ha="left", size=11, weight=weight, **style)
    if rung.bound_ms and rung.takes_ms:
        axes.text(1.1, row, f"{rung.bound_ms / rung.takes_ms:.0%}", size=10, **style)
