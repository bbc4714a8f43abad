"""What a run says before its first step and after its last."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import numpy as np
import torch

from fastgpt.config import settings
from fastgpt.config.schema import Config
from fastgpt.data.token_files import Dataset
from fastgpt.data.tokenizer import decode_stream
from fastgpt.inference.generate import generate
from fastgpt.model import ops
from fastgpt.train import memory, plot
from fastgpt.train.loop import Loop
from fastgpt.train.step import Trainer


def introduce(trainer: Trainer, dataset: Dataset, run_dir: Path) -> None:
    """Say once what runs, on what, and why."""
    config, section = trainer.resolved, ""
    for leaf in settings.leaves(Config).values():
        if leaf.section != section:
            section = leaf.section
            print(f"\n{section + ':':8}" if section != "run" else f"{section + ':':8}", end="")
        print(f"{leaf.name}={settings.get(config, leaf)}", end=" ")
    machine, device = trainer.machine, trainer.device
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    print(f"\n\ndata {dataset.describe()}")
    print(f"tokens per iteration will be: {config.optim.rows * config.model.block_size:,}")
    print(f"number of parameters: {trainer.model.n_params() / 1e6:.2f}M")
    if trainer.layout:
        kind = {"ddp": "DDP", "fsdp": "FSDP2"}[trainer.layout]
        rows = f"{trainer.micro_batch} rows a micro-batch"
        print(f"ranks {trainer.ranks.size} with {kind}, {rows}")
    print(f"device {device}{gpu}, {machine.dtype}, compile {machine.compile}")
    if device.type == "cuda":
        asked = trainer.model, trainer.batch_size, config.optim.optimizer
        print(f"memory, by estimate: {memory.of_model(*asked)}")
    print(f"ops {ops.describe(trainer.choices)}")
    print(f"run {run_dir}", flush=True)


def draw_if_missing(run_dir: Path) -> None:
    """The picture of a run that was killed after its last save."""
    picture, log = run_dir / "loss.png", run_dir / "metrics.jsonl"
    if not log.exists():
        return
    if not picture.exists() or picture.stat().st_mtime_ns < log.stat().st_mtime_ns:
        print(f"loss curve {plot.loss_curve(run_dir)}")


def farewell(loop: Loop, dataset: Dataset, run_dir: Path) -> None:
    """Say how it went: losses, the picture, a sample, and the commands to go on."""
    at, c = loop.progress, loop.config
    picture = plot.loss_curve(run_dir)
    if at.last_eval >= 0:
        print(f"\nval loss {at.val_loss:.4f} at step {at.last_eval}, best {at.best_val_loss:.4f}")
    if loop.reached:
        print(
            f"reached --target_val_loss={c.log.target_val_loss:g} after {at.step:,} steps, "
            f"{at.step * loop.tokens_per_step:,} tokens, {at.step_seconds:,.1f} s of training, "
            f"{at.seconds:,.1f} s in all"
        )
    if picture:
        print(f"loss curve {picture}")
    if (
        c.log.sample_tokens
        and dataset.tokenizer is not None
        and not loop.stopped
        and loop.trainer.layout != "fsdp"
    ):
        # The first token of the validation text: one that the model knows in any vocabulary.
        prompt = dataset.val.gather(np.zeros(1, dtype=np.int64), 1)[0].tolist()
        ids = generate(
            loop.trainer.model,
            prompt,
            c.log.sample_tokens,
            temperature=0.8,
            top_k=200,
            seed=c.run.seed,
        )
        # A model of more ids than its data's, as nanoGPT's 50,304, may draw one that is no text.
        known = dataset.tokenizer.vocab_size
        ids = (i for i in ids if i < known)
        print(f"\n--- sample {'-' * 61}")
        print("".join(decode_stream(dataset.tokenizer, itertools.chain(prompt, ids))).strip())
        print("-" * 72)
    if loop.saved:
        more = "" if at.step < c.run.max_iters else f" --max_iters={2 * c.run.max_iters}"
        print()
        place = shlex.quote(str(run_dir))
        if dataset.tokenizer is not None:
            print(f"sample:   fastgpt sample --out_dir={place}")
        print(f"continue: fastgpt train --init_from=resume --out_dir={place}{more}")
        if dataset.tokenizer is None:
            print(
                "no sample: these token files have no tokenizer; if you know it, continue with "
                "--tokenizer=gpt2 --vocab_file=FILE"
            )
