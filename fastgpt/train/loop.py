"""Training loop: steps, evaluations, log lines and checkpoints in their order."""

from __future__ import annotations

import contextlib
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
from fastgpt.train import distributed, memory, metrics, optim, resume
from fastgpt.train.resume import Progress
from fastgpt.train.trainer import NonFinite, Trainer
from fastgpt_kernels.progress import progress


class StepClock:
    """Clock of mean seconds per step since the last lap, and of all seconds, without pauses."""

    def __init__(self) -> None:
        self.steps, self._start, self._laps = 0, time.perf_counter(), 0.0

    @property
    def elapsed(self) -> float:
        return self._laps + time.perf_counter() - self._start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._start += time.perf_counter() - began

    def lap(self) -> float:
        now = time.perf_counter()
        seconds = now - self._start
        mean = seconds / self.steps
        self.steps, self._start, self._laps = 0, now, self._laps + seconds
        return mean


class Loop:
    """Run of a trainer from the step in `progress` to its end, its target, or a signal."""

    def __init__(self, trainer: Trainer, dataset: Dataset, run_dir: Path, progress: Progress):
        self.trainer, self.dataset, self.run_dir = trainer, dataset, run_dir
        self.ranks = trainer.ranks
        self.progress, self.config = progress, trainer.config
        c = self.config
        self.rows = c.optim.rows
        self.tokens_per_step = self.rows * c.model.block_size
        self.batches = Batches(
            dataset.train,
            rows_per_step=self.rows,
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
        c, trainer, start = self.config, self.trainer, self.progress.step
        self.flops = metrics.flops_per_token(trainer.model)
        print(f"MFU against {trainer.machine.peak}", flush=True)
        rows = self.ranks.rows(self.rows)
        self.prefetcher = Prefetcher(self.batches, trainer.device, start_step=start, row_slice=rows)
        stack.callback(self.prefetcher.close)
        self.metrics = stack.enter_context(
            metrics.Metrics(
                self.run_dir,
                trainer.resolved,
                start_step=start,
                tokens_per_step=self.tokens_per_step,
                start_tokens=self.tokens,
                keeps=self.ranks.first,
                seal=self.progress.seal,
            )
        )
        self.stop = stack.enter_context(StopRequest())
        # Garbage collection would delay single steps. It runs at evaluations instead, without the
        # modules and the model, which stay.
        gc.freeze()
        gc.disable()
        stack.callback(gc.enable)
        stack.callback(gc.unfreeze)
        try:
            if trainer.machine.compile:
                self._compile()
            self._capture()
            self._steps()
            self.trainer.check()
        except NonFinite as e:
            raise self.non_finite(e.step) from e
        except torch.OutOfMemoryError as e:
            said = memory.out_of_memory(c, trainer.model, trainer.device, trainer.batch_size)
            raise UserError(said) from e
        if self._stopping() and self.stopped and not c.log.eval_only:
            at = self.progress
            self.metrics.say(f"{self.stopped.name}: stopping after step {at.step}")
            if self.saved is None or self.saved.name != checkpoint.name_of(at.step):
                self.save(best=False)
        return 128 + self.stopped if self.stopped else 0

    def _stopping(self) -> bool:
        """Returns whether to stop, the same on all ranks, since a signal may reach only some.

        The stop flag is all-reduced asynchronously and read one step (or evaluation batch) later,
        so no rank waits for the slowest.
        """
        answer = self.ranks.largest(self.stop.signal or 0)
        if self.ranks.size > 1:
            answer, self._asked = self._asked, answer
        number = answer()
        self.stopped = signal.Signals(number) if number else None
        return bool(number)

    def _steps(self) -> None:
        """Alternates steps, log lines, evaluations and checkpoints until the run stops."""
        c, trainer, at = self.config, self.trainer, self.progress
        clock, before = StepClock(), at.step_seconds
        while True:
            step = at.step
            last = step == c.run.max_iters
            due = (step % c.log.eval_interval == 0 or last) and step != at.last_eval
            if due or c.log.eval_only:
                trainer.check()  # waits for the device, so that the steps' time is complete
                at.step_seconds = before + clock.elapsed
                with clock.paused():
                    if self.evaluate(step):
                        self.save_after_evaluation(step)
                    gc.collect()
            if last or c.log.eval_only or self.reached or self._stopping():
                at.step_seconds = before + clock.elapsed
                return

            loss, grad_norm = trainer.step(step, self.prefetcher.get(step))
            at.step, at.rows, clock.steps = step + 1, at.rows + self.rows, clock.steps + 1
            if step % c.log.log_interval == 0:
                record = {
                    "loss": loss.item(),  # waits for the device
                    "lr": optim.learning_rate(step, c.optim),
                    "grad_norm": grad_norm.item(),
                }
                trainer.check()
                seconds = clock.lap()
                peak = trainer.machine.peak.flops * self.ranks.size
                rate = self.tokens_per_step / seconds / peak
                record |= {k: v * rate for k, v in vars(self.flops).items()}
                record |= self._skew(seconds)
                self.metrics.train(step, seconds, record)

    def _compile(self) -> None:
        """Compiles before the first step, so that no iteration's time includes it."""
        with progress("compiling", self.metrics.say) as elapsed:
            self.trainer.warm_up(self.progress.step, self._micro_batch())
        self.metrics.say(f"compiled in {elapsed():.1f}s")

    def _micro_batch(self) -> torch.Tensor:
        rows = slice(self.trainer.micro_batch)
        tokens = torch.from_numpy(self.batches.tokens(self.progress.step, rows))
        return tokens.to(self.trainer.device)

    def _capture(self) -> None:
        """Captures the micro-step as a CUDA graph if that pays."""
        step, trainer = self.progress.step, self.trainer
        wanted, graphed, why = trainer.capture_if_it_pays(step, self._micro_batch)
        if graphed:
            self.metrics.say(f"each micro-batch is one CUDA graph ({why})")
        elif wanted:
            self.metrics.say(f"no CUDA graph: {why}")

    def _skew(self, seconds: float) -> dict[str, float]:
        """Returns the spread of the ranks' step times, or nothing for one rank."""
        if self.ranks.size == 1:
            return {}
        times = self.ranks.gather(seconds)
        return {
            "ranks": self.ranks.size,
            "tokens_per_second_per_rank": round(self.tokens_per_step / seconds / len(times), 1),
            "time_ms_min": round(min(times) * 1000, 3),
            "time_ms_mean": round(sum(times) / len(times) * 1000, 3),
            "time_ms_max": round(max(times) * 1000, 3),
        }

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
                self.metrics.working(f"evaluating {name}", step, i * n + min(k + 1, n), 2 * n)
            means[name] = self.ranks.sum(losses).mean().item()
        if not all(map(math.isfinite, means.values())):
            raise self._diverged(f"train loss {means['train']}, val loss {means['val']}")
        at = self.progress
        at.last_eval, at.val_loss = step, means["val"]
        self.metrics.evaluation(step, means["train"], means["val"])
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
        self.metrics.working("saving", at.step, 0, 1)
        self.metrics.sync()
        seal = self.metrics.seal()
        self.saved = resume.save(self.trainer, at, self.dataset, self.run_dir, best=best, seal=seal)
        self.metrics.say(f"saving checkpoint to {self.saved}")

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
        mine = tokens[self.ranks.rows(self.rows)]
        report = trainer.diagnose(step, mine.to(trainer.device))
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
    """Context in which SIGTERM, SIGHUP or SIGINT sets `signal`; a second SIGINT ends at once.

    A SIGHUP that the caller ignores, as nohup does, stays ignored.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
