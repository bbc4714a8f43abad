"""Registry of ops: one `OpSpec` per op, with its implementations, example inputs and cost.

`spec(name)` loads the op's module. Selection, the self-check, the benchmarks and the traces are
written in terms of these specs, so that no other file knows an op by name.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import OPS, launch, versions


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model and its micro-batch, by default GPT-2 124M's with few rows."""

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
        """GELU's form in PyTorch's words."""
        return "none" if self.gelu == "erf" else "tanh"


@dataclass(frozen=True)
class ExampleInputs:
    """Inputs of one call: the differentiable ones in fp32, and the other arguments by name.

    inputs       the differentiable inputs; None is an optional one that is left out, such as a bias
    arguments    the other arguments, by name
    fp32_inputs  positions of the inputs that stay fp32 if the activations have 16 bits
    gradients    True if a run differentiates this call
    keywords     names of the last inputs, which are passed by name
    """

    inputs: list[Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    fp32_inputs: Sequence[int] = ()
    gradients: bool = True
    keywords: Sequence[str] = ()

    def call(self, function: Callable[..., Any], inputs: Sequence[Any]) -> Any:
        """Returns the function's results, with `inputs` in place of the example's own."""
        positional = len(inputs) - len(self.keywords)
        named = dict(zip(self.keywords, inputs[positional:], strict=True))
        return function(*inputs[:positional], **named, **self.arguments)

    def outputs(self, function: Callable[..., Any], inputs: Sequence[Any]) -> list[Tensor]:
        """Returns the results of `call` as a list."""
        results = self.call(function, inputs)
        return list(results) if isinstance(results, tuple) else [results]

    def leaves(self) -> list[Any]:
        """Returns copies of the inputs, which require gradients if the call is differentiated."""
        inputs = [None if x is None else x.detach().clone() for x in self.inputs]
        return [None if x is None else x.requires_grad_(self.gradients) for x in inputs]

    def rounded(self, dtype: torch.dtype) -> ExampleInputs:
        """Returns the same call with inputs in `dtype`, except for those that stay fp32."""
        kept = self.fp32_inputs
        inputs = [x if x is None or i in kept else x.to(dtype) for i, x in enumerate(self.inputs)]
        return replace(self, inputs=inputs)

    def without_dropout(self) -> ExampleInputs:
        """Returns the same call without dropout."""
        kept = {k: v for k, v in self.arguments.items() if k not in ("dropout_p", "seed")}
        return replace(self, arguments=kept)


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes of one pass, each tensor moved once. 0 FLOPs means bound by memory."""

    flops: float = 0.0
    bytes: float = 0.0


Random = Callable[..., Tensor]  # (*shape) -> N(0, 1) in fp32


def normal(device: torch.device, seed: int = 0) -> Random:
    """Returns a source of random numbers on a device, seeded."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, device=device)


def differentiate(function: Callable[..., Any], example: ExampleInputs) -> list[Tensor]:
    """Returns results and gradients in fp32, for fixed random upstream gradients."""
    leaves = example.leaves()
    outs = example.outputs(function, leaves)
    if example.gradients:
        weights = [normal(o.device, seed=1 + i)(*o.shape).to(o.dtype) for i, o in enumerate(outs)]
        # One number, for which autograd does not load torch.fx: that takes a second.
        sums = [(o * w).float().sum() for o, w in zip(outs, weights, strict=True)]
        torch.stack(sums).sum().backward()
    grads = [x.grad for x in leaves if x is not None and x.grad is not None]
    return [t.detach().float() for t in (*outs, *grads)]


def triton_unsupported(sizes: Sizes, dtype: torch.dtype, arch: str) -> str | None:
    """Returns why no Triton kernel runs on an architecture, or None."""
    if not launch.HAS_TRITON:
        return "triton is not installed"
    if not launch.is_gpu(arch):
        return None if launch.INTERPRETED else "no GPU"
    if arch.startswith("gfx") or int(arch.removeprefix("sm_")) < 80:
        return f"the kernels are for NVIDIA GPUs from sm_80 on, not {arch}"
    return None


def gluon_unsupported(sizes: Sizes, dtype: torch.dtype, arch: str) -> str | None:
    """Returns why no Gluon kernel for Hopper runs, or None."""
    if reason := triton_unsupported(sizes, dtype, arch):
        return reason
    if arch != "sm_90":
        return f"hopper is for sm_90, not {arch}"
    if reason := _untested_triton(importlib.import_module("triton").__version__):
        return f"hopper: {reason}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"hopper is for bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None


@functools.cache
def _untested_triton(version: str) -> str | None:
    return versions.outside({"triton": version})


@dataclass(frozen=True)
class Implementation:
    """Implementation of an op.

    function            a function with the signature of the op's public one
    unsupported_reason  (sizes, dtype, architecture) -> the reason why it cannot run, or None
    follows_seed        False if it draws a dropout mask of its own, not that of `seed`
    """

    function: Callable[..., Any]
    unsupported_reason: Callable[[Sizes, torch.dtype, str], str | None] = lambda *_: None
    follows_seed: bool = True


def implementations(
    eager: Callable[..., Any],
    triton: Callable[..., Any],
    unsupported_reason: Callable[[Sizes, torch.dtype, str], str | None] = lambda *_: None,
) -> dict[str, Implementation]:
    """Returns the two implementations of an op with Triton kernels, given the kernels' limits."""

    def reason(sizes: Sizes, dtype: torch.dtype, arch: str) -> str | None:
        return triton_unsupported(sizes, dtype, arch) or unsupported_reason(sizes, dtype, arch)

    return {"eager": Implementation(eager), "triton": Implementation(triton, reason)}


def traffic(forward: int, backward: int, width: int = 1) -> Callable[[Sizes, int], dict[str, Cost]]:
    """Returns the cost of passes that move these numbers of tensors (B, T, width C)."""

    def cost(sizes: Sizes, itemsize: int) -> dict[str, Cost]:
        moved = float(width * sizes.tokens * sizes.n_embd * itemsize)
        return {"forward": Cost(0, forward * moved), "backward": Cost(0, backward * moved)}

    return cost


@dataclass(frozen=True)
class OpSpec:
    """Specification of an op.

    name             the name in the flag `--op.NAME` and in `fastgpt_kernels`
    implementations  by the flag's names: "eager" is plain PyTorch and runs on every device,
                     "triton" has the fused kernels
    example_inputs   (sizes, random) -> every kind of call that a run of these sizes makes, of which
                     benchmarks time the first
    cost             (sizes, bytes per element) -> FLOPs and bytes by pass: "forward", "backward",
                     or "both" if the gradient is computed with the result
    kernels          names of its Triton kernels, as a profile shows them
    category         the part of a training step: attention, head, memory or optimizer
    label            the name within that category, in traces
    calls_per_step   the number of calls in a training step of GPT-2 124M with 12 layers
    few_tokens       the number of tokens in the self-check
    variant          sizes -> a value that tells calls apart which launch other kernels, so that the
                     self-check launches the run's
    preferred        the default implementation by architecture, where it is not `standard`
    """

    name: str
    implementations: Mapping[str, Implementation]
    example_inputs: Callable[[Sizes, Random], list[ExampleInputs]]
    cost: Callable[[Sizes, int], dict[str, Cost]]
    kernels: tuple[str, ...]
    category: str
    label: str = ""
    calls_per_step: int = 0
    few_tokens: int = 4096
    variant: Callable[[Sizes], Any] = lambda sizes: None
    preferred: Mapping[str, str] = field(default_factory=dict)

    @property
    def reference(self) -> Callable[..., Any]:
        """The specification and the eager implementation."""
        return self.implementations["eager"].function

    @property
    def standard(self) -> str:
        """The implementation where kernels run: "triton", or "eager" if there is none."""
        return "triton" if "triton" in self.implementations else "eager"

    @property
    def triton(self) -> Callable[..., Any]:
        return self.implementations[self.standard].function

    def unsupported_reason(
        self, implementation: str, arch: str, dtype: torch.dtype, sizes: Sizes
    ) -> str | None:
        """Returns why an implementation cannot run on an architecture of `arch_on`, or None."""
        return self.implementations[implementation].unsupported_reason(sizes, dtype, arch)

    def default(self, arch: str, dtype: torch.dtype, sizes: Sizes) -> tuple[str, str]:
        """Returns the implementation without a result of `fastgpt tune`, and the reason."""
        reason = triton_unsupported(sizes, dtype, arch)
        reason = reason or self.unsupported_reason(self.standard, arch, dtype, sizes)
        if not reason and launch.is_gpu(arch) and arch not in launch.SMS:
            reason = f"no kernel was ever compiled for {arch}; --kernels=triton tries"
        reason = reason or versions.untested()
        if not reason and self.standard == "eager":
            reason = "no other is measured to be faster"
        if reason:
            return "eager", reason
        name = self.preferred.get(arch, "triton")
        if name == "triton" or self.unsupported_reason(name, arch, dtype, sizes):
            return "triton", "fused kernels"
        return name, f"fused kernels for {arch}"


def spec(name: str) -> OpSpec:
    """Returns an op's spec and loads its module."""
    return importlib.import_module(f"fastgpt_kernels.{OPS[name].module}").SPECS[name]


def specs() -> list[OpSpec]:
    """Returns the specs of all ops."""
    return [spec(name) for name in OPS]


def model_specs() -> list[OpSpec]:
    """Returns the specs of the ops that fastgpt's model calls."""
    return [spec(name) for name, op in OPS.items() if op.flag]
