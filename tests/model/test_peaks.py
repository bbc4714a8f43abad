"""Peaks against device names as drivers print them."""

from __future__ import annotations

import pytest
import torch

from fastgpt.model import peaks


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71),
    ],
)
def test_peaks(name, tflops):
    peak = peaks.table_peak(name)
    assert peak is not None and peak.flops == tflops * 1e12 and peak.source


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "Tesla T4", ""]
)
def test_devices_that_only_sound_alike_are_measured(name):
    assert peaks.table_peak(name) is None


def test_unknown_device_is_measured_and_says_so():
    peak = peaks.device_peak(torch.device("cpu"), torch.float32)
    assert peak.flops > 1e8 and "measured" in peak.source


def test_override():
    peak = peaks.device_peak(torch.device("cpu"), torch.float32, 12.5)
    assert peak == peaks.Peak(12.5e12, "--peak_tflops")
