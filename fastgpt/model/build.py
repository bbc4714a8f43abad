"""From a config to a model that can be trained or asked: the only place that puts one together."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from fastgpt.config.schema import Config
from fastgpt.model import ops
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt_kernels.registry import Sizes


def sizes_of(config: Config, vocab_size: int) -> Sizes:
    """What the ops of a model of this config are asked about."""
    shape = ModelShape.of(config.model, vocab_size)
    return shape.sizes(config.optim.batch_size, config.model.dropout)


def choose(config: Config, vocab_size: int, machine: Machine) -> ops.OpTable:
    """The ops that a model of this config is made with. Raises UserError as `build` does."""
    sizes, wish = sizes_of(config, vocab_size), ops.Wish(config.system.kernels, vars(config.op))
    return ops.choose(machine.device, machine.torch_dtype, sizes, wish)


def set_precision(config: Config, machine: Machine) -> None:
    """How fp32 matrices are multiplied and sums are ordered, for the whole process.

    In float32 products are exact unless TF32 is asked for: it is what others are held against.
    With --deterministic=True sums have one order: attention's backward pass takes the kernels that
    have one, the embedding's sorts its tokens, cuBLAS keeps its workspaces apart (which it reads
    from the environment once, before its first product).
    """
    if config.system.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # What is not written is not read either: tests poison it. Filling it would take time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    exact = machine.dtype == "float32" and not config.system.tf32
    torch.set_float32_matmul_precision("highest" if exact else "high")


def build(
    config: Config,
    vocab_size: int,
    machine: Machine,
    weights: Mapping[str, Tensor] | None = None,
) -> GPT:
    """The model on its device, with `weights` (a state dict), else drawn from --seed.

    Also sets, for the whole process, what `set_precision` says. Raises UserError if an op
    that was asked for cannot run here.
    """
    system, shape = config.system, ModelShape.of(config.model, vocab_size)
    set_precision(config, machine)
    table = choose(config, vocab_size, machine)
    model = GPT(shape, config.model.dropout, table, machine.torch_dtype)
    if weights is None:
        model.init_weights(config.run.seed)
    else:
        model.load_state_dict(weights)
    model.checkpointing = system.activation_checkpointing
    return model.to(machine.device)
