"""Checkpoints of a run: `save` writes them and `load` resumes from them."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
    """Position of a run."""

    step: int = 0  # the next one
    last_eval: int = -1
    val_loss: float = float("inf")
    best_val_loss: float = float("inf")
    metrics: dict[str, Any] | None = None  # hash of metrics.jsonl, by which a change is noticed
    step_seconds: float = 0.0  # of all steps so far
    seconds: float = 0.0  # of the run so far, with compilation, evaluations and saves
    rows: int = 0  # of training data seen so far, each of block_size tokens


def save(
    trainer: Trainer, progress: Progress, dataset: Dataset, run_dir: Path, *, best: bool
) -> Path:
    """Writes a checkpoint of the next step; all ranks take part. Returns its folder.

    Raises UserError on all ranks if it cannot be written.
    """
    ranks = trainer.ranks
    weights = {k: v.detach() for k, v in trainer.model.state_dict().items()}
    moments = optim.state_tensors(trainer.optimizer, trainer.model)
    groups: dict[str, Any] = {"model": weights, "optimizer": moments}
    if trainer.layout == "fsdp":  # the file is the same, but no rank has to hold all tensors
        shards = checkpoint.shards(run_dir)
        ranks.from_first(lambda: shutil.rmtree(shards, ignore_errors=True))
        for k in [k for k in groups if groups[k]]:  # before the first update there are no moments
            groups[k] = distributed.write_shards(groups[k], shards / k)
    else:
        groups = {k: distributed.whole_on_first(v, ranks) for k, v in groups.items()}
    document = vars(progress) | {
        "format": checkpoint.FORMAT,
        "model": vars(trainer.model.shape),
        "data": dataset.fingerprint,
        "tokenizer": dataset.tokenizer.fingerprint if dataset.tokenizer else None,
        "config": settings.to_dict(trainer.resolved),
        "threads": _threads(trainer),
        "ops": [vars(op) for op in trainer.selected],
        "scaler": trainer.scaler.state_dict(),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }
    keep, step = trainer.config.log.keep_checkpoints, progress.step

    def write() -> None:
        checkpoint.save(run_dir, step, **groups, state=document, best=best, keep=keep)
        run.settle(run_dir)

    ranks.from_first(write)
    return checkpoint.root(run_dir) / checkpoint.name_of(progress.step)


def load(trainer: Trainer, dataset: Dataset, run_dir: Path) -> Progress:
    """Loads the checkpoint that --checkpoint names into the trainer.

    Raises UserError if it does not fit, or holds numbers that are not finite.
    """
    r = trainer.config.run
    saved = checkpoint.load(run_dir, r.checkpoint)
    document, shape = saved.state, trainer.model.shape
    with reading(saved.folder / "state.json", "is damaged"):
        # Checkpoints of version 0.1 have no rows.
        rows = document["step"] * trainer.config.optim.rows
        document = {"rows": rows, "step_seconds": 0.0, "seconds": 0.0, **document}
        values = {k: type(v)(document[k]) for k, v in vars(Progress()).items() if k != "metrics"}
        progress = Progress(**values, metrics=document.get("metrics"))
        document["data"], document["scaler"]
    if document["data"] not in (None, dataset.fingerprint):  # None in an imported run
        raise UserError(
            f"{data_flag(trainer.config)}: the run in {run_dir} was trained on other data than "
            f"{dataset.folder} holds; give the same data, or start a new run"
        )
    for key, was in document["model"].items():
        now = getattr(shape, key, None)
        if now != was:
            raise UserError(
                f"--{key}={now}: the run in {run_dir} has {key}={was}; leave the flag out, "
                "or start a new run"
            )
    optimizer = {} if r.reset_optimizer else saved.optimizer
    fresh = r.reset_optimizer or progress.step == 0 or "imported_from" in document
    if not (optimizer or fresh):
        raise UserError(
            f"{saved.folder}: has no optimizer state; --reset_optimizer=True goes on with fresh "
            "moments"
        )
    trainer.load(saved.model, optimizer, document["scaler"])
    if bad := trainer.non_finite_tensors():
        raise UserError(
            f"{saved.folder}: {bad[0]} is not finite; resume from an older checkpoint with "
            "--checkpoint=NAME"
        )
    print(f"resuming from {saved.folder}")
    threads = document.get("threads")
    with contextlib.suppress(UserError), reading(run_dir / "plan.json", ""):  # of version 0.1.0
        threads = threads or json.loads(read_bytes(run_dir / "plan.json", 1 << 24))["threads"]
    stored = settings.from_dict(document.get("config") or {}, "state.json: ")
    was = _deciding(stored, threads or None, document.get("ops", ()))
    now = _deciding(trainer.resolved, _threads(trainer), map(vars, trainer.selected))
    changed = [f"{k} {v} (was {was[k]})" for k, v in now.items() if was.get(k) not in (None, v)]
    if changed:
        print(f"other than before: {', '.join(changed)}")
    return progress


def data_flag(config: Config) -> str:
    """Returns the flag that names a run's data."""
    data = config.data
    return f"--input={data.input}" if data.input else f"--dataset={data.dataset}"


def _deciding(config: Config, threads: int | None, ops: Iterable[dict]) -> dict[str, Any]:
    """Returns the settings, threads and kernels that decide the numbers of a step."""
    found = {"rows per step": config.optim.rows, "threads": threads}
    names = {"seed", "sampling", "block_size", "dropout", "dtype"} | vars(config.optim).keys()
    names -= {"batch_size", "gradient_accumulation_steps"}  # their product counts
    found |= {name: value for name, value in settings.to_dict(config).items() if name in names}
    return found | {op["op"]: op["implementation"] for op in ops}


def _threads(trainer: Trainer) -> int | None:
    return torch.get_num_threads() if trainer.device.type == "cpu" else None
