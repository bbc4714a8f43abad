"""Self-check of an op's implementations against the reference, on the device at hand.

A kernel that is right elsewhere can be wrong or fail to compile on this GPU. The calls of a run are
checked forward and backward on few tokens, with its widths, vocabulary, dropout, biases and dtypes.
Checks run in child processes with a time limit, where a kernel may fail, hang or crash. What passed
is stored for this GPU, driver, PyTorch, Triton and kernel sources, and not checked again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import cache
from fastgpt_kernels.progress import describe_error
from fastgpt_kernels.registry import ExampleInputs, OpSpec, Sizes, differentiate, normal, spec
from fastgpt_kernels.worker import ask_all

LIMIT_S = 120.0  # per check, compilation included
# Relative error (Frobenius norm) that rounding to 8, 11 and 24 bits explains.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
# Kernels are compiled again for sequences that are not whole tiles of this many tokens (attention's
# longest), and for numbers of rows that are not multiples of ALIGNMENT.
TILE, ALIGNMENT = 128, 16
MOST_ROWS = 64  # of a micro-batch, whose variants are checked


@dataclass(frozen=True)
class Check:
    """Self-check of one implementation of an op on the calls of a model."""

    op: str
    implementation: str
    device: str
    dtype: str
    sizes: Sizes = Sizes()
    deterministic: bool = False
    precision: str = "highest"

    @classmethod
    def of(cls, op: str, name: str, at: torch.device, dtype: torch.dtype, sizes: Sizes) -> Check:
        """Returns the check of an implementation under this process's settings."""
        deterministic = torch.are_deterministic_algorithms_enabled()
        settings = deterministic, torch.get_float32_matmul_precision()
        return cls(op, name, str(at), str(dtype).removeprefix("torch."), sizes, *settings)

    @property
    def key(self) -> str:
        """Returns a name with a hash of the check without the index of the GPU."""
        text = json.dumps({**asdict(self), "device": self.device.partition(":")[0]}, sort_keys=True)
        return f"{self.op} {self.implementation} {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def adopt(self) -> None:
        """Takes over the settings of the process that made the check."""
        device = torch.device(self.device)
        if device.index is not None:
            torch.cuda.set_device(device)
        torch.use_deterministic_algorithms(self.deterministic, warn_only=True)
        torch.set_float32_matmul_precision(self.precision)

    def examples(self, timed: bool = False) -> list[ExampleInputs]:
        """Returns the calls in the dtypes of a run.

        Those to be timed are the run's. Those to be checked have few tokens, and no dropout if the
        implementation draws its own mask.
        """
        op, device, dtype = spec(self.op), torch.device(self.device), getattr(torch, self.dtype)
        few = [self.sizes] if timed else few_rows(self.sizes, op.few_tokens, op.variant)
        found = [example for sizes in few for example in op.example_inputs(sizes, normal(device))]
        if not timed and not op.implementations[self.implementation].follows_seed:
            found = [example.without_dropout() for example in found]
        return [example.rounded(dtype) for example in found]


def few_rows(
    sizes: Sizes, tokens: int, variant: Callable[[Sizes], Any] = lambda sizes: None
) -> list[Sizes]:
    """Returns the same model on about `tokens` tokens, for which the same kernels are compiled.

    A sequence has two tiles and the rest of the run's. The number of tokens is a multiple of
    ALIGNMENT if the run's is. Each `variant` that the model has at some micro-batch is there once,
    with as few sequences as it takes, since the micro-batch is chosen after the check.
    """
    B, T = sizes.batch_size, sizes.block_size
    length = T if T < 3 * TILE else 2 * TILE + T % TILE
    aligned = B * length % ALIGNMENT == 0
    least, most = min(B, max(1, tokens // length)), max(B, MOST_ROWS)
    few: dict[Any, Sizes] = {}
    for rows in range(least, most + 1):
        if (rows * length % ALIGNMENT == 0) == aligned:
            found = replace(sizes, batch_size=rows, block_size=length)
            few.setdefault(variant(found), found)
    wanted = {variant(replace(sizes, batch_size=rows)) for rows in range(1, most + 1)}
    return [few[v] for v in few if v in wanted] or [*few.values()][:1]


# --- One check, in a child process ---------------------------------------------------------------


def run(check: Check) -> str | None:
    """Returns why an implementation fails, or None if all its calls agree with the reference."""
    check.adopt()
    torch.set_float32_matmul_precision("highest")  # TF32 would put the reference itself off by 1e-3
    op = spec(check.op)
    return disagreement(op, op.implementations[check.implementation].function, check.examples())


def disagreement(
    op: OpSpec, function: Callable[..., Any], examples: Iterable[ExampleInputs]
) -> str | None:
    """Returns how a function differs from the op's reference in fp32, or None.

    Where algorithms have to be deterministic, it must not differ between two runs either.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    for example in examples:
        exact = [None if x is None else x.float() for x in example.inputs]
        with torch.enable_grad():
            want = differentiate(op.reference, replace(example, inputs=exact))
            try:
                got = differentiate(function, example)
                off = _error(got, want)
                again = differentiate(function, example) if deterministic else got
            except Exception as e:
                return f"does not run here ({describe_error(e)})"
        if not off <= max(TOLERANCE.get(x.dtype, 1e-4) for x in example.inputs if x is not None):
            return f"is off by {off:.2g} here"
        if not all(map(torch.equal, got, again)):
            return "differs from run to run here"
    return None


def _error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Returns the largest relative error, or NaN if one is NaN."""
    pairs = zip(got, want, strict=True)
    errors = torch.stack([(g.float() - w).norm() / w.norm() for g, w in pairs])
    return float("nan") if errors.isnan().any() else errors.max().item()


# --- Many checks ---------------------------------------------------------------------------------

# Results in this process. A failure is not kept longer, since its reason may be memory that other
# processes had taken.
_FOUND: dict[Check, str | None] = {}


def failures(checks: Sequence[Check]) -> dict[Check, str]:
    """Returns the reason of each check that fails, and stores those that pass."""
    if not checks:
        return {}
    section = cache.environment(torch.device(checks[0].device))
    passed = cache.load("self_check", section)
    _FOUND.update({c: None for c in checks if c not in _FOUND and c.key in passed})
    waiting = [c for c in dict.fromkeys(checks) if c not in _FOUND]
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    jobs = max(1, min(cores // 2, len(waiting), 8))  # compilation takes longer than the kernels
    _FOUND.update(zip(waiting, ask_all(run, waiting, LIMIT_S, jobs), strict=True))
    if agreed := {c.key: True for c in waiting if not _FOUND[c]}:
        cache.keep("self_check", section, agreed)
    return {c: reason for c in checks if (reason := _FOUND[c])}
