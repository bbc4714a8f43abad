"""Checkpoints: folders that are there whole or not at all, and that show any change of a byte.

    RUN/checkpoints/
        step_00000250/
            model.safetensors      fp32 weights, under nanoGPT's names
            optimizer.safetensors  AdamW's moments and steps, Muon's momentum: "<state>.<parameter>"
            state.json             step, losses, model shape, config, fingerprints
            manifest.json          size and sha256 of each of these
        latest                     name of the newest checkpoint; written last
        best                       name of the one with the lowest validation loss

A save writes all files to a temporary folder, fsyncs them, renames the folder, and only then moves
`latest`. A reader verifies before it uses; what does not verify is named, and the newest checkpoint
that does is used. There is no pickle anywhere.
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

from fastgpt.errors import UserError, read_bytes, reading
from fastgpt.storage.files import (
    explain_os_error,
    replace_folder,
    sealed,
    sha256_file,
    sweep,
    umask,
    unsealed,
    write_text,
)

if TYPE_CHECKING:  # arguments are checked before PyTorch is loaded, and this is asked for names
    from torch import Tensor

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
    return sealed(json.dumps({"format": FORMAT, "files": files}, indent=1, sort_keys=True))


def write_folder(
    target: Path, tensors: Mapping[str, Mapping[str, Tensor] | Path], documents: Mapping[str, Any]
) -> None:
    """Write {name}.safetensors and {name}.json files and their manifest as one atomic folder.

    Tensors that several ranks wrote come as the path of their file, which is moved here.
    A folder that is already there is replaced. On any error `target` stays as it was and nothing
    is left behind. Raises UserError if the disk is full or not writable.
    """
    from safetensors.torch import save_file

    tmp = target.parent / f".tmp-{target.name}-{os.getpid()}"
    try:
        tmp.mkdir(parents=True)
        mode = 0o666 & ~umask()
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
            path.chmod(mode)  # safetensors writes for the owner alone
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
    _recover(folder)
    # What a killed save left: the run's lock says that no other process is writing here.
    sweep(folder, ".tmp-*", ".old-*", ".*.tmp", ".*.old")
    tensors = {"model": model, "optimizer": optimizer}
    write_folder(target, tensors, {"state": {**state, "step": step}})
    shutil.rmtree(shards(run_dir), ignore_errors=True)  # of this save, or of one that was killed
    if best:
        write_text(folder / "best", target.name + "\n")
    write_text(folder / "latest", target.name + "\n")
    _prune(run_dir, step, keep)
    return target


def _recover(folder: Path) -> None:
    """A checkpoint that was being replaced by one of the same step, when a kill came in between."""
    for old in folder.glob(".step_*.old"):
        if not (target := folder / old.name[1:-4]).exists():
            with contextlib.suppress(OSError):  # perhaps not ours to write
                os.rename(old, target)


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
        data = read_bytes(root(run_dir) / which, limit=100)
    except (OSError, UserError):  # not there, or no file that can be read
        return None
    name = data.decode("ascii", "replace").removesuffix("\n")
    return name if _NAME.fullmatch(name) and (root(run_dir) / name).is_dir() else None


def _listed(folder: Path) -> dict[str, tuple[int, str]]:
    """(size, sha256) by name, of the files that the manifest lists. UserError if it is damaged."""
    path = folder / _MANIFEST
    with reading(path, "is damaged"):
        body = unsealed(read_bytes(path))
        if body is None:
            raise UserError(f"{path}: sha256 does not match")
        files = json.loads(body)["files"].items()
        listed = {str(n): (int(f["bytes"]), str(f["sha256"])) for n, f in files}
        if any(Path(name).name != name for name in listed):
            raise ValueError("it lists files elsewhere")
    return listed


def _fault_of(path: Path, size: int, sha256: str) -> str | None:
    if path.stat().st_size != size:
        return f"{path}: {path.stat().st_size} bytes, written were {size}"
    return None if sha256_file(path) == sha256 else f"{path}: sha256 does not match"


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, naming the file; None if nothing is."""
    try:
        faults = (_fault_of(folder / name, *entry) for name, entry in _listed(folder).items())
        return next((found for found in faults if found), None)
    except UserError as e:
        return str(e)
    except FileNotFoundError as e:
        return f"{e.filename}: missing"
    except OSError as e:
        return f"{e.filename}: {e.strerror}"


def saved_config(run_dir: Path) -> dict[str, Any] | None:
    """The settings in the newest checkpoint whose state.json is intact; no tensor is read."""
    first = pointer(run_dir, "latest")
    for name in sorted(names(run_dir), key=lambda name: name != first):
        path = root(run_dir) / name / "state.json"
        try:
            if _fault_of(path, *_listed(path.parent)[path.name]) is None:
                config = json.loads(read_bytes(path))["config"]
                return config if isinstance(config, dict) else None
        except (OSError, UserError, ValueError, LookupError, TypeError, RecursionError):
            continue
    return None


def load(run_dir: Path, which: str = "latest", warn: Callable[[str], None] = print) -> Checkpoint:
    """The checkpoint that `which` names: latest, best, or a folder's name under checkpoints/.

    A damaged one is named through `warn` and the newest good one is used in its place; a folder
    asked for by name has no substitute. Raises UserError if nothing usable is left.
    """
    _recover(root(run_dir))
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
    from safetensors.torch import load_file

    path = folder / "state.json"
    with reading(path, "is damaged"):
        state = json.loads(read_bytes(path))
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            found = state.get("format") if isinstance(state, dict) else "none"
            raise UserError(f"{folder}: format {found}, this fastgpt reads {FORMAT}")
    with reading(folder, "is damaged", SafetensorError):
        model, optimizer = (load_file(folder / f"{n}.safetensors") for n in ("model", "optimizer"))
    return Checkpoint(folder, state, model, optimizer)
