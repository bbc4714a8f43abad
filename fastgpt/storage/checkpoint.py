"""Checkpoints: folders that are whole or absent, and in which any changed byte is noticed.

RUN/checkpoints/
    step_00000250/
        model.safetensors      fp32 weights, under nanoGPT's names
        optimizer.safetensors  AdamW's moments and steps, Muon's momentum: "<state>.<parameter>"
        state.json             step, losses, model shape, config, fingerprints
        manifest.json          size and sha256 of each of these
    latest, best               names of the newest one and of that with the lowest loss
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from fastgpt.config import settings
from fastgpt.errors import UserError, read_bytes, reading
from fastgpt.storage import atomic
from fastgpt.storage.atomic import sha256_file, write_text

if TYPE_CHECKING:  # arguments are checked before PyTorch is loaded, and that needs names only
    from torch import Tensor

FORMAT = 1
_NAME = re.compile(r"step_\d{8,}")
_MANIFEST = "manifest.json"


@dataclass
class Checkpoint:
    """Checkpoint in memory, verified, with tensors on the CPU."""

    folder: Path
    state: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def root(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def shards(run_dir: Path) -> Path:
    """Returns the folder of the ranks' shards of a checkpoint, before they become one file."""
    return root(run_dir) / ".shards"


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def names(run_dir: Path) -> list[str]:
    """Returns the names of the run's checkpoint folders, newest first."""
    folder = root(run_dir)
    found = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(filter(_NAME.fullmatch, found), key=lambda name: int(name[5:]), reverse=True)


def pointer(run_dir: Path, which: str) -> str | None:
    """Returns the checkpoint that `latest` or `best` names, or None if it names none."""
    with contextlib.suppress(OSError, UserError):  # not there, or no file that can be read
        data = read_bytes(root(run_dir) / which, limit=100)
        name = data.decode("ascii", "replace").removesuffix("\n")
        return name if name in names(run_dir) else None
    return None


# --- saving ---------------------------------------------------------------------------------------


def write_folder(
    target: Path, tensors: Mapping[str, Mapping[str, Tensor] | Path], documents: Mapping[str, Any]
) -> None:
    """Writes {name}.safetensors and {name}.json files and their manifest as one atomic folder.

    Tensors that several ranks wrote come as the path of their file, which is moved here.
    A folder that is already there is replaced. Raises UserError if the disk is full or not
    writable. After any error `target` is as it was, and no other file is left.
    """
    from safetensors.torch import save_file

    tmp, files = target.parent / f".tmp-{target.name}-{os.getpid()}", {}
    try:
        tmp.mkdir(parents=True)
        for name, group in tensors.items():
            path = tmp / f"{name}.safetensors"
            if isinstance(group, Path):
                os.replace(group, path)
            else:
                save_file({k: v.contiguous() for k, v in group.items()}, path)
        for name, document in documents.items():
            text = json.dumps(document, indent=1, sort_keys=True, allow_nan=True)
            (tmp / f"{name}.json").write_text(text + "\n")
        for path in sorted(tmp.iterdir()):
            path.chmod(0o666 & ~atomic.umask())  # safetensors writes for the owner alone
            with open(path, "rb") as f:
                os.fsync(f.fileno())
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        manifest = {"format": FORMAT, "files": files}
        text = json.dumps(manifest, indent=1, sort_keys=True)
        write_text(tmp / _MANIFEST, atomic.sealed(text))
        atomic.replace_folder(tmp, target)
    except (OSError, SafetensorError) as e:
        raise atomic.explain_os_error(e, target) from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def save(
    run_dir: Path,
    step: int,
    model: Mapping[str, Tensor] | Path,
    optimizer: Mapping[str, Tensor] | Path,
    state: Mapping[str, Any],
    *,
    best: bool,
    keep: int,
) -> Path:
    """Saves a checkpoint, moves `best` (if it is one) and `latest`, and removes others.

    The newest `keep` and the best one stay. A resume has abandoned those past `step`.
    """
    folder = root(run_dir)
    target = folder / name_of(step)
    _recover(folder)
    atomic.sweep(folder, ".tmp-*", ".old-*", ".*.tmp")
    tensors = {"model": model, "optimizer": optimizer}
    write_folder(target, tensors, {"state": {**state, "step": step}})
    shutil.rmtree(shards(run_dir), ignore_errors=True)  # of this save, or of one that was killed
    if best:
        write_text(folder / "best", target.name + "\n")
    write_text(folder / "latest", target.name + "\n")
    alive = [name for name in names(run_dir) if int(name[5:]) <= step]
    stay = {*alive[:keep], pointer(run_dir, "best"), target.name}
    for name in names(run_dir):
        if name not in stay:
            # Renamed first, so that a kill never leaves half of a checkpoint.
            os.replace(folder / name, folder / f".old-{name}")
            shutil.rmtree(folder / f".old-{name}", ignore_errors=True)
    return target


def _recover(folder: Path) -> None:
    """Completes or undoes replacements by a checkpoint of the same step that kills interrupted."""
    for old in folder.glob(".step_*.old"):
        with contextlib.suppress(OSError):  # the folder may belong to another user
            atomic.recover_folder(folder / old.name[1:-4])


# --- loading --------------------------------------------------------------------------------------


def fault(folder: Path) -> str | None:
    """Returns the first damage to a checkpoint's files, naming the file; None if they are whole."""
    manifest = folder / _MANIFEST
    try:
        with reading(manifest, "is damaged"):
            body = atomic.unsealed(read_bytes(manifest))
            if body is None:
                raise UserError(f"{manifest}: sha256 does not match")
            files = json.loads(body)["files"].items()
            listed = [(str(n), int(f["bytes"]), str(f["sha256"])) for n, f in files]
            if any(Path(name).name != name for name, *_ in listed):
                raise ValueError("it lists files elsewhere")
        for name, size, sha256 in listed:
            path = folder / name
            if (found := path.stat().st_size) != size:
                return f"{path}: {found} bytes, written were {size}"
            if sha256_file(path) != sha256:
                return f"{path}: sha256 does not match"
    except UserError as e:
        return str(e)
    except OSError as e:
        return f"{e.filename}: {e.strerror}"
    return None


def load(run_dir: Path, which: str = "latest", warn: Callable[[str], None] = print) -> Checkpoint:
    """Returns the checkpoint `which`: latest, best, or a folder's name under checkpoints/.

    A damaged one is named through `warn`, and the newest good one is used in its place, but not in
    that of a named folder. Raises UserError if no usable one is left.
    """
    folder = root(run_dir)
    _recover(folder)
    candidates = names(run_dir)
    if which in ("latest", "best"):
        first = pointer(run_dir, which)
        if first is None and candidates and (folder / which).exists():
            warn(f"{folder / which}: does not name a checkpoint; taking the newest good one")
        candidates.sort(key=lambda name: name != first)  # the others stay newest first
    elif which in candidates:
        candidates = [which]
    else:
        raise UserError(f"--checkpoint={which}: {folder} has {', '.join(candidates) or 'none'}")
    for i, name in enumerate(candidates, 1):
        if (wrong := fault(folder / name)) is None:
            return _read(folder / name)
        another = "; trying the one before" if i < len(candidates) else ""
        warn(f"damaged checkpoint: {wrong}{another}")
    if not candidates:
        raise UserError(f"{run_dir}: has no checkpoint yet; start it anew with --overwrite=True")
    raise UserError(f"{run_dir}: no checkpoint is intact ({len(candidates)} tried)")


def read_state(folder: Path) -> dict[str, Any]:
    """Returns a checkpoint's state without its tensors. Raises UserError if it is damaged."""
    path = folder / "state.json"
    with reading(path, "is damaged"):
        state = dict(json.loads(read_bytes(path, limit=1 << 24)))
        if (found := state.get("format", "none")) != FORMAT:
            raise UserError(f"{folder}: format {found}, this fastgpt reads {FORMAT}")
        _check_state(state, folder.name, f"{path}: ")
    return state


def finished(state: Mapping[str, Any], max_iters: int) -> bool:
    """Returns True for a run with all its steps that was not stopped in its last evaluation."""
    step, evaluated = state["step"], state.get("last_eval", -1)
    return step > max_iters or (step == max_iters and not 0 <= evaluated < step)


def _read(folder: Path) -> Checkpoint:
    from safetensors.torch import load_file

    state = read_state(folder)
    with reading(folder, "is damaged", SafetensorError):
        model, optimizer = (load_file(folder / f"{n}.safetensors") for n in ("model", "optimizer"))
    return Checkpoint(folder, state, model, optimizer)


# Types of a state's values. Versions before 0.2 wrote less.
_STATE: dict[str, Any] = {"step": int, "rows": int, "last_eval": int, "threads": int}
_STATE |= dict.fromkeys(("val_loss", "best_val_loss", "step_seconds", "seconds"), float | int)
_STATE |= {"data": str, "tokenizer": str, "ops": list}
_STATE |= dict.fromkeys(("metrics", "model", "config", "scaler"), dict)


def _check_state(state: dict[str, Any], name: str, where: str) -> None:
    """Raises UserError, or an error for `reading`, for values that no save writes."""
    for key, kind in _STATE.items():
        value = state.get(key)
        if not isinstance(value, kind | None) or value != value:
            raise ValueError(f"{key} is {value!r}")
    if name_of(state["step"]) != name or not 0 <= state.get("rows", 0) < 2**62:
        raise ValueError(f"step is {state['step']}, rows {state.get('rows')}")
    settings.check_model(state.get("model") or {}, where)
    texts = [op[key] for op in state.get("ops") or () for key in ("op", "implementation")]
    texts += [state["metrics"]["sha256"]] if state.get("metrics") else []
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("ops or metrics are no text")
    if not all(isinstance(x, float | int) for x in (state.get("scaler") or {}).values()):
        raise ValueError("scaler holds no numbers")
