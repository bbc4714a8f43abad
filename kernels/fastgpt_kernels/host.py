"""What every launcher needs on the host: who runs the op, argument errors, the architecture's name.

Argument errors read `attention: n_head must divide C=770, got 12`: op, argument, wanted, got.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

HAS_TRITON = find_spec("triton") is not None
# Whether kernels are defined for Triton's interpreter: `triton.jit` looks at the variable when it
# decorates. A plain bool, since torch.compile can read that and cannot trace Triton's settings.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")


def use_kernel(x: torch.Tensor) -> bool:
    """Whether the kernel itself runs: for a GPU tensor, or for any under TRITON_INTERPRET=1."""
    return HAS_TRITON and (x.is_cuda or INTERPRETED)


@functools.cache
def arch(device_index: int) -> str:
    """Architecture key of a GPU, as in `configs`: "sm_90", "gfx942"."""
    props = torch.cuda.get_device_properties(device_index)
    if torch.version.hip:
        return props.gcnArchName.split(":")[0]
    return f"sm_{props.major}{props.minor}"


def arch_of(x: torch.Tensor) -> str:
    """Architecture key for the device of `x`; the interpreter counts as "cpu"."""
    return arch(x.device.index) if x.is_cuda else "cpu"


def on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the one `x` is on."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


@functools.cache
def _multiprocessors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def multiprocessors(x: torch.Tensor) -> int:
    """SMs (CUs) of the device of `x`; the interpreter counts as 2, so that programs do loop."""
    return _multiprocessors(x.device.index) if x.is_cuda else 2


def row_view(x: torch.Tensor) -> torch.Tensor:
    """`x` (..., C) as (M, C) with contiguous rows; copied only where strides leave no other way."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def check_tensor(
    op: str,
    name: str,
    x: object,
    *,
    ndim: int | None = None,
    shape: Sequence[int | None] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> None:
    """Raise TypeError/ValueError naming op, argument, what it got and what it wants.

    `shape` entries of None match any size. Nothing is checked where the argument is None here.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if ndim is not None and x.ndim != ndim:
        raise ValueError(f"{op}: {name} must have {ndim} dimensions, got shape {tuple(x.shape)}")
    if shape is not None and (
        x.ndim != len(shape)
        or any(s is not None and s != g for s, g in zip(shape, x.shape, strict=True))
    ):
        wanted = "(" + ", ".join("*" if s is None else str(s) for s in shape) + ")"
        raise ValueError(f"{op}: {name} must have shape {wanted}, got {tuple(x.shape)}")
    if dtypes is not None and x.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(
            f"{op}: {name} must be of dtype {wanted}, got {str(x.dtype).removeprefix('torch.')}"
        )
    if device is not None and x.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {x.device}")


def refuse_interpreted_bf16(op: str, *tensors: torch.Tensor | None) -> None:
    """Raise TypeError for bfloat16 on the CPU: Triton's interpreter gets its bits wrong, silently.

    Call it where the interpreter is about to run the kernel.
    """
    for t in tensors:
        if t is not None and t.dtype is torch.bfloat16 and not t.is_cuda:
            raise TypeError(
                f"{op}: Triton's interpreter (TRITON_INTERPRET=1) cannot do bfloat16: "
                "use float32 or float16, or unset TRITON_INTERPRET"
            )
