"""What this device reaches at best: the roofs that kernels are held against."""

from __future__ import annotations

import torch

from bench.timing import interleaved
from fastgpt.model.device import measured_peak


def measure(device: torch.device) -> dict[str, float]:
    """{"TFLOP/s": bf16 matmul (CPU: fp32), "GB/s": copy, reads and writes counted}."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    matmul = measured_peak(device, dtype).flops
    return {"TFLOP/s": matmul / 1e12, "GB/s": copy_bandwidth(device) / 1e9}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s, reads plus writes, of a copy much larger than the caches; the best of several."""
    source = torch.randn(1 << (28 if device.type == "cuda" else 24), device=device)
    target = torch.empty_like(source)
    (times,) = interleaved([lambda: target.copy_(source)], device, rounds=10)
    return 2 * source.nbytes / (min(times) * 1e-3)
