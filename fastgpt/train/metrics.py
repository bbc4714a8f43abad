"""Log of a run: nanoGPT's log lines, metrics.jsonl, TensorBoard and W&B.

    iter 4980: loss 0.8010, time 33.22ms, mfu 11.07%
    step 5000: train loss 0.6224, val loss 1.7044

metrics.jsonl has one JSON object per line, described in docs/logging.md. Losses are nats per token,
MFU is a fraction, tokens are those seen since the start. Trackers use nanoGPT's names where it has
them: train/loss and val/loss at evaluations, lr, and mfu in percent, each over `iter`.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
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
from fastgpt_kernels.progress import describe_error, print_line

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
    units = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))
    for (size, unit), (part, name) in itertools.pairwise(units):
        if s >= size:
            return f"{s // size}{unit} {s % size // part:02d}{name}"
    return f"{s}s"


def count(n: float) -> str:
    """Formats a number with three digits: 980, 12.3k, 4.56M, 7.89B."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= scale:
            return f"{n / scale:.3g}{unit}"
    return f"{n:.0f}"


class Metrics:
    """Log of a run.

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
        self._file: IO[str] = open(self.path, "a")  # noqa: SIM115 - closed in close
        log = config.log
        asked: dict[Any, bool] = {_Wandb: log.wandb_log, _TensorBoard: log.tensorboard}
        self._trackers = [kind(run_dir, config) for kind, on in asked.items() if on and keeps]
        self._config, self._start, self._seconds = config, start_step, 0.0
        self._every, self._ten_minutes = Every(), Every(600)

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def train(self, step: int, tokens: int, seconds: float, record: dict[str, float]) -> None:
        """Logs a step, after which `tokens` were seen.

        `seconds` is the mean time per step since the last log line.
        """
        self._seconds = seconds
        print_line(
            f"iter {step}: loss {record['loss']:.4f}, time {seconds * 1000:.2f}ms, "
            f"mfu {record['mfu'] * 100:.2f}%"
        )
        self._every = Every()  # a line was just printed
        early = step - self._start <= 10 < step - self._start + self._config.log.log_interval
        if early or self._ten_minutes.due():
            self._status(step + 1, tokens)
        speed = {"time_ms": round(1000 * seconds, 3), "tokens_per_second": round(self._speed, 1)}
        self._write({"kind": "train", "step": step, **record, **speed, "tokens": tokens})

    def evaluation(self, step: int, tokens: int, train_loss: float, val_loss: float) -> None:
        """Logs the mean losses on the fixed evaluation batches, before step `step`."""
        print_line(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        if self._seconds:
            self._status(step, tokens)
        losses = {"train_loss": train_loss, "val_loss": val_loss}
        self._write({"kind": "eval", "step": step, **losses, "tokens": tokens})

    @property
    def _speed(self) -> float:
        """Tokens per second."""
        return self._config.optim.rows * self._config.model.block_size / self._seconds

    def _status(self, done: int, tokens: int) -> None:
        """Prints the tokens seen, the speed, and the time left after `done` steps."""
        line = f"{count(tokens)} tokens seen, {count(self._speed)} tok/s"
        left, interval = self._config.run.max_iters - done, self._config.log.eval_interval
        if left > 0:
            next_in = duration(min(left, interval - done % interval) * self._seconds)
            line += f", ETA {duration(left * self._seconds)}, next evaluation in {next_in}"
        print_line(line)
        self._ten_minutes = Every(600)

    def working(self, text: str) -> None:
        """Prints the progress of an evaluation, every ten seconds at most."""
        if self._every.due():
            print_line(text)

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
    """Weights & Biases: the run's own id lets a resumed run continue there."""

    def __init__(self, run_dir: Path, config: Config):
        wandb, identity = _import("wandb", "wandb_log"), run.identity(run_dir)
        try:
            self._run = wandb.init(
                project=config.log.wandb_project,
                name=config.log.wandb_run_name or run_dir.name,
                config=to_dict(config),
                dir=run_dir,
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
    """TensorBoard: events in the run's folder."""

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
