"""A run is a folder: found, made, locked, and described by its config.toml.

RUN/config.toml  plan.json  metrics.jsonl  loss.png  tokenizer.json  checkpoints/
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastgpt.config import settings
from fastgpt.config.schema import Config
from fastgpt.errors import UserError, reading
from fastgpt.storage.files import explain_os_error, write_text

RUNS = Path("runs")
_OWN_FILES = (
    "config.toml", "plan.json", "metrics.jsonl", "loss.png", "tokenizer.json", "tokenizer.tiktoken",
)  # fmt: skip
_OWN_FOLDERS = ("checkpoints", "nonfinite", "tensorboard")


def newest() -> Path:
    """The run under runs/ that saved last. Raises UserError if none has."""
    found = list(RUNS.glob("*/checkpoints/latest"))
    if not found:
        advice = "start one with: fastgpt train, or name --out_dir"
        raise UserError(f"no run with a checkpoint under {RUNS}/ yet; {advice}")
    return max(found, key=lambda p: (p.stat().st_mtime_ns, p.parts)).parent.parent


def find(out_dir: str) -> Path:
    """The run that --out_dir names, or the newest one."""
    if not out_dir:
        return newest()
    run_dir = Path(out_dir)
    if not (run_dir / "config.toml").is_file():
        advice = "fastgpt train makes one"
        raise UserError(f"--out_dir={out_dir}: no run there (no config.toml); {advice}")
    return run_dir


def load_config(run_dir: Path) -> Config:
    """The run's own config, with its folder filled in."""
    return settings.replace(settings.load_toml(run_dir / "config.toml"), out_dir=str(run_dir))


def save_config(run_dir: Path, config: Config) -> None:
    """Write config.toml so that `fastgpt train RUN/config.toml` repeats the run in a new folder."""
    path, init_from = run_dir / "config.toml", config.run.init_from
    if init_from == "resume":  # what it began from is in the file that is about to be replaced
        init_from = settings.load_toml(path).run.init_from if path.is_file() else "scratch"
    config = settings.replace(config, out_dir="", overwrite=False, init_from=init_from)
    write_text(path, settings.to_toml(config))


def load_plan(run_dir: Path) -> Any:
    """The JSON of plan.json; None if the run has none, as those of earlier versions.

    Raises UserError if it cannot be read: what the run computed with is not known then.
    """
    path = run_dir / "plan.json"
    if not path.exists():
        return None
    with reading(path, "not JSON; without the file the run goes on, on other kernels perhaps"):
        return json.loads(path.read_text())


def save_plan(run_dir: Path, plan: Any) -> None:
    """Keep what a resume has to compute with."""
    write_text(run_dir / "plan.json", json.dumps(plan, indent=1) + "\n")


def create(out_dir: str, name: str, overwrite: bool) -> Path:
    """An empty folder for a new run: --out_dir, or runs/<time>-<name>.

    Raises UserError if a run or other files stand there already; with `overwrite` the old run's
    own files are removed, and nothing else.
    """
    try:
        if not out_dir:
            return _create_numbered(name)
        run_dir = Path(out_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        others = {p.name for p in run_dir.iterdir()} - {".lock"}
        if not others:
            return run_dir
        if "config.toml" not in others:
            raise UserError(f"--out_dir={out_dir}: is not empty and not a run; name another folder")
        if not overwrite:
            raise UserError(
                f"--out_dir={out_dir}: a run stands there; go on with --init_from=resume, "
                "start anew with --overwrite=True, or name another folder"
            )
        with lock(run_dir):
            for file in _OWN_FILES:
                (run_dir / file).unlink(missing_ok=True)
            for folder in _OWN_FOLDERS:
                if (run_dir / folder).exists():
                    shutil.rmtree(run_dir / folder)
        return run_dir
    except OSError as e:
        raise explain_os_error(e, Path(out_dir or RUNS)) from e


def _create_numbered(name: str) -> Path:
    stem = f"{time.strftime('%Y-%m-%d_%H%M%S')}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}"
    RUNS.mkdir(parents=True, exist_ok=True)
    for i in range(1, 1000):
        run_dir = RUNS / (stem if i == 1 else f"{stem}-{i}")
        with contextlib.suppress(FileExistsError):
            run_dir.mkdir()
            return run_dir
    raise UserError(f"{RUNS / stem}: a thousand runs began this second; name --out_dir")


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold the run for this process; the system lets go of it however the process ends."""
    path = run_dir / ".lock"
    try:
        file = open(path, "a")  # noqa: SIM115
    except OSError as e:
        raise explain_os_error(e, path) from e
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"{run_dir}: another process is training this run; wait for it") from e
        yield
