"""A run is a folder: found, made, locked, and described by its config.toml.

RUN/config.toml  run.json  metrics.jsonl  loss.png  tokenizer.json  checkpoints/

run.json has the run's id, who launched it, and the text of config.toml, and ends in its own sha256:
a config.toml that was changed or damaged is named, and the run goes on with what it wrote itself.

A new run takes the place of an old one only once it has a checkpoint. Until then the old run lies
whole in RUN/.replaced; whatever ends the new one before, the next command on the folder finds the
old run as it was. So that a kill at any moment can be told apart, it goes there and back by way of
RUN/.replaced.part: what lies in that has to go back, and nothing of a new run was written yet.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgpt.config import settings
from fastgpt.config.schema import Config
from fastgpt.errors import UserError, read_bytes
from fastgpt.storage import checkpoint
from fastgpt.storage.files import (
    explain_os_error,
    fsync_dir,
    sealed,
    sweep,
    unsealed,
    write_text,
)

RUNS = Path("runs")
IDENTITY = "run.json"
_OWN: tuple[str, ...] = (IDENTITY, "config.toml", "plan.json", "metrics.jsonl", "loss.png")
_OWN += ("tokenizer.json", "tokenizer.tiktoken")
_OWN += ("checkpoints", "nonfinite", "tensorboard", "wandb")
_ASIDE, _MOVING, _LOCK = ".replaced", ".replaced.part", ".lock"


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
    if not is_run(run_dir):
        advice = "fastgpt train makes one"
        raise UserError(f"--out_dir={out_dir}: no run there (no config.toml); {advice}")
    recover(run_dir)
    return run_dir


def is_run(folder: Path) -> bool:
    """Whether a run stands in a folder, if only in part."""
    marks = ("config.toml", IDENTITY, _ASIDE, _MOVING)
    return any((folder / m).exists() for m in marks) or bool(checkpoint.names(folder))


# --- its description ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """What run.json holds."""

    id: str
    launch: tuple[str, ...] = ()
    """Which processes of torchrun started it; none without torchrun."""
    config: str = ""


def identity(run_dir: Path) -> Identity | None:
    """What run.json says; None if there is none, or if it is damaged."""
    try:
        body = unsealed(read_bytes(run_dir / IDENTITY, limit=1 << 20))
        if body is None:
            return None
        saved = json.loads(body)
        return Identity(str(saved["id"]), tuple(map(str, saved["launch"])), str(saved["config"]))
    except (UserError, OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def made_by(run_dir: Path, launch: Sequence[str]) -> bool:
    """Whether one of these processes of torchrun made the run."""
    ours = identity(run_dir)
    return ours is not None and bool(set(ours.launch) & set(launch) - {""})


def load_config(run_dir: Path, say: Callable[[str], None] = print) -> Config:
    """The run's own config, with its folder filled in.

    It is the one that the run wrote: a config.toml that differs from it is named through `say`.
    """
    path, ours = run_dir / "config.toml", identity(run_dir)
    if ours is None:
        if (run_dir / IDENTITY).exists():
            say(f"{run_dir / IDENTITY}: is damaged; the settings are those of {path}")
        if path.exists():
            config = settings.load_toml(path)
        elif (flat := checkpoint.saved_config(run_dir)) is not None:
            config = settings.from_dict(flat, f"{run_dir}: ")
        else:
            raise UserError(f"{run_dir}: its settings are lost: no config.toml, no checkpoint")
    else:
        config = settings.parse_toml(ours.config, run_dir / IDENTITY)
        try:
            changed = settings.differences(settings.load_toml(path), config)
        except UserError as e:
            say(f"{e}; the settings are those that the run wrote")
        else:
            if changed:
                what = ", ".join(f"{name} {now} (was {then})" for name, now, then in changed)
                flags = " ".join(f"--{name}={now}" for name, now, _ in changed)
                say(
                    f"{path}: is not what the run wrote: {what}; the run's own settings count, "
                    f"change them with {flags}"
                )
    return settings.replace(config, out_dir=str(run_dir))


def save_config(run_dir: Path, config: Config, launch: Sequence[str] = ()) -> Identity:
    """Write config.toml so that `fastgpt train RUN/config.toml` repeats the run in a new folder.

    A run that is there keeps its id and launch; a new one gets a fresh id and `launch`.
    """
    before = identity(run_dir)
    init_from = config.run.init_from
    if init_from == "resume":  # what it began from is in the file that is about to be replaced
        init_from = "scratch"
        if before or (run_dir / "config.toml").is_file():
            init_from = load_config(run_dir, say=lambda line: None).run.init_from
    config = settings.replace(
        config, out_dir="", overwrite=False, init_from=init_from, checkpoint="latest",
        reset_optimizer=False,
    )  # fmt: skip
    text = settings.to_toml(config)
    kept = (before.id, before.launch) if before else (secrets.token_hex(8), tuple(launch))
    body = {"format": 1, "id": kept[0], "launch": kept[1], "config": text}
    write_text(run_dir / IDENTITY, sealed(json.dumps(body, indent=1)))
    write_text(run_dir / "config.toml", text)
    return Identity(*kept, text)


# --- a folder of one's own ------------------------------------------------------------------------


@contextlib.contextmanager
def begin(out_dir: str, name: str, overwrite: bool) -> Iterator[Path]:
    """Hold the folder of a new run, --out_dir or runs/<time>-<name>, for as long as the block runs.

    Raises UserError if a run or other files stand there already; with `overwrite` the old run is
    moved aside, whole, and is back if the block ends before the new run has a checkpoint. A run
    that ends in an error without having done anything leaves nothing behind.
    """
    try:
        run_dir, made = _place(out_dir, name, overwrite)
    except OSError as e:
        raise explain_os_error(e, Path(out_dir or RUNS)) from e
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(run_dir))
            _bring_back(run_dir)
            sweep(run_dir)
            _check_free(run_dir, out_dir, overwrite)
            if _present(run_dir):
                _move_aside(run_dir)
        except OSError as e:
            raise explain_os_error(e, run_dir) from e
        try:
            yield run_dir
        except BaseException:
            if (run_dir / _ASIDE).exists():
                _bring_back(run_dir)
            elif _barren(run_dir) or not _present(run_dir):
                _remove(run_dir, made)
            raise
        if _bring_back(run_dir):
            print(f"{run_dir}: no checkpoint was saved: the run that stood there is back")


@contextlib.contextmanager
def resumed(out_dir: str) -> Iterator[Path]:
    """Hold the run that --out_dir names (or the newest one) for as long as the block runs."""
    run_dir = find(out_dir)
    with lock(run_dir):
        _bring_back(run_dir)
        sweep(run_dir)
        yield run_dir


def check_free(out_dir: str, overwrite: bool) -> None:
    """Raise the UserError of `begin` for a folder that a new run may not have; touch nothing."""
    if out_dir and Path(out_dir).is_dir():
        _check_free(Path(out_dir), out_dir, overwrite)


def settle(run_dir: Path) -> None:
    """The new run has its first checkpoint: remove the one whose place it takes."""
    _bring_back(run_dir)


def recover(run_dir: Path) -> None:
    """Finish what a kill interrupted between an old run and the one that should replace it.

    Does nothing while another process holds the folder.
    """
    if (run_dir / _ASIDE).exists() or (run_dir / _MOVING).exists():
        with contextlib.suppress(Held), lock(run_dir):
            _bring_back(run_dir)


def _place(out_dir: str, name: str, overwrite: bool) -> tuple[Path, list[Path]]:
    """(the folder, which folders were made for it); refused before anything there is touched."""
    run_dir = Path(out_dir) if out_dir else RUNS
    made = [p for p in (run_dir, *run_dir.parents) if not p.exists()]
    run_dir.mkdir(parents=True, exist_ok=True)
    if not out_dir:
        run_dir = _create_numbered(name)
        return run_dir, [run_dir, *made]
    _check_free(run_dir, out_dir, overwrite)
    return run_dir, made


def _present(run_dir: Path) -> list[str]:
    """What a run itself put into the folder; last what tells that it is a run."""
    return [name for name in reversed(_OWN) if os.path.lexists(run_dir / name)]


def _leftover(name: str) -> bool:
    """What a killed command of ours may leave besides."""
    return name in (_LOCK, _ASIDE, _MOVING) or name.startswith(".") and name.endswith(".tmp")


def _barren(run_dir: Path) -> bool:
    """Whether a run did nothing yet: it was killed, or failed, on its way to the first log line."""
    worth = (_ASIDE, _MOVING, "nonfinite")
    if checkpoint.names(run_dir) or any((run_dir / name).exists() for name in worth):
        return False
    if identity(run_dir) is None:  # perhaps not ours
        return False
    log = run_dir / "metrics.jsonl"
    return not log.exists() or log.stat().st_size == 0


def _check_free(run_dir: Path, out_dir: str, overwrite: bool) -> None:
    """Raise UserError unless a new run may begin here."""
    here = f"--out_dir={out_dir}"
    names = [p.name for p in run_dir.iterdir()]
    whole = bool(checkpoint.names(run_dir)) or (run_dir / _ASIDE).exists()
    whole = whole or (run_dir / _MOVING).exists()
    if not whole and identity(run_dir) is None and not _has_config(run_dir):
        if not all(map(_leftover, names)):
            raise UserError(f"{here}: is not empty and not a run; name another folder")
    elif not overwrite and not _barren(run_dir):
        if whole:
            raise UserError(
                f"{here}: a run stands there; go on with --init_from=resume, "
                "start anew with --overwrite=True, or name another folder"
            )
        raise UserError(
            f"{here}: a run stands there, without a checkpoint to go on from; start anew with "
            "--overwrite=True, or name another folder"
        )


def _has_config(run_dir: Path) -> bool:
    """Whether config.toml is one of ours: others have files of that name too."""
    with contextlib.suppress(UserError):
        settings.load_toml(run_dir / "config.toml")
        return True
    return False


def _move_aside(run_dir: Path) -> None:
    if _barren(run_dir):
        _remove(run_dir, [])
        return
    moving = run_dir / _MOVING
    moving.mkdir()
    for name in _present(run_dir):
        os.rename(run_dir / name, moving / name)
    fsync_dir(moving)
    os.rename(moving, run_dir / _ASIDE)
    fsync_dir(run_dir)


def _bring_back(run_dir: Path) -> bool:
    """End an overwrite: as the new run if that has a checkpoint, else as the old one (True)."""
    aside, moving = run_dir / _ASIDE, run_dir / _MOVING
    if aside.exists():  # whole: everything else is the new run's
        if checkpoint.names(run_dir):
            shutil.rmtree(aside)
            return False
        for name in _present(run_dir):
            if name != "nonfinite":  # what the new run's error message names
                _delete(run_dir / name)
        os.rename(aside, moving)
        fsync_dir(run_dir)
    if not moving.exists():
        return False
    for path in moving.iterdir():
        if path.name == "nonfinite" and (run_dir / path.name).is_dir():
            for part in path.iterdir():
                if not (run_dir / path.name / part.name).exists():
                    os.rename(part, run_dir / path.name / part.name)
            shutil.rmtree(path)
        else:
            os.rename(path, run_dir / path.name)
    moving.rmdir()
    fsync_dir(run_dir)
    return True


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _remove(run_dir: Path, made: Sequence[Path]) -> None:
    """Take away a run that did nothing, and the folders that were made for it."""
    for name in _present(run_dir):
        _delete(run_dir / name)
    if made:
        sweep(run_dir)
        (run_dir / _LOCK).unlink(missing_ok=True)
        for folder in made:
            with contextlib.suppress(OSError):  # something else came in meanwhile
                folder.rmdir()


def _create_numbered(name: str) -> Path:
    stem = f"{time.strftime('%Y-%m-%d_%H%M%S')}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}"
    for i in range(1, 1000):
        run_dir = RUNS / (stem if i == 1 else f"{stem}-{i}")
        with contextlib.suppress(FileExistsError):
            run_dir.mkdir()
            return run_dir
    raise UserError(f"{RUNS / stem}: a thousand runs began this second; name --out_dir")


class Held(UserError):
    """Another process works on the folder."""


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold the run for this process; the system lets go of it however the process ends."""
    path = run_dir / _LOCK
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as e:
        raise explain_os_error(e, path) from e
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UserError(f"{path}: is no file; remove it")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise Held(f"{run_dir}: another process is training this run; wait for it") from e
        yield
    finally:
        os.close(fd)
