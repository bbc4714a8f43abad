"""Other ways to compute the ops: torch.compile, PyTorch's kernels alone, and other libraries.

A baseline's function is made at its first call: another library's import can fail in any way, and
then the failure is that baseline's own row. Baselines need a GPU; without one the reason is listed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import results
from fastgpt_kernels.registry import OpSpec

Function = Callable[..., Any]
Make = Callable[[Any], Function]  # of what lies at a library's path, with the op's signature


def of(op: OpSpec, gpu: bool) -> tuple[dict[str, Function], dict[str, str]]:
    """Returns the baselines of an op that can run here, with versions, and why others cannot."""
    found, skipped = {f"torch.compile {torch.__version__}": torch.compile(op.reference)}, {}
    for name, (path, make) in BASELINES.get(op.name, {}).items():
        package = path.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            skipped[name] = "not installed"
        else:
            found[f"{name} {results.version(package)}"] = late(path, make)
    return (found, skipped) if gpu else ({}, skipped | dict.fromkeys(found, "needs a GPU"))


def late(path: str, make: Make) -> Function:
    """Returns the function that `make` returns, imported and made at its first call."""
    made: list[Function] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if not made:
            module, _, name = path.rpartition(".")
            made.append(make(getattr(importlib.import_module(module), name)))
        return made[0](*args, **kwargs)

    return call


SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def alone(backend: str, qkv: Tensor, n_head: int) -> tuple[Function, list[Tensor]]:
    """Returns SDPA's kernel, and q, k and v as it likes them: without the copies around it."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([SDPA[backend]]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    parts = qkv.unflatten(-1, (3, n_head, -1)).permute(2, 0, 3, 1, 4)
    return attend, [x.contiguous() for x in parts]


def flash_attention(function: Function) -> Function:
    """Returns FlashAttention's own function; some versions also return the log-sum-exp."""

    def attend(qkv: Tensor, n_head: int, bias: Tensor | None = None) -> Tensor:
        y = function(*qkv.unflatten(-1, (3, n_head, -1)).unbind(2), causal=True)
        return (y[0] if isinstance(y, tuple) else y).flatten(2)

    return attend


def of_logits(loss: Function) -> Function:
    """Returns the op from a loss of (logits, targets)."""
    return lambda z, *, targets, vocab_size, **_: loss(
        z[:, :vocab_size], targets, ignore_index=-1
    )  # fmt: skip


def of_weights(loss: Function) -> Function:
    """Returns the op from a loss of (x, weight, targets), the weight in x's dtype."""
    return lambda x, w, *, targets, vocab_size, **_: loss(
        x, w[:vocab_size].to(x.dtype), targets, ignore_index=-1
    )  # fmt: skip


def torch_chunks(function: Function) -> Function:
    """Returns PyTorch's own linear cross entropy, since 2.13, in chunks."""
    return of_weights(partial(function, options=torch.nn.LinearCrossEntropyOptions()))


def liger_loss(kind: Any) -> Function:
    loss = kind(ignore_index=-1)
    return of_logits(lambda z, targets, ignore_index: loss(z, targets))


def liger_linear_loss(kind: Any) -> Function:
    loss = kind(ignore_index=-1)
    return of_weights(lambda x, weight, targets, ignore_index: loss(weight, x, targets))


def liger_layer_norm(function: Any) -> Function:
    return lambda x, w, b=None: function.apply(x, w, torch.zeros_like(w) if b is None else b, 1e-5)


LIGER = "liger_kernel.transformers"
BASELINES: dict[str, dict[str, tuple[str, Make]]] = {
    "attention": {
        "FA3's function": ("flash_attn_interface.flash_attn_func", flash_attention),
        "FA4's function": ("flash_attn.cute.flash_attn_func", flash_attention),
    },
    "layer_norm": {
        "Liger": ("liger_kernel.ops.layer_norm.LigerLayerNormFunction", liger_layer_norm),
    },
    "cross_entropy": {
        "QuACK": ("quack.cross_entropy.cross_entropy", of_logits),
        "Liger": (f"{LIGER}.LigerCrossEntropyLoss", liger_loss),
    },
    "linear_cross_entropy": {
        "torch, chunks": ("torch.nn.functional.linear_cross_entropy", torch_chunks),
        "QuACK": ("quack.linear_cross_entropy.chunked_linear_cross_entropy", of_weights),
        "Liger": (f"{LIGER}.LigerFusedLinearCrossEntropyLoss", liger_linear_loss),
    },
}
