"""Checkpoints of a run: `save` writes them and `load` resumes from them."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.config import settings
from fastgpt.config.schema import Config
from fastgpt.data.token_files import Dataset
from fastgpt.errors import UserError, read_bytes, reading
from fastgpt.storage import checkpoint
from fastgpt.storage import run_dir as run
from fastgpt.train import distributed, optim
from fastgpt.train.trainer import Trainer


@dataclass
class Progress:
    """Position of a run.

    step          next step
    rows          training rows seen so far, each of block_size tokens
    seal          hash of metrics.jsonl at this step
    step_seconds  time of all steps so far
    seconds       time of the run so far, with compilation, evaluations and saves
    """

    step: int = 0
    last_eval: int = -1
    val_loss: float = float("inf")
    best_val_loss: float = float("inf")
    seal: dict[str, Any] | None = None
    step_seconds: float = 0.0
    seconds: float = 0.0
    rows: int = 0


def save(
    trainer: Trainer,
    progress: Progress,
    dataset: Dataset,
    run_dir: Path,
    *,
    best: bool,
    seal: dict[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint of the next step; all ranks take part. Returns its folder.

    `seal` is the hash of metrics.jsonl at this step, by which a later change is noticed. Raises
    UserError on all ranks if the checkpoint cannot be written.
    """
    ranks = trainer.ranks
    weights = {k: v.detach() for k, v in trainer.model.state_dict().items()}
    moments = optim.state_tensors(trainer.optimizer, trainer.model)
    model: dict[str, Tensor] | Path
    optimizer: dict[str, Tensor] | Path
    if trainer.layout == "fsdp":
        # The file is the same, but no rank has to hold all tensors.
        shards = checkpoint.shards(run_dir)
        with ranks.raise_on_all_ranks():
            if ranks.first:
                shutil.rmtree(shards, ignore_errors=True)
        model = distributed.write_shards(weights, shards / "model")
        optimizer = distributed.write_shards(moments, shards / "optimizer")
    else:
        model = distributed.whole_on_first(weights, ranks)
        optimizer = distributed.whole_on_first(moments, ranks)
    document = {
        "format": checkpoint.FORMAT,
        "model": trainer.model.shape.__dict__,
        "last_eval": progress.last_eval,
        "val_loss": progress.val_loss,
        "best_val_loss": progress.best_val_loss,
        "rows": progress.rows,
        "step_seconds": progress.step_seconds,
        "seconds": progress.seconds,
        "data": dataset.fingerprint,
        "tokenizer": dataset.tokenizer.fingerprint if dataset.tokenizer else None,
        "metrics": seal,
        "config": settings.to_dict(trainer.resolved),
        "threads": _threads(trainer),
        "ops": [c.__dict__ for c in trainer.selected],
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        **trainer.state_dict(),
    }
    with ranks.raise_on_all_ranks():
        if ranks.first:
            keep = trainer.config.log.keep_checkpoints
            checkpoint.save(
                run_dir, progress.step, model, optimizer, document, best=best, keep=keep
            )
            run.settle(run_dir)
    return checkpoint.root(run_dir) / checkpoint.name_of(progress.step)


def load(trainer: Trainer, dataset: Dataset, run_dir: Path) -> Progress:
    """Loads the checkpoint that --checkpoint names into the trainer.

    Raises UserError if it does not fit, or holds numbers that are not finite.
    """
    r = trainer.config.run
    saved = checkpoint.load(run_dir, r.checkpoint)
    document, shape = saved.state, trainer.model.shape
    with reading(saved.folder / "state.json", "is damaged"):
        progress = Progress(
            document["step"],
            document["last_eval"],
            float(document["val_loss"]),
            float(document["best_val_loss"]),
            document.get("metrics"),
            float(document.get("step_seconds", 0.0)),
            float(document.get("seconds", 0.0)),
            # Checkpoints of version 0.1 have no rows.
            document.get("rows", document["step"] * trainer.config.optim.rows),
        )
        document["data"], document["scaler"]
    for key, was in document["model"].items():
        now = getattr(shape, key, None)
        if now != was:
            raise UserError(
                f"--{key}={now}: the run in {run_dir} has {key}={was}; leave the flag out, "
                "or start a new run"
            )
    if document["data"] not in (None, dataset.fingerprint):  # None in an imported run
        raise UserError(
            f"{run_dir}: was trained on other data than {dataset.folder} holds; give the same "
            "data, or start a new run"
        )
    optimizer = {} if r.reset_optimizer else saved.optimizer
    if not (optimizer or r.reset_optimizer or "imported_from" in document):
        raise UserError(
            f"{saved.folder}: has no optimizer state; --reset_optimizer=True goes on with fresh "
            "moments"
        )
    trainer.load(saved.model, optimizer, document)
    if bad := trainer.non_finite_tensors():
        raise UserError(
            f"{saved.folder}: {bad[0]} is not finite; resume from an older checkpoint with "
            "--checkpoint=NAME"
        )
    print(f"resuming from {saved.folder}")
    _say_if_changed(trainer, document, _planned_threads(run_dir / "plan.json"))
    return progress


def _say_if_changed(trainer: Trainer, document: dict[str, Any], threads: int | None) -> None:
    """Prints settings, kernels and a CPU's threads by which the run computes otherwise than before.

    threads: those before, if the checkpoint does not tell.
    """
    stored = settings.from_dict(document.get("config") or {}, "state.json: ")
    was, now = settings.to_dict(stored), settings.to_dict(trainer.resolved)
    was["rows per step"], now["rows per step"] = stored.optim.rows, trainer.config.optim.rows
    was["threads"], now["threads"] = document.get("threads") or threads, _threads(trainer)
    was |= {c["op"]: c["implementation"] for c in document.get("ops", ())}
    now |= {s.op: s.implementation for s in trainer.selected}
    keys = ["rows per step", "threads", "seed", "sampling", "block_size", "dropout", "dtype"]
    keys += [leaf.name for leaf in settings.leaves(Config).values() if leaf.section == "optim"]
    keys += [s.op for s in trainer.selected]
    split = ("batch_size", "gradient_accumulation_steps")
    changed = [
        f"{key} {now[key]} (was {was[key]})"
        for key in dict.fromkeys(keys)
        if key not in split and was.get(key) is not None and was[key] != now[key]
    ]
    if changed:
        print(f"other than before: {', '.join(changed)}")


def _threads(trainer: Trainer) -> int | None:
    return torch.get_num_threads() if trainer.device.type == "cpu" else None


def _planned_threads(path: Path) -> int | None:
    """Returns the CPU threads that a plan of version 0.1.0 set; no longer applied."""
    with contextlib.suppress(UserError), reading(path, ""):
        return json.loads(read_bytes(path, limit=1 << 24))["threads"] or None
    return None
