"""Construction of a model from a config."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from fastgpt.config.schema import Config
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.model.kernels import KernelOptions, Kernels, select
from fastgpt_kernels.registry import Sizes


def sizes_of(config: Config, vocab_size: int) -> Sizes:
    """Returns the sizes at which a model of this config calls its ops."""
    shape = ModelShape.of(config.model, vocab_size)
    return shape.sizes(config.optim.batch_size, config.model.dropout)


def select_kernels(config: Config, vocab_size: int, machine: Machine) -> Kernels:
    """Returns the kernels of a model of this config. Raises UserError as `build` does.

    Calls `set_precision` before: results of checks and of tuning are kept by it.
    """
    set_precision(config, machine)
    options = KernelOptions(config.system.kernels, vars(config.op))
    sizes = sizes_of(config, vocab_size)
    return select(machine.device, machine.torch_dtype, sizes, options, machine.compile)


def tune(config: Config) -> int:
    """Measures which implementation of each op is the fastest on this GPU, for `fastgpt tune`.

    Returns the exit code: 0 without a GPU too, so that a script may tune wherever it runs.
    """
    s = config.system
    machine = Machine.of(s.device, s.dtype, s.compile)
    if machine.device.type != "cuda":
        print(f"tune: nothing to tune on {machine.device}: every op runs eager there")
        return 0
    from fastgpt_kernels.tune import tune_model

    set_precision(config, machine)
    sizes = sizes_of(config, config.model.vocab_size)
    tune_model(machine.device, machine.torch_dtype, sizes, machine.compile)
    return 0


def set_precision(config: Config, machine: Machine) -> None:
    """Sets how fp32 matrices are multiplied and sums are ordered, for the whole process.

    float32 is the oracle, so its matmuls are exact unless --tf32=True. With --deterministic=True
    sums have one order: the embedding's gradient sorts its tokens, and cuBLAS keeps its workspaces
    apart (it reads the variable once, before its first matmul).
    """
    if config.system.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Filling outputs would take time, and no kernel reads what it has not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    exact = machine.dtype == "float32" and not config.system.tf32
    torch.set_float32_matmul_precision("highest" if exact else "high")


def build(
    config: Config,
    vocab_size: int,
    machine: Machine,
    weights: Mapping[str, Tensor] | None = None,
) -> GPT:
    """Returns the model on its device, with `weights` (a state dict), else drawn from --seed.

    Raises UserError if an implementation that a flag asks for cannot run here.
    """
    system, shape = config.system, ModelShape.of(config.model, vocab_size)
    kernels = select_kernels(config, vocab_size, machine)
    model = GPT(shape, config.model.dropout, kernels, machine.torch_dtype)
    if weights is None:
        model.init_weights(config.run.seed)
    else:
        model.load_state_dict(weights)
    model.checkpointing = system.activation_checkpointing
    return model.to(machine.device)
