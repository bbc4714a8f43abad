"""Which device and which precision a run gets."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

from fastgpt.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The torch device for `--device`. Raises UserError where this machine does not have it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise UserError(f"--device={name}: wanted auto, cpu, cuda, cuda:N or mps") from e
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise UserError(f"--device={name}: PyTorch sees no GPU here; pass --device=cpu")
        if (device.index or 0) >= count:
            raise UserError(f"--device={name}: there are {count}, cuda:0 to cuda:{count - 1}")
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise UserError(f"--device={name}: PyTorch sees no MPS device here; pass --device=cpu")
    elif device.type != "cpu":
        raise UserError(f"--device={name}: wanted auto, cpu, cuda, cuda:N or mps")
    return device


def resolve_dtype(name: str, device: torch.device) -> str:
    """float32, bfloat16 or float16 for `--dtype` on this device."""
    if name == "auto":
        if device.type != "cuda":
            return "float32"
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    if name == "float16" and device.type != "cuda":
        raise UserError("--dtype=float16: needs a GPU (loss scaling); pass bfloat16 or float32")
    return name


def resolve_compile(wish: str | bool, device: torch.device) -> bool:
    """Whether to torch.compile: asked for, or by itself on a GPU."""
    return device.type == "cuda" if wish == "auto" else bool(wish)


def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    """Mixed precision for the forward pass; nothing for float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[dtype])


def synchronize(device: torch.device) -> None:
    """Wait for the device, where there is something to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def set_matmul_precision(*, exact: bool) -> None:
    """How fp32 matrices are multiplied on a GPU: as fp32, or with inputs rounded to TF32."""
    torch.set_float32_matmul_precision("highest" if exact else "high")
