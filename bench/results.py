"""Result files: what is in them, where they lie, and reading them back. Schema: bench/README.md."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import provenance
from bench.stats import Ratio, summarize

SCHEMA = 1
NOT_YET = "the run was cut short before this was measured"
FOLDER = Path(__file__).parent / "results"
_WANTED: dict[str, type] = {
    "schema": int,
    **dict.fromkeys(("name", "command", "date"), str),
    **dict.fromkeys(("environment", "gpu_before", "gpu_after", "settings"), dict),
    **dict.fromkeys(("rows", "problems"), list),
    "complete": bool,
}


class Result:
    """A result in the making. `save` can be called after every part: the file is always valid.

    Until `finish`, `complete` is false in it: a run that was cut short says so.
    """

    def __init__(self, name: str, argv: Sequence[str], settings: dict[str, Any]):
        now = time.gmtime()
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "name": name,
            "command": _command(name, argv),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", now),
            "environment": provenance.environment(),
            "gpu_before": provenance.gpu_state(),
            "gpu_after": {},
            "settings": settings,
            "rows": [],
            "problems": [],
            "complete": False,
        }
        self._path: Path | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.data["rows"]

    @property
    def problems(self) -> list[str]:
        return self.data["problems"]

    def save(self, folder: Path | None) -> Path | None:
        """Write `<folder>/<gpu>/<date>-<commit>-<name>.json`; None: nowhere.

        Of commands that begin in the same second the second writes `...-2.json`.
        """
        if folder is None:
            return None
        self.data["gpu_after"] = provenance.gpu_state()
        environment = self.data["environment"]
        stamp = re.sub(r"[-:]", "", self.data["date"]).replace("T", "-").rstrip("Z")
        stem = f"{stamp}-{environment['commit']}-{self.data['name']}"
        inside = folder / slug(environment["device"])
        if self._path is not None and self._path.parent == inside:
            write(self._path, self.data)
            return self._path
        for count in itertools.count(1):
            self._path = inside / (f"{stem}.json" if count == 1 else f"{stem}-{count}.json")
            with contextlib.suppress(FileExistsError):
                write(self._path, self.data, new=True)
                break
        return self._path

    def finish(self, folder: Path | None) -> Path | None:
        """`save` for the last time: all that was asked for has been measured, or has a problem."""
        self.data["complete"] = True
        return self.save(folder)

    def end(self, folder: Path | None, also: str = "") -> int:
        """`finish`, and say where. The command's exit code: 1 if any row has a problem."""
        if path := self.finish(folder):
            print(f"written: {path}{also}")
        return 1 if any(row["problem"] for row in self.rows) else 0


def _command(name: str, argv: Sequence[str]) -> str:
    """What to type for the same again, without the places of the results and of the checkout."""
    words, skip = ["python", "-m", "bench", name], False
    for word in argv:
        if not skip and word.split("=")[0] != "--out":
            words.append(word.replace(f"{provenance.ROOT}/", ""))
        skip = word == "--out"
    return shlex.join(words)


def timed(samples: list[float]) -> dict[str, Any]:
    """What a row says of its samples, in ms."""
    s = summarize(samples)
    return {"samples_ms": samples, "median_ms": s.median, "q1_ms": s.q1, "q3_ms": s.q3}


def median_ms(row: dict[str, Any]) -> float:
    return row.get("median_ms") or summarize(row["samples_ms"]).median


def said(row: dict[str, Any]) -> str:
    """A row's ratio in words; empty if it has none."""
    r = row.get("ratio")
    return str(Ratio(r["ratio"], r["low"], r["high"])) if r else ""


def ratio(to: str, r: Ratio) -> dict[str, Any]:
    """A row's `ratio`: its time over that of `to`; from too few rounds `low`, `high` are null."""
    return {"to": to, "ratio": r.ratio, "low": r.low, "high": r.high, "verdict": r.verdict}


def slug(text: str) -> str:
    """ "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write(path: Path, data: dict[str, Any], new: bool = False) -> None:
    """Check, then write aside and rename. Raises FileExistsError if it was to be new and is not."""
    check(data, str(path))
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    if new:
        path.touch(exist_ok=False)
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    aside.write_text(text)
    os.replace(aside, path)


def check(data: Any, where: str) -> None:
    """Raise ValueError if `data` is not a result of this schema."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: not a result: not a JSON object")
    for key, kind in _WANTED.items():
        if not isinstance(data.get(key), kind):
            raise ValueError(f"{where}: not a result: {key} should be {kind.__name__}")
    if data["schema"] != SCHEMA:
        raise ValueError(f"{where}: schema {data['schema']}, this program reads {SCHEMA}")
    keys = [row.get("key") for row in data["rows"]]
    if not all(isinstance(k, str) for k in keys) or len(set(keys)) != len(keys):
        raise ValueError(f"{where}: every row needs a key of its own")
    for row in data["rows"]:
        if bool(row.get("samples_ms")) == bool(row.get("problem")):
            raise ValueError(f"{where}: {row['key']}: a row has either samples_ms or a problem")


def load(path: Path) -> dict[str, Any]:
    """Read and check one file. Raises ValueError naming the file."""
    try:
        data = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ValueError(f"{path}: cannot be read: {e}") from e
    check(data, str(path))
    return data


def files(folder: Path = FOLDER) -> Iterable[Path]:
    """Result files below a folder, oldest first."""
    return sorted(folder.glob("**/*.json"), key=lambda p: p.name)


def committed() -> list[Path]:
    """Those in `FOLDER` that are kept: what a CPU wrote there is ignored by git."""
    return [p for p in files() if not p.relative_to(FOLDER).parts[0].startswith("cpu-")]
