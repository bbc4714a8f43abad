"""Models of any size on the fused ops, without memory or a GPU: fake tensors.

Fake tensors have shapes and dtypes only. The registered ops' own fakes say what comes out, so what
autograd keeps, and which matmuls run, is what a GPU would see. They pose as CPU tensors (autograd
of CUDA ones needs a CUDA build), and as fp16 where bf16 is meant: as many bytes.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.model.kernels import Kernels, Selected
from fastgpt_kernels import launch
from fastgpt_kernels.registry import model_specs


def fused_table(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """The Triton ops, made to believe that they are on a GPU."""
    monkeypatch.setattr(launch, "use_kernel", lambda x: True)
    functions = {op.name: op.triton for op in model_specs()}
    choices = tuple(Selected(op.name, op.standard, "fake") for op in model_specs())
    return Kernels(functions, choices)


def fake_model(shape: ModelShape, table: Kernels | None, monkeypatch: pytest.MonkeyPatch) -> GPT:
    """Call it, and use what it gives, under a FakeTensorMode; `table` None: the eager ops."""
    for layer in (torch.nn.Linear, torch.nn.Embedding):  # there is nothing to initialise
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    return GPT(shape, 0.0, table, torch.float16)


def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs kernels on CPU tensors, in Triton's interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(launch, "INTERPRETED", True)


class Reduce:
    """An object whose pickle, once it is loaded, makes a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


__all__ = ["FakeTensorMode", "Reduce", "fake_model", "fused_table", "interpreted"]
