"""Run folders: found, made, locked, described, and never overwritten unasked.

A new run takes the place of an old one with its first checkpoint. Until then the old run lies whole
in RUN/.replaced. The end of the new one, or the next command on the folder, puts it back. It goes
there and back by way of RUN/.replaced.part. While that exists the new run has written nothing, so
its files go back whenever a kill came.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fastgpt.config import settings
from fastgpt.config.schema import Config
from fastgpt.errors import SharedError, UserError, read_bytes
from fastgpt.storage import atomic, checkpoint
from fastgpt.storage.atomic import Held, explain_os_error, fsync_dir, remove, sealed, unsealed

RUNS = Path("runs")
IDENTITY = "run.json"
_ASIDE, _MOVING = _OLD = ".replaced", ".replaced.part"
_LOCK = ".lock"
# Files of a run. The last ones tell that it is a run. Versions up to 0.1 also wrote plan.json.
_OWN: tuple[str, ...] = ("wandb", "tensorboard", "nonfinite", "checkpoints", "tokenizer.tiktoken")
_OWN += ("tokenizer.json", "loss.png", "metrics.jsonl", "plan.json", "config.toml", IDENTITY)


def find(out_dir: str, flag: str = "--out_dir=") -> Path:
    """Returns the run that --out_dir names, whole, or the one under runs/ that saved last."""
    if not out_dir:
        saved = [(p.stat().st_mtime_ns, p.parts, p) for p in RUNS.glob("*/checkpoints/latest")]
        if saved:
            return max(saved)[2].parent.parent
        advice = "start one with: fastgpt train, or name --out_dir"
        raise UserError(f"no run with a checkpoint under {RUNS}/ yet; {advice}")
    run_dir = Path(out_dir)
    if not (_has_state(run_dir) or any((run_dir / m).exists() for m in ("config.toml", IDENTITY))):
        advice = "fastgpt train makes one"
        if run_dir.suffix == ".safetensors" or any(run_dir.glob("*.safetensors")):
            advice = f"weights of another program are read with --weights={out_dir}"
        raise UserError(f"{flag}{out_dir}: no run there (no config.toml); {advice}")
    if any((run_dir / m).exists() for m in _OLD):
        with contextlib.suppress(Held), lock(run_dir):
            settle(run_dir)
    return run_dir


# --- description ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Identity:
    """Contents of run.json."""

    id: str
    config: str


def identity(run_dir: Path) -> Identity | None:
    """Returns the contents of run.json, or None if it is absent or damaged."""
    try:
        saved = json.loads(unsealed(read_bytes(run_dir / IDENTITY, limit=1 << 20)) or "")
        return Identity(str(saved["id"]), str(saved["config"]))
    except (UserError, OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def load_config(run_dir: Path, say: Callable[[str], None] = print) -> Config:
    """Returns the config that the run wrote, with its folder filled in.

    A config.toml that differs from it is named through `say`.
    """
    path, own = run_dir / "config.toml", identity(run_dir)
    if own is not None:
        config = settings.parse_toml(own.config, run_dir / IDENTITY)
        try:
            changed = settings.differences(settings.load_toml(path), config)
        except UserError as e:
            say(f"{e}; the settings are those that the run wrote")
            changed = []
        if changed:
            what = ", ".join(f"{name} {now} (was {then})" for name, now, then in changed)
            flags = " ".join(f"--{name}={now}" for name, now, _ in changed)
            say(
                f"{path}: is not what the run wrote: {what}; the run's own settings count, which "
                f"training changes by {flags}"
            )
        return settings.replace(config, out_dir=str(run_dir))
    if (run_dir / IDENTITY).exists():
        say(f"{run_dir / IDENTITY}: is damaged; the settings are those of {path}")
    if path.exists():
        config = settings.load_toml(path)
    elif checkpoint.names(run_dir):
        state = checkpoint.load(run_dir, warn=say).state
        config = settings.from_dict(state.get("config", {}), f"{run_dir}: ")
    else:
        raise UserError(f"{run_dir}: its settings are lost: no config.toml, no checkpoint")
    return settings.replace(config, out_dir=str(run_dir))


def save_config(run_dir: Path, config: Config) -> None:
    """Writes run.json, and config.toml so that `fastgpt train RUN/config.toml` repeats the run.

    A run that is there keeps its id.
    """
    before, start = identity(run_dir), config.run.init_from
    if start == "resume":  # the file that is about to be replaced tells how the run began
        start = "scratch"
        if before or (run_dir / "config.toml").is_file():
            start = load_config(run_dir, say=lambda line: None).run.init_from
    config = settings.replace(config, out_dir="", overwrite=False, init_from=start)
    config = settings.replace(config, checkpoint="latest", reset_optimizer=False)
    own = Identity(before.id if before else secrets.token_hex(8), settings.to_toml(config))
    text = json.dumps({"format": 1, **vars(own)}, indent=1)
    atomic.write_text(run_dir / IDENTITY, sealed(text))
    atomic.write_text(run_dir / "config.toml", own.config)


# Settings that a run resolves, and those of this host.
_RESOLVED = {"vocab_size", "batch_size", "auto_batch_size", "gradient_accumulation_steps"}
_RESOLVED |= {"lr_decay_iters", "data_dir", "vocab_file", "workers"}


def continuation(config: Config) -> dict[str, str]:
    """Returns the flags by which --init_from=auto resumes the run in --out_dir, or begins it.

    A run without a checkpoint is begun anew. Raises UserError if another run stands there, and
    SharedError with code 0 if this one has all its steps.
    """
    if not config.run.out_dir:
        raise UserError("--init_from=auto: which run? name its folder with --out_dir")
    run_dir = Path(config.run.out_dir)
    if not _has_state(run_dir) and identity(run_dir) is None:
        return {}
    stored = load_config(find(config.run.out_dir), say=lambda line: None)
    # Weights to start from decide the model's shape.
    sections = ("data", "optim") + ("model",) * (config.run.init_from == "scratch")
    own = {n for n, leaf in settings.leaves(Config).items() if leaf.section in sections}
    for name, was, now in settings.differences(stored, config):
        if name in own - _RESOLVED | {"seed"}:
            raise UserError(
                f"--out_dir={run_dir}: another run stands there, with {name}={was!r} instead of "
                f"{now!r}; name another folder"
            )
    saved = checkpoint.names(run_dir)
    if not saved:
        return {"overwrite": "True"}
    # A kill may have come between the last checkpoint and `latest`, from which the run resumes.
    latest = checkpoint.root(run_dir) / (checkpoint.pointer(run_dir, "latest") or saved[0])
    state = None
    with contextlib.suppress(UserError):  # of a damaged one, since resuming takes the one before
        state = checkpoint.read_state(latest)
    if state and checkpoint.finished(state, config.run.max_iters):
        raise SharedError(f"{run_dir}: finished at step {state['step']}", code=0)
    return {"init_from": "resume"}


# --- beginning and resuming -----------------------------------------------------------------------


@contextlib.contextmanager
def begin(out_dir: str, name: str, overwrite: bool) -> Iterator[Path]:
    """Holds the folder of a new run, --out_dir or runs/<time>-<name>, while the block runs.

    Raises UserError if a run or other files stand there already. With `overwrite` the old run is
    moved aside, and is back if the block ends before the new run has a checkpoint. A run that ends
    in an error before its first log line leaves no file.
    """
    run_dir = Path(out_dir) if out_dir else RUNS
    with contextlib.ExitStack() as stack:
        try:
            made = [p for p in (run_dir, *run_dir.parents) if not p.exists()]
            run_dir.mkdir(parents=True, exist_ok=True)
            if not out_dir:
                run_dir = _create_numbered(name)
                made.insert(0, run_dir)
            check_free(out_dir, overwrite)
            stack.enter_context(_held(run_dir))
            check_free(out_dir, overwrite)
            if _is_barren(run_dir):
                _remove(run_dir)
            elif _present(run_dir):
                _move_aside(run_dir)
        except OSError as e:
            raise explain_os_error(e, run_dir) from e
        try:
            yield run_dir
        except BaseException:
            if not settle(run_dir) and (_is_barren(run_dir) or not _present(run_dir)):
                _remove(run_dir, made)
            raise
        if settle(run_dir):
            print(f"{run_dir}: no checkpoint was saved: the run that stood there is back")


@contextlib.contextmanager
def resumed(out_dir: str) -> Iterator[Path]:
    """Holds the run that --out_dir names (or the newest one) while the block runs."""
    run_dir = find(out_dir)
    with _held(run_dir):
        yield run_dir


@contextlib.contextmanager
def _held(run_dir: Path) -> Iterator[None]:
    """Holds a run's lock, and first completes or undoes what a killed process has left."""
    with lock(run_dir):
        settle(run_dir)
        atomic.sweep(run_dir, ".*.tmp")
        yield


def lock(run_dir: Path) -> contextlib.AbstractContextManager[None]:
    busy = f"{run_dir}: another process is training this run; wait for it"
    return atomic.lock(run_dir / _LOCK, busy)


def check_free(out_dir: str, overwrite: bool) -> None:
    """Raises UserError if a new run may not have the folder; touches nothing."""
    run_dir, here = Path(out_dir), f"--out_dir={out_dir}"
    if not out_dir or not run_dir.is_dir():
        return
    whole = _has_state(run_dir)
    if not whole and identity(run_dir) is None:
        leftover = re.compile(r"\.lock|\..*\.tmp")
        if not all(leftover.fullmatch(p.name) for p in run_dir.iterdir()):
            raise UserError(f"{here}: is not empty and not a run; name another folder")
    elif not overwrite and not _is_barren(run_dir):
        how = ", without a checkpoint to go on from; "
        if whole:
            how = "; go on with --init_from=resume, "
        how += "start anew with --overwrite=True, or name another folder"
        raise UserError(f"{here}: a run stands there{how}")


def _has_state(run_dir: Path) -> bool:
    """Returns whether the folder holds a checkpoint, or a run that was put aside."""
    return any((run_dir / m).exists() for m in _OLD) or bool(checkpoint.names(run_dir))


def _present(run_dir: Path) -> list[str]:
    """Returns the names of the files and folders that a run itself wrote."""
    return [name for name in _OWN if os.path.lexists(run_dir / name)]


def _is_barren(run_dir: Path) -> bool:
    """Returns whether a run was killed, or failed, before its first log line."""
    if _has_state(run_dir) or (run_dir / "nonfinite").exists() or identity(run_dir) is None:
        return False
    log = run_dir / "metrics.jsonl"
    return not log.exists() or log.stat().st_size == 0


def _move_aside(run_dir: Path) -> None:
    moving = run_dir / _MOVING
    moving.mkdir()
    for name in _present(run_dir):
        os.rename(run_dir / name, moving / name)
    fsync_dir(moving)
    os.rename(moving, run_dir / _ASIDE)
    fsync_dir(run_dir)


def settle(run_dir: Path) -> bool:
    """Ends an overwrite. Keeps the new run if it has a checkpoint, else the old one (True)."""
    aside, moving = run_dir / _ASIDE, run_dir / _MOVING
    if aside.exists():  # whole, so all other files are the new run's
        if checkpoint.names(run_dir):
            shutil.rmtree(aside)
            return False
        for name in _present(run_dir):
            if name != "nonfinite":  # the new run's error message names it
                remove(run_dir / name)
        os.rename(aside, moving)
        fsync_dir(run_dir)
    if not moving.exists():
        return False
    for path in moving.iterdir():
        if path.name == "nonfinite":
            shutil.copytree(path, run_dir / path.name, dirs_exist_ok=True)
            shutil.rmtree(path)
        else:
            os.rename(path, run_dir / path.name)
    moving.rmdir()
    fsync_dir(run_dir)
    return True


def _remove(run_dir: Path, made: Sequence[Path] = ()) -> None:
    """Removes a run that did nothing, and the folders that were made for it."""
    for name in _present(run_dir):
        remove(run_dir / name)
    if made:
        atomic.sweep(run_dir, ".*.tmp", _LOCK)
        with contextlib.suppress(OSError):  # another program has put files there meanwhile
            for folder in made:
                folder.rmdir()


def _create_numbered(name: str) -> Path:
    stem = f"{time.strftime('%Y-%m-%d_%H%M%S')}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}"
    for i in range(1, 1000):
        run_dir = RUNS / (stem if i == 1 else f"{stem}-{i}")
        with contextlib.suppress(FileExistsError):
            run_dir.mkdir()
            return run_dir
    raise UserError(f"{RUNS / stem}: a thousand runs began this second; name --out_dir")
