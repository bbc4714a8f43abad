"""What bench.kernels compares: an op at a size, who computes it, and the fp64 truth.

A case has an op of `fastgpt_kernels`, random inputs, the op in eager PyTorch and the work of each
pass. The truth is the op's reference in fp64; who else computes the op is in `bench/rivals.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgpt_kernels as ours
from bench import rivals, setup
from bench.rivals import Provider, Tensors
from fastgpt.model import ops
from fastgpt_kernels import reference
from fastgpt_kernels.matmul_kernels import runs_on

PIECE = 1 << 26  # values of a tensor that fp64 has in memory at a time


@dataclass
class Case:
    """One op at one size; `op` is called with `inputs`, of which the last `shared` are weights that
    all rows have in common, and `extras`. `work` is FLOPs or bytes by pass: forward, backward or,
    for a loss, both together.
    """

    op: str  # of fastgpt_kernels
    size: str
    inputs: Tensors  # floating-point ones that need gradients
    dys: Tensors  # one gradient an output
    eager: Callable[..., Any]  # of inputs and extras
    unit: str  # "TFLOP/s" or "GB/s"
    work: dict[str, float]
    shared: int = 0
    extras: tuple[Any, ...] = ()  # tensors among them have a row a row
    kept: Sequence[int] | None = None  # rows that the truth speaks of; None: all
    exact: Tensors | None = None  # the truth's inputs, if they are not `inputs`
    owned: bool = False  # inputs are handed over as results of an op, fresh for every call
    name: str = ""  # of the result's rows; "": op
    providers: list[Provider] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # provider -> why it is not here

    def __post_init__(self) -> None:
        self.name = self.name or self.op
        kept = range(len(self.inputs[0])) if self.kept is None else self.kept
        self.keep = torch.zeros(len(self.inputs[0]), dtype=torch.bool)
        self.keep[list(kept)] = True

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    @property
    def is_loss(self) -> bool:
        return self.dys[0].ndim == 0

    def bound(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`, a function with the op's signature, of the inputs alone."""
        return lambda *inputs: fn(*inputs, *self.extras)

    def pick(self, results: Tensors) -> Tensors:
        """Of outputs and gradients, what the truth speaks of."""
        keep = self.keep.to(self.device)
        return [t[keep] if rows else t for t, rows in zip(results, self._by_row(), strict=True)]

    def _by_row(self) -> list[bool]:
        """Whether outputs and gradients have a row a row; others are sums over the rows."""
        rows = len(self.inputs) - self.shared
        return [not self.is_loss] * len(self.dys) + [True] * rows + [False] * self.shared

    def truth(self) -> Tensors:
        """Outputs and gradients in fp64, as `pick` has them.

        In pieces of rows, which do not depend on each other: fp64 of all may not fit in memory.
        """
        options = {"reduction": "sum"} if self.is_loss else {}
        fn = partial(getattr(reference, self.op), **options)
        inputs, M, by_row = self.exact or self.inputs, len(self.keep), self._by_row()
        found: list[Tensors] = [[] for _ in by_row]
        split = len(inputs) - self.shared
        widest = max(inputs[0][0].numel(), *(len(w) for w in inputs[split:]), 1)
        sums = self.is_loss or self.shared  # over all rows
        rows = torch.arange(M) if sums else self.keep.nonzero().flatten()
        for some in rows.split(max(1, PIECE // widest)):
            here, keep = some.to(self.device), self.keep[some].to(self.device)
            leaves = [x[here] for x in inputs[:split]] + inputs[split:]
            leaves = [x.detach().double().requires_grad_() for x in leaves]
            y = fn(*leaves, *(x[here] if isinstance(x, Tensor) else x for x in self.extras))
            y = list(y) if isinstance(y, tuple) else [y / M if self.is_loss else y]
            dys = [dy.double() if self.is_loss else dy[here].double() for dy in self.dys]
            both = [*(x.detach() for x in y), *torch.autograd.grad(y, leaves, dys)]
            for t, row, held in zip(both, by_row, found, strict=True):
                if row:
                    held.append(t[keep])
                else:
                    held[:] = [held[0] + t if held else t]
        return [
            torch.cat(held) if row else held[0] for row, held in zip(by_row, found, strict=True)
        ]


def complete(case: Case, without: str = "") -> Case:
    """The case with all who compute it here: fastgpt, eager PyTorch and the op's rivals, of which
    one can be left out."""
    fn, arch = getattr(ours, case.op), setup.arch(case.device)
    if case.op in ("linear", "mlp") and not (arch and runs_on(arch)):
        case.skipped["fastgpt"] = f"{arch} has no TMA" if arch else "needs a GPU"
    else:
        case.providers.append(Provider("fastgpt", case.bound(fn)))
    case.providers.append(Provider("eager", case.bound(case.eager)))
    rivals.add(case)
    if without:
        case.skipped[without] = "left out"
        case.providers = [p for p in case.providers if p.name != without]
    return case


def sizes(device: torch.device, gpu: tuple[int, ...], cpu: tuple[int, ...], size: int) -> list[int]:
    """The sizes of a case here, the last of them `size` unless that is 0."""
    usual = gpu if device.type == "cuda" else cpu
    return [*usual[:-1], size or usual[-1]]


def random(device: torch.device, *shapes: tuple[int, ...]) -> Tensors:
    """Normal values in the dtype of measurements: bf16, on a CPU fp32."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def dtype_of(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def attention(device: torch.device, size: int = 0) -> Case:
    """Packed qkv in, (B, T, C) out, causal. `size` is T, at an equal number of tokens."""
    B, T, H, D = (64, 1024, 12, 64) if device.type == "cuda" else (2, 64, 2, 32)
    B, T, C = (max(2, B * T // size), size, H * D) if size else (B, T, H * D)
    qkv, dy = random(device, (B, T, 3 * C), (B, T, C))

    def eager(qkv: Tensor, n_head: int) -> Tensor:
        """Single ops, as nanoGPT without flash attention."""
        q, k, v = qkv.view(-1, T, 3, n_head, D).permute(2, 0, 3, 1, 4)
        hidden = torch.ones(T, T, dtype=torch.bool, device=qkv.device).triu(1)
        p = ((q @ k.transpose(-2, -1)) / D**0.5).masked_fill(hidden, float("-inf")).softmax(-1)
        return (p @ v).transpose(1, 2).reshape(-1, T, C)

    flops = 2.0 * B * T * T * C
    work = {"forward": flops, "backward": 2.5 * flops}
    label = f"B={B} T={T} {H}x{D} causal {dtype_of(qkv)}"
    return Case(
        "attention", label, [qkv], [dy], eager, "TFLOP/s", work, extras=(H,), kept=[0, B - 1]
    )


def layer_norm(device: torch.device, size: int = 0) -> Case:
    M, C = sizes(device, (65536, 768), (64, 96), size)
    x, dy, *weights = random(device, (M, C), (M, C), (C,), (C,))
    work = {"forward": 2.0 * x.nbytes, "backward": 3.0 * x.nbytes}
    label = f"{M} x {C} {dtype_of(x)}"
    return Case("layer_norm", label, [x, *weights], [dy], ops.layer_norm, "GB/s", work, shared=2)


def add_layer_norm(device: torch.device, size: int = 0) -> Case:
    """In the truth the sum is rounded, as all round it: what they add to that is compared."""
    M, C = sizes(device, (65536, 768), (64, 96), size)
    x, residual, *dys = random(device, *[(M, C)] * 4)
    weights = random(device, (C,), (C,))
    inputs = [x, residual, *weights]
    exact = [x + residual, torch.zeros_like(x), *weights]
    work = {"forward": 4.0 * x.nbytes, "backward": 4.0 * x.nbytes}
    label, eager = f"{M} x {C} {dtype_of(x)}", ops.add_layer_norm
    return Case(
        "add_layer_norm", label, inputs, dys, eager, "GB/s", work, shared=2, exact=exact
    )  # fmt: skip


def bias_gelu(device: torch.device, size: int = 0) -> Case:
    M, C = sizes(device, (65536, 3072), (64, 384), size)
    x, dy, bias = random(device, (M, C), (M, C), (C,))
    work = {"forward": 2.0 * x.nbytes, "backward": 3.0 * x.nbytes}
    label = f"{M} x {C} {dtype_of(x)}"
    return Case("bias_gelu", label, [x, bias], [dy], ops.bias_gelu, "GB/s", work, shared=1)


def cross_entropy(device: torch.device, size: int = 0) -> Case:
    """Loss and gradient together: when the gradient is computed is each provider's business."""
    M, V = sizes(device, (65536, 50304), (64, 500), size)
    (logits,), one = random(device, (M, V)), torch.ones((), device=device)
    extras, kept = (torch.randint(V, (M,), device=device),), [0, 1, M // 2, M - 1]
    work, label = {"both": 2.0 * logits.nbytes}, f"{M} x {V} {dtype_of(logits)}"
    return Case(
        "cross_entropy", label, [logits], [one], F.cross_entropy, "GB/s", work,
        extras=extras, kept=kept, owned=True,
    )  # fmt: skip


def linear_cross_entropy(device: torch.device, size: int = 0) -> Case:
    """Loss and both gradients together; `size` is the vocabulary."""
    M, C, V = sizes(device, (32768, 768, 50304), (64, 32, 500), size)
    x, weight = random(device, (M, C), (V, C))
    inputs, one = [x, weight / C**0.5], torch.ones((), device=device)
    extras = (torch.randint(V, (M,), device=device),)
    work, label = {"both": 6.0 * M * C * V}, f"{M} x {C} -> {V} {dtype_of(x)}"
    return Case(
        "linear_cross_entropy", label, inputs, [one], ops.linear_cross_entropy, "TFLOP/s", work,
        shared=1, extras=extras,
    )  # fmt: skip


def linear(device: torch.device, M: int, K: int, N: int, name: str = "linear") -> Case:
    """y (M, N) = x (M, K) @ weight (N, K).T; of large ones the truth has the first rows."""
    x, weight, dy = random(device, (M, K), (N, K), (M, N))
    flops = 2.0 * M * K * N
    work = {"forward": flops, "backward": 2 * flops}
    label, kept = f"{M} x {K} -> {N} {dtype_of(x)}", None if M * N <= 1 << 22 else range(512)
    return Case(
        "linear", label, [x, weight / K**0.5], [dy], ops.linear, "TFLOP/s", work,
        shared=1, kept=kept, name=name,
    )  # fmt: skip


def mlp(device: torch.device, M: int, C: int) -> Case:
    """The MLP (M, C) -> (M, C), GELU and biases included, all gradients."""
    H = 4 * C
    x, fc, fc_bias, proj, proj_bias, dy = random(device, (M, C), (H, C), (H,), (C, H), (C,), (M, C))
    inputs = [x, fc / C**0.5, fc_bias, proj / H**0.5, proj_bias]
    flops = 4.0 * M * C * H
    work = {"forward": flops, "backward": 2 * flops}
    label = f"{M} x {C} -> {H} -> {C} {dtype_of(x)}"
    return Case("mlp", label, inputs, [dy], ops.mlp, "TFLOP/s", work, shared=4)


CASES: dict[str, Callable[..., Case]] = {
    f.__name__: f
    for f in (
        attention, layer_norm, add_layer_norm, bias_gelu, cross_entropy, linear_cross_entropy,
    )
}  # fmt: skip
