"""The cross entropy for the tools."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels.ops.loss.cross_entropy import cross_entropy
from fastgpt_kernels.ops.loss.linear import linear_cross_entropy
from fastgpt_kernels.ops.loss.record import SPECS
from fastgpt_kernels.specs import Model, Use, recorded


def uses(m: Model) -> Iterator[Use]:
    """Also targets that begin within a row of tokens, as those of a single sequence do; and the
    loss alone at the width of 124M only, of logits that are an op's result.
    """
    options: dict[str, Any] = {"vocab_size": m.vocab_size}

    def targets(first: int) -> Tensor:
        return torch.empty(first + m.tokens, dtype=torch.int64, device="meta")[first:]

    def head() -> Tensor:
        x, weight = m.activation(m.tokens, m.n_embd), m.parameter(m.padded_vocab_size, m.n_embd)
        return linear_cross_entropy(x, weight, targets(1), **options)

    def loss(reduction: str) -> Tensor:
        logits = m.activation(m.tokens, m.padded_vocab_size) * 1
        return cross_entropy(logits, targets(0), reduction=reduction, **options)

    yield from recorded(SPECS["linear_cross_entropy"], m)
    for trains in (True, False):
        yield Use("linear_cross_entropy", head, trains)
    for reduction in ("mean", "none") if m.n_embd == 768 else ():
        yield Use("cross_entropy", partial(loss, reduction))
