"""The training loop, and what has to be there before it starts and after it ends."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from fastgpt import (
    checkpoint,
    graph,
    loading,
    memory,
    metrics,
    mfu,
    ops,
    optim,
    report,
    run,
    settings,
)
from fastgpt.config import Config, PrepareConfig
from fastgpt.data.batches import Batches, Prefetcher, eval_batches
from fastgpt.data.prepare import ensure
from fastgpt.data.tokens import Dataset, TokenSplit, open_dataset
from fastgpt.device import (
    DTYPES,
    resolve_compile,
    resolve_device,
    resolve_dtype,
    set_matmul_precision,
)
from fastgpt.errors import UserError
from fastgpt.model import GPT, ModelShape
from fastgpt.signals import StopRequest
from fastgpt.step import NonFinite, Trainer


def train(config: Config, name: str) -> int:
    """Run a training run to its end, or to a signal. Returns the process's exit code.

    `config` is changed to what was resolved (device, dtype, compile); `name` ends up in the name
    of a new run's folder. Raises UserError where the run cannot be done as asked.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("several processes (torchrun) are not supported yet; start one, without it")
    system, resume = config.system, config.run.init_from == "resume"
    device = resolve_device(system.device)
    system.device = str(device)
    system.dtype = cast(Any, resolve_dtype(system.dtype, device))
    system.compile = resolve_compile(system.compile, device)

    graph.check(config, device)
    if system.max_autotune and not system.compile:
        raise UserError("--max_autotune=True: is torch.compile's; give --compile=True with it")

    dataset = open_dataset(ensure(PrepareConfig(**vars(config.data))))
    given = loading.start_from(config, dataset)
    for split in (dataset.train, dataset.val):
        split.require(config.model.block_size)
    m = config.model
    vocab_size = loading.vocabulary(config, dataset)
    shape = ModelShape(m.n_layer, m.n_head, m.n_embd, m.block_size, vocab_size, m.bias, m.gelu)
    set_matmul_precision(exact=system.dtype == "float32" and not system.tf32)
    dtype = DTYPES[system.dtype]
    table = ops.choose(
        device,
        dtype,
        head_dim=m.n_embd // m.n_head,
        width=m.n_embd,
        kernels=system.kernels,
        overrides=vars(config.op),
    )
    model = GPT(shape, m.dropout, table, dtype).init_weights(config.run.seed)
    if given is not None:
        model.load_state_dict(given.tensors)
        del given
    model.to(device)
    model.checkpointing = system.activation_checkpointing

    if resume:
        run_dir = run.find(config.run.out_dir)
    else:
        run_dir = run.create(config.run.out_dir, name, config.run.overwrite)
    with ExitStack() as stack:
        stack.enter_context(run.lock(run_dir))
        trainer = Trainer(model, config, device)
        start = _resume(trainer, run_dir, dataset) if resume else Progress()
        if start.step >= config.run.max_iters and not config.log.eval_only:
            raise UserError(
                f"{run_dir}: already at step {start.step} of --max_iters={config.run.max_iters}; "
                "give more to go on"
            )
        if config.optim.auto_batch_size and not resume:
            rows = config.optim.batch_size * config.optim.gradient_accumulation_steps
            print(memory.fit_batch_size(trainer, config, rows))
        run.save_config(run_dir, config)
        if dataset.tokenizer is not None:
            dataset.tokenizer.save(run_dir)
        report.introduce(config, trainer, dataset, run_dir)
        loop = Loop(trainer, dataset, run_dir, start)
        code = loop.run(stack)
    report.farewell(loop, dataset, run_dir)
    return code


@dataclass
class Progress:
    """Where a run stands: the next step, and what was evaluated so far."""

    step: int = 0
    last_eval: int = -1
    val_loss: float = float("inf")
    best_val_loss: float = float("inf")


class StepClock:
    """Mean seconds a step since the last lap, without what was paused for."""

    def __init__(self) -> None:
        self.steps, self._start = 0, time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._start += time.perf_counter() - began

    def lap(self) -> float:
        now = time.perf_counter()
        seconds = (now - self._start) / self.steps
        self.steps, self._start = 0, now
        return seconds


class Loop:
    """Steps, evaluations, log lines and checkpoints in their order."""

    def __init__(self, trainer: Trainer, dataset: Dataset, run_dir: Path, progress: Progress):
        self.trainer, self.dataset, self.run_dir = trainer, dataset, run_dir
        self.progress, self.config = progress, trainer.config
        c = self.config
        self.rows = c.optim.batch_size * c.optim.gradient_accumulation_steps
        self.tokens_per_step = self.rows * c.model.block_size
        self.batches = Batches(
            dataset.train,
            rows_per_step=self.rows,
            block_size=c.model.block_size,
            seed=c.run.seed,
            sampling=c.data.sampling,
        )
        self.saved: Path | None = None

    def run(self, stack: ExitStack) -> int:
        """From progress.step to max_iters. Returns the exit code."""
        c, device = self.config, self.trainer.device
        self.peak = mfu.device_peak(device, DTYPES[c.system.dtype], c.system.peak_tflops)
        self.flops = mfu.flops_per_token(self.trainer.model)
        print(f"MFU against {self.peak}", flush=True)
        self.prefetcher = Prefetcher(self.batches, device, start_step=self.progress.step)
        stack.callback(self.prefetcher.close)
        self.metrics = stack.enter_context(
            metrics.Metrics(
                self.run_dir,
                c,
                start_step=self.progress.step,
                tokens_per_step=self.tokens_per_step,
            )
        )
        self.stop = stack.enter_context(StopRequest())
        # The collector's pauses would land in single steps; it runs at evaluations instead, and
        # leaves alone what is there for good: modules, the model.
        gc.freeze()
        gc.disable()
        stack.callback(gc.enable)
        stack.callback(gc.unfreeze)
        try:
            if c.system.compile:
                self._compile()
            self._capture()
            self._steps()
            self.trainer.check()
        except NonFinite as e:
            raise self.non_finite(e.step) from e
        except torch.OutOfMemoryError as e:
            raise UserError(memory.out_of_memory(c, self.trainer.model, device)) from e
        if self.stop.signal is not None and not c.log.eval_only:
            at = self.progress
            self.metrics.say(f"{self.stop.signal.name}: stopping after step {at.step}")
            if self.saved is None or self.saved.name != checkpoint.name_of(at.step):
                self.save(best=False)
        return self.stop.exit_code

    def _steps(self) -> None:
        """The loop itself."""
        c, trainer, at = self.config, self.trainer, self.progress
        clock = StepClock()
        while True:
            step = at.step
            last = step == c.run.max_iters
            due = (step % c.log.eval_interval == 0 or last) and step != at.last_eval
            if due or c.log.eval_only:
                trainer.check()  # waits for the device: what it still has to do is the steps' time
                with clock.paused():
                    if self.evaluate(step):
                        self.save_after_evaluation(step)
                    gc.collect()
            if last or c.log.eval_only or self.stop:
                return

            loss, grad_norm = trainer.step(step, self.prefetcher.get(step))
            at.step, clock.steps = step + 1, clock.steps + 1
            if step % c.log.log_interval == 0:
                record = {
                    "loss": loss.item(),  # waits for the device
                    "lr": optim.learning_rate(step, c.optim),
                    "grad_norm": grad_norm.item(),
                }
                trainer.check()
                seconds = clock.lap()
                rate = self.tokens_per_step / seconds / self.peak.flops
                record |= {k: v * rate for k, v in vars(self.flops).items()}
                self.metrics.train(step, seconds, record)

    def _compile(self) -> None:
        """Trace and compile before the first step, so that no iteration's time has it in it."""
        started = time.perf_counter()
        self.trainer.warm_up(self.progress.step, self._micro_batch())
        self.metrics.say(f"compiled in {time.perf_counter() - started:.1f}s")

    def _micro_batch(self) -> torch.Tensor:
        rows = slice(self.config.optim.batch_size)
        tokens = torch.from_numpy(self.batches.tokens(self.progress.step, rows))
        return tokens.to(self.trainer.device)

    def _capture(self) -> None:
        """Make the micro-step one CUDA graph where that pays; go on without where it cannot be."""
        trainer = self.trainer
        yes, why = graph.wanted(self.config, trainer.model, trainer.device, self.peak.flops)
        if not yes:
            return
        try:
            trainer.capture(self.progress.step, self._micro_batch())
            self.metrics.say(f"each micro-batch is one CUDA graph ({why})")
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            line = (str(e).strip().splitlines() or [type(e).__name__])[0]
            if self.config.system.cuda_graph is True:
                raise UserError(f"--cuda_graph=True: {line}; leave the flag out") from e
            self.metrics.say(f"no CUDA graph: {line}")

    def evaluate(self, step: int) -> bool:
        """Both mean losses on the fixed batches. False where a signal broke it off."""
        means = {}
        total = 2 * self.config.log.eval_iters
        for i, (name, split) in enumerate(
            (("train", self.dataset.train), ("val", self.dataset.val))
        ):
            losses = []
            for k, tokens in enumerate(self._eval_tokens(split)):
                if self.stop:
                    return False
                losses.append(self.trainer.losses(tokens))
                done = i * self.config.log.eval_iters + k + 1
                self.metrics.working(f"evaluating {name}", step, done, total)
            means[name] = torch.stack(losses).double().mean().item()
        at = self.progress
        at.last_eval, at.val_loss = step, means["val"]
        self.metrics.evaluation(step, means["train"], means["val"])
        return True

    def _eval_tokens(self, split: TokenSplit) -> Iterator[torch.Tensor]:
        c = self.config
        windows = eval_batches(
            split,
            n_batches=c.log.eval_iters,
            batch_size=c.optim.batch_size,
            block_size=c.model.block_size,
            seed=c.run.seed,
        )
        for window in windows:
            yield torch.from_numpy(window).to(self.trainer.device, non_blocking=True)

    def save_after_evaluation(self, step: int) -> None:
        """nanoGPT's rule: where the validation loss improved, or always; and at the end."""
        at, c = self.progress, self.config
        best = at.val_loss < at.best_val_loss
        at.best_val_loss = min(at.val_loss, at.best_val_loss)
        if c.log.eval_only or step == 0:
            return
        if best or c.log.always_save_checkpoint or step == c.run.max_iters:
            self.save(best=best)

    def save(self, *, best: bool) -> None:
        at = self.progress
        self.metrics.working("saving", at.step, 0, 1)
        self.metrics.sync()
        model = {k: v.detach().float().cpu() for k, v in self.trainer.model.state_dict().items()}
        moments = optim.state_tensors(self.trainer.optimizer, self.trainer.model)
        self.saved = checkpoint.save(
            self.run_dir,
            at.step,
            model,
            {k: v.cpu() for k, v in moments.items()},
            self._state(),
            best=best,
            keep=self.config.log.keep_checkpoints,
        )
        self.metrics.say(f"saving checkpoint to {self.saved}")

    def _state(self) -> dict:
        shape, at = self.trainer.model.shape, self.progress
        return {
            "format": checkpoint.FORMAT,
            "model": shape.__dict__,
            "last_eval": at.last_eval,
            "val_loss": at.val_loss,
            "best_val_loss": at.best_val_loss,
            "data": self.dataset.fingerprint,
            "config": settings.to_dict(self.config),
            "ops": [c.__dict__ for c in self.trainer.model.ops.choices],
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
            **self.trainer.state_dict(),
        }

    def non_finite(self, step: int) -> UserError:
        """Write what is needed to look at the bad step: weights before it, batch, norms."""
        trainer = self.trainer
        tokens = torch.from_numpy(self.batches.tokens(step))
        report = trainer.diagnose(step, tokens.to(trainer.device))
        folder = self.run_dir / "nonfinite" / checkpoint.name_of(step)
        checkpoint.write_folder(
            folder,
            {
                "model": {k: v.cpu() for k, v in trainer.model.state_dict().items()},
                "batch": {"tokens": tokens},
            },
            {"report": report},
        )
        bad = report["not_finite"]
        where = f"; first of {len(bad)} bad tensors: {bad[0]}" if bad else ""
        return UserError(
            f"step {step}: loss {report['loss']} or gradient norm is not finite{where}; stopped "
            f"before the update; weights, batch and norms are in {folder}; "
            "try a lower --learning_rate or --dtype=float32"
        )


def _resume(trainer: Trainer, run_dir: Path, dataset: Dataset) -> Progress:
    """Load the newest good checkpoint into the trainer. Raises UserError where it does not fit."""
    saved = checkpoint.load(run_dir)
    state, shape = saved.state, trainer.model.shape
    for key, was in state["model"].items():
        now = getattr(shape, key)
        if now != was:
            raise UserError(
                f"--{key}={now}: the run in {run_dir} has {key}={was}; leave the flag out, "
                "or start a new run"
            )
    if state["data"] not in (None, dataset.fingerprint):  # None: an imported run's is unknown
        raise UserError(
            f"{run_dir}: was trained on other data than {dataset.folder} holds; give the same "
            "data, or start a new run"
        )
    trainer.load(saved.model, saved.optimizer, state)
    print(f"resuming from {saved.folder}")
    return Progress(state["step"], state["last_eval"], state["val_loss"], state["best_val_loss"])
