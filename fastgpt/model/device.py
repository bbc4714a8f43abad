"""Machine that a command computes on: device, precision, compilation and peak."""

from __future__ import annotations

import re
import subprocess
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fastgpt.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Machine:
    """Device, precision and compilation, resolved once by a command from its flags.

    dtype        of activations: float32, bfloat16 or float16
    peak_tflops  the user's figure for `peak`; 0: none
    """

    device: torch.device
    dtype: str = "float32"
    compile: bool = False
    peak_tflops: float = 0.0

    @classmethod
    def of(
        cls,
        device: str = "auto",
        dtype: str = "auto",
        compile: str | bool = False,
        peak_tflops: float = 0.0,
    ) -> Machine:
        """Resolves the settings. Raises UserError if this machine cannot do as they ask."""
        found = resolve_device(device)
        compiled = found.type == "cuda" if compile == "auto" else bool(compile)
        return cls(found, _dtype(dtype, found), compiled, peak_tflops)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @cached_property
    def peak(self) -> Peak:
        """Peak for MFU: the user's figure, the table's, or one measured at the first use."""
        if self.peak_tflops:
            return Peak(self.peak_tflops * 1e12, "--peak_tflops")
        on_gpu = self.device.type == "cuda"
        known = table_peak(torch.cuda.get_device_name(self.device)) if on_gpu else None
        return known or measured_peak(self.device, self.torch_dtype)

    @property
    def settings(self) -> dict[str, Any]:
        """Resolved settings by their names."""
        return {"device": str(self.device), "dtype": self.dtype, "compile": self.compile}

    def synchronize(self) -> None:
        """Waits until the device has done all it was given."""
        synchronize(self.device)


def resolve_device(name: str) -> torch.device:
    """Returns the torch device for `--device`. Raises UserError if this machine lacks it."""
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
    """Returns float32, bfloat16 or float16 for `--dtype` on this device."""
    if name == "auto":
        if device.type != "cuda":
            return "float32"
        # PyTorch counts as support what it computes in fp32: Turing (T4) has no bf16 of its own.
        own = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if own else "float16"
    if name == "float16" and device.type != "cuda":
        raise UserError("--dtype=float16: needs a GPU (loss scaling); pass bfloat16 or float32")
    return name


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# --- The peak that MFU is taken against ----------------------------------------------------------


@dataclass(frozen=True)
class Peak:
    """Peak FLOPs per second, and the source of the figure."""

    flops: float
    source: str

    def __str__(self) -> str:
        return f"{self.flops / 1e12:.4g} TFLOP/s ({self.source})"


# Dense bf16 TFLOP/s with fp32 accumulation, by the device's whole name without "NVIDIA": a slice of
# a GPU ("... MIG 1g.5gb"), a laptop's, or a name that two chips share is measured. Half of the
# figure if a sheet gives it with sparsity.
SHEETS = (
    ("GB200", 2500.0, "NVIDIA GB200 NVL72 data sheet"),
    ("B200", 2250.0, "NVIDIA HGX B200 data sheet"),
    ("GH200 (480GB|144G HBM3e)", 989.4, "NVIDIA GH200 data sheet"),
    ("H200", 989.4, "NVIDIA H200 data sheet"),
    ("H200 NVL", 835.5, "NVIDIA H200 data sheet"),
    ("H100 80GB HBM3", 989.4, "NVIDIA H100 data sheet"),
    ("H100 NVL", 835.5, "NVIDIA H100 data sheet"),
    ("H100 PCIe", 756.0, "NVIDIA H100 data sheet"),
    ("A100-SXM4-[48]0GB|A100-PCIE-40GB|A100 80GB PCIe", 312.0, "NVIDIA A100 data sheet"),
    ("L40S", 362.05, "NVIDIA L40S data sheet"),
    ("L40", 181.05, "NVIDIA L40 data sheet"),
    ("L4", 121.0, "NVIDIA L4 data sheet"),
    ("A40", 149.7, "NVIDIA A40 data sheet"),
    ("A30", 165.0, "NVIDIA A30 data sheet"),
    ("A10", 125.0, "NVIDIA A10 data sheet"),
    ("RTX 6000 Ada Generation", 364.25, "NVIDIA RTX 6000 Ada data sheet"),
    ("RTX A6000", 154.8, "NVIDIA RTX A6000 data sheet"),
    ("GeForce RTX 5090", 209.5, "NVIDIA RTX Blackwell paper"),
    ("GeForce RTX 4090", 165.2, "NVIDIA Ada architecture paper"),
    ("GeForce RTX 4080", 97.5, "NVIDIA Ada architecture paper"),
    ("GeForce RTX 3090 Ti", 80.0, "NVIDIA Ampere GA102 paper"),
    ("GeForce RTX 3090", 71.0, "NVIDIA Ampere GA102 paper"),
)


def table_peak(device_name: str) -> Peak | None:
    """Returns the data sheet's peak for a device's name, or None if the table lacks it."""
    for pattern, tflops, source in SHEETS:
        if re.fullmatch(f"(NVIDIA )?({pattern})", device_name):
            return Peak(tflops * 1e12, source)
    return None


def measured_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Returns the best of many square matmuls on random data, in 0.5 s, or 0.1 s on a CPU."""
    size = 8192 if device.type == "cuda" else 768
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    best, end = float("inf"), time.perf_counter() + (0.1 if device.type == "cpu" else 0.5)
    while time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    name, source = str(dtype).removeprefix("torch."), f"measured: {size} x {size}"
    count = torch.get_num_threads()
    threads = f", {count} thread{'s'[: count > 1]}" if device.type == "cpu" else ""
    return Peak(2.0 * size**3 / best, f"{source} {name} matmul{threads}")


def unseen_gpu() -> str | None:
    """Returns a line for a machine with an NVIDIA GPU that PyTorch does not see, or None."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if found.returncode or not found.stdout.strip():
        return None
    name, _, driver = found.stdout.strip().splitlines()[0].rpartition(", ")
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return (
        f"there is a {name} with driver {driver}, but PyTorch {torch.__version__}, built {built}, "
        "does not see it: install a build for this driver (https://pytorch.org/get-started), or "
        "check CUDA_VISIBLE_DEVICES"
    )
