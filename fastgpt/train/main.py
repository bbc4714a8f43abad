"""Training run from its settings to its end: checks, run folder, introduction, loop, summary."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
import torch
from torch import Tensor

from fastgpt import __version__
from fastgpt.config import settings
from fastgpt.config.presets import PRESETS
from fastgpt.config.schema import Config, PrepareConfig
from fastgpt.data.corpora import CORPORA
from fastgpt.data.prepare import check_data, ensure, with_tokenizer
from fastgpt.data.token_files import Dataset, open_dataset
from fastgpt.data.tokenizer import GPT2_VOCAB, parse_spec
from fastgpt.errors import SharedError, UserError
from fastgpt.inference.generate import BatchGenerator, Sampling, on_screen
from fastgpt.model.build import build
from fastgpt.model.device import Machine, unseen_gpu
from fastgpt.model.kernels import describe
from fastgpt.storage import checkpoint
from fastgpt.storage import run_dir as run
from fastgpt.train import cuda_graph, memory, metrics, optim, plots, resume
from fastgpt.train.distributed import Ranks, join, local_device
from fastgpt.train.loop import Loop
from fastgpt.train.metrics import count, duration
from fastgpt.train.resume import Progress
from fastgpt.train.trainer import Trainer
from fastgpt.weights import hf_tokenizer
from fastgpt.weights.hugging_face import SIZES, read_config, shape_of_size
from fastgpt.weights.source import pretrained


def train(config: Config, name: str) -> tuple[int, Path]:
    """Runs a training run to its end or to a signal. Returns the exit code and the run's folder.

    `name` becomes part of the name of a new run's folder. Raises UserError if the run cannot be
    done as asked.
    """
    system = config.system
    device = local_device(system.device)
    machine = Machine.of(device, system.dtype, system.compile, system.peak_tflops)
    if system.device == "auto" and machine.device.type == "cpu" and (said := unseen_gpu()):
        print(f"{said}; using the CPU", flush=True)
    if system.max_autotune and not machine.compile:
        raise UserError("--max_autotune=True: needs torch.compile; pass --compile=True too")
    # A closed terminal, pipe or full disk behind stdout or stderr ends no run.
    out, err = (cast(TextIO, _LastingStream(stream)) for stream in (sys.stdout, sys.stderr))
    with ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        ranks = stack.enter_context(join(config, machine.device))
        if name in PRESETS:
            print(f"preset {name}: {PRESETS[name].about}")
        if config.run.dry_run:
            _dry_run(config, name, machine, ranks)
            return 0, Path()
        return _train(config, name, machine, ranks)


class _LastingStream:
    """Stream whose output goes to /dev/null after the first error."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
            self._stream.flush()  # here, so that a later flush has nothing left to fail with
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        return len(text)


def _train(config: Config, name: str, machine: Machine, ranks: Ranks) -> tuple[int, Path]:
    """Runs the training on this rank. Everything that can fail, fails before the run's folder."""
    changed, r = _changes(config, name), config.run
    wrong = cuda_graph.unsupported_reason(config.system, machine)
    if config.system.cuda_graph is True and wrong:
        raise UserError(f"--cuda_graph=True: {wrong}; leave the flag out")
    # 1. Data, weights to start from, and the model.
    ranks.from_first(lambda: metrics.check_trackers(config.log))
    folder = ranks.from_first(lambda: ensure(PrepareConfig.of(config.data)))
    with ranks.raise_on_all_ranks():
        dataset = with_tokenizer(open_dataset(folder), config.data)
        config, weights = _start_from(config, dataset, changed)
        for split in (dataset.train, dataset.val):
            split.require(config.model.block_size)
        vocabulary = _vocab_size(config, dataset)
    _require_equal_ranks(config, dataset, machine, ranks)
    with ranks.raise_on_all_ranks():
        model = build(config, vocabulary, machine, weights)
    del weights
    # 2. Trainer.
    batch_size, resuming = config.optim.batch_size, r.init_from == "resume"
    if config.optim.auto_batch_size and not resuming:
        with ranks.raise_on_all_ranks():
            batch_size = memory.fastest_batch_size(model, config, machine, ranks)
    trainer = Trainer(model, config, machine, ranks, batch_size)
    with ExitStack() as stack:
        # 3. The run's folder and its checkpoint.
        held = run.resumed(r.out_dir) if resuming else run.begin(r.out_dir, name, r.overwrite)
        run_dir = ranks.from_first(lambda: stack.enter_context(held))
        with ranks.raise_on_all_ranks():
            start = resume.load(trainer, dataset, run_dir) if resuming else Progress()
            if checkpoint.finished(vars(start), r.max_iters) and not config.log.eval_only:
                at = f"already at step {start.step} of --max_iters={r.max_iters}"
                raise UserError(f"{run_dir}: {at}; give more to go on")

        def describe_run() -> None:
            run.save_config(run_dir, trainer.resolved)
            if dataset.tokenizer is not None:
                dataset.tokenizer.save(run_dir)

        ranks.from_first(describe_run)
        # 4. Introduction, loop, summary.
        _print_introduction(trainer, dataset.describe(), run_dir, changed)
        loop = Loop(trainer, dataset, run_dir, start)
        code = loop.run(stack)
    if ranks.first:
        _print_summary(loop, dataset, run_dir)
    return code, run_dir


# Settings that may differ between ranks: paths of this host, and those that only rank 0 uses.
_PER_RANK = {"out_dir", "data_dir", "input", "vocab_file", "weights", "workers", "peak_tflops"}


def _require_equal_ranks(config: Config, dataset: Dataset, machine: Machine, ranks: Ranks) -> None:
    """Raises SharedError on all ranks if a rank's settings, data or versions are not rank 0's."""
    mine = settings.to_dict(config) | machine.settings
    mine = {k: v for k, v in mine.items() if k not in _PER_RANK}
    mine |= {"fastgpt": __version__, "torch": torch.__version__}
    mine |= {"device": machine.device.type, "data": dataset.fingerprint}
    first, *others = ranks.gather(mine)
    for rank, other in enumerate(others, 1):
        for key, value in first.items():
            if other.get(key) != value:
                raise SharedError(
                    f"rank {rank} has {key}={other.get(key)}, rank 0 has {key}={value}: start all "
                    "ranks with the same flags, data and versions",
                    code=1,
                )


def _start_from(
    config: Config, dataset: Dataset, changed: set[str]
) -> tuple[Config, dict[str, Tensor] | None]:
    """Returns the config and the weights that a new run starts from, or None for new weights.

    The config takes the weights' shape. As in nanoGPT, a smaller --block_size drops the last
    positions. Warns if the data has another tokenizer. Raises UserError if the weights have fewer
    positions than asked for, or another shape than `changed` settings.
    """
    if config.run.init_from in ("scratch", "resume"):
        return config, None
    found = pretrained(config.run.init_from, config.run.weights)
    tensors, block_size = found.tensors, config.model.block_size
    for name, has in vars(found.shape).items():
        if name in changed - {"block_size"} and has != (given := getattr(config.model, name)):
            raise UserError(f"--{name}={given}: {found.source} has {has}; leave the flag out")
    if block_size > found.shape.block_size:
        raise UserError(
            f"--block_size={block_size}: {found.source} has {found.shape.block_size} positions; "
            f"pass --block_size={found.shape.block_size} or less"
        )
    wpe = tensors["transformer.wpe.weight"]
    tensors["transformer.wpe.weight"] = wpe[:block_size].contiguous()
    shape = replace(found.shape, block_size=block_size)
    print(f"weights from {found.source}: {shape}")
    known, data = hf_tokenizer.read(found.folder), dataset.tokenizer
    if known and data and known.fingerprint != data.fingerprint:
        print(
            f"warning: these weights know the ids of {known.name}, the data in {dataset.folder} "
            f"is in {data.name}: the text means nothing to them"
        )
    return settings.replace(config, **vars(shape)), tensors


def _vocab_size(config: Config, dataset: Dataset) -> int:
    """Returns the given vocabulary, or the data's. Raises UserError if the data has more ids."""
    given = config.model.vocab_size
    if given and given < dataset.vocab_size:
        resumed = config.run.init_from == "resume"
        raise UserError(
            f"{resume.data_flag(config) if resumed else f'--vocab_size={given}'}: the data in "
            f"{dataset.folder} has a vocabulary of {dataset.vocab_size:,}, the model of {given:,}; "
            "it needs weights made for it, or other data"
        )
    return given or dataset.vocab_size


# --- introduction and dry run -------------------------------------------------------------------


def _changes(config: Config, name: str) -> set[str]:
    """Returns the settings that differ from the preset `name`; none if there is no such preset."""
    preset = PRESETS[name]() if name in PRESETS else config
    return {key for key, *_ in settings.differences(preset, config)}


def _print_introduction(
    trainer: Trainer, data: str, place: object, changed: Collection[str]
) -> None:
    """Prints the settings, the data, the model, the device, and the chosen kernels.

    A star marks the settings in `changed`, which are not the preset's.
    """
    config, sections = trainer.resolved, dict[str, list[str]]()
    for leaf in settings.leaves(Config).values():
        text = f"{'*' * (leaf.name in changed)}{leaf.name}={settings.get(config, leaf)}"
        sections.setdefault(leaf.section, []).append(text)
    for section, values in sections.items():
        print(f"{section + ':':8}{' '.join(values)}")
    machine, device = trainer.machine, trainer.device
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    print(f"\ndata {data}")
    print(f"tokens per iteration will be: {config.optim.rows * config.model.block_size:,}")
    print(optim.describe_schedule(config.optim, config.run.max_iters))
    print(f"number of parameters: {trainer.model.n_params() / 1e6:.2f}M")
    if trainer.layout:
        kind = {"ddp": "DDP", "fsdp": "FSDP2"}[trainer.layout]
        rows = f"{trainer.micro_batch} rows per micro-batch"
        print(f"ranks {trainer.ranks.size} with {kind}, {rows}")
    print(f"device {device}{gpu}, {machine.dtype}, compile {machine.compile}")
    if device.type == "cuda" or config.run.dry_run:
        expected = memory.estimate(trainer.model, trainer.batch_size, config.optim.optimizer)
        print(f"memory, by estimate: {memory.describe(expected)}")
    print(f"ops {describe(trainer.selected)}")
    print(f"run {place}", flush=True)


def as_trained(config: Config) -> Config:
    """Returns the config with the shape of its weights and the vocabulary of its data or tokenizer.

    It reads neither weights nor texts.
    """
    start, path, data = config.run.init_from, Path(config.run.weights), config.data
    if start in SIZES or start == "weights":
        beside = (path if path.is_dir() else path.parent) / "config.json"
        shape = shape_of_size(start) if start in SIZES else read_config(beside)[0]
        block_size = min(config.model.block_size, shape.block_size)
        return settings.replace(config, **{**vars(shape), "block_size": block_size})
    if config.model.vocab_size:
        return config
    own = CORPORA[data.dataset].tokenizer if data.dataset in CORPORA else "gpt2"
    kind, size = parse_spec(data.tokenizer or own)
    vocabulary = size or {"byte": 256, "char": 65}.get(kind, GPT2_VOCAB)
    with contextlib.suppress(UserError):
        if not data.input:
            vocabulary = open_dataset(Path(data.data_dir, data.dataset)).vocab_size
    return settings.replace(config, vocab_size=vocabulary)


def _dry_run(config: Config, name: str, machine: Machine, ranks: Ranks) -> None:
    """Prints the introduction of a run, its tokens and disk space, and on a GPU its time."""
    changed, config = _changes(config, name), as_trained(config)
    model = build(config, config.model.vocab_size, machine)
    batch_size = config.optim.batch_size
    if config.optim.auto_batch_size and machine.device.type == "cuda":
        batch_size = memory.fastest_batch_size(model, config, machine, ranks)
    trainer = Trainer(model, config, machine, ranks, batch_size)
    try:
        check_data(PrepareConfig.of(config.data))
        data = config.data.input or config.data.dataset
    except UserError as e:
        data = str(e)
    _print_introduction(trainer, data, "none: --dry_run=True", changed)
    steps, tokens = config.run.max_iters, config.optim.rows * config.model.block_size
    needs = memory.estimate(model, batch_size, config.optim.optimizer)
    kept, size = config.log.keep_checkpoints + 1, needs["weights"] + needs["optimizer"]
    home = next(p for p in (Path(config.run.out_dir).absolute(), *Path.cwd().parents) if p.exists())
    free = shutil.disk_usage(home).free / 1e9
    split = f"{config.optim.rows // batch_size} x {batch_size} x {config.model.block_size:,}"
    print(f"{steps:,} steps of {split} tokens: {count(steps * tokens)} in all")
    print(f"disk {kept * size / 1e9:.2f} GB for {kept} checkpoints, {free:.1f} GB are free")
    if machine.device.type != "cuda":
        print("time is measured on a GPU only")
        return
    seconds = seconds_per_step(trainer)
    speed, total = count(tokens / seconds), duration(steps * seconds)
    print(f"time {seconds:.3f} s per step, {speed} tok/s: {total} without evaluations")


def seconds_per_step(trainer: Trainer) -> float:
    """Returns the mean time of ten steps on random tokens, after two that are not timed."""
    rows = trainer.config.optim.rows // trainer.ranks.size
    shape = rows, trainer.config.model.block_size + 1
    tokens = torch.randint(trainer.model.shape.vocab_size, shape, device=trainer.device)
    micro_batch, began = tokens[: trainer.micro_batch], 0.0
    if trainer.machine.compile:
        trainer.warm_up(0, micro_batch)
    if trainer.device.type == "cuda":
        trainer.capture(0, micro_batch)
    for step in range(12):
        if step == 2:
            trainer.machine.synchronize()
            began = time.perf_counter()
        trainer.step(step, tokens)
    trainer.machine.synchronize()
    return (time.perf_counter() - began) / 10


# --- summary ------------------------------------------------------------------------------------


def _print_summary(loop: Loop, dataset: Dataset, run_dir: Path) -> None:
    """Prints the losses, the picture's path, a sample, and the commands to go on."""
    at, c = loop.progress, loop.config
    picture = plots.loss_curve(run_dir)
    if at.last_eval >= 0:
        print(f"\nval loss {at.val_loss:.4f} at step {at.last_eval}, best {at.best_val_loss:.4f}")
    if loop.reached:
        print(
            f"reached --target_val_loss={c.log.target_val_loss:g} after {at.step:,} steps, "
            f"{loop.tokens:,} tokens, {at.step_seconds:,.1f} s of training, "
            f"{at.seconds:,.1f} s in all"
        )
    if picture:
        print(f"loss curve {picture}")
    known = dataset.tokenizer is not None
    if known and c.log.sample_tokens and not loop.stopped and loop.trainer.layout != "fsdp":
        _print_sample(loop, dataset)
    if loop.saved:
        more = "" if at.step < c.run.max_iters else f" --max_iters={2 * c.run.max_iters}"
        place = shlex.quote(str(run_dir))
        lines = [f"continue: fastgpt train --init_from=resume --out_dir={place}{more}"]
        if known:
            lines.insert(0, f"sample:   fastgpt sample --out_dir={place}")
        else:
            lines.append(
                "no sample: these token files have no tokenizer; if you know it, continue with "
                "--tokenizer=gpt2 --vocab_file=FILE"
            )
        print("", *lines, sep="\n")


def _print_sample(loop: Loop, dataset: Dataset) -> None:
    """Prints text that follows "def ", or of other data the first token."""
    c, tokenizer = loop.config, dataset.tokenizer
    assert tokenizer is not None
    prompt = dataset.val.gather(np.zeros(1, dtype=np.int64), 1)[0].tolist()
    if c.data.dataset == "python_stdlib" and not c.data.input:
        prompt = tokenizer.encode("def ").tolist()
    sampling, n = Sampling(temperature=0.8, top_k=200), c.log.sample_tokens
    batch = BatchGenerator(loop.trainer.model, 1, len(prompt) + n, sampling)
    ids = [*prompt, *(tokens[0] for tokens in batch.stream([prompt], n, [c.run.seed]))]
    # A model with more ids than its data, such as nanoGPT's 50,304, may draw one without a text.
    text = tokenizer.decode([i for i in ids if i < tokenizer.vocab_size])
    print(f"\n--- sample {'-' * 61}")
    print(on_screen(text.strip()))
    print("-" * 72)
