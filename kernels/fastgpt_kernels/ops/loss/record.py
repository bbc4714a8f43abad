"""What the losses tell the rest of the program."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt_kernels.ops.loss.cross_entropy import cross_entropy
from fastgpt_kernels.ops.loss.linear import linear_cross_entropy
from fastgpt_kernels.registry import (
    Cost,
    ExampleInputs,
    Implementation,
    OpSpec,
    Random,
    Sizes,
    triton_unsupported,
)

KERNELS = ("cross_entropy_kernel", "cross_entropy_scale_kernel")


def eager_cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int = -1, reduction: str = "mean",
    vocab_size: int | None = None,
) -> Tensor:  # fmt: skip
    """In fp32, whatever logits (..., V) is; columns past vocab_size are padding."""
    logits = logits[..., :vocab_size].flatten(0, -2).float()
    targets, shape = targets.flatten(), targets.shape
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)
    return loss.view(shape) if reduction == "none" else loss


def eager(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -1, reduction: str = "mean",
    vocab_size: int | None = None, chunk_tokens: int | None = None,
) -> Tensor:  # fmt: skip
    """The same of x @ weight.T, without the logits of padding: weight's rows past vocab_size."""
    logits = F.linear(x, weight[:vocab_size].to(x.dtype))
    return eager_cross_entropy(logits, targets, ignore_index, reduction)


def _with_targets(s: Sizes, *inputs: Tensor) -> ExampleInputs:
    """Random classes, with one row that does not count."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(s.vocab_size, (s.tokens,), generator=generator)
    targets[s.tokens // 2] = -1
    arguments = {"targets": targets.to(inputs[0].device), "vocab_size": s.vocab_size}
    return ExampleInputs([*inputs], arguments)


def _examples(s: Sizes, random: Random) -> list[ExampleInputs]:
    """Training, in several chunks of which the last is a short one, and evaluation."""
    x, weight = random(s.tokens, s.n_embd), random(s.padded_vocab_size, s.n_embd) * 0.1
    example = replace(_with_targets(s, x, weight), fp32_inputs=(1,))
    chunks = {"chunk_tokens": -(-s.tokens // 48) * 16}  # aligned, as long ones are
    return [
        replace(example, arguments=example.arguments | chunks),
        replace(example, gradients=False),
    ]


def _cross_entropy_examples(s: Sizes, random: Random) -> list[ExampleInputs]:
    return [_with_targets(s, random(s.tokens, s.padded_vocab_size))]


def _cost(s: Sizes, itemsize: int) -> dict[str, Cost]:
    """Three products; the logits written, read, overwritten by their gradient, and read twice."""
    logits = 1.0 * s.tokens * s.padded_vocab_size
    return {"both": Cost(6 * logits * s.n_embd, 5 * logits * itemsize)}


def _cross_entropy_cost(s: Sizes, itemsize: int) -> dict[str, Cost]:
    return {"both": Cost(0, 2.0 * s.tokens * s.padded_vocab_size * itemsize)}


SPECS = {
    "linear_cross_entropy": OpSpec(
        "linear_cross_entropy",
        {
            "eager": Implementation(eager),
            "triton": Implementation(linear_cross_entropy, triton_unsupported),
        },
        _examples, _cost,
        kernels=KERNELS, category="head", label="cross entropy", few_tokens=512, calls_per_step=1,
    ),
    "cross_entropy": OpSpec(
        "cross_entropy",
        {
            "eager": Implementation(eager_cross_entropy),
            "triton": Implementation(cross_entropy, triton_unsupported),
        },
        _cross_entropy_examples, _cross_entropy_cost,
        kernels=KERNELS, category="head", label="cross entropy",
    ),
}  # fmt: skip
