"""Decoding for the tools: what is compiled ahead of time. Its configs are not tuned yet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fastgpt_kernels.ops.decode.attention import decode_attention
from fastgpt_kernels.ops.decode.linear import decode_linear
from fastgpt_kernels.specs import Model, Tunable, Use


def uses(m: Model) -> Iterator[Use]:
    """A token: attention to the cache, and the layers around it; at 124M of eight sequences too."""
    C, H = m.n_embd, 4 * m.n_embd

    def attend(rows: int) -> Tensor:
        k, v = m.activation(2, rows, m.n_head, m.block_size, m.head_dim).detach().unbind(0)
        positions = torch.empty(rows, dtype=torch.int64, device="meta")
        return decode_attention(m.activation(rows, 3 * C), k, v, positions)

    def layer(
        rows: int, inputs: int, outputs: int, norm: bool, residual: bool, gelu: str
    ) -> Tensor:
        x, weight = m.activation(rows, inputs), m.activation(outputs, inputs)
        gain, shift = (m.parameter(inputs), m.optional(inputs)) if norm else (None, None)
        bias = m.activation(outputs) if m.bias and outputs != m.vocab_size else None
        return decode_linear(
            x, weight, bias, norm_weight=gain, norm_bias=shift, activation=gelu,
            residual=m.activation(rows, outputs) if residual else None,
        )  # fmt: skip

    for rows in (1, 8) if m.n_embd == 768 else (1,):
        sizes = replace(m, batch_size=rows)
        yield Use("decode_attention", partial(attend, rows), False, sizes)
        for layer_of in (
            (C, 3 * C, True, False, "none"),
            (C, C, False, True, "none"),
            (C, H, True, False, m.gelu),
            (H, C, False, True, "none"),
            (C, m.vocab_size, True, False, "none"),
        ):
            yield Use("decode_linear", partial(layer, rows, *layer_of), False, sizes)


def tunables(arch: str) -> Iterator[Tunable]:
    """None yet."""
    return iter(())
