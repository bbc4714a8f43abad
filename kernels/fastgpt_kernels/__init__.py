"""Fused Triton kernels for GPT-2-class models, usable in any PyTorch model.

    from fastgpt_kernels import attention, layer_norm, cross_entropy

Loaded on first use, so that `fastgpt_kernels.reference` works where Triton is not installed.
"""

from __future__ import annotations

import importlib
from typing import Any

_OPS = {
    "attention": "attention",
    "layer_norm": "layer_norm",
    "add_layer_norm": "layer_norm",
    "bias_gelu": "gelu",
    "cross_entropy": "cross_entropy",
    "linear_cross_entropy": "linear_cross_entropy",
}

__all__ = sorted(_OPS)


def __getattr__(name: str) -> Any:
    if name not in _OPS:
        raise AttributeError(f"module 'fastgpt_kernels' has no attribute {name!r}")
    # Importing the submodule binds its own name here (attention -> the module); put the function
    # in its place, so that `fastgpt_kernels.attention` is always the op.
    function = getattr(importlib.import_module(f"fastgpt_kernels.{_OPS[name]}"), name)
    globals()[name] = function
    return function
