"""Result files, their provenance, and tables of their rows; bench/README.md has the schema."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import power
from fastgpt.errors import UserError
from fastgpt.storage.atomic import write_text
from fastgpt_kernels.launch import HAS_TRITON

SCHEMA = 1
NOT_YET = "the run was cut short before this was measured"
ROOT = Path(__file__).resolve().parents[1]  # of a checkout, or site-packages
FOLDER = ROOT / "bench/results"
PACKAGES = ("fastgpt", "kernels/fastgpt_kernels", "fastgpt_kernels", "bench")
Row = dict[str, Any]


class Result:
    """A result file that is valid after every `save`; `complete` is false in it until `end`."""

    def __init__(self, name: str, argv: Sequence[str], settings: dict[str, Any]):
        self.rows: list[Row] = []
        self._gpu, self._path = power.open_gpu()[0], Path()
        before = self._gpu.state() if self._gpu else {}
        self.data: dict[str, Any] = {
            "schema": SCHEMA, "name": name, "command": command(name, argv),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "environment": environment(), "gpu_before": before, "gpu_after": {},
            "settings": settings, "rows": self.rows, "problems": [], "complete": False,
        }  # fmt: skip

    def save(self, folder: Path) -> Path:
        """Writes `<folder>/<gpu>/<date>-<commit>-<name>.json`, and returns the path."""
        self.data["gpu_after"] = self._gpu.state() if self._gpu else {}
        check(self.data, self.data["name"])
        if not self._path.name:
            where, stamp = self.data["environment"], re.sub("[-:Z]", "", self.data["date"])
            stem = f"{stamp.replace('T', '-')}-{where['commit']}-{self.data['name']}"
            self._path = folder / slug(where["device"]) / f"{stem}.json"
            self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, json.dumps(self.data, indent=1, allow_nan=False) + "\n")
        return self._path

    def end(self, folder: Path, also: str = "") -> int:
        """Saves for the last time and prints the path. Returns 1 if a row has a problem, else 0."""
        self.data["complete"] = True
        print(f"written: {self.save(folder)}{also}")
        return 1 if any(row["problem"] for row in self.rows) else 0


def sources(root: Path = ROOT) -> str:
    """Returns one hash of all modules that a result depends on."""
    found = hashlib.sha256()
    for path in sorted(p for package in PACKAGES for p in (root / package).rglob("*.py")):
        if not path.name.startswith("test_"):  # pytest's modules measure for themselves
            found.update(path.relative_to(root).as_posix().encode())
            found.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return found.hexdigest()[:16]


def commit(folder: Path = ROOT) -> str:
    """Returns the commit checked out in a folder, with "-dirty" if tracked files differ."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=10"]
    command += ["--exclude=*"]  # no tags
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):  # provenance must not stop a measurement
        return "unknown"


def environment() -> dict[str, Any]:
    """Returns the versions and the device of this process."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name(0) if gpu else f"CPU {platform.machine()}",
        "gpu": gpu, "python": platform.python_version(), "torch": torch.__version__,
        "cuda": torch.version.cuda or "none", "cudnn": torch.backends.cudnn.version(),
        "triton": metadata.version("triton") if HAS_TRITON else "none",
        "cpu_threads": torch.get_num_threads(), "commit": commit(), "sources": sources(),
    }  # fmt: skip


def command(name: str, argv: Sequence[str]) -> str:
    """Returns the command that repeats a run, without the folders of results and checkout."""
    text = shlex.join(["python", "-m", "bench", name, *argv])
    return re.sub(r" --out[ =]('[^']*'|\S+)", "", text).replace(f"{ROOT}/", "")


def timed(samples: Sequence[float]) -> Row:
    """Returns a row's samples in ms, with their median and quartiles."""
    q1, median, q3 = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
    return {"samples_ms": [*samples], "median_ms": median, "q1_ms": q1, "q3_ms": q3}


def slug(text: str) -> str:
    """Returns "nvidia-h200" for "NVIDIA H200", a name for files."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def check(data: Any, where: str) -> None:
    """Raises UserError if `data` is not a result of this schema."""
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or "rows" not in data:
        raise UserError(f"{where}: no result of schema {SCHEMA}")
    if len({row.get("key") for row in data["rows"]} - {None}) < len(data["rows"]):
        raise UserError(f"{where}: every row needs a key of its own")
    for row in data["rows"]:
        if bool(row.get("samples_ms")) == bool(row.get("problem")):
            raise UserError(f"{where}: {row['key']}: a row has either samples_ms or a problem")


def load(path: Path) -> dict[str, Any]:
    """Returns the checked content of a result file. Raises UserError."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: {getattr(e, 'strerror', None) or e}") from None
    check(data, str(path))
    return data


def columns(rows: Sequence[Row], name: str, cells: Mapping[str, Callable[[Row], str]]) -> str:
    """Returns a table of the rows that have a time, fastest first, without empty columns.

    cells  by the column's head; a row that lacks a key has an empty cell
    """

    def text(cell: Callable[[Row], str], row: Row) -> str:
        try:
            return cell(row)
        except KeyError:
            return ""

    timed = sorted((r for r in rows if not r["problem"]), key=lambda r: r["median_ms"])
    shown = {head: [text(cell, row) for row in timed] for head, cell in cells.items()}
    shown = {"": [row[name] for row in timed]} | {h: c for h, c in shown.items() if any(c)}
    return table([*shown], [*zip(*shown.values(), strict=True)])


def table(head: Sequence[str], lines: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """Returns columns as wide as they need to be; the first is left-aligned, the others right."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    rule = [["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]] if markdown else []
    all_rows = (head, *rule, *lines)
    rows = [[r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])] for r in all_rows]
    if markdown:
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join("  " + "  ".join(row).rstrip() for row in rows)
