"""GELU for the tools."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fastgpt_kernels.ops.gelu.op import bias_gelu
from fastgpt_kernels.ops.gelu.record import SPECS
from fastgpt_kernels.specs import Model, Use, recorded


def uses(m: Model) -> Iterator[Use]:
    """Also a prompt of odd length, whose model has its biases rounded."""
    width = 4 * m.n_embd

    def prompt() -> Tensor:
        bias = m.activation(width) if m.bias else None
        return bias_gelu(m.activation(5, width), bias, m.approximate)

    yield from recorded(SPECS["bias_gelu"], m)
    yield Use("bias_gelu", prompt, trains=False)
