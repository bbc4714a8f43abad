"""What bench.kernels compares: the ops, their sizes, who computes them, and the fp64 truth.

A provider maps leaves to outputs; its backward is autograd's. `collect` brings outputs and
gradients of every provider of a case into one form, a list of tensors that `oracle` gives in fp64.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgpt_kernels as ours

Tensors = list[Tensor]


def split_results(outputs: Tensors, gradients: Tensors) -> Tensors:
    return [*outputs, *gradients]


@dataclass
class Provider:
    """forward(*leaves) -> outputs; where `leaves` is given they are made from the case's inputs."""

    name: str
    forward: Callable[..., Any]
    leaves: Callable[[Tensors], Tensors] = lambda inputs: inputs
    dys: Callable[[Tensors], Tensors] = lambda dys: dys
    collect: Callable[[Tensors, Tensors], Tensors] = split_results


@dataclass
class Case:
    """One op at one size. `work` is FLOPs or bytes by pass; passes: forward, backward or both."""

    name: str
    size: str
    inputs: Tensors  # floating-point ones that need gradients
    dys: Tensors  # one gradient an output
    providers: list[Provider]
    oracle: Callable[[], Tensors]
    unit: str  # "TFLOP/s" or "GB/s"
    work: dict[str, float]
    skipped: dict[str, str] = field(default_factory=dict)  # provider -> why it is not here
    pick: Callable[[Tensors], Tensors] = lambda results: results  # what the oracle speaks of
    owned: bool = False  # inputs are handed over as results of an op, fresh for every call


def run_oracle(fn: Callable[..., Any], inputs: Tensors, dys: Tensors) -> Tensors:
    """Outputs and gradients of `fn` in float64."""
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    y = fn(*leaves)
    outputs = list(y) if isinstance(y, tuple) else [y]
    gradients = torch.autograd.grad(outputs, leaves, [dy.double() for dy in dys])
    return [*(y.detach() for y in outputs), *gradients]


def compiled(case: Case, fn: Callable[..., Any], device: torch.device) -> None:
    """Add torch.compile of `fn`, on a GPU."""
    if device.type == "cuda":
        case.providers.append(Provider("torch.compile", torch.compile(fn, fullgraph=True)))
    else:
        case.skipped["torch.compile"] = "not timed on the CPU"


def late(make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """The function that `make` returns, made at its first call.

    Another library's import can fail in any way; made late, its failure is that provider's own.
    """
    made: list[Callable[..., Any]] = []

    def forward(*leaves: Tensor) -> Any:
        if not made:
            made.append(make())
        return made[0](*leaves)

    return forward


def installed(
    case: Case,
    name: str,
    package: str,
    device: torch.device,
    make: Callable[[], Callable[..., Any]],
) -> None:
    """Add another library's function where its package is installed, on a GPU."""
    if importlib.util.find_spec(package) is None:
        case.skipped[name] = "not installed"
    elif device.type != "cuda":
        case.skipped[name] = "needs a GPU"
    else:
        case.providers.append(Provider(name, late(make)))


def attention(device: torch.device, size: int = 0) -> Case:
    """Packed qkv in, (B, T, C) out, causal; and SDPA's kernels alone, on separate q, k, v.

    `size` is T, at an equal number of tokens.
    """
    B, T, H, D = (64, 1024, 12, 64) if device.type == "cuda" else (2, 64, 2, 32)
    B, T = (max(2, B * T // size), size) if size else (B, T)
    C, dtype = H * D, torch.bfloat16 if device.type == "cuda" else torch.float32
    qkv = torch.randn(B, T, 3 * C, device=device, dtype=dtype)
    dy = torch.randn(B, T, C, device=device, dtype=dtype)

    def heads(x: Tensor) -> Tensor:
        return x.view(x.shape[0], T, H, D).transpose(1, 2)

    def eager(qkv: Tensor) -> Tensor:
        q, k, v = map(heads, qkv.split(C, dim=2))
        logits = (q @ k.transpose(-2, -1)) / D**0.5
        hidden = torch.ones(T, T, dtype=torch.bool, device=device).triu(1)
        p = logits.masked_fill(hidden, float("-inf")).softmax(-1)
        return (p @ v).transpose(1, 2).reshape(qkv.shape[0], T, C)

    def packed(backend: SDPBackend) -> Callable[[Tensor], Tensor]:
        def forward(qkv: Tensor) -> Tensor:
            q, k, v = map(heads, qkv.split(C, dim=2))
            with sdpa_kernel([backend]):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return y.transpose(1, 2).reshape(B, T, C)

        return forward

    def alone(backend: SDPBackend) -> Provider:
        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        def flat(x: Tensor) -> Tensor:
            return x.transpose(1, 2).reshape(B, T, C)

        return Provider(
            f"SDPA {NAMES[backend]}, kernel alone",
            forward,
            leaves=lambda inputs: [heads(x).contiguous() for x in inputs[0].split(C, dim=2)],
            dys=lambda dys: [heads(dys[0]).contiguous()],
            collect=lambda y, grads: [flat(y[0]), torch.cat([flat(g) for g in grads], 2)],
        )

    def pick(results: Tensors) -> Tensors:
        return [t[[0, -1]] for t in results]

    flops = 2.0 * B * T * T * C
    case = Case(
        "attention",
        f"B={B} T={T} {H}x{D} causal {str(dtype)[6:]}",
        [qkv],
        [dy],
        [
            Provider("fastgpt", lambda x: ours.attention(x, H)),
            Provider("fastgpt, deterministic", lambda x: ours.attention(x, H, deterministic=True)),
            Provider("eager", eager),
        ],
        lambda: run_oracle(eager, pick([qkv]), pick([dy])),
        "TFLOP/s",
        {"forward": flops, "backward": 2.5 * flops},
        pick=pick,
    )
    NAMES = {SDPBackend.FLASH_ATTENTION: "flash", SDPBackend.CUDNN_ATTENTION: "cuDNN"}
    for backend, name in NAMES.items():
        if device.type == "cuda":
            case.providers += [Provider(f"SDPA {name}", packed(backend)), alone(backend)]
        else:
            case.skipped[f"SDPA {name}"] = "needs a GPU"
    if device.type == "cuda":
        case.providers.append(Provider("FlexAttention", late(lambda: flex_attention(T, H))))
    else:
        case.skipped["FlexAttention"] = "needs a GPU"
    return case


def flex_attention(T: int, H: int) -> Callable[[Tensor], Tensor]:
    """PyTorch's FlexAttention with a causal block mask, compiled as it wants to be."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, T, T, device="cuda")

    def forward(qkv: Tensor) -> Tensor:
        B, _, C3 = qkv.shape
        q, k, v = (x.view(B, T, H, -1).transpose(1, 2) for x in qkv.split(C3 // 3, dim=2))
        y = flex_attention(q, k, v, block_mask=mask)
        return y.transpose(1, 2).reshape(B, T, C3 // 3)

    return torch.compile(forward)


def layer_norm(device: torch.device, size: int = 0) -> Case:
    M, C = (65536, size or 768) if device.type == "cuda" else (64, size or 96)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, dy = torch.randn(2, M, C, device=device).to(dtype)
    weight, bias = torch.randn(2, C, device=device).to(dtype)  # one dtype: torch wants it so

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (C,), weight, bias)

    def liger_kernel() -> Callable[..., Any]:
        from liger_kernel.ops.layer_norm import (  # type: ignore[import-not-found]
            LigerLayerNormFunction,
        )

        return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, 1e-5)

    size = x.element_size()
    case = Case(
        "layer_norm",
        f"{M} x {C} {str(dtype)[6:]}",
        [x, weight, bias],
        [dy],
        [Provider("fastgpt", ours.layer_norm), Provider("eager", eager)],
        lambda: run_oracle(eager, [x, weight, bias], [dy]),
        "GB/s",
        {"forward": 2.0 * M * C * size, "backward": 3.0 * M * C * size},
    )
    compiled(case, eager, device)
    installed(case, "liger-kernel", "liger_kernel", device, liger_kernel)
    return case


def add_layer_norm(device: torch.device, size: int = 0) -> Case:
    M, C = (65536, size or 768) if device.type == "cuda" else (64, size or 96)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, residual, dy, d_residual_out = torch.randn(4, M, C, device=device).to(dtype)
    weight, bias = torch.randn(2, C, device=device).to(dtype)
    inputs = [x, residual, weight, bias]

    def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        s = x + residual
        return F.layer_norm(s, (C,), weight, bias), s

    def oracle() -> Tensors:
        """The sum is rounded, as every provider does: what they add to that is compared."""
        s = (x + residual).double()
        y, dx, dweight, dbias = run_oracle(
            lambda s, w, b: F.layer_norm(s, (C,), w, b), [s, weight, bias], [dy]
        )
        dx = dx + d_residual_out.double()
        return [y, s, dx, dx, dweight, dbias]

    size = x.element_size()
    case = Case(
        "add_layer_norm",
        f"{M} x {C} {str(dtype)[6:]}",
        inputs,
        [dy, d_residual_out],
        [Provider("fastgpt", ours.add_layer_norm), Provider("eager", eager)],
        oracle,
        "GB/s",
        {"forward": 4.0 * M * C * size, "backward": 4.0 * M * C * size},
    )
    compiled(case, eager, device)
    return case


def bias_gelu(device: torch.device, size: int = 0) -> Case:
    M, C = (65536, size or 3072) if device.type == "cuda" else (64, size or 384)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, dy = torch.randn(2, M, C, device=device).to(dtype)
    bias = torch.randn(C, device=device).to(dtype)

    def eager(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias, approximate="tanh")

    size = x.element_size()
    case = Case(
        "bias_gelu",
        f"{M} x {C} {str(dtype)[6:]}",
        [x, bias],
        [dy],
        [Provider("fastgpt", ours.bias_gelu), Provider("eager", eager)],
        lambda: run_oracle(eager, [x, bias], [dy]),
        "GB/s",
        {"forward": 2.0 * M * C * size, "backward": 3.0 * M * C * size},
    )
    compiled(case, eager, device)
    return case


def cross_entropy(device: torch.device, size: int = 0) -> Case:
    """Loss and gradient together: where the gradient is computed is each provider's business."""
    M, V = (65536, size or 50304) if device.type == "cuda" else (64, size or 500)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    logits = torch.randn(M, V, device=device, dtype=dtype)
    targets = torch.randint(V, (M,), device=device)
    rows = [0, 1, M // 2, M - 1]

    def eager(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets)

    def in_fp32(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets)

    def liger_kernel() -> Callable[..., Any]:
        from liger_kernel.transformers import (  # type: ignore[import-not-found]
            LigerCrossEntropyLoss,
        )

        loss = LigerCrossEntropyLoss()
        return lambda logits: loss(logits, targets)

    def quack() -> Callable[..., Any]:
        from quack.cross_entropy import cross_entropy  # type: ignore[import-not-found]

        return lambda logits: cross_entropy(logits, targets, reduction="mean")

    def oracle() -> Tensors:
        """A few rows' gradient and the whole loss, chunk by chunk: fp64 logits do not fit."""
        total = torch.zeros((), dtype=torch.float64, device=device)
        for part, t in zip(logits.split(2048), targets.split(2048), strict=True):
            total += F.cross_entropy(part.double(), t, reduction="sum")
        few = logits[rows].double()
        gradient = (few.softmax(1) - F.one_hot(targets[rows], V)) / M
        return [total / M, gradient]

    case = Case(
        "cross_entropy",
        f"{M} x {V} {str(dtype)[6:]}",
        [logits],
        [torch.ones((), device=device)],
        [
            Provider("fastgpt", lambda x: ours.cross_entropy(x, targets)),
            Provider("eager", eager),
            Provider("eager, in fp32", in_fp32),
        ],
        oracle,
        "GB/s",
        {"both": 2.0 * M * V * logits.element_size()},
        pick=lambda results: [results[0], results[1][rows]],
        owned=True,
    )
    compiled(case, in_fp32, device)
    installed(case, "quack", "quack", device, quack)
    installed(case, "liger-kernel", "liger_kernel", device, liger_kernel)
    return case


CASES = {f.__name__: f for f in (attention, layer_norm, add_layer_norm, bias_gelu, cross_entropy)}
