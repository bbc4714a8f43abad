"""Attention's implementation `hopper`: the kernels in Gluon where they apply, else those in Triton.

No import of Gluon happens here: it refuses where kernels are interpreted, and costs a second.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastgpt_kernels.launch import HAS_TRITON, arch_of
from fastgpt_kernels.ops.attention import op as plain
from fastgpt_kernels.register import Op
from fastgpt_kernels.registry import Sizes

HEAD_DIMS = (64, 128)
# Versions of Triton between which the kernels were compiled and their machine code judged.
FIRST, LAST = (3, 6), (3, 9)


def refusal(s: Sizes, dtype: torch.dtype, arch: str) -> str:
    """Why the kernels cannot take these; empty if they can."""
    if arch != "sm_90":
        return f"hopper is for sm_90, not {arch}"
    if wrong := version_refusal():
        return wrong
    if dtype not in (torch.bfloat16, torch.float16):
        return f"hopper is for bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if s.head_dim not in HEAD_DIMS:
        return f"hopper has head dims 64 and 128, not {s.head_dim}"
    if s.dropout:
        return "hopper has no dropout: its mask takes registers that consumers do not have to spare"
    return ""


@functools.cache
def _parsed(version: str) -> tuple[int, ...]:
    """(3, 7) of "3.7.1"."""
    return tuple(map(int, version.split(".")[:2]))


def _version() -> tuple[int, ...]:
    """Triton's."""
    import triton

    return _parsed(triton.__version__)


def version_refusal() -> str:
    """Why not with the Triton that is installed; empty for one that the kernels are known to."""
    if not HAS_TRITON:
        return "triton is not installed"
    if FIRST <= _version() <= LAST:
        return ""
    import triton

    known = " to ".join(f"{a}.{b}" for a, b in (FIRST, LAST))
    return f"hopper is not available with Triton {triton.__version__}: known are {known}"


def _applies(qkv: Tensor, n_head: int, causal: bool, dropout_p: float) -> bool:
    """Whether the kernels take this call."""
    sizes = Sizes(n_head=n_head, n_embd=qkv.shape[2] // 3, dropout=dropout_p)
    if refusal(sizes, qkv.dtype, arch_of(qkv)):
        return False
    # With Triton 3.9 the forward kernel of full attention spills at head dim 128.
    return causal or sizes.head_dim == 64


_op: Op | None = None

if HAS_TRITON:
    from fastgpt_kernels.ops.attention.backward import sum_rows

    def _forward(
        qkv: Tensor, bias: Tensor | None, n_head: int, causal: bool, dropout_p: float,
        seed: Tensor | None, scale: float, deterministic: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(y, lse), the same numbers by either kernels."""
        if not _applies(qkv, n_head, causal, dropout_p):
            return plain._forward(qkv, bias, n_head, causal, dropout_p, seed, scale, deterministic)
        from fastgpt_kernels.ops.attention.hopper.forward import launch_forward

        return launch_forward(qkv, n_head, causal, scale)

    def _backward(
        grad_y: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, seed: Tensor | None, n_head: int,
        causal: bool, dropout_p: float, scale: float, deterministic: bool, biased: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """dq's addends arrive in any order: if that must not be, Triton's kernels do it."""
        if deterministic or not _applies(qkv, n_head, causal, dropout_p):
            return plain.launch_backward(
                grad_y, qkv, y, lse, seed, n_head, causal, dropout_p, scale, deterministic, biased
            )
        from fastgpt_kernels.ops.attention.hopper.backward import launch_backward

        dqkv = launch_backward(grad_y, qkv, y, lse, n_head, causal, scale)
        return dqkv, sum_rows(dqkv) if biased else None

    _op = plain.declare("attention_hopper", _forward, _backward)


def hopper_attention(
    qkv: Tensor,
    n_head: int,
    *,
    bias: Tensor | None = None,
    causal: bool = True,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    scale: float | None = None,
    deterministic: bool | None = None,
) -> Tensor:
    """`attention`, by the kernels for Hopper where they apply: arguments, results, errors as there.

    They apply to bf16 and fp16 with head dim 64 or 128 and without dropout, on sm_90, with a Triton
    that they are known to compile with, but not to full attention of head dim 128. Gradients that
    are the same to the bit every time (`deterministic`) and every other call are left to the
    kernels in plain Triton.
    """
    return plain.run(_op, qkv, bias, n_head, causal, dropout_p, seed, scale, deterministic)
