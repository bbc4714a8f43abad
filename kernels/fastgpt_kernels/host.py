"""What every launcher needs on the host: what runs the op, argument errors, architecture names.

Argument errors read `attention: n_head must divide C=770, got 12`: op, argument, wanted, got.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec

import torch

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

try:
    HAS_TRITON = find_spec("triton") is not None  # loading it takes a quarter of a second
except ImportError:
    HAS_TRITON = False
# Whether kernels are defined for Triton's interpreter: `triton.jit` looks at the variable when it
# decorates. A plain bool, since torch.compile can read that and cannot trace Triton's settings.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")
# The architecture that meta tensors lie on for the tools (see `pretend`), with its SMs (CUs): those
# of a T4, A100, 3090, 4090, H100, B200, 5090 and MI300X.
_PRETENDED = ""
SMS = {
    "sm_75": 40, "sm_80": 108, "sm_86": 82, "sm_89": 128, "sm_90": 132, "sm_100": 148,
    "sm_120": 170, "gfx942": 304,
}  # fmt: skip


@contextmanager
def pretend(arch: str) -> Iterator[None]:
    """Within, ops launch their kernels for meta tensors too, as on a GPU of this architecture.

    For the tools, under a driver that launches nothing: meta tensors have no data, and addresses
    that start at 0.
    """
    global _PRETENDED
    before, _PRETENDED = _PRETENDED, arch
    try:
        yield
    finally:
        _PRETENDED = before


def pretending() -> bool:
    """Returns True inside `pretend`."""
    return _PRETENDED != ""


def use_kernel(x: torch.Tensor) -> bool:
    """Whether the kernel itself runs: for a GPU tensor, or for any under TRITON_INTERPRET=1."""
    return HAS_TRITON and (x.is_cuda or INTERPRETED or (_PRETENDED != "" and x.is_meta))


@functools.cache
def arch(device_index: int) -> str:
    """Architecture key of a GPU, as in `configs`: "sm_90", "gfx942"."""
    props = torch.cuda.get_device_properties(device_index)
    if torch.version.hip:
        return props.gcnArchName.split(":")[0]
    return f"sm_{props.major}{props.minor}"


def arch_on(device: torch.device) -> str:
    """Architecture key of a device; its type, "cpu" or "mps", if it is no GPU with kernels."""
    return arch(device.index or 0) if device.type == "cuda" else device.type


def is_gpu(arch: str) -> bool:
    """Returns True for the key of a GPU that Triton may compile for."""
    return arch.startswith(("sm_", "gfx"))


def arch_of(x: torch.Tensor) -> str:
    """Architecture key for the device of `x`; "cpu" for the interpreter."""
    return arch(x.device.index) if x.is_cuda else _PRETENDED or "cpu"


def adds_in_place(device: torch.device) -> bool:
    """Whether a product of 16-bit factors there adds to fp32 as it ends: cuBLAS's do."""
    return device.type == "cuda" and torch.version.hip is None


def on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the device of `x` the current one, which is where Triton launches."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


@functools.cache
def _multiprocessors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def multiprocessors(x: torch.Tensor) -> int:
    """SMs (CUs) of the device of `x`; 2 for the interpreter, so that programs loop there too."""
    return _multiprocessors(x.device.index) if x.is_cuda else SMS.get(_PRETENDED, 2)


def row_view(x: torch.Tensor) -> torch.Tensor:
    """`x` (..., C) as (M, C) with contiguous rows; a copy only if its strides require one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


_INTEGER = int | torch.SymInt
_NUMBER = int | float


def check_tensor(
    op: str,
    name: str,
    x: object,
    *,
    ndim: int | None = None,
    shape: Sequence[int | None] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    like: torch.Tensor | None = None,
    optional: bool = False,
) -> None:
    """Raise TypeError/ValueError naming op, argument, what it got and what it wants.

    ndim      how many dimensions it has
    shape     entries of None match any size
    dtypes    those that it may have; without them that of `like`
    like      a tensor on the same device
    optional  x may be None
    """
    if x is None and optional:
        return
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if ndim is not None and x.ndim != ndim:
        raise ValueError(f"{op}: {name} must have {ndim} dimensions, got shape {tuple(x.shape)}")
    if (
        shape is not None
        and x.shape != shape
        and (
            x.ndim != len(shape)
            or any(s not in (None, g) for s, g in zip(shape, x.shape, strict=True))
        )
    ):
        wanted = "(" + ", ".join("*" if s is None else str(s) for s in shape) + ")"
        raise ValueError(f"{op}: {name} must have shape {wanted}, got {tuple(x.shape)}")
    if dtypes is None:
        dtypes = (x.dtype if like is None else like.dtype,)
    if x.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(
            f"{op}: {name} must be of dtype {wanted}, got {str(x.dtype).removeprefix('torch.')}"
        )
    if like is not None and x.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {x.device}")


def check_dropout(op: str, dropout_p: object, seed: object, like: torch.Tensor) -> None:
    """Raise TypeError/ValueError unless p is in [0, 1) and the seed an int64, as int or tensor."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, _NUMBER):
        raise TypeError(f"{op}: dropout_p must be a float, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")
    if seed is None:
        return
    if isinstance(seed, torch.Tensor):
        check_tensor(op, "seed", seed, dtypes=(torch.int64,), like=like)
        if seed.numel() != 1:
            raise ValueError(f"{op}: seed must have one element, got shape {tuple(seed.shape)}")
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{op}: seed must be an int, a tensor or None, got {type(seed).__name__}")
    elif not -(2**63) <= seed < 2**63:
        raise ValueError(f"{op}: seed must fit in 64 bits, got {seed}")


def check_int(
    op: str, name: str, value: object, *, least: int | None = None, optional: bool = False
) -> None:
    """TypeError unless `value` is an int (None if optional), ValueError if it is below `least`."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, _INTEGER):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")


def check_approximate(op: str, approximate: str) -> str:
    """The name that `torch.nn.functional.gelu` has for a GELU; "erf" is what it calls "none".

    Raises ValueError for any other.
    """
    if approximate == "erf":
        return "none"
    if approximate not in ("tanh", "none"):
        wanted = "'tanh', 'none' or 'erf' (the same)"
        raise ValueError(f"{op}: approximate must be {wanted}, got {approximate!r}")
    return approximate


def refuse_interpreted_bf16(op: str, *tensors: torch.Tensor | None) -> None:
    """Raise TypeError for bfloat16 on the CPU: Triton's interpreter gets its bits wrong, silently.

    Call it when a kernel is about to run.
    """
    for t in tensors:
        if t is not None and t.dtype is torch.bfloat16 and t.is_cpu:
            raise TypeError(
                f"{op}: Triton's interpreter (TRITON_INTERPRET=1) cannot do bfloat16: "
                "use float32 or float16, or unset TRITON_INTERPRET"
            )
