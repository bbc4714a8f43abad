"""The machine that a command computes on: device, precision, compilation and peak."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fastgpt.errors import UserError
from fastgpt.model.peaks import Peak, device_peak, synchronize

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Machine:
    """What --device, --dtype and --compile mean here; resolved once by a command, then fixed."""

    device: torch.device
    dtype: str = "float32"
    """Of activations: float32, bfloat16 or float16."""
    compile: bool = False
    peak_tflops: float = 0.0
    """The user's figure for `peak`; 0: none."""

    @classmethod
    def of(
        cls,
        device: str = "auto",
        dtype: str = "auto",
        compile: str | bool = False,
        peak_tflops: float = 0.0,
    ) -> Machine:
        """From the settings. Raises UserError if this machine cannot do what they ask for."""
        found = resolve_device(device)
        on_gpu = found.type == "cuda"
        return cls(
            found, _dtype(dtype, found), on_gpu if compile == "auto" else bool(compile), peak_tflops
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @cached_property
    def peak(self) -> Peak:
        """What MFU is taken against; measured at the first use if no table has the device."""
        return device_peak(self.device, self.torch_dtype, self.peak_tflops)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that were resolved, by their names."""
        return {"device": str(self.device), "dtype": self.dtype, "compile": self.compile}

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""
        synchronize(self.device)


def resolve_device(name: str) -> torch.device:
    """The torch device for `--device`. Raises UserError if this machine does not have it."""
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


def _dtype(name: str, device: torch.device) -> str:
    """float32, bfloat16 or float16 for `--dtype` on this device."""
    if name == "auto":
        if device.type != "cuda":
            return "float32"
        # PyTorch counts as support what it computes in fp32: Turing (T4) has no bf16 of its own.
        own = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if own else "float16"
    if name == "float16" and device.type != "cuda":
        raise UserError("--dtype=float16: needs a GPU (loss scaling); pass bfloat16 or float32")
    return name
