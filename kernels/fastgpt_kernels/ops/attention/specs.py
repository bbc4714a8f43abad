"""Attention for the tools: the variants to compile ahead of time, the configs to try."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels.launch import arch_of
from fastgpt_kernels.ops.attention.hopper.op import hopper_attention, refusal
from fastgpt_kernels.ops.attention.op import attention
from fastgpt_kernels.ops.attention.record import SPECS
from fastgpt_kernels.specs import Model, Use, recorded


def uses(m: Model) -> Iterator[Use]:
    """Also gradients that are the same every time, and a prompt of odd length."""
    options = {"dropout_p": m.dropout, "seed": torch.empty(1, dtype=torch.int64, device="meta")}

    def call(T: int, **options: Any) -> Tensor:
        return attention(m.activation(m.batch_size, T, 3 * m.n_embd), m.n_head, **options)

    yield from recorded(SPECS["attention"], m)
    yield Use("attention", partial(call, m.block_size, deterministic=True, **options))
    yield Use("attention", partial(call, m.block_size - 1), trains=False)
    if m.name == "gpt2" and not refusal(m, m.dtype, arch_of(torch.empty(0, device="meta"))):
        yield from _hopper_uses(m)


def _hopper_uses(m: Model) -> Iterator[Use]:
    """All that the kernels for Hopper are compiled for: head dims, full attention, fp16."""
    for n_head in (m.n_head, m.n_head // 2):
        for dtype, causal in (
            (torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)
        ):  # fmt: skip
            if not causal and n_head < m.n_head:
                continue  # left to plain Triton

            def call(
                n_head: int = n_head, dtype: torch.dtype = dtype, causal: bool = causal
            ) -> Tensor:
                shape = (m.batch_size, m.block_size, 3 * m.n_embd)
                qkv = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
                return hopper_attention(qkv, n_head, causal=causal)

            yield Use("attention", call)
