"""TensorBoard and Weights & Biases beside metrics.jsonl; docs/logging.md lists the names.

Names are nanoGPT's where it has them: train/loss and val/loss at evaluations, lr, and mfu in
percent as the console shows it, each over `iter`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Protocol

from fastgpt.config.schema import Config, LogConfig
from fastgpt.config.settings import to_dict
from fastgpt.errors import UserError
from fastgpt.storage import run

_ELSE = "or set WANDB_MODE=offline, or leave the flag out"


class Tracker(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def values(record: dict[str, Any]) -> dict[str, float]:
    """What trackers are told of a record of metrics.jsonl, by their names."""
    if record["kind"] == "eval":
        return {"train/loss": record["train_loss"], "val/loss": record["val_loss"]}
    named = {"loss": "batch/loss"}
    skipped = ("kind", "step")
    out = {named.get(k, k): v for k, v in record.items() if k not in skipped}
    return {k: v * 100 if k.startswith("mfu") else v for k, v in out.items()}


def check(log: LogConfig) -> None:
    """Raise UserError unless the trackers that are asked for can be used; starts none."""
    if log.wandb_log:
        wandb = _import("wandb", "wandb_log")
        try:
            wandb.login()  # asks on a terminal; without one it fails if no key is known
        except Exception as e:  # its errors have no base that all of its versions know
            raise UserError(f"--wandb_log=True: {_first(e)}; run `wandb login`, {_ELSE}") from e
    if log.tensorboard:
        _import("torch.utils.tensorboard", "tensorboard")


def start(run_dir: Path, config: Config) -> list[Tracker]:
    """The trackers of a run. Raises UserError if one cannot start."""
    out: list[Tracker] = []
    if config.log.wandb_log:
        out.append(_Wandb(run_dir, config))
    if config.log.tensorboard:
        out.append(_TensorBoard(run_dir))
    return out


def _import(module: str, flag: str) -> Any:
    try:
        return __import__(module, fromlist=["x"])
    except ImportError as e:
        advice = "pip install -e '.[log]'"
        raise UserError(f"--{flag}=True: {e.name or module} is not installed; {advice}") from e


def _first(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]


class _Wandb:
    def __init__(self, run_dir: Path, config: Config):
        wandb = _import("wandb", "wandb_log")
        ours = run.identity(run_dir)
        try:
            self._run = wandb.init(
                project=config.log.wandb_project,
                name=config.log.wandb_run_name or run_dir.name,
                config=to_dict(config),
                dir=run_dir,
                # The run's own id: what is resumed here goes on there too.
                id=ours.id if ours else None,
                resume="allow",
            )
            self._run.define_metric("*", step_metric="iter")
        except Exception as e:
            raise UserError(f"--wandb_log=True: cannot start ({_first(e)}); {_ELSE[3:]}") from e
        self._told = False

    def log(self, step: int, values: dict[str, float]) -> None:
        try:
            self._run.log({"iter": step, **values})
        except Exception as e:  # a tracker that fails does not end the training
            if not self._told:
                print(f"warning: W&B: {_first(e)}; metrics.jsonl has it all", file=sys.stderr)
            self._told = True

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, run_dir: Path):
        writer = _import("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._writer = writer(str(run_dir / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
