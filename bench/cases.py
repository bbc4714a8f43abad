"""What bench.kernels compares: an op at a size, who computes it, and the fp64 truth.

A case has an op of `fastgpt_kernels`, random inputs, the op in eager PyTorch and the work of each
pass. The truth is the op's reference in fp64; who else computes the op is in `bench/rivals.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import rivals
from bench.rivals import Provider, Tensors
from fastgpt_kernels.registry import Sizes, normal, spec, specs

PIECE = 1 << 26  # values of a tensor that fp64 has in memory at a time


@dataclass
class Case:
    """One op at one size. It is called with `inputs`, of which the last `shared` are weights that
    all rows have in common, and `extras`. `work` is FLOPs or bytes by pass: forward, backward or,
    for a loss, both together.
    """

    op: str  # of fastgpt_kernels
    size: str  # in words; the dtype is added
    inputs: Tensors  # floating-point ones that need gradients
    dys: Tensors  # one gradient an output
    work: dict[str, float]
    unit: str = "TFLOP/s"  # or "GB/s"
    shared: int = 0
    extras: tuple[Any, ...] = ()  # tensors among them have a row a row
    eager: Callable[..., Any] | None = None  # of inputs and extras; None: the op table's
    kept: Sequence[int] | None = None  # rows that the truth speaks of; None: all
    exact: Tensors | None = None  # the truth's inputs, if they are not `inputs`
    owned: bool = False  # inputs are handed over as results of an op, fresh for every call
    name: str = ""  # of the result's rows; "": op
    providers: list[Provider] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # provider -> why it is not here

    def __post_init__(self) -> None:
        self.name = self.name or self.op
        self.size += f" {str(self.inputs[0].dtype).removeprefix('torch.')}"
        self.keep = torch.zeros(len(self.inputs[0]), dtype=torch.bool)
        self.keep[slice(None) if self.kept is None else list(self.kept)] = True

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    @property
    def is_loss(self) -> bool:
        return self.dys[0].ndim == 0

    def bound(self, fn: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """`fn`, a function with the op's signature (default: eager), of the inputs alone."""
        fn = fn or self.eager or spec(self.op).eager
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
        fn = partial(spec(self.op).reference, **options)
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
    op = spec(case.op)
    case.providers.append(Provider("fastgpt", case.bound(op.triton)))
    case.providers.append(Provider("eager", case.bound()))
    rivals.add(case)
    if without:
        case.skipped[without] = "left out"
        case.providers = [p for p in case.providers if p.name != without]
    return case


# --- the ops -------------------------------------------------------------------------------------


def random(device: torch.device, *shapes: tuple[int, ...]) -> Tensors:
    """Normal values in the dtype of measurements: bf16, on a CPU fp32."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def of(op: str, sizes: Sizes, device: torch.device, label: str, dys: Tensors, **more: Any) -> Case:
    """The op's own inputs at a model's sizes, and the work that its record says this is."""
    known, (like,) = spec(op), random(device, ())
    made = known.example_inputs(sizes, normal(device))[0]
    inputs = [x.to(like) for x in made.inputs]
    shared = sum(len(x) != len(inputs[0]) for x in inputs)
    work = known.cost(sizes, like.itemsize)
    unit = "TFLOP/s" if any(w.flops for w in work.values()) else "GB/s"
    return Case(
        op, label, inputs, dys, {kind: w.flops or w.bytes for kind, w in work.items()}, unit,
        shared, **{"extras": tuple(made.arguments.values())[:1], **more},
    )  # fmt: skip


def attention(device: torch.device, size: int = 0) -> Case:
    """Packed qkv in, (B, T, C) out, causal. `size` is T, at an equal number of tokens."""
    B, T, H, D = (64, 1024, 12, 64) if device.type == "cuda" else (2, 64, 2, 32)
    B, T, C = (max(2, B * T // size), size, H * D) if size else (B, T, H * D)
    # The op table's eager implementation is PyTorch's fused one: a rival here.
    return of(
        "attention", Sizes(B, T, H, C, bias=False), device, f"B={B} T={T} {H}x{D} causal",
        random(device, (B, T, C)), eager=single_ops, kept=(0, B - 1),
    )  # fmt: skip


def single_ops(qkv: Tensor, n_head: int) -> Tensor:
    """Causal attention as nanoGPT has it without flash attention."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)
    hidden = torch.ones(T, T, dtype=torch.bool, device=qkv.device).triu(1)
    p = (
        (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5)
        .masked_fill(hidden, float("-inf"))
        .softmax(-1)
    )
    return (p @ v).transpose(1, 2).reshape(B, T, C3 // 3)


def plain(op: str, device: torch.device, size: int = 0) -> Case:
    """Any other op of the model, on 65,536 tokens; `size` is the model's width."""
    M, C = (65536, size or 768) if device.type == "cuda" else (64, size or 96)
    case = of(op, Sizes(1, M, 1, C), device, "", [])
    rows, columns = case.inputs[0].shape
    with torch.no_grad():
        y = case.bound()(*case.inputs)
    y = y if isinstance(y, tuple) else (y,)
    case = replace(case, size=f"{rows} x {columns}", dys=random(device, *[t.shape for t in y]))
    if len(y) > 1:  # all round the sum: what they add to that error is compared
        x, residual, *weights = case.inputs
        case.exact = [x + residual, torch.zeros_like(x), *weights]
    return case


def loss(op: str, device: torch.device, size: int = 0, tokens: int = 32768) -> Case:
    """Loss and gradients together: when a gradient is computed is each provider's business.

    `size` is the vocabulary. Every row counts.
    """
    M, C, V = (tokens, 768, size or 50304) if device.type == "cuda" else (64, 32, size or 500)
    one = torch.ones((), device=device)
    case = of(op, Sizes(1, M, 1, C, V, V), device, f"{M} x {C} -> {V}", [one])
    case.extras = (case.extras[0].clamp(min=0),)
    return case


def loss_alone(op: str, device: torch.device, size: int = 0) -> Case:
    """`loss` of logits, which it may overwrite; the truth has a few rows' gradients."""
    case = loss(op, device, size, tokens=65536)
    M, V = case.inputs[0].shape
    few = (0, 1, M // 2, M - 1)
    return replace(case, size=f"{M} x {V}", eager=F.cross_entropy, kept=few, owned=True)


CASES: dict[str, Callable[..., Case]] = {
    **{op.name: partial(plain, op.name) for op in specs("model")},
    "cross_entropy": partial(loss_alone, "cross_entropy"),
    "linear_cross_entropy": partial(loss, "linear_cross_entropy"),
} | {"attention": attention}
