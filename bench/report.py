"""python -m bench report [FOLDER]: results as Markdown (RESULTS.md) and plots beside it.

Only the newest result of a device and command is shown, each table under its GPU, date, commit and
command, so that no row mixes two versions.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench import results
from bench.check import shortly, stale
from bench.provenance import sources
from bench.tables import table

COLOURS = {"fastgpt": "#1f77b4", "kernels+compile": "#1f77b4", "kernels": "#6baed6"}


def newest(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The last result of each (device, command without --out), in the order of their dates."""
    found = {}
    for path in results.files(folder):
        data = results.load(path)
        words = [w for w in data["command"].split() if not w.startswith("--out")]
        found[(data["environment"]["device"], " ".join(words))] = (path, data)
    return list(found.values())


def cells(row: dict[str, Any]) -> dict[str, str]:
    """The columns of a row that people read; those that a kind of result lacks are left out."""
    out = {"what": row["key"]}
    if row.get("problem"):
        return out | {"": row["problem"]}
    if "median_ms" in row:
        spread = f" [{row['q1_ms']:.3f}, {row['q3_ms']:.3f}]" if "q1_ms" in row else ""
        out["ms"] = f"{row['median_ms']:.3f}{spread}"
    if "rate" in row:
        out["rate"] = f"{row['rate']:,.1f} {row['unit']}"
        out["of the roof"] = f"{row['share_of_roof']:.0%}"
    if "mfu" in row:
        out["tokens/s"] = f"{row['tokens_per_second']:,.0f}"
        for name in ("mfu", "mfu_causal", "mfu_6n"):
            out[f"{name} %"] = f"{100 * row[name]:.1f}"
    if row.get("peak_memory_bytes"):
        out["GiB"] = f"{row['peak_memory_bytes'] / 2**30:.2f}"
    if "ratio" in row:
        out["time against"] = f"{row['ratio']['to']}: {results.said(row)}"
    return out


def section(path: Path, data: dict[str, Any], now: dict[str, str], below: Path) -> list[str]:
    environment = data["environment"]
    lines = [
        f"## {data['name']} on {environment['device']}",
        "",
        f"{data['date'][:10]}, commit {environment['commit']}, torch {environment['torch']}, "
        f"triton {environment['triton']}: `{data['command']}` "
        f"([all numbers]({os.path.relpath(path, below)}))",
        "",
    ]
    if not data["complete"]:
        lines += ["This run was cut short; here is what it had.", ""]
    if changed := stale(data, now):
        lines += [f"Measured before these sources changed: {shortly(changed)}.", ""]
    rows = [cells(row) for row in data["rows"]]
    head = list(dict.fromkeys(key for row in rows for key in row))
    lines += [table(head, [[row.get(k, "") for k in head] for row in rows], markdown=True), ""]
    picture = path.with_suffix(".png")
    if not picture.exists():
        picture = plot(path, data)
    if picture.exists():
        lines += [f"![{data['name']}]({os.path.relpath(picture, below)})", ""]
    return lines


def plot(path: Path, data: dict[str, Any]) -> Path:
    """A picture beside the result, if its kind has one. Returns its path, there or not."""
    picture = path.with_suffix(".svg")
    rows = [r for r in data["rows"] if not r["problem"]]
    draw = {"step": plot_steps, "ablate": plot_steps, "kernels": plot_kernels}.get(data["name"])
    if draw is None or not rows:
        return picture
    if importlib.util.find_spec("matplotlib") is None:
        return picture
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    draw(figure, rows, data)
    where = data["environment"]
    figure.suptitle(f"{where['device']}, {data['date'][:10]}, commit {where['commit']}", size=9)
    figure.savefig(picture, metadata={"Date": None})
    return picture


def plot_steps(figure: Any, rows: list[dict[str, Any]], data: dict[str, Any]) -> None:
    """Bars of MFU by preset; for a sweep, ms over the value with the step at 100 % MFU."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    known = ("batch", "block_size", "n_layer", "n_embd")
    sweep = next((k for k in known if k in rows[0]), None)
    axes = figure.subplots()
    if sweep is None:
        names = [r["key"] for r in rows]
        bars = axes.barh(names, [100 * r["mfu"] for r in rows], color="#9aa5b1")
        for bar, r in zip(bars, rows, strict=True):
            bar.set_color(COLOURS.get(r["variant"], "#9aa5b1"))
        axes.bar_label(bars, [f"{r['median_ms']:.2f} ms" for r in rows], padding=3)
        axes.invert_yaxis()
        axes.set_xlabel("MFU, % of the peak")
        axes.margins(x=0.15)
        return
    lines = defaultdict(list)
    for r in rows:
        lines[f"{r['preset']} {r['variant']}"].append((r[sweep], r["median_ms"]))
        lines[f"{r['preset']}: 100 % MFU"].append((r[sweep], r["mfu"] * r["median_ms"]))
    for name, points in lines.items():
        style = {"ls": "--", "color": "black", "lw": 1} if name.endswith("MFU") else {"marker": "o"}
        axes.plot(*zip(*sorted(points), strict=True), label=name, **style)
    axes.set(xlabel=sweep, ylabel="ms a step", xscale="log", yscale="log")
    values = sorted({r[sweep] for r in rows})
    axes.set_xticks(values, [f"{v:,}" for v in values])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    axes.grid(color="#e4e8ec", lw=0.8)
    axes.legend(fontsize=8)


def _numbers(size: str) -> list[int]:
    """What sizes are ordered by; the batch falls as T grows and does not count."""
    return [int(n) for n in re.findall(r"\d+", re.sub(r"B=\d+", "", size))]


def shorter(size: str) -> str:
    """A size's numbers on a line, and what they are of on the next."""
    first, _, rest = size.rpartition(" ")
    return f"{first}\n{rest}" if first else size


def plot_kernels(figure: Any, rows: list[dict[str, Any]], data: dict[str, Any]) -> None:
    """Rates by op and pass, a line a provider over the sizes, with the measured roof."""
    panels: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for r in rows:
        panels[(r["op"], r["pass"])].append(r)
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure.set_size_inches(5 * columns, 3.8 * height)
    for i, ((op, kind), here) in enumerate(sorted(panels.items())):
        axes = figure.add_subplot(height, columns, i + 1)
        sizes = sorted({r["size"] for r in here}, key=_numbers)
        for name in dict.fromkeys(r["provider"] for r in here):
            mine = {r["size"]: r["rate"] for r in here if r["provider"] == name}
            at = [k for k, size in enumerate(sizes) if size in mine]
            axes.plot(at, [mine[sizes[k]] for k in at], marker="o", ms=3, label=name)
        unit = here[0]["unit"]
        roof = data["settings"]["roofs"][unit]
        axes.axhline(roof, ls="--", color="black", lw=1, label=f"roof {roof:,.4g}")
        axes.set_xticks(range(len(sizes)), [shorter(size) for size in sizes], fontsize=7)
        axes.margins(x=0.1)
        axes.set_title(f"{op}, {kind}", fontsize=10)
        axes.set_ylabel(unit, fontsize=8)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=results.FOLDER)
    parser.add_argument("--out", type=Path, help="the Markdown file; default: RESULTS.md above")
    args = parser.parse_args(argv)
    folder: Path = args.folder.resolve()
    if args.folder != results.FOLDER and not folder.is_dir():
        parser.error(f"{args.folder}: there is no such folder")
    out: Path = (args.out or folder.parent / "RESULTS.md").resolve()
    try:
        found = newest(folder)
    except ValueError as e:
        parser.error(str(e))
    lines = ["# Measured results", ""]
    lines += ["Made by `python -m bench report`; `python -m bench check` says what is old.", ""]
    if not found:
        lines += ["No result is committed yet. With a GPU: `python -m bench all`.", ""]
    now = sources()
    for path, data in found:
        lines += section(path, data, now, out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines))
    print(f"written: {out}, {len(found)} results")
    return 0
