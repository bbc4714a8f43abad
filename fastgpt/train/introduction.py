"""Facts about a run that are printed before its first step, and `--dry_run=True`."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Collection
from pathlib import Path

import torch

from fastgpt.config import settings
from fastgpt.config.presets import PRESETS
from fastgpt.config.schema import Config, PrepareConfig
from fastgpt.data.corpora import CORPORA
from fastgpt.data.prepare import check_data
from fastgpt.data.token_files import open_dataset
from fastgpt.data.tokenizer import GPT2_VOCAB, parse_spec
from fastgpt.errors import UserError
from fastgpt.model.build import build
from fastgpt.model.device import Machine
from fastgpt.model.kernels import describe
from fastgpt.train import memory, optim
from fastgpt.train.distributed import Ranks
from fastgpt.train.metrics import count, duration
from fastgpt.train.trainer import Trainer
from fastgpt.weights.hugging_face import SIZES, read_config, shape_of_size


def changes(config: Config, name: str) -> set[str]:
    """Returns the settings that differ from the preset `name`; none if there is no such preset."""
    preset = PRESETS[name]() if name in PRESETS else config
    return {key for key, *_ in settings.differences(preset, config)}


def print_introduction(
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


def vocab_size(config: Config) -> int:
    """Returns the vocabulary's size of the prepared data, or else that of its tokenizer."""
    data = config.data
    with contextlib.suppress(UserError):
        if config.model.vocab_size or not data.input:
            folder = Path(data.data_dir, data.dataset)
            return config.model.vocab_size or open_dataset(folder).vocab_size
    own = CORPORA[data.dataset].tokenizer if data.dataset in CORPORA else "gpt2"
    kind, size = parse_spec(data.tokenizer or own)
    return size or {"byte": 256, "char": 65}.get(kind, GPT2_VOCAB)


def as_trained(config: Config) -> Config:
    """Returns the config with the shape of the weights it starts from, if that is known."""
    start, path = config.run.init_from, Path(config.run.weights)
    if start in SIZES:
        size = shape_of_size(start)
    elif start == "weights":
        size, _ = read_config((path if path.is_dir() else path.parent) / "config.json")
    else:
        return config
    block_size = min(config.model.block_size, size.block_size)
    return settings.replace(config, **{**vars(size), "block_size": block_size})


def dry_run(config: Config, name: str, machine: Machine, ranks: Ranks) -> None:
    """Prints the introduction of a run, its tokens and disk space, and on a GPU its time."""
    changed, config = changes(config, name), as_trained(config)
    vocabulary = vocab_size(config)
    model, batch_size = build(config, vocabulary, machine), config.optim.batch_size
    if config.optim.auto_batch_size and machine.device.type == "cuda":
        batch_size = memory.fastest_batch_size(model, config, machine, ranks)
    trainer = Trainer(model, config, machine, ranks, batch_size)
    try:
        check_data(PrepareConfig.of(config.data))
        data = config.data.input or config.data.dataset
    except UserError as e:
        data = str(e)
    print_introduction(trainer, data, "none: --dry_run=True", changed)
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
    c, rows = trainer.config, trainer.ranks.rows(trainer.config.optim.rows)
    shape = rows.stop - rows.start, c.model.block_size + 1
    tokens = torch.randint(trainer.model.shape.vocab_size, shape, device=trainer.device)
    micro_batch, began = tokens[: trainer.micro_batch], 0.0
    try:
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
    except torch.OutOfMemoryError as e:
        said = memory.out_of_memory(c, trainer.model, trainer.device, trainer.batch_size)
        raise UserError(said) from e
    return (time.perf_counter() - began) / 10
