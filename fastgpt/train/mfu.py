"""Model FLOPs, the device's peak, and their ratio over time: model FLOPs utilisation (MFU).

Three counts of the FLOPs a token costs, forward and backward, each named wherever it is shown; N is
the number of parameters without position embeddings (the tied head counts once, as a matmul):

    mfu         6N + 12 L C T   nanoGPT; PaLM (Chowdhery et al. 2022, appendix B)
    mfu_causal  6N +  6 L C T   llm.c: causal attention needs half of the scores
    mfu_6n      6N              Kaplan et al. 2020
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch

from fastgpt.model.device import synchronize
from fastgpt.model.gpt import GPT


@dataclass(frozen=True)
class FlopsPerToken:
    """FLOPs a token, by the three counts."""

    mfu: float
    mfu_causal: float
    mfu_6n: float


def flops_per_token(model: GPT) -> FlopsPerToken:
    """The three counts for a model at its full block_size."""
    n = 6.0 * model.n_params()
    scores = 6.0 * model.shape.n_layer * model.shape.n_embd * model.shape.block_size
    return FlopsPerToken(mfu=n + 2 * scores, mfu_causal=n + scores, mfu_6n=n)


@dataclass(frozen=True)
class Peak:
    """What MFU is taken against, and where the figure is from."""

    flops: float
    source: str

    def __str__(self) -> str:
        return f"{self.flops / 1e12:.4g} TFLOP/s ({self.source})"


# Dense bf16 tensor-core peaks in TFLOP/s with fp32 accumulation, from the vendors' data sheets
# (half of the figure where a sheet gives it with sparsity). The first matching pattern counts.
_GEFORCE = r"GeForce RTX {}$"
PEAKS: tuple[tuple[str, float, str], ...] = (
    (r"GB200", 2500.0, "NVIDIA GB200 NVL72 data sheet"),
    (r"B200", 2250.0, "NVIDIA HGX B200 data sheet"),
    (r"H200 NVL", 835.5, "NVIDIA H200 data sheet"),
    (r"GH200|H200", 989.4, "NVIDIA H200 data sheet"),
    (r"H100 NVL", 835.5, "NVIDIA H100 data sheet"),
    (r"H100 PCIe", 756.0, "NVIDIA H100 data sheet"),
    (r"H100|H800", 989.4, "NVIDIA H100 data sheet"),
    (r"A100|A800", 312.0, "NVIDIA A100 data sheet"),
    (r"L40S", 362.05, "NVIDIA L40S data sheet"),
    (r"L40\b", 181.05, "NVIDIA L40 data sheet"),
    (r"L4\b", 121.0, "NVIDIA L4 data sheet"),
    (r"A40\b", 149.7, "NVIDIA A40 data sheet"),
    (r"A30\b", 165.0, "NVIDIA A30 data sheet"),
    (r"A10\b", 125.0, "NVIDIA A10 data sheet"),
    (r"RTX 6000 Ada", 364.25, "NVIDIA RTX 6000 Ada data sheet"),
    (r"RTX A6000", 154.8, "NVIDIA RTX A6000 data sheet"),
    (_GEFORCE.format("5090"), 209.5, "NVIDIA RTX Blackwell architecture paper"),
    (_GEFORCE.format("4090"), 165.2, "NVIDIA Ada architecture paper"),
    (_GEFORCE.format("4080"), 97.5, "NVIDIA Ada architecture paper"),
    (_GEFORCE.format("3090 Ti"), 80.0, "NVIDIA Ampere GA102 architecture paper"),
    (_GEFORCE.format("3090"), 71.0, "NVIDIA Ampere GA102 architecture paper"),
    (_GEFORCE.format("3080"), 59.5, "NVIDIA Ampere GA102 architecture paper"),
    (r"MI300X|MI325X", 1307.4, "AMD CDNA 3 data sheet"),
)


def table_peak(device_name: str) -> Peak | None:
    """The data-sheet peak for a device's name, or None where the table has no such device."""
    for pattern, tflops, source in PEAKS:
        if re.search(pattern, device_name):
            return Peak(tflops * 1e12, source)
    return None


def measured_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The best of a few square matmuls on random data, in about half a second."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + 0.5
    a @ b
    while time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    name = str(dtype).removeprefix("torch.")
    return Peak(2.0 * size**3 / best, f"measured: {size} x {size} {name} matmul")


def device_peak(device: torch.device, dtype: torch.dtype, override_tflops: float = 0.0) -> Peak:
    """The peak for a run: the user's figure, else the table's, else one measured here."""
    if override_tflops:
        return Peak(override_tflops * 1e12, "--peak_tflops")
    if device.type == "cuda":
        peak = table_peak(torch.cuda.get_device_name(device))
        if peak is not None:
            return peak
    return measured_peak(device, dtype)
