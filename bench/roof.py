"""What this device reaches at best: the roofs that kernels are held against."""

from __future__ import annotations

import torch

from fastgpt.model.peaks import measured_peak
from fastgpt_kernels.tools.timing import interleaved

COPY_BYTES = 1 << 30


def measure(device: torch.device) -> dict[str, float]:
    """{"TFLOP/s": bf16 matmul (CPU: fp32), "GB/s": copy, reads and writes counted}."""
    cuda = device.type == "cuda"
    matmul = measured_peak(device, torch.bfloat16 if cuda else torch.float32).flops
    n = (COPY_BYTES if cuda else COPY_BYTES >> 5) // 4
    source = torch.randn(n, device=device)
    target = torch.empty_like(source)
    times = interleaved([lambda: target.copy_(source)], device, rounds=10)[0]
    return {"TFLOP/s": matmul / 1e12, "GB/s": 8 * n / (min(times) * 1e-3) / 1e9}
