"""The peak that a device's MFU is taken against: from a table of data sheets, or measured."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Peak:
    """What MFU is taken against, and where the figure is from."""

    flops: float
    source: str

    def __str__(self) -> str:
        return f"{self.flops / 1e12:.4g} TFLOP/s ({self.source})"


@dataclass(frozen=True)
class Sheet:
    """A vendor's data sheet: dense bf16 TFLOP/s with fp32 sums, TB/s and GB of its memory."""

    pattern: str  # of the device's name
    tflops: float
    tbs: float
    gb: int
    arch: str
    source: str

    @property
    def name(self) -> str:
        """The device without its vendor: "H100", "GeForce RTX 4090", "A100 40GB"."""
        plain = self.pattern.replace("\\b", "").replace(".*", " ").rstrip("$")
        return plain.split("|")[0]


# Half of the figure if a sheet gives it with sparsity. The first matching pattern counts.
_GEFORCE = r"GeForce RTX {}$"
SHEETS = tuple(
    Sheet(*row)
    for row in (
        (r"GB200", 2500.0, 8.0, 186, "sm_100", "NVIDIA GB200 NVL72 data sheet"),
        (r"B200", 2250.0, 8.0, 180, "sm_100", "NVIDIA HGX B200 data sheet"),
        (r"GH200", 989.4, 4.0, 96, "sm_90", "NVIDIA GH200 data sheet"),
        (r"H200 NVL", 835.5, 4.8, 141, "sm_90", "NVIDIA H200 data sheet"),
        (r"H200", 989.4, 4.8, 141, "sm_90", "NVIDIA H200 data sheet"),
        (r"H100 NVL", 835.5, 3.9, 94, "sm_90", "NVIDIA H100 data sheet"),
        (r"H100 PCIe", 756.0, 2.0, 80, "sm_90", "NVIDIA H100 data sheet"),
        (r"H100|H800", 989.4, 3.35, 80, "sm_90", "NVIDIA H100 data sheet"),
        (r"A100.*40GB", 312.0, 1.555, 40, "sm_80", "NVIDIA A100 data sheet"),
        (r"A100|A800", 312.0, 2.039, 80, "sm_80", "NVIDIA A100 data sheet"),
        (r"L40S", 362.05, 0.864, 48, "sm_89", "NVIDIA L40S data sheet"),
        (r"L40\b", 181.05, 0.864, 48, "sm_89", "NVIDIA L40 data sheet"),
        (r"L4\b", 121.0, 0.3, 24, "sm_89", "NVIDIA L4 data sheet"),
        (r"A40\b", 149.7, 0.696, 48, "sm_86", "NVIDIA A40 data sheet"),
        (r"A30\b", 165.0, 0.933, 24, "sm_80", "NVIDIA A30 data sheet"),
        (r"A10\b", 125.0, 0.6, 24, "sm_86", "NVIDIA A10 data sheet"),
        (r"RTX 6000 Ada", 364.25, 0.96, 48, "sm_89", "NVIDIA RTX 6000 Ada data sheet"),
        (r"RTX A6000", 154.8, 0.768, 48, "sm_86", "NVIDIA RTX A6000 data sheet"),
        (_GEFORCE.format("5090"), 209.5, 1.792, 32, "sm_120", "NVIDIA RTX Blackwell paper"),
        (_GEFORCE.format("4090"), 165.2, 1.008, 24, "sm_89", "NVIDIA Ada architecture paper"),
        (_GEFORCE.format("4080"), 97.5, 0.717, 16, "sm_89", "NVIDIA Ada architecture paper"),
        (_GEFORCE.format("3090 Ti"), 80.0, 1.008, 24, "sm_86", "NVIDIA Ampere GA102 paper"),
        (_GEFORCE.format("3090"), 71.0, 0.936, 24, "sm_86", "NVIDIA Ampere GA102 paper"),
        (_GEFORCE.format("3080"), 59.5, 0.76, 10, "sm_86", "NVIDIA Ampere GA102 paper"),
        (r"MI325X", 1307.4, 6.0, 256, "gfx942", "AMD Instinct MI325X data sheet"),
        (r"MI300X", 1307.4, 5.3, 192, "gfx942", "AMD Instinct MI300X data sheet"),
    )
)


def sheet(device_name: str) -> Sheet | None:
    """The data sheet for a device's name, or None if the table has no such device."""
    return next((s for s in SHEETS if re.search(s.pattern, device_name)), None)


def table_peak(device_name: str) -> Peak | None:
    """The data sheet's peak for a device's name, or None if the table has no such device."""
    found = sheet(device_name)
    return Peak(found.tflops * 1e12, found.source) if found else None


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def measured_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The best of many square matmuls on random data.

    Takes half a second. On a CPU other programs take their share of every measurement, so the best
    one ever made on this machine, with as many threads, is remembered and counts.
    """
    size = 8192 if device.type == "cuda" else 768
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    best, end = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    name = str(dtype).removeprefix("torch.")
    flops, source = 2.0 * size**3 / best, f"measured: {size} x {size} {name} matmul"
    if device.type != "cpu":
        return Peak(flops, source)
    threads = torch.get_num_threads()
    return Peak(
        _best_ever(f"{_cpu()}, {threads} threads, {name}", flops),
        f"{source}, {threads} thread{'s' * (threads > 1)}, the best on this machine so far",
    )


def _cpu() -> str:
    """The processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{platform.node()}: {line.partition(':')[2].strip()}"
    return f"{platform.node()}: {platform.processor() or platform.machine()}"


def _best_ever(key: str, flops: float) -> float:
    """The larger of this measurement and the one remembered under `key`, which it then becomes."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgpt"
    path, known = cache / "cpu_peaks.json", {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = dict(json.loads(path.read_text()))
    before = known.get(key)
    if isinstance(before, int | float) and flops <= before < 100 * flops:
        return float(before)
    with contextlib.suppress(OSError):  # without a home it is measured anew each time
        cache.mkdir(parents=True, exist_ok=True)
        aside = cache / f".cpu_peaks.{os.getpid()}.tmp"
        aside.write_text(json.dumps(known | {key: flops}, indent=1) + "\n")
        os.replace(aside, path)
    return flops


def device_peak(device: torch.device, dtype: torch.dtype, override_tflops: float = 0.0) -> Peak:
    """The peak for a run: the user's figure, else the table's, else one measured here."""
    if override_tflops:
        return Peak(override_tflops * 1e12, "--peak_tflops")
    if device.type == "cuda":
        peak = table_peak(torch.cuda.get_device_name(device))
        if peak is not None:
            return peak
    return measured_peak(device, dtype)
