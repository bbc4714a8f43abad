"""What the losses tell the rest of the program."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt_kernels.ops.loss.cross_entropy import cross_entropy
from fastgpt_kernels.ops.loss.linear import linear_cross_entropy
from fastgpt_kernels.record import Case, Random, Record, Sizes, Work

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
    vocab_size: int | None = None,
) -> Tensor:  # fmt: skip
    """The same of x @ weight.T, without the logits of padding: weight's rows past vocab_size."""
    logits = F.linear(x, weight[:vocab_size].to(x.dtype))
    return eager_cross_entropy(logits, targets, ignore_index, reduction)


def _with_targets(s: Sizes, *inputs: Tensor) -> Case:
    """Random classes, with one row that does not count."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(s.vocab_size, (s.tokens,), generator=generator)
    targets[s.tokens // 2] = -1
    arguments = {"targets": targets.to(inputs[0].device), "vocab_size": s.vocab_size}
    return Case([*inputs], arguments)


def _case(s: Sizes, random: Random) -> Case:
    x, weight = random(s.tokens, s.n_embd), random(s.padded_vocab_size, s.n_embd) * 0.1
    return _with_targets(s, x, weight)


def _calls(s: Sizes, random: Random) -> list[Case]:
    """Training, in several chunks of which the last is a short one, and evaluation."""
    case = replace(_case(s, random), masters=(1,))
    return [
        replace(case, hints={"chunk_tokens": -(-s.tokens // 48) * 16}),  # aligned, as long ones are
        replace(case, gradients=False),
    ]


def _cross_entropy_case(s: Sizes, random: Random) -> Case:
    return _with_targets(s, random(s.tokens, s.padded_vocab_size))


def _work(s: Sizes, itemsize: int) -> dict[str, Work]:
    """Three products; the logits written, read, overwritten by their gradient, and read twice."""
    logits = 1.0 * s.tokens * s.padded_vocab_size
    return {"both": Work(6 * logits * s.n_embd, 5 * logits * itemsize)}


def _cross_entropy_work(s: Sizes, itemsize: int) -> dict[str, Work]:
    return {"both": Work(0, 2.0 * s.tokens * s.padded_vocab_size * itemsize)}


RECORDS = {
    "linear_cross_entropy": Record(
        "linear_cross_entropy", {"eager": eager, "triton": linear_cross_entropy}, _case, _work,
        kernels=KERNELS, part="head", item="cross entropy", calls=_calls, few_tokens=512, often=1,
    ),
    "cross_entropy": Record(
        "cross_entropy", {"eager": eager_cross_entropy, "triton": cross_entropy},
        _cross_entropy_case, _cross_entropy_work,
        kernels=KERNELS, part="head", item="cross entropy",
    ),
}  # fmt: skip
