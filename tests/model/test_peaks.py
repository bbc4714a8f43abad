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


def test_a_measured_peak_counts_two_operations_a_multiplication(monkeypatch, tmp_path):
    """With a clock that says a matmul takes a millisecond: 2 n^3 FLOPs in that time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ticks = iter(i * 1e-3 for i in range(10**6))
    monkeypatch.setattr(peaks.time, "perf_counter", lambda: next(ticks))
    peak = peaks.measured_peak(torch.device("cpu"), torch.float32)
    assert peak.flops == pytest.approx(2 * 768**3 / 1e-3)
    n = torch.get_num_threads()
    threads = "1 thread" if n == 1 else f"{n} threads"
    assert f"matmul, {threads}, the best on this machine so far" in peak.source


def test_the_best_measurement_of_a_machine_counts(monkeypatch, tmp_path):
    """A busy moment does not lower it, and what cannot be true does not stay."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert [peaks._best_ever("cpu", x) for x in (5.0, 3.0, 6.0, 4.0)] == [5.0, 5.0, 6.0, 6.0]
    assert peaks._best_ever("other", 1.0) == 1.0 and peaks._best_ever("cpu", 1.0) == 6.0
    path = tmp_path / "fastgpt" / "cpu_peaks.json"
    for damaged in ("no json", "[3]", '{"cpu": "x"}', '{"cpu": 1e30}', '{"cpu": NaN}'):
        path.write_text(damaged)
        assert peaks._best_ever("cpu", 2.0) == 2.0
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert peaks._best_ever("cpu", 2.0) == 2.0
