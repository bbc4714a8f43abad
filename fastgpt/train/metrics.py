"""Log of a run: nanoGPT's log lines, a progress bar, metrics.jsonl, TensorBoard and W&B.

    iter 4980: loss 0.8010, time 33.22ms, mfu 11.07%
    step 5000: train loss 0.6224, val loss 1.7044

metrics.jsonl has one JSON object per line, described in docs/logging.md. Losses are nats per token,
MFU is a fraction, tokens are those seen since the start. Trackers use nanoGPT's names where it has
them: train/loss and val/loss at evaluations, lr, and mfu in percent, each over `iter`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import sys
from pathlib import Path
from typing import IO, Any

from fastgpt.config.schema import Config, LogConfig
from fastgpt.config.settings import to_dict
from fastgpt.data.progress import Every
from fastgpt.errors import UserError, read_text, reading
from fastgpt.model.gpt import GPT
from fastgpt.storage import run_dir as run
from fastgpt.storage.atomic import explain_os_error, write_text
from fastgpt_kernels.progress import describe_error

_NUMBERS = {
    "train": ("step", "loss", "tokens"),
    "eval": ("step", "train_loss", "val_loss", "tokens"),
}


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a metrics.jsonl, without a last line cut off by a kill."""
    if not path.exists():
        return []
    with reading(path, "is not UTF-8 text"):
        lines = read_text(path).splitlines(keepends=True)
    records = []
    for i, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            for name in _NUMBERS[record["kind"]]:
                math.isfinite(record[name])  # raises for what is no number, or beyond a float
            records.append(record)
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as e:
            if i < len(lines) or line.endswith("\n"):
                wrong = "is not JSON, or no record; mend or remove it"
                raise UserError(f"{path}: line {i} {wrong}") from e
    return records


def duration(seconds: float) -> str:
    """Formats seconds as 1m 05s, 2h 03m, 3d 04h."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m {s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h {s % 3600 // 60:02d}m"
    return f"{s // 86400}d {s % 86400 // 3600:02d}h"


def count(n: float) -> str:
    """Formats a number with three digits: 980, 12.3k, 4.56M, 7.89B."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= scale:
            return f"{n / scale:.3g}{unit}"
    return f"{n:.0f}"


class Metrics:
    """Log of a run, as a context that closes its files and the progress bar.

    `keeps` is False for all ranks but the first, which write nothing.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        start_step: int = 0,
        keeps: bool = True,
        seal: dict[str, Any] | None = None,
    ):
        self.path, self._keeps = run_dir / "metrics.jsonl" if keeps else Path(os.devnull), keeps
        self._tokens_per_step = config.optim.rows * config.model.block_size
        self._max_iters = config.run.max_iters
        self._digest = hashlib.sha256()
        if keeps:  # a resumed run repeats the steps after its checkpoint
            kept = [r for r in read(self.path) if r["step"] < start_step + (r["kind"] == "eval")]
            text = "".join(json.dumps(r) + "\n" for r in kept)
            self._digest.update(text.encode())
            if seal and seal["sha256"] != self._digest.hexdigest():
                print(
                    f"warning: {self.path}: is not what it was at step {start_step}, when the "
                    "checkpoint was saved: changed, or damaged"
                )
            write_text(self.path, text)
        self._file: IO[str] = open(self.path, "a")  # noqa: SIM115 - closed in __exit__
        asked: dict[Any, bool] = {
            _Wandb: config.log.wandb_log,
            _TensorBoard: config.log.tensorboard,
        }
        trackers = [kind for kind, wanted in asked.items() if wanted and keeps]
        self._trackers = [tracker(run_dir, config) for tracker in trackers]
        self._progress: Any = None  # of rich
        if sys.stdout.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=Console(highlight=False), transient=True)
            self._task = self._progress.add_task("", total=self._max_iters, completed=start_step)
        self._speed, self._seconds = "", 0.0
        self._every, self._ten_minutes = Every(), Every(600)
        self._start, self._log = start_step, config.log

    def __enter__(self) -> Metrics:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._progress:
            self._progress.stop()
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def say(self, line: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        if self._progress:
            self._progress.console.print(line, markup=False, soft_wrap=True)
        else:
            print(line, flush=True)

    def train(self, step: int, tokens: int, seconds: float, record: dict[str, float]) -> None:
        """Logs a step, after which `tokens` were seen.

        `seconds` is the mean time per step since the last log line.
        """
        tokens_per_second, done = round(self._tokens_per_step / seconds, 1), step + 1
        self._seconds, self._speed = seconds, f"{count(tokens_per_second)} tok/s"
        self.say(
            f"iter {step}: loss {record['loss']:.4f}, time {seconds * 1000:.2f}ms, "
            f"mfu {record['mfu'] * 100:.2f}%"
        )
        self._every = Every()  # a line was just said
        if self._progress:
            text = f"{done}/{self._max_iters} {count(tokens)} tokens, {self._speed}"
            text += self._eta(done)
            self._progress.update(self._task, completed=done, description=text)
        early = step - self._start <= 10 < step - self._start + self._log.log_interval
        if early or self._ten_minutes.due():
            self._status(done, tokens)
        speed = {"time_ms": round(1000 * seconds, 3), "tokens_per_second": tokens_per_second}
        self._write({"kind": "train", "step": step, **record, **speed, "tokens": tokens})

    def evaluation(self, step: int, tokens: int, train_loss: float, val_loss: float) -> None:
        """Logs the mean losses on the fixed evaluation batches, before step `step`."""
        self.say(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        self._status(step, tokens)
        losses = {"train_loss": train_loss, "val_loss": val_loss}
        self._write({"kind": "eval", "step": step, **losses, "tokens": tokens})

    def _status(self, done: int, tokens: int) -> None:
        """Says what is done and left after `done` steps, if no progress bar shows it."""
        if not self._speed or self._progress:
            return
        line, left = f"{count(tokens)} tokens seen, {self._speed}", self._max_iters - done
        if left > 0:
            steps = min(left, self._log.eval_interval - done % self._log.eval_interval)
            line += f"{self._eta(done)}, next evaluation in {duration(steps * self._seconds)}"
        self.say(line)
        self._ten_minutes = Every(600)

    def working(self, what: str, step: int, done: int, total: int) -> None:
        """Shows progress of work between two steps; in a pipe every ten seconds at most."""
        text = f"{what} {done}/{total}"
        if self._progress:
            self._progress.update(self._task, completed=step, description=text)
        elif done and self._every.due():
            self.say(text)

    def _eta(self, done: int) -> str:
        """Returns the time left after `done` steps, or "" at the end."""
        left = self._max_iters - done
        return f", ETA {duration(left * self._seconds)}" if left > 0 else ""

    def _write(self, record: dict[str, Any]) -> None:
        line = json.dumps(record) + "\n"
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as e:
            raise explain_os_error(e, self.path) from e
        self._digest.update(line.encode())
        for tracker in self._trackers:
            tracker.log(record["step"], tracker_values(record))

    def seal(self) -> dict[str, Any]:
        """Writes the log through to the disk. Returns its hash for a checkpoint to keep."""
        if self._keeps:
            os.fsync(self._file.fileno())
        return {"sha256": self._digest.hexdigest()}


def tracker_values(record: dict[str, Any]) -> dict[str, float]:
    """Returns the values of a record of metrics.jsonl under the trackers' names."""
    if record["kind"] == "eval":
        return {"train/loss": record["train_loss"], "val/loss": record["val_loss"]}
    named = {"batch/loss" if k == "loss" else k: v for k, v in record.items()}
    del named["kind"], named["step"]
    return {k: v * 100 if k.startswith("mfu") else v for k, v in named.items()}


def check_trackers(log: LogConfig) -> None:
    """Raises UserError unless the requested trackers can be used; starts none."""
    if log.wandb_log:
        wandb = _import("wandb", "wandb_log")
        try:
            wandb.login()  # asks on a terminal; without one it fails if no key is known
        except Exception as e:  # its errors have no base that all of its versions know
            raise _wandb_error(e, "run `wandb login`, or ") from e
    if log.tensorboard:
        _import("torch.utils.tensorboard", "tensorboard")


def _import(module: str, flag: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        name = flag.removesuffix("_log")
        raise UserError(f"--{flag}=True: {name} is not installed; pip install {name}") from e


def _wandb_error(e: Exception, advice: str = "") -> UserError:
    advice += "set WANDB_MODE=offline, or leave the flag out"
    return UserError(f"--wandb_log=True: {describe_error(e)}; {advice}")


class _Wandb:
    def __init__(self, run_dir: Path, config: Config):
        wandb = _import("wandb", "wandb_log")
        identity = run.identity(run_dir)
        try:
            self._run = wandb.init(
                project=config.log.wandb_project,
                name=config.log.wandb_run_name or run_dir.name,
                config=to_dict(config),
                dir=run_dir,
                # With the run's own id a resumed run continues there, too.
                id=identity.id if identity else None,
                resume="allow",
            )
            self._run.define_metric("*", step_metric="iter")
        except Exception as e:
            raise _wandb_error(e) from e
        self.close, self._failed = self._run.finish, False

    def log(self, step: int, values: dict[str, float]) -> None:
        try:
            self._run.log({"iter": step, **values})
        except Exception as e:  # a tracker that fails does not end the training
            if not self._failed:
                said = f"warning: W&B: {describe_error(e)}; metrics.jsonl has it all"
                print(said, file=sys.stderr)
            self._failed = True


class _TensorBoard:
    def __init__(self, run_dir: Path, config: Config):
        module = _import("torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(str(run_dir / "tensorboard"))
        self.close = self._writer.close

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


def flops_per_token(model: GPT) -> dict[str, float]:
    """Returns the FLOPs per token, forward and backward, of a model at its full block_size.

    N is the number of parameters without position embeddings. The tied head counts once.

    mfu         6N + 12 L C T   nanoGPT; PaLM (Chowdhery et al. 2022, appendix B)
    mfu_causal  6N +  6 L C T   llm.c: causal attention needs half of the scores
    mfu_6n      6N              Kaplan et al. 2020
    """
    n, shape = 6.0 * model.n_params(), model.shape
    scores = 6.0 * shape.n_layer * shape.n_embd * shape.block_size
    return {"mfu": n + 2 * scores, "mfu_causal": n + scores, "mfu_6n": n}
