"""Checkpoints: folders that are there whole or not at all, and that show any change of a byte.

    RUN/checkpoints/
        step_00000250/
            model.safetensors      fp32 weights, under nanoGPT's names
            optimizer.safetensors  AdamW's moments and step counts, "<state>.<parameter>"
            state.json             step, losses, model shape, config, fingerprints
            manifest.json          size and sha256 of each of these
        latest                     name of the newest checkpoint; written last
        best                       name of the one with the lowest validation loss

A save writes all files to a temporary folder, fsyncs them, renames the folder, and only then moves
`latest`. A reader verifies before it uses; what does not verify is named, and the newest checkpoint
that does is used. There is no pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgpt.errors import UserError
from fastgpt.storage.files import explain_os_error, replace_folder, sha256_file, write_text

FORMAT = 1
_NAME = re.compile(r"step_\d{8,}")
_MANIFEST = "manifest.json"


@dataclass
class Checkpoint:
    """A verified checkpoint in memory, tensors on the CPU."""

    folder: Path
    state: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def root(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def shards(run_dir: Path) -> Path:
    """Where ranks put their parts of a checkpoint before these become one."""
    return root(run_dir) / ".shards"


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def names(run_dir: Path) -> list[str]:
    """Names of the run's checkpoint folders, newest first."""
    folder = root(run_dir)
    if not folder.is_dir():
        return []
    found = [p.name for p in folder.iterdir() if _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda n: int(n[5:]), reverse=True)


def _manifest_text(files: Mapping[str, Mapping[str, Any]]) -> str:
    """The manifest, ending in its own sha256, so that a changed byte in it shows too."""
    body = json.dumps({"format": FORMAT, "files": files}, indent=1, sort_keys=True)
    return f"{body}\n{hashlib.sha256(body.encode()).hexdigest()}\n"


def write_folder(
    target: Path, tensors: Mapping[str, Mapping[str, Tensor] | Path], documents: Mapping[str, Any]
) -> None:
    """Write {name}.safetensors and {name}.json files and their manifest as one atomic folder.

    Tensors that several ranks wrote come as the path of their file, which is moved here.
    A folder that is already there is replaced. On any error `target` stays as it was and nothing
    is left behind. Raises UserError if the disk is full or not writable.
    """
    tmp = target.parent / f".tmp-{target.name}-{os.getpid()}"
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
        files = {}
        for path in sorted(tmp.iterdir()):
            with open(path, "rb") as f:
                os.fsync(f.fileno())
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        write_text(tmp / _MANIFEST, _manifest_text(files))
        replace_folder(tmp, target)
    except (OSError, SafetensorError) as e:
        raise explain_os_error(e, target) from e
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
    """Save a checkpoint, move `best` (if it is one) and `latest`, remove the oldest ones."""
    folder = root(run_dir)
    target = folder / name_of(step)
    _remove_leftovers(folder)
    tensors = {"model": model, "optimizer": optimizer}
    write_folder(target, tensors, {"state": {**state, "step": step}})
    shutil.rmtree(shards(run_dir), ignore_errors=True)  # of this save, or of one that was killed
    if best:
        write_text(folder / "best", target.name + "\n")
    write_text(folder / "latest", target.name + "\n")
    _prune(run_dir, step, keep)
    return target


def _remove_leftovers(folder: Path) -> None:
    """What a killed save left: the run's lock says that no other process is writing here."""
    for pattern in (".tmp-*", ".old-*", ".*.tmp", ".*.old"):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _prune(run_dir: Path, step: int, keep: int) -> None:
    """Keep the newest `keep` and the best one; what lies past `step` was abandoned by a resume."""
    alive = [n for n in names(run_dir) if int(n[5:]) <= step]
    stay = {*alive[:keep], pointer(run_dir, "best"), pointer(run_dir, "latest")}
    for name in names(run_dir):
        if name not in stay:
            # First out of sight by one rename, so that a kill never leaves half of a checkpoint.
            gone = root(run_dir) / f".old-{name}"  # not there: `save` removes leftovers first
            os.replace(root(run_dir) / name, gone)
            shutil.rmtree(gone, ignore_errors=True)


def pointer(run_dir: Path, which: str) -> str | None:
    """The checkpoint that `latest` or `best` names, or None if it names none."""
    try:
        name = (root(run_dir) / which).read_bytes().decode("ascii", "replace").removesuffix("\n")
    except FileNotFoundError:
        return None
    return name if _NAME.fullmatch(name) and (root(run_dir) / name).is_dir() else None


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, naming the file; None if nothing is."""
    try:
        text = (folder / _MANIFEST).read_bytes().decode()
        body, _, digest = text.removesuffix("\n").rpartition("\n")
        if hashlib.sha256(body.encode()).hexdigest() != digest:
            return f"{folder / _MANIFEST}: sha256 does not match"
        files = json.loads(body)["files"]
        for name, entry in files.items():
            path = folder / name
            if path.stat().st_size != entry["bytes"]:
                return f"{path}: {path.stat().st_size} bytes, written were {entry['bytes']}"
            if sha256_file(path) != entry["sha256"]:
                return f"{path}: sha256 does not match"
    except FileNotFoundError as e:
        return f"{e.filename}: missing"
    except UnicodeDecodeError:
        return f"{folder / _MANIFEST}: not text"
    except OSError as e:
        return f"{e.filename}: {e.strerror}"
    return None


def load(run_dir: Path, which: str = "latest", warn: Callable[[str], None] = print) -> Checkpoint:
    """The checkpoint that `which` names: latest, best, or a folder's name under checkpoints/.

    A damaged one is named through `warn` and the newest good one is used in its place; a folder
    asked for by name has no substitute. Raises UserError if nothing usable is left.
    """
    available = names(run_dir)
    if which in ("latest", "best"):
        first = pointer(run_dir, which)
        if first is None and available and (root(run_dir) / which).exists():
            warn(f"{root(run_dir) / which}: does not name a checkpoint; taking the newest good one")
        # The one it names comes first, then the others from the newest on.
        candidates = sorted(available, key=lambda name: name != first)
    elif which in available:
        candidates = [which]
    else:
        listed = ", ".join(available) or "none"
        raise UserError(f"--checkpoint={which}: {root(run_dir)} has {listed}")
    for i, name in enumerate(candidates):
        wrong = fault(root(run_dir) / name)
        if wrong is None:
            return _read(root(run_dir) / name)
        another = "; trying the one before" if i + 1 < len(candidates) else ""
        warn(f"damaged checkpoint: {wrong}{another}")
    if not candidates:
        raise UserError(f"{run_dir}: has no checkpoint yet; start it anew with --overwrite=True")
    raise UserError(f"{run_dir}: no checkpoint is intact ({len(candidates)} tried)")


def _read(folder: Path) -> Checkpoint:
    state = json.loads((folder / "state.json").read_text())
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{folder}: format {state.get('format')}, this fastgpt reads {FORMAT}")
    model, optimizer = (load_file(folder / f"{n}.safetensors") for n in ("model", "optimizer"))
    return Checkpoint(folder, state, model, optimizer)
