"""Attention for the tools: the variants to compile ahead of time, the configs to try."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels.configs import Config
from fastgpt_kernels.host import arch_of
from fastgpt_kernels.ops.attention.hopper.op import hopper_attention, refusal
from fastgpt_kernels.ops.attention.op import attention
from fastgpt_kernels.ops.attention.record import SPECS
from fastgpt_kernels.specs import Model, Tunable, Use, recorded


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


def _candidates(tma: tuple[int | None, ...]) -> list[Config]:
    return [
        Config(
            {"BLOCK_M": m, "BLOCK_N": n} | ({} if t is None else {"TMA_REDUCE": t}), warps, stages
        )
        for m, n in ((32, 64), (32, 128), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128))
        for warps in (4, 8)
        for stages in (1, 2, 3)
        for t in tma
    ]


def tunables(arch: str) -> Iterator[Tunable]:
    """The 16-bit tables without and with dropout."""
    tma = (0, 1) if arch.startswith("sm_") and int(arch[3:]) >= 90 else (0,)
    reductions: dict[str, tuple[int | None, ...]]
    reductions = {"FORWARD": (None,), "BACKWARD": tma, "KEY_VALUE": (0,), "QUERY": (None,)}
    for dropout in ("", "_DROPOUT"):
        for head in (64, 128):
            for name, tried in reductions.items():
                yield Tunable(name + dropout, head, _candidates(tried))
