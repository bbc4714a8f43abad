"""What attention tells the rest of the program."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt_kernels.launch import is_gpu
from fastgpt_kernels.ops.attention.hopper.op import hopper_attention, refusal
from fastgpt_kernels.ops.attention.op import HEAD_DIMS, attention
from fastgpt_kernels.reference import SumsForBias
from fastgpt_kernels.registry import (
    Cost,
    ExampleInputs,
    Implementation,
    OpSpec,
    Random,
    Sizes,
    triton_unsupported,
)

KERNELS = ("forward", "prepare", "key_value", "query")
# FlashAttention 3 and 4 as PyTorch takes them in the place of its own flash: the package that has
# to be installed, and the architectures it is for.
FLASH_IMPLS = {
    "fa3": ("FA3", "flash_attn_interface", ("sm_90",)),
    "fa4": ("FA4", "flash_attn.cute.interface", ("sm_90", "sm_100")),
}
HOPPER_KERNELS = tuple(
    f"hopper_{kernel}" for kernel in ("forward", "prepare", "backward", "finish")
)


def eager(
    qkv: Tensor,
    n_head: int,
    *,
    bias: Tensor | None = None,
    causal: bool = True,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Multi-head attention of a packed projection: qkv (B, T, 3*C) -> (B, T, C).

    Dropout draws from PyTorch's generator; `seed` is for kernels that draw their own. A bias
    (3*C,) is in qkv already, and only gets a gradient.
    """
    if bias is not None:
        qkv = SumsForBias.apply(qkv, bias)
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // (3 * n_head)).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=causal, scale=scale)
    return y.transpose(1, 2).reshape(B, T, C3 // 3)


def _sdpa(backend: SDPBackend, *args, **kwargs) -> Tensor:
    with sdpa_kernel([backend]):
        return eager(*args, **kwargs)


def _flash(impl: str, *args, **kwargs) -> Tensor:
    _take_flash(impl)
    return _sdpa(SDPBackend.FLASH_ATTENTION, *args, **kwargs)


@torch.compiler.assume_constant_result  # it runs when a graph is traced, which each process does
def _take_flash(impl: str) -> bool:
    """Have PyTorch's flash attention be this implementation, or its own, in this process."""
    current = getattr(nn.attention, "current_flash_attention_impl", lambda: None)() or ""
    if impl and impl != current:
        nn.attention.activate_flash_attention_impl(impl)
    elif current and not impl:
        nn.attention.restore_flash_attention_impl()
    return True


def _unsupported(s: Sizes, dtype: torch.dtype, arch: str) -> str | None:
    if reason := triton_unsupported(s, dtype, arch):
        return reason
    if arch.startswith("sm_7"):
        return f"Triton has no tensor-core products for {arch}: without them the tiles spill"
    if s.head_dim in HEAD_DIMS:
        return None
    return f"head dim {s.head_dim} is none of {', '.join(map(str, HEAD_DIMS))}"


def _hopper_unsupported(s: Sizes, dtype: torch.dtype, arch: str) -> str | None:
    return triton_unsupported(s, dtype, arch) or refusal(s, dtype, arch) or None


def _needs_gpu(s: Sizes, dtype: torch.dtype, arch: str) -> str | None:
    return None if is_gpu(arch) else "no GPU"


def _flash_unsupported(s: Sizes, dtype: torch.dtype, arch: str) -> str | None:
    if arch == "cpu":
        return "on a CPU it has no dropout" if s.dropout else None
    return _needs_gpu(s, dtype, arch)


def _package_unsupported(name: str, s: Sizes, dtype: torch.dtype, arch: str) -> str | None:
    """Returns why FlashAttention 3 or 4 cannot run, or None if it can."""
    impl, package, archs = FLASH_IMPLS[name]
    if not is_gpu(arch):
        return "no GPU"
    if arch not in archs:
        return f"{impl} is for {' and '.join(archs)}, not {arch}"
    if s.dropout:
        return f"{impl} has no dropout"
    known: list[str] = getattr(nn.attention, "list_flash_attention_impls", lambda: [])()
    if impl not in known:
        return f"torch {torch.__version__} knows no {impl}"
    try:
        found = importlib.util.find_spec(package)
    except ImportError:  # of the package that it is in
        found = None
    return None if found is not None else f"{impl} is not installed: no module {package}"


def _examples(s: Sizes, random: Random) -> list[ExampleInputs]:
    """Training and evaluation, which drops nothing."""
    qkv = random(s.batch_size, s.block_size, 3 * s.n_embd)
    case = ExampleInputs([qkv], {"n_head": s.n_head})
    if s.bias:
        inputs = [*case.inputs, random(3 * s.n_embd)]
        case = replace(case, inputs=inputs, fp32_inputs=(1,), keywords=("bias",))
    if not s.dropout:
        return [case]
    dropout = {**case.arguments, "dropout_p": s.dropout, "seed": 1}
    return [
        replace(case, arguments=dropout),
        replace(case, gradients=False),
    ]


def _cost(s: Sizes, itemsize: int) -> dict[str, Cost]:
    """Two products of T x T x D a head forward, five backward, of which causal needs half."""
    product = 1.0 * s.batch_size * s.block_size**2 * s.n_embd
    moved = 1.0 * s.tokens * s.n_embd * itemsize
    return {"forward": Cost(2 * product, 4 * moved), "backward": Cost(5 * product, 8 * moved)}


def _other(function: Callable[..., Tensor], reason: Any) -> Implementation:
    """PyTorch's own attentions, which draw masks of their own."""
    return Implementation(function, reason, follows_seed=False)


SPECS = {
    "attention": OpSpec(
        "attention",
        {
            "eager": Implementation(eager, follows_seed=False),
            "triton": Implementation(attention, _unsupported),
            "cudnn": _other(partial(_sdpa, SDPBackend.CUDNN_ATTENTION), _needs_gpu),
            "flash": _other(partial(_flash, ""), _flash_unsupported),
            **{
                name: _other(partial(_flash, impl), partial(_package_unsupported, name))
                for name, (impl, *_) in FLASH_IMPLS.items()
            },
            "math": _other(partial(_sdpa, SDPBackend.MATH), lambda s, dtype, arch: None),
            "hopper": Implementation(hopper_attention, _hopper_unsupported),
        },
        _examples, _cost,
        kernels=tuple(f"attention_{kernel}_kernel" for kernel in KERNELS + HOPPER_KERNELS),
        category="attention", few_tokens=512, calls_per_step=12,
    )
}  # fmt: skip
