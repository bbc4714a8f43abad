"""Peaks against device names as drivers print them."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

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


# Streaming multiprocessors, dense bf16 FLOPs of one in a clock, boost clock in GHz; and the bus's
# bits with Gbit/s a pin. By the vendors' descriptions of the chips, not by their data sheets.
CHIPS = [
    ("NVIDIA H100 80GB HBM3", 132, 4096, 1.83, 5120, 5.23),
    ("NVIDIA A100-SXM4-80GB", 108, 2048, 1.41, 5120, 3.19),
    ("NVIDIA A100-SXM4-40GB", 108, 2048, 1.41, 5120, 2.43),
    ("NVIDIA A30", 56, 2048, 1.44, 3072, 2.43),
    ("NVIDIA L40", 142, 512, 2.49, 384, 18.0),
    ("NVIDIA L4", 58, 1024, 2.04, 192, 12.5),
    ("NVIDIA A40", 84, 1024, 1.74, 384, 14.5),
    ("NVIDIA A10", 72, 1024, 1.695, 384, 12.5),
    ("NVIDIA RTX 6000 Ada Generation", 142, 1024, 2.505, 384, 20.0),
    ("NVIDIA RTX A6000", 84, 1024, 1.8, 384, 16.0),
    ("NVIDIA GeForce RTX 5090", 170, 512, 2.407, 512, 28.0),
    ("NVIDIA GeForce RTX 4090", 128, 512, 2.52, 384, 21.0),
    ("NVIDIA GeForce RTX 4080", 76, 512, 2.505, 256, 22.4),
    ("NVIDIA GeForce RTX 3090 Ti", 84, 512, 1.86, 384, 21.0),
    ("NVIDIA GeForce RTX 3090", 82, 512, 1.695, 384, 19.5),
    ("NVIDIA GeForce RTX 3080", 68, 512, 1.71, 320, 19.0),
]


@pytest.mark.parametrize(("name", "sms", "flops", "ghz", "bits", "gbits"), CHIPS, ids=str)
def test_a_sheet_agrees_with_its_chip(name, sms, flops, ghz, bits, gbits):
    sheet = peaks.sheet(name)
    assert sheet is not None
    assert sheet.tflops == pytest.approx(sms * flops * ghz / 1e3, rel=4e-3)
    assert sheet.tbs == pytest.approx(bits * gbits / 8e3, rel=4e-3)


@pytest.mark.parametrize(
    ("name", "tbs", "gb"),
    [
        ("NVIDIA GB200", 8.0, 186),
        ("NVIDIA B200", 8.0, 180),
        ("NVIDIA GH200 480GB", 4.0, 96),
        ("NVIDIA H200", 4.8, 141),
        ("NVIDIA A100-SXM4-40GB", 1.555, 40),
        ("AMD Instinct MI325X", 6.0, 256),
        ("AMD Instinct MI300X", 5.3, 192),
    ],
)
def test_stacked_memory(name, tbs, gb):
    sheet = peaks.sheet(name)
    assert sheet is not None and (sheet.tbs, sheet.gb) == (tbs, gb)


def test_a_sheet_is_a_fact():
    with pytest.raises(FrozenInstanceError):
        peaks.SHEETS[0].tflops = 1.0  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        peaks.Peak(1.0, "").flops = 2.0  # type: ignore[misc]


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
    """With a clock that says a matmul takes five milliseconds: 2 n^3 FLOPs in that time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ticks = 0

    def clock() -> float:
        nonlocal ticks
        ticks += 1
        return ticks * 5e-3

    monkeypatch.setattr(peaks.time, "perf_counter", clock)
    with FlopCounterMode(display=False) as counter:
        peak = peaks.measured_peak(torch.device("cpu"), torch.float32)
    assert peak.flops == pytest.approx(2 * 768**3 / 5e-3)
    # A clock is read once before all, and for each measurement before, after and to go on.
    measured = (ticks - 2) // 3
    assert measured > 20 and counter.get_total_flops() == 2 * 768**3 * (measured + 1), "a warm-up"
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
