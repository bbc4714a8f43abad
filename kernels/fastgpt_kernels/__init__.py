"""Fused Triton kernels for GPT-2-class models, usable in any PyTorch model.

    from fastgpt_kernels import attention, layer_norm, cross_entropy

This module is the table of ops. It imports neither PyTorch nor Triton, since a function is loaded
with its module on first use. On a CPU tensor, and without Triton, a function runs its reference of
the same name in `fastgpt_kernels.reference`. If Triton is not installed, one warning says so.
"""

# ruff: noqa: F401 - __getattr__ exports these names
from __future__ import annotations

import functools
import importlib
import sys
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt_kernels.attention import attention
    from fastgpt_kernels.bias_gelu import bias_gelu
    from fastgpt_kernels.cross_entropy import cross_entropy
    from fastgpt_kernels.layer_norm import add_layer_norm, layer_norm
    from fastgpt_kernels.linear_cross_entropy import linear_cross_entropy
    from fastgpt_kernels.mlp import mlp

__version__ = "0.2.0"


@dataclass(frozen=True)
class Op:
    """Row of the table of ops.

    module   the module of the function, which has the op's name, and of `SPECS` (see registry.py)
    about    the help text of the flag `--op.NAME`
    choices  the flag's implementations besides auto
    flag     False for an op that fastgpt's model does not call
    """

    module: str
    about: str
    choices: tuple[str, ...] = ("triton", "eager")
    flag: bool = True


OPS: dict[str, Op] = {
    "attention": Op(
        "attention",
        "Causal self-attention; hopper is for sm_90; cudnn and flash are PyTorch's own.",
        choices=("triton", "eager", "hopper", "cudnn", "flash"),
    ),
    "layer_norm": Op("layer_norm", "The first norm."),
    "add_layer_norm": Op("layer_norm", "Residual addition and the norm behind it."),
    "bias_gelu": Op("bias_gelu", "The MLP's bias and GELU."),
    "mlp": Op(
        "mlp",
        "The MLP; hopper, for sm_90, and cublaslt have GELU in the matmuls.",
        choices=("eager", "hopper", "cublaslt"),
    ),
    "linear_cross_entropy": Op("linear_cross_entropy", "The head and the loss."),
    "cross_entropy": Op("cross_entropy", "The loss alone, of logits.", flag=False),
}
__all__ = [*OPS]


class _Package(ModuleType):
    """Package in which an op's name is its function, also after its module was imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_module = name in OPS and isinstance(value, ModuleType)
        super().__setattr__(name, getattr(value, name) if is_module else value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(importlib.import_module(f"{__name__}.{OPS[name].module}"), name)
    globals()[name] = function
    if not importlib.import_module("fastgpt_kernels.launch").HAS_TRITON:
        _warn_without_triton()
    return function


@functools.cache
def _warn_without_triton() -> None:
    message = "fastgpt_kernels: triton is not installed, so every function runs its reference"
    warnings.warn(message, stacklevel=3)
