"""Trainers of small models, and batches for them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.config.presets import laptop
from fastgpt.config.settings import replace
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.model.kernels import KernelOptions, select
from fastgpt.train.trainer import Trainer

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = ModelShape(2, 2, 32, 16, 50, bias=True)


def make_trainer(
    shape: ModelShape = SHAPE,
    kernels: str = "eager",
    dtype: str = "float32",
    device: torch.device = CPU,
    rows: int = 8,
    accumulation: int = 1,
    seed: int = 0,
    compile: bool = False,
    **settings,
) -> Trainer:
    """A trainer of `rows` rows per step, in `accumulation` micro-batches; settings as of flags."""
    size, machine = rows // accumulation, Machine(device, dtype, compile)
    split = {"batch_size": size, "gradient_accumulation_steps": accumulation}
    config = replace(laptop(), kernels=kernels, **split, **settings)
    dropout = config.model.dropout
    options = KernelOptions(kernels)
    table = select(device, machine.torch_dtype, shape.sizes(size, dropout), options)
    model = GPT(shape, dropout, table, machine.torch_dtype).init_weights(seed)
    return Trainer(model.to(device), config, machine)


def batch(step: int = 0, rows: int = 8, shape: ModelShape = SHAPE) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(shape.vocab_size, (rows, shape.block_size + 1), generator=generator)


def weights(t: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in t.model.parameters()]
