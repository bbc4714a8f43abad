"""The matrix products for the tools."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from fastgpt_kernels.configs import entries
from fastgpt_kernels.ops.matmul import configs
from fastgpt_kernels.ops.matmul.configs import runs_on
from fastgpt_kernels.ops.matmul.linear import linear
from fastgpt_kernels.ops.matmul.mlp import mlp
from fastgpt_kernels.ops.matmul.record import RECORDS
from fastgpt_kernels.record import Sizes
from fastgpt_kernels.specs import Model, Tunable, Use, tunable


def uses(m: Model) -> Iterator[Use]:
    """A block's four layers, the MLP's two as one op."""
    C, H = m.n_embd, 4 * m.n_embd

    def layer(inputs: int, outputs: int) -> Tensor:
        x, weight = m.activation(m.tokens, inputs), m.parameter(outputs, inputs)
        return linear(x, weight, m.optional(outputs))

    yield Use("linear", partial(layer, C, 3 * C), often=12)
    yield Use("linear", partial(layer, C, C), often=12, share=1 / 3)
    approximate = "none" if m.gelu == "erf" else "tanh"
    yield Use(
        "mlp",
        lambda: mlp(
            m.activation(m.tokens, C), m.parameter(H, C), m.optional(H), m.parameter(C, H),
            m.optional(C), approximate,
        ),
        often=12,
    )  # fmt: skip


def tunables(arch: str) -> Iterator[Tunable]:
    """GPT-2's c_attn, of 65,536 tokens: y for MATMUL, dx and dW for MATMUL_REDUCE.

    N = 768, which has the fewest tiles, is tuned by itself once the tables have an entry for it.
    """
    if not runs_on(arch):
        return
    candidates = [
        configs.matmul(m, n, 64, warps, stages, per_sm, halves)
        for m, n, warps, stages, per_sm in (
            (128, 256, 8, 3, 1), (128, 256, 8, 4, 1), (256, 128, 8, 3, 1), (256, 128, 8, 4, 1),
            (128, 128, 4, 3, 2), (128, 128, 4, 2, 2), (128, 128, 8, 3, 2), (128, 128, 8, 4, 1),
            (64, 256, 4, 3, 2),
        )
        for halves in (1, 2)
    ]  # fmt: skip
    for table, backward in (("MATMUL", False), ("MATMUL_REDUCE", True)):
        for key in entries(getattr(configs, table), arch):
            yield tunable(
                RECORDS["linear"], arch, table, key, Sizes(64, 1024), candidates, backward=backward
            )
