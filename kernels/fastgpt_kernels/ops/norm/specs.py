"""The layer norms for the tools."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from fastgpt_kernels.ops.norm.record import SPECS
from fastgpt_kernels.specs import Model, Use, recorded


def _first(call: Callable[[], Any]) -> Any:
    return call()[0]


def uses(m: Model) -> Iterator[Use]:
    """Also a prompt of odd length, and the last norm's stream, which nobody reads."""

    def call(norm: Callable[..., Any], streams: int) -> Any:
        inputs = [m.activation(5, m.n_embd) for _ in range(streams)]
        return norm(*inputs, m.parameter(m.n_embd), m.optional(m.n_embd))

    for streams, (name, op) in enumerate(SPECS.items(), 1):
        yield from recorded(op, m)
        yield Use(name, partial(call, op.triton, streams), trains=False)
    if m.dropout:  # without it, that backward pass is layer_norm's
        for use in recorded(SPECS["add_layer_norm"], m):
            yield replace(use, often=0, call=partial(_first, use.call))
