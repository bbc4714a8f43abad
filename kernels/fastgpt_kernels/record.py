"""What an op tells the rest of the program about itself, so that nobody else knows it by name.

Each op's room has a `record.py` with its records; `record(name)` finds one. The
op table, the self-check, benchmarks and traces are written in terms of these.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import OPS, host, reference


@dataclass(frozen=True)
class Sizes:
    """A model and its micro-batch, as ops see them; GPT-2 124M's but for the rows."""

    batch_size: int = 2
    block_size: int = 256
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50257
    padded_vocab_size: int = 50304
    dropout: float = 0.0
    bias: bool = True
    gelu: str = "tanh"  # or "erf"

    @property
    def tokens(self) -> int:
        return self.batch_size * self.block_size

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def approximate(self) -> str:
        """The same GELU in PyTorch's words."""
        return "none" if self.gelu == "erf" else "tanh"


@dataclass(frozen=True)
class Case:
    """Inputs of one call: the differentiable ones in fp32, and the other arguments by name.

    inputs     None stands for what a call goes without, such as a bias
    masters    positions of the inputs that are fp32 in a run, whatever the activations are
    gradients  whether a run differentiates this call
    hints      arguments that only ours takes, and that change no result but by rounding
    keywords   names of the last inputs, which go by name
    ours       True: only ours makes this call, for it draws what others cannot repeat; False: only
               the others do; None: all do
    """

    inputs: list[Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    masters: Sequence[int] = ()
    gradients: bool = True
    hints: dict[str, Any] = field(default_factory=dict)
    keywords: Sequence[str] = ()
    ours: bool | None = None

    def call(self, function: Callable[..., Any], inputs: Sequence[Any]) -> Any:
        """The function's results, with `inputs` in place of the case's own."""
        places = len(inputs) - len(self.keywords)
        named = dict(zip(self.keywords, inputs[places:], strict=True))
        return function(*inputs[:places], **named, **self.arguments)


@dataclass(frozen=True)
class Work:
    """FLOPs (0: bound by memory) and bytes of one pass, each tensor moved once."""

    flops: float = 0.0
    bytes: float = 0.0


Random = Callable[..., Tensor]  # (*shape) -> N(0, 1) in fp32


def normal(device: torch.device, seed: int = 0) -> Random:
    """Random numbers on a device, the same for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, device=device)


def differentiate(function: Callable[..., Any], case: Case) -> list[Tensor]:
    """Results and gradients in fp32; all results are weighed by fixed random numbers."""
    leaves = [None if x is None else x.clone().requires_grad_(case.gradients) for x in case.inputs]
    out = case.call(function, leaves)
    outs = list(out) if isinstance(out, tuple) else [out]
    if case.gradients:
        weights = [normal(o.device, seed=1 + i)(*o.shape).to(o.dtype) for i, o in enumerate(outs)]
        # A number, for which autograd does not load torch.fx: that takes a second.
        sum((o * w).float().sum() for o, w in zip(outs, weights, strict=True)).backward()
    grads = [x.grad for x in leaves if x is not None and x.grad is not None]
    return [t.detach().float() for t in (*outs, *grads)]


def _needs_a_gpu(name: str, sizes: Sizes, device: torch.device) -> str:
    return "" if device.type == "cuda" else "no GPU"


@dataclass(frozen=True)
class Record:
    """One op.

    name             as in flags, `--op.NAME`, and in `fastgpt_kernels`
    implementations  by the name that a flag gives them. "eager" is plain PyTorch with the signature
                     of ours: it runs on every device, and is what the others are held against.
                     "triton" is ours
    case             inputs at a model's sizes, for benchmarks and tuning
    calls            every kind of call that a run of these sizes makes: widths, biases, dropout,
                     with and without gradients; if there is none, `case` is the only one
    few_tokens       how many tokens show what the op does with more of them; 0: its rows are few
    work             FLOPs and bytes of each pass ("forward", "backward", or "both" if the gradient
                     is computed with the result), from sizes and bytes an element
    kernels          names of its Triton kernels, as a profile shows them
    part             of a training step that it belongs to, as traces group it: attention, head,
                     linear, memory or optimizer
    item             what a trace calls it inside of that part
    limits           why ours cannot take these sizes and this dtype on this architecture ("sm_90";
                     "cpu" is Triton's interpreter); empty if it can
    limits_of        the same of further implementations of ours, by name
    library          whose fused kernel "eager" is already, if it is one: such an op is left only on
                     architectures on which ours was measured faster
    measured_faster  these architectures
    made_of          other ops that "eager" takes as keyword arguments
    often            how many times a training step of GPT-2 124M, 12 layers, calls it
    run              (implementation, case) -> all that has to agree between implementations
    others           (name, sizes, device) -> why an implementation besides eager and triton cannot
                     run there; empty if it can
    """

    name: str
    implementations: Mapping[str, Callable[..., Any]]
    case: Callable[[Sizes, Random], Case]
    work: Callable[[Sizes, int], dict[str, Work]]
    kernels: tuple[str, ...]
    part: str
    item: str = ""
    limits: Callable[[Sizes, torch.dtype, str], str] = lambda sizes, dtype, arch: ""
    limits_of: Mapping[str, Callable[[Sizes, torch.dtype, str], str]] = field(default_factory=dict)
    library: str = ""
    measured_faster: tuple[str, ...] = ()
    made_of: tuple[str, ...] = ()
    calls: Callable[[Sizes, Random], list[Case]] | None = None
    few_tokens: int = 4096
    often: int = 0
    run: Callable[[Callable[..., Any], Case], list[Tensor]] = differentiate
    others: Callable[[str, Sizes, torch.device], str] = _needs_a_gpu

    @property
    def eager(self) -> Callable[..., Any]:
        return self.implementations["eager"]

    @property
    def twin(self) -> Callable[..., Any]:
        """The specification: the function in `reference`, or eager if there is none."""
        return getattr(reference, self.name, self.eager)

    def cases(self, sizes: Sizes, random: Random) -> list[Case]:
        """What has to agree before a run of these sizes uses an implementation."""
        return [self.case(sizes, random)] if self.calls is None else self.calls(sizes, random)

    def refusal(
        self, sizes: Sizes, dtype: torch.dtype, arch: str, name: str = "triton"
    ) -> str:  # fmt: skip
        """Why ours cannot run so: its limits, and what no kernel can; empty if it can."""
        if arch == "sm_75" and dtype == torch.bfloat16:
            return "sm_75 has no bfloat16, only float16"
        limits = self.limits if name == "triton" else self.limits_of[name]
        return limits(sizes, dtype, arch)

    def obstacle(
        self, name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes, arch: str
    ) -> str:
        """Why an implementation cannot run on a device of this architecture; empty if it can."""
        if name == "eager":
            return ""
        if name != "triton" and name not in self.limits_of:
            return self.others(name, sizes, device)
        if not host.HAS_TRITON:
            return "triton is not installed"
        if device.type != "cuda" and not host.INTERPRETED:
            return "no GPU"
        return self.refusal(sizes, dtype, arch, name)

    def slower(self, arch: str) -> str:
        """Why an op that could run stays with a library, unmeasured; empty for all others."""
        if not self.library or arch in self.measured_faster:
            return ""
        return f"nothing measured faster than {self.library}"

    @property
    def ours(self) -> Callable[..., Any]:
        return self.implementations["triton"]


def record(name: str) -> Record:
    """An op's record; loads its room."""
    return importlib.import_module(f"{OPS[name].room}.record").RECORDS[name]


def record_of(registered: str) -> Record:
    """Of the op that a registered op is a part of: attention's of `attention_hopper_backward`."""
    return record(max((name for name in OPS if registered.startswith(name)), key=len))


def records(chosen_by: str | None = None) -> list[Record]:
    """All records, or those of the ops that one part of the program chooses."""
    return [record(n) for n, e in OPS.items() if chosen_by is None or e.chosen_by == chosen_by]
