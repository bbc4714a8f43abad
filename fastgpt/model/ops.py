"""The op table: which function computes each of the model's fused ops, and why that one.

Chosen once, when the run starts; the model only ever calls `table.attention(...)` and so on. All
rows of an op have the same signature (that of `fastgpt_kernels`), so a checkpoint never depends on
the choice:

    eager    plain PyTorch, right on every device; under torch.compile Inductor fuses it
    triton   fastgpt_kernels, on a GPU
    cudnn    attention only: PyTorch's SDPA on cuDNN
    flash    attention only: PyTorch's SDPA on its flash attention

By itself (`--kernels=auto`) a GPU gets Triton where the shapes allow it and the op agrees with the
eager one on this very device (`selfcheck.py`), and everything else gets eager. Matrix products and
the optimizer are different: there eager is a library's own kernel, which they leave only on GPUs
where measurements say so (`MEASURED_FASTER`), or for --op.linear=triton.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt.errors import UserError
from fastgpt.model.selfcheck import disagreement


def attention(
    qkv: Tensor,
    n_head: int,
    *,
    causal: bool = True,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Multi-head attention of a packed projection: qkv (B, T, 3*C) -> (B, T, C).

    Dropout draws from PyTorch's generator; `seed` is for kernels that draw their own.
    """
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // (3 * n_head)).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=causal, scale=scale)
    return y.transpose(1, 2).reshape(B, T, C3 // 3)


def _sdpa_attention(backend: SDPBackend, *args, **kwargs) -> Tensor:
    with sdpa_kernel([backend]):
        return attention(*args, **kwargs)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, in x's dtype.

    With weights of another dtype (fp32 masters, bf16 activations) all of it is computed in theirs.
    """
    return F.layer_norm(x.to(weight.dtype), x.shape[-1:], weight, bias, eps).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """residual_out = x + residual; (layer_norm(residual_out), residual_out)."""
    residual_out = x + residual
    return layer_norm(residual_out, weight, bias, eps), residual_out


def bias_gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """gelu(x + bias); approximate: "tanh" (GPT-2) or "none" (erf)."""
    return F.gelu(x if bias is None else x + bias.to(x.dtype), approximate=approximate)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) or None -> x W^T + bias (..., N), in x's dtype.

    fp32 masters are rounded on the way in; their gradients come back fp32.
    """
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    approximate: str = "tanh",
    *,
    linear: Callable[..., Tensor] = linear,
    bias_gelu: Callable[..., Tensor] = bias_gelu,
) -> Tensor:
    """gelu(x fc_weight^T + fc_bias) proj_weight^T + proj_bias, made of two other ops of the table.

    The first bias is left to the GELU op, which reads the activation anyway.
    """
    h = bias_gelu(linear(x, fc_weight), fc_bias, approximate)
    return linear(h, proj_weight, proj_bias)


def adamw(groups: Any, **options: Any) -> torch.optim.AdamW:
    """AdamW of parameter groups in one pass over all tensors, where PyTorch has that (not on mps).

    Fused, `grad_scale` divides the gradients and `found_inf` calls off a step, without a copy of
    either to the host.
    """
    fused = groups[0]["params"][0].device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, fused=fused, **options)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -1,
    reduction: str = "mean",
    vocab_size: int | None = None,
) -> Tensor:
    """Cross entropy of softmax(x @ weight.T) with targets; x (M, C), weight (V, C), targets (M,).

    Rows of weight past vocab_size are padding: they take no part, so they get no probability and no
    gradient. The loss is fp32 whatever x is.
    """
    logits = F.linear(x, weight if vocab_size is None else weight[:vocab_size])
    return F.cross_entropy(logits.float(), targets, ignore_index=ignore_index, reduction=reduction)


EAGER: dict[str, Callable] = {
    f.__name__: f
    for f in (
        attention,
        layer_norm,
        add_layer_norm,
        bias_gelu,
        linear,
        mlp,
        linear_cross_entropy,
        adamw,
    )
}
# The ops whose eager row is a library's fused kernel already.
LIBRARY = {"linear": "cuBLAS", "mlp": "cuBLAS", "adamw": "PyTorch's fused AdamW"}
# Architectures ("sm_90") on which `python -m bench gemms` and `bench ablate` found ours faster.
# These have not been run on any yet.
MEASURED_FASTER: dict[str, tuple[str, ...]] = {op: () for op in LIBRARY}
SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# What the Triton kernels take: `fastgpt_kernels.attention.HEAD_DIMS`, and one row to a program.
HEAD_DIMS = (32, 64, 80, 96, 128)
MAX_WIDTH = 8192


@dataclass(frozen=True)
class Choice:
    """One op's row: which implementation runs and the reason, for `doctor` and the run's log."""

    op: str
    implementation: str
    reason: str


@dataclass(frozen=True)
class OpTable:
    """The functions the model calls and the optimizer it is trained by, and why these."""

    attention: Callable[..., Tensor]
    layer_norm: Callable[..., Tensor]
    add_layer_norm: Callable[..., tuple[Tensor, Tensor]]
    bias_gelu: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    mlp: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., Tensor]
    adamw: Callable[..., torch.optim.AdamW]
    choices: tuple[Choice, ...]

    def describe(self) -> str:
        """One line: implementations with the ops that run on them, and the reason."""
        groups: dict[tuple[str, str], list[str]] = {}
        for c in self.choices:
            groups.setdefault((c.implementation, c.reason), []).append(c.op)
        return "; ".join(f"{i} ({r}): {', '.join(ops)}" for (i, r), ops in groups.items())


def choose(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    head_dim: int = 64,
    width: int = 768,
    kernels: str = "auto",
    overrides: Mapping[str, str] | None = None,
) -> OpTable:
    """The op table for a device, activations of `dtype`, and a model's head dim and width.

    `kernels` is auto, triton or eager for all ops (for those of LIBRARY triton means auto);
    `overrides` names single ops' implementations. Raises UserError where what was asked for cannot
    run here.
    """
    functions: dict[str, Callable] = {}
    choices = []
    for op in EAGER:
        asked = (overrides or {}).get(op, "auto")
        flag = f"--op.{op}={asked}" if asked != "auto" else f"--kernels={kernels}"
        wish = asked if asked != "auto" else kernels
        if op in LIBRARY and asked == "auto" and kernels == "triton":
            wish = "auto"
        wanted = "triton" if wish == "auto" else wish
        obstacle = _obstacle(op, wanted, device, dtype, head_dim, width)
        name, reason = wish, flag
        if wish == "auto":
            obstacle = obstacle or _slower(op, device)
            name, reason = ("eager", obstacle) if obstacle else ("triton", "fused kernels")
        elif obstacle:
            raise UserError(f"{flag}: {obstacle}")
        function = _implementation(op, name)
        if name != "eager" and device.type == "cuda":
            wrong = disagreement(op, function, EAGER[op], device, dtype, head_dim)
            if wrong and wish != "auto":
                raise UserError(f"{flag}: {wrong}")
            if wrong:
                name, function, reason = "eager", EAGER[op], f"triton: {wrong}"
        if op == "mlp" and name == "eager":
            function = partial(mlp, linear=functions["linear"], bias_gelu=functions["bias_gelu"])
        functions[op] = function
        choices.append(Choice(op, name, reason))
    return OpTable(**functions, choices=tuple(choices))


def _slower(op: str, device: torch.device) -> str:
    """Why an op that could run stays with a library; empty for all others."""
    from fastgpt_kernels import _host

    arch = _host.arch(device.index or 0) if device.type == "cuda" else "cpu"
    if op not in LIBRARY or arch in MEASURED_FASTER[op]:
        return ""
    return f"nothing measured faster than {LIBRARY[op]}"


def _obstacle(
    op: str, name: str, device: torch.device, dtype: torch.dtype, head_dim: int, width: int
) -> str:
    """Why an implementation cannot run here; empty where it can."""
    if name == "eager":
        return ""
    if name in SDPA:
        return "" if device.type == "cuda" else "no GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from fastgpt_kernels import _host

    if device.type != "cuda" and not _host.INTERPRETED:
        return "no GPU"
    if op == "attention" and head_dim not in HEAD_DIMS:
        return f"head dim {head_dim} is none of {', '.join(map(str, HEAD_DIMS))}"
    if "layer_norm" in op and width > MAX_WIDTH:
        return f"width {width} is more than {MAX_WIDTH}"
    if op in ("linear", "mlp"):
        from fastgpt_kernels.matmul_kernels import runs_on

        if width % 8:
            return f"width {width} is not a multiple of 8"
        if device.type == "cuda" and dtype == torch.float32:
            return "float32 has no tensor-core products"
        if device.type == "cuda" and not runs_on(arch := _host.arch(device.index or 0)):
            return f"{arch} has no TMA, sm_90 and later have"
    return ""


def _implementation(op: str, name: str) -> Callable:
    if name == "eager":
        return EAGER[op]
    if name in SDPA:
        return partial(_sdpa_attention, SDPA[name])
    if op == "adamw":
        from fastgpt.model.adamw import FusedAdamW

        return FusedAdamW
    import fastgpt_kernels

    return getattr(fastgpt_kernels, op)
