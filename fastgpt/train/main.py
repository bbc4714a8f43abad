"""A training run: what has to be there before the loop starts, and after it ends."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch

from fastgpt.config.schema import Config, PrepareConfig
from fastgpt.data.prepare import ensure
from fastgpt.data.tokens import open_dataset
from fastgpt.errors import UserError
from fastgpt.model import ops
from fastgpt.model.device import (
    DTYPES,
    resolve_compile,
    resolve_device,
    resolve_dtype,
    set_matmul_precision,
)
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.model.ops import Wish
from fastgpt.storage import checkpoint, run
from fastgpt.train import console, graph, memory, parallel, resume
from fastgpt.train.loop import Loop
from fastgpt.train.parallel import Ranks
from fastgpt.train.resume import Progress
from fastgpt.train.step import Trainer
from fastgpt.weights import source


def train(config: Config, name: str) -> int:
    """Run a training run to its end, or to a signal. Returns the process's exit code.

    `config` is changed to what was resolved (device, dtype, compile); `name` ends up in the name
    of a new run's folder. Raises UserError where the run cannot be done as asked.
    """
    system = config.system
    parallel.check_launch(config)
    device = parallel.local_device(resolve_device(system.device))
    with parallel.join(config, device) as ranks:
        return _train(config, name, device, ranks)


def _train(config: Config, name: str, device: torch.device, ranks: Ranks) -> int:
    """`train` on one of the ranks."""
    system, resuming = config.system, config.run.init_from == "resume"
    system.device = str(device)
    with ranks.together():
        system.dtype = cast(Any, resolve_dtype(system.dtype, device))
        system.compile = resolve_compile(system.compile, device)
        graph.check(config, device)
        if system.max_autotune and not system.compile:
            raise UserError("--max_autotune=True: is torch.compile's; give --compile=True with it")
        folder = ensure(PrepareConfig(**vars(config.data))) if ranks.first else Path()
    folder = ranks.gather(folder)[0]
    with ranks.together():
        dataset = open_dataset(folder)
        given = source.start_from(config, dataset)
        for split in (dataset.train, dataset.val):
            split.require(config.model.block_size)
        vocab_size = source.vocabulary(config, dataset)
    m = config.model
    shape = ModelShape(m.n_layer, m.n_head, m.n_embd, m.block_size, vocab_size, m.bias, m.gelu)
    set_matmul_precision(exact=system.dtype == "float32" and not system.tf32)
    dtype = DTYPES[system.dtype]
    sizes = shape.sizes(config.optim.batch_size, m.dropout)
    table = ops.choose(device, dtype, sizes, Wish(system.kernels, vars(config.op)))
    model = GPT(shape, m.dropout, table, dtype).init_weights(config.run.seed)
    if given is not None:
        model.load_state_dict(given.tensors)
        del given
    model.to(device)
    model.checkpointing = system.activation_checkpointing

    trainer = Trainer(model, config, device, ranks)

    resuming = resuming or parallel.restarted() and bool(checkpoint.names(Path(config.run.out_dir)))
    with ExitStack() as stack:
        run_dir = Path()
        with ranks.together():
            if ranks.first:
                if resuming:
                    run_dir = run.find(config.run.out_dir)
                else:
                    overwrite = config.run.overwrite or parallel.restarted()
                    run_dir = run.create(config.run.out_dir, name, overwrite)
                stack.enter_context(run.lock(run_dir))
        run_dir = ranks.gather(run_dir)[0]
        with ranks.together():
            start = resume.load(trainer, dataset, run_dir) if resuming else Progress()
            if start.step >= config.run.max_iters and not config.log.eval_only:
                raise UserError(
                    f"{run_dir}: already at step {start.step} of "
                    f"--max_iters={config.run.max_iters}; give more to go on"
                )
        if config.optim.auto_batch_size and not resuming:
            print(memory.fit_batch_size(trainer, config, config.optim.rows))
        with ranks.together():
            if ranks.first:
                run.save_config(run_dir, config)
                if dataset.tokenizer is not None:
                    dataset.tokenizer.save(run_dir)
        console.introduce(config, trainer, dataset, run_dir)
        loop = Loop(trainer, dataset, run_dir, start)
        code = loop.run(stack)
    if ranks.first:
        console.farewell(loop, dataset, run_dir)
    return code
