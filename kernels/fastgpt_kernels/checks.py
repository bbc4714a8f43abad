"""Argument checks. A wrong argument raises one line with op, argument, value and what is expected.

    attention: n_head must divide C=770, got 12

Every op takes bfloat16, float16 and float32 on every device. The functions of `reference` also take
float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_INTEGER = int | torch.SymInt
_NUMBER = int | float


def check_tensor(
    op: str,
    name: str,
    x: object,
    *,
    ndim: int | None = None,
    shape: Sequence[int | None] | None = None,
    dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
    like: torch.Tensor | None = None,
    optional: bool = False,
) -> None:
    """Raises TypeError or ValueError unless x is a tensor that fits.

    ndim      the number of dimensions
    shape     the shape, in which None matches any size
    dtypes    the supported dtypes
    like      a tensor on the same device
    optional  x may be None
    """
    if x is None and optional:
        return
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if ndim is not None and x.ndim != ndim:
        raise ValueError(f"{op}: {name} must have {ndim} dimensions, got shape {tuple(x.shape)}")
    if shape is not None and x.shape != shape and not _matches(x.shape, shape):
        wanted = "(" + ", ".join("*" if s is None else str(s) for s in shape) + ")"
        raise ValueError(f"{op}: {name} must have shape {wanted}, got {tuple(x.shape)}")
    if x.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must be of dtype {wanted}, got {got}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {x.device}")


def _matches(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(
        w in (None, s) for s, w in zip(shape, wanted, strict=True)
    )


def check_dropout(op: str, dropout_p: object, seed: object, like: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless p is in [0, 1) and the seed an int64 or None."""
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
    """Raises TypeError unless `value` is an int, and ValueError if it is below `least`."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, _INTEGER):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")


def refuse_interpreted_bf16(op: str, *tensors: torch.Tensor | None) -> None:
    """Raises TypeError for bfloat16 on a CPU, which Triton's interpreter gets wrong silently.

    Launchers call it, since the reference supports bfloat16.
    """
    for t in tensors:
        if t is not None and t.dtype is torch.bfloat16 and t.is_cpu:
            raise TypeError(
                f"{op}: Triton's interpreter (TRITON_INTERPRET=1) cannot do bfloat16: "
                "use float32 or float16, or unset TRITON_INTERPRET"
            )
