"""Training loop: steps, evaluations, log lines and checkpoints in their order."""

from __future__ import annotations

import gc
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import torch

from fastgpt.data.loader import Batches, Prefetcher, eval_batches
from fastgpt.data.token_files import Dataset, TokenSplit
from fastgpt.errors import SharedError, UserError
from fastgpt.storage import checkpoint
from fastgpt.train import distributed, memory, optim, resume
from fastgpt.train.metrics import Metrics, flops_per_token
from fastgpt.train.resume import Progress
from fastgpt.train.trainer import NonFinite, Trainer
from fastgpt_kernels.progress import print_line, progress


class Loop:
    """Run of a trainer from the step in `progress` to its end, its target, or a signal."""

    def __init__(self, trainer: Trainer, dataset: Dataset, run_dir: Path, progress: Progress):
        c = trainer.config
        self.trainer, self.dataset, self.run_dir = trainer, dataset, run_dir
        self.ranks, self.config, self.progress = trainer.ranks, c, progress
        self.batches = Batches(
            dataset.train,
            rows_per_step=c.optim.rows,
            block_size=c.model.block_size,
            seed=c.run.seed,
            sampling=c.data.sampling,
            start=(progress.step, progress.rows),
        )
        self.saved: Path | None = None
        self.stopped: signal.Signals | None = None
        self._asked: Callable[[], int] = lambda: 0
        self._began = time.perf_counter() - progress.seconds

    @property
    def reached(self) -> bool:
        """True if the last evaluation met --target_val_loss."""
        return 0 < self.config.log.target_val_loss >= self.progress.val_loss

    @property
    def tokens(self) -> int:
        """Training tokens seen so far."""
        return self.progress.rows * self.config.model.block_size

    def run(self, stack: ExitStack) -> int:
        """Runs from progress.step to max_iters. Returns the exit code."""
        c, trainer, at = self.config, self.trainer, self.progress
        print(f"MFU against {trainer.machine.peak}", flush=True)
        self.prefetcher = Prefetcher(
            self.batches,
            trainer.device,
            start_step=at.step,
            row_slice=self.ranks.rows(c.optim.rows),
        )
        stack.callback(self.prefetcher.close)
        first = self.ranks.first
        self.metrics = Metrics(self.run_dir, trainer.resolved, at.step, first, at.metrics)
        stack.callback(self.metrics.close)
        self.stop = stack.enter_context(StopRequest())
        # Garbage collection would delay single steps. It runs at evaluations instead, without the
        # modules and the model, which stay.
        gc.freeze()
        gc.disable()
        stack.callback(gc.enable)
        stack.callback(gc.unfreeze)
        try:
            self._prepare()
            self._steps()
            trainer.check()
        except NonFinite as e:
            raise self.non_finite(e.step) from e
        except torch.OutOfMemoryError as e:
            said = memory.out_of_memory(c, trainer.model, trainer.device, trainer.batch_size)
            raise UserError(said) from e
        if self._stopping() and self.stopped and not c.log.eval_only:
            print_line(f"{self.stopped.name}: stopping after step {at.step}")
            if self.saved is None or self.saved.name != checkpoint.name_of(at.step):
                self.save(best=False)
        return 128 + self.stopped if self.stopped else 0

    def _prepare(self) -> None:
        """Compiles, and captures a CUDA graph, so that no iteration's time includes either."""
        step, trainer = self.progress.step, self.trainer
        rows = self.batches.tokens(step, slice(trainer.micro_batch))
        micro_batch = torch.from_numpy(rows).to(trainer.device)
        if trainer.machine.compile:
            with progress("compiling") as elapsed:
                trainer.warm_up(step, micro_batch)
            print_line(f"compiled in {elapsed():.1f}s")
        if trainer.device.type == "cuda":
            print_line(trainer.capture(step, micro_batch))

    def _stopping(self) -> bool:
        """Returns True on all ranks once a signal has reached one of them.

        The stop flag is all-reduced asynchronously and read one step (or evaluation batch) later,
        so no rank waits for the slowest.
        """
        answer = self.ranks.largest(self.stop.received or 0)
        if self.ranks.size > 1:
            answer, self._asked = self._asked, answer
        self.stopped = signal.Signals(number) if (number := answer()) else None
        return self.stopped is not None

    def _steps(self) -> None:
        """Alternates evaluations, checkpoints, steps and log lines until the run stops."""
        c, trainer, at = self.config, self.trainer, self.progress
        began = time.perf_counter() - at.step_seconds  # moved on by every pause
        logged, logged_at = at.step, at.step_seconds
        while True:
            # Evaluate, save after it, and collect garbage, outside of the steps' time.
            step = at.step
            last = step == c.run.max_iters
            due = (step % c.log.eval_interval == 0 or last) and step != at.last_eval
            if due or c.log.eval_only:
                trainer.check()  # waits for the device, so that the steps' time is complete
                paused = time.perf_counter()
                at.step_seconds = paused - began
                if self.evaluate(step):
                    self.save_after_evaluation(step)
                gc.collect()
                began += time.perf_counter() - paused
            if last or c.log.eval_only or self.reached or self._stopping():
                at.step_seconds = time.perf_counter() - began
                return

            # One step, and every log_interval steps a line, for which the host waits.
            loss, grad_norm = trainer.step(step, self.prefetcher.get(step))
            at.step, at.rows = step + 1, at.rows + c.optim.rows
            if step % c.log.log_interval == 0:
                record = {"loss": loss.item(), "lr": optim.learning_rate(step, c.optim)}
                record["grad_norm"] = grad_norm.item()
                trainer.check()
                now = time.perf_counter() - began
                seconds = (now - logged_at) / (at.step - logged)
                logged, logged_at = at.step, now
                self.metrics.train(step, self.tokens, seconds, record | self._speed(seconds))

    def _speed(self, seconds: float) -> dict[str, float]:
        """Returns the MFU of a step of so many seconds, and of several ranks their spread."""
        size, flops = self.ranks.size, flops_per_token(self.trainer.model)
        tokens_per_second = self.config.optim.rows * self.config.model.block_size / seconds
        peak = self.trainer.machine.peak.flops * size
        mfu = {name: n * (tokens_per_second / peak) for name, n in flops.items()}
        if size == 1:
            return mfu
        times = [1000 * s for s in self.ranks.gather(seconds)]
        spread = {"min": min(times), "mean": sum(times) / size, "max": max(times)}
        each = {"ranks": size, "tokens_per_second_per_rank": round(tokens_per_second / size, 1)}
        return mfu | each | {f"time_ms_{name}": round(ms, 3) for name, ms in spread.items()}

    def evaluate(self, step: int) -> bool:
        """Computes both mean losses on the fixed batches. Returns False if a signal came."""
        with self.ranks.raise_on_all_ranks():
            self.dataset.train.check_unchanged()
            self.dataset.val.check_unchanged()
        means, n = {}, self.config.log.eval_iters
        splits = {"train": self.dataset.train, "val": self.dataset.val}
        for i, (name, split) in enumerate(splits.items()):
            losses = torch.zeros(n, dtype=torch.float64, device=self.trainer.device)
            for k, tokens in self._eval_tokens(split):
                if self._stopping():
                    return False
                loss = self.trainer.losses(tokens)  # on all ranks, since FSDP gathers weights
                if k < n:
                    losses[k] = loss
                self.metrics.working(f"evaluating {name} {i * n + min(k + 1, n)}/{2 * n}")
            means[name] = self.ranks.sum(losses).mean().item()
        if not all(map(math.isfinite, means.values())):
            raise self._diverged(f"train loss {means['train']}, val loss {means['val']}")
        at = self.progress
        at.last_eval, at.val_loss = step, means["val"]
        self.metrics.evaluation(step, self.tokens, means["train"], means["val"])
        return True

    def _eval_tokens(self, split: TokenSplit) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields (index, tokens) of this rank's batches; surplus ones keep the ranks in step."""
        c, ranks = self.config, self.ranks
        windows = eval_batches(
            split,
            n_batches=-(-c.log.eval_iters // ranks.size) * ranks.size,
            batch_size=self.trainer.batch_size,
            block_size=c.model.block_size,
            seed=c.run.seed,
        )
        for k, window in enumerate(windows):
            if k % ranks.size == ranks.rank:
                yield k, torch.from_numpy(window).to(self.trainer.device, non_blocking=True)

    def save_after_evaluation(self, step: int) -> None:
        """Saves as nanoGPT does: if the validation loss improved, or always; and at the end."""
        at, c = self.progress, self.config
        best = at.val_loss < at.best_val_loss
        at.best_val_loss = min(at.val_loss, at.best_val_loss)
        if c.log.eval_only or step == 0:
            return
        if best or c.log.always_save_checkpoint or self.reached or step == c.run.max_iters:
            self.save(best=best)

    def save(self, *, best: bool) -> None:
        """Writes a checkpoint. Raises UserError, and writes nothing, if a weight is not finite."""
        at = self.progress
        if bad := self.trainer.non_finite_tensors():
            raise self._diverged(f"{bad[0]} and {len(bad) - 1} other tensors are not finite")
        at.seconds = time.perf_counter() - self._began
        at.metrics = self.metrics.seal()
        self.saved = resume.save(self.trainer, at, self.dataset, self.run_dir, best=best)
        print_line(f"saving checkpoint to {self.saved}")

    def _diverged(self, what: str) -> UserError:
        """Returns the error of a run whose numbers are not finite any more."""
        good = checkpoint.names(self.run_dir)
        resume_from = f"--init_from=resume --checkpoint={good[0]}" if good else "a new run"
        return SharedError(
            f"step {self.progress.step}: {what}: the run has diverged and nothing was saved; go on "
            f"with {resume_from} and a lower --learning_rate"
        )

    def non_finite(self, step: int) -> UserError:
        """Writes weights, batch and norms of a step that was not finite. Returns the error."""
        trainer = self.trainer
        tokens = torch.from_numpy(self.batches.tokens(step))
        rows = self.ranks.rows(self.config.optim.rows)
        report = trainer.diagnose(step, tokens[rows].to(trainer.device))
        model = distributed.whole_on_first(trainer.model.state_dict(), self.ranks)
        folder = self.run_dir / "nonfinite" / checkpoint.name_of(step)
        if self.ranks.first:
            groups = {"model": model, "batch": {"tokens": tokens}}
            checkpoint.write_folder(folder, groups, {"report": report})
        bad = report["not_finite"]
        where = f"; first of {len(bad)} bad tensors: {bad[0]}" if bad else ""
        ranks = ", ".join(map(str, report["bad_ranks"])) or "unknown"
        on = f" on rank {ranks}" if self.ranks.size > 1 else ""
        return SharedError(
            f"step {step}{on}: loss {report['loss']} or gradient norm is not finite{where}; "
            f"stopped before the update; weights, batch and norms are in {folder}; "
            "try a lower --learning_rate or --dtype=float32"
        )


class StopRequest:
    """Context in which SIGTERM, SIGHUP or SIGINT sets `received`; a second SIGINT ends at once.

    A SIGHUP that the caller ignores, as nohup does, stays ignored.
    """

    received: signal.Signals | None = None

    def __enter__(self) -> StopRequest:
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
