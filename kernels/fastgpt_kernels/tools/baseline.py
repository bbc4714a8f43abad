"""What the gate found and what it compares with: baselines, and the table in kernels/README.md.

A room's baseline is `gate.json`: {Triton's version: {architecture: what passed}}, with figures by
name for the architectures in `FIGURES`, and for the others hashes alone.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastgpt_kernels import OPS
from fastgpt_kernels.tools.bound import DEVICES
from fastgpt_kernels.tools.launches import Launch

FIGURES = ("sm_80", "sm_89", "sm_90")
TOLERANCE = 1.03  # a hot path or a bound may be worse than the baseline by this factor
BEGIN, END = "<!-- the gate's table: aot --readme -->\n", "<!-- end of the gate's table -->"


@dataclass(frozen=True)
class Verdict:
    """What was found out about a launch; `problem` is empty if all is well.

    figures  registers a thread, bytes of shared memory, programs an SM, launches a training step,
             instructions of the hot path and barriers among them, its global accesses by width,
             bytes in flight an SM, how often the hot path waits for memory, and the bound on each
             device: microseconds, share of the roof, what rules, and the rate
    """

    name: str
    arch: str
    op: str = ""
    key: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    summary: str = ""


def table(verdicts: Sequence[Verdict], show: bool = False) -> str:
    """The verdicts as text, one row a kernel; `show`: with a summary of its machine code."""
    width = max(len(v.name) for v in [*verdicts, Verdict("kernel", "")])
    lines = [
        f"{'kernel':{width}}  arch   regs shared per SM  hot bar flying waits  accesses, bounds"
    ]
    for v in verdicts:
        f, text = v.figures, ""
        if f:
            bounds = [f"{d} {f[d][3]} {f[d][1]:.0%} {f[d][2]}" for d in DEVICES if d in f]
            text = (
                f"{f['registers']:4} {f['shared']:6} {f['programs']:6} {f['instructions']:4} "
                f"{f['barriers']:3} {f['flight']:6} {f['waits']:5.2f}  "
                f"{', '.join([f['width'], *bounds])}"
            )
        problem = f"  <- {v.problem}" if v.problem else ""
        lines.append(f"{v.name:{width}}  {v.arch:6} {text}{problem}")
        lines += [v.summary] * show
    return "\n".join(lines)


def room(launch: Any) -> str:
    """The specs of the room that a launch or a verdict comes from."""
    return f"{OPS[launch.op].room}.specs"


def path(module: str) -> Path:
    """The baseline of a room, from its specs."""
    return Path(str(importlib.import_module(module).__file__)).with_name("gate.json")


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def write(file: Path, baseline: Mapping[str, Any]) -> None:
    """One line a kernel, or for all hashes of an architecture."""
    versions = []
    for version, archs in sorted(baseline.items()):
        parts = []
        for arch, entries in sorted(archs.items()):
            text = json.dumps(entries)
            if isinstance(entries, dict):
                rows = [f'   "{name}": {json.dumps(e)}' for name, e in sorted(entries.items())]
                text = "{\n" + ",\n".join(rows) + "\n  }"
            parts.append(f'  "{arch}": {text}')
        versions.append(f' "{version}": {{\n' + ",\n".join(parts) + "\n }")
    file.write_text("{\n" + ",\n".join(versions) + "\n}\n")


def hashes(baseline: Mapping[str, Any], version: str, arch: str) -> set[str]:
    """Of what passed with a version of Triton on an architecture."""
    entries = baseline.get(version, {}).get(arch, [])
    return {e["key"] for e in entries.values()} if isinstance(entries, dict) else set(entries)


def stale(launches: Iterable[Launch], known: Mapping[str, Any], version: str) -> list[Launch]:
    """Those that nobody has compiled with this version of Triton; baselines are by room."""
    return [x for x in launches if x.key not in hashes(known[room(x)], version, x.arch)]


def updated(
    baseline: Mapping[str, Any],
    version: str,
    launches: Sequence[Launch],
    verdicts: Sequence[Verdict],
) -> dict[str, Any]:
    """A room's baseline with what passed; `launches` are all of the room on their architectures."""
    now = {v.key: v for v in verdicts}
    archs = dict(baseline.get(version, {}))
    for arch in dict.fromkeys(x.arch for x in launches):
        before = hashes(baseline, version, arch)
        mine = [x for x in launches if x.arch == arch]
        passed = [x for x in mine if (not now[x.key].problem if x.key in now else x.key in before)]
        if arch in FIGURES:
            old = {e["key"]: e for e in archs.get(arch, {}).values()}
            archs[arch] = {
                x.name: {"key": x.key, **now[x.key].figures} if x.key in now else old[x.key]
                for x in passed
            }
        else:
            archs[arch] = sorted(x.key for x in passed)
    return {**baseline, version: archs}


def compare(verdict: Verdict, known: Mapping[str, Any], version: str) -> Verdict:
    """The verdict, with a problem added if it is worse than the figures of the baseline, by room.

    Where the baselines say nothing about this version of Triton or architecture, nothing is.
    """
    entries = known[room(verdict)].get(version, {}).get(verdict.arch)
    if not isinstance(entries, dict):
        return verdict
    problems = [verdict.problem] * bool(verdict.problem)
    before, now = entries.get(verdict.name, {}), verdict.figures
    if not before:
        problems.append("not in the baseline")
    for figure in ("instructions", "waits", *DEVICES):
        if figure in before and figure in now:
            old, new = before[figure], now[figure]
            if figure in DEVICES:
                old, new = old[0], new[0]
            if new > old * TOLERANCE:
                what = f"us at least on {figure}" if figure in DEVICES else figure
                problems.append(f"{new:g} {what}, {old:g} in the baseline")
    if now and now["programs"] < before.get("programs", 0):
        problems.append(f"{now['programs']} programs an SM, {before['programs']} in the baseline")
    return replace(verdict, problem="; ".join(problems))


# --------------------------------------------------------------------------------- for the README


def step_table(baselines: Iterable[Mapping[str, Any]], version: str) -> str:
    """The kernels of a training step of GPT-2 124M, as Markdown."""
    heads = ["kernel", "hot", "registers", "per SM", "accesses", "in flight", *DEVICES, "ms"]
    rows = []
    total = 0.0
    for archs in (b.get(version, {}) for b in baselines):
        for name, f in archs.get("sm_90", {}).items():
            if not name.startswith("gpt2 ") or name.startswith("gpt2 bias ") or not f["times"]:
                continue
            ms = f["times"] * f["H200"][0] / 1e3
            total += 0 if name.startswith("gpt2 dropout") else ms
            cells = [name.removeprefix("gpt2 "), f["instructions"], f["registers"], f["programs"]]
            cells += [f["width"], f"{f['flight'] / 1024:.0f} KB"]
            for device, sheet in DEVICES.items():
                b = archs.get(sheet.arch, {}).get(name, {}).get(device)
                cells.append(f"{b[3]}, {b[1]:.0%}, {b[2]}" if b else "-")
            rows.append([*cells, f"{ms:.2f}"])
    lines = [f"| {' | '.join(map(str, row))} |" for row in [heads, ["---"] * len(heads), *rows]]
    return f"Triton {version}; without dropout {total:.1f} ms.\n\n" + "\n".join(lines) + "\n"


def with_table(readme: str, table: str) -> str:
    """The README's text with the table between its markers; ValueError if it has none."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no lines {BEGIN!r} and {END!r}")
    return head + begin + table + end + tail
