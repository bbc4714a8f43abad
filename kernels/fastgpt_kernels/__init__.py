"""Fused Triton kernels for GPT-2-class models, usable in any PyTorch model.

    from fastgpt_kernels import attention, layer_norm, cross_entropy

This is the table of what the package exports. It imports neither PyTorch nor Triton: a function is
loaded with its module when it is first asked for. On a CPU tensor, and if Triton is not installed,
it runs its reference in `fastgpt_kernels.reference`; the latter is said once, by a warning.
"""

# ruff: noqa: F401 - what is imported for type checkers is exported by __getattr__
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
    from fastgpt_kernels.tune import tune


@dataclass(frozen=True)
class Entry:
    """An op: the module with its public function and spec, and its line in `--help`.

    `chosen_by`: ops of the "model" have a flag with these `choices`, besides auto; "" are those for
    other people's models.
    """

    module: str
    about: str
    chosen_by: str = "model"
    choices: tuple[str, ...] = ("triton", "eager")

    @property
    def path(self) -> str:
        return f"fastgpt_kernels.{self.module}"


OPS: dict[str, Entry] = {
    "attention": Entry(
        "attention",
        "Causal self-attention; hopper is for sm_90; cudnn, flash and math are PyTorch's own, fa3 "
        "and fa4 FlashAttention's packages.",
        choices=("triton", "eager", "cudnn", "flash", "math", "hopper", "fa3", "fa4"),
    ),
    "layer_norm": Entry("layer_norm", "The first norm."),
    "add_layer_norm": Entry("layer_norm", "Residual addition and the norm behind it."),
    "bias_gelu": Entry("bias_gelu", "The MLP's bias and GELU."),
    "linear_cross_entropy": Entry("linear_cross_entropy", "The head and the loss."),
    "cross_entropy": Entry("cross_entropy", "The loss alone, of logits.", chosen_by=""),
}
_PATHS = {name: op.path for name, op in OPS.items()} | {"tune": "fastgpt_kernels.tune"}
__all__ = [*_PATHS]


class _Package(ModuleType):
    """This package, in which a function's name is no module, also after its module was imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_module = name in _PATHS and isinstance(value, ModuleType)
        super().__setattr__(name, getattr(value, name) if is_module else value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _PATHS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(importlib.import_module(_PATHS[name]), name)
    globals()[name] = function
    if not importlib.import_module("fastgpt_kernels.launch").HAS_TRITON:
        _warn_without_triton()
    return function


@functools.cache
def _warn_without_triton() -> None:
    message = "fastgpt_kernels: no triton here, so every function runs its reference in PyTorch"
    warnings.warn(message, stacklevel=3)
