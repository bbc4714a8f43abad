"""Device, precision and peak by name, and what to install where PyTorch sees no GPU."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastgpt.config.presets import laptop
from fastgpt.config.schema import Config
from fastgpt.config.settings import replace
from fastgpt.errors import UserError
from fastgpt.model import build, device
from fastgpt.model.device import Machine, Peak, table_peak, unseen_gpu
from fastgpt.train import main

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_cpu():
    assert Machine.of("cpu") == Machine.of("cpu", compile="auto") == Machine(CPU, "float32", False)
    assert Machine.of("cpu", "bfloat16", True) == Machine(CPU, "bfloat16", True)
    with pytest.raises(UserError, match="--dtype=float16: needs a GPU"):
        Machine.of("cpu", "float16")


def test_cuda_by_itself_when_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert Machine.of(compile="auto") == Machine(CUDA, "bfloat16", True)
    wanted = {"device": "cuda:1", "dtype": "bfloat16", "compile": False}
    assert Machine.of("cuda:1").settings == wanted
    with pytest.raises(UserError, match="cuda:2: there are 2, cuda:0 to cuda:1"):
        Machine.of("cuda:2")
    # As on Turing, where PyTorch computes in fp32.
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert Machine.of().dtype == Machine.of(dtype="float16").dtype == "float16"


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "meta", "xla"])
def test_names_that_mean_nothing(name):
    with pytest.raises(UserError, match="wanted auto, cpu, cuda, cuda:N or mps"):
        Machine.of(name)


@pytest.mark.parametrize(
    ("dtype", "tf32", "precision"),
    [("float32", False, "highest"), ("float32", True, "high"), ("bfloat16", False, "high")],
)
def test_float32_is_exact_unless_asked(dtype, tf32, precision):
    before = torch.get_float32_matmul_precision()
    try:
        # By the doctor too, which shows what was tuned under it.
        build.select_kernels(replace(Config(), tf32=tf32), 65, Machine(CPU, dtype))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_deterministic(monkeypatch):
    """Asked for, it holds for the whole process; not asked for, it is left as the caller has it."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        for asked, holds in ((False, False), (True, True), (False, True)):
            build.set_precision(replace(Config(), deterministic=asked), Machine(CPU))
            assert torch.are_deterministic_algorithms_enabled() is holds
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)


# --- The peak ------------------------------------------------------------------------------------


def test_the_peak_is_found_once(monkeypatch):
    asked = []
    monkeypatch.setattr(device, "measured_peak", lambda *a: asked.append(a) or Peak(1e12, "here"))
    machine = Machine.of("cpu", "bfloat16")
    assert asked == [], "measured before its first use"
    assert machine.peak == machine.peak == Peak(1e12, "here") and asked == [(CPU, torch.bfloat16)]
    assert Machine.of("cpu", peak_tflops=2).peak.flops == 2e12 and len(asked) == 1


# TFLOP/s by the chip: streaming multiprocessors x dense bf16 kFLOPs of one in a clock x boost clock
# in GHz.
CHIPS = {
    "H100 80GB HBM3": 132 * 4.096 * 1.83,
    "A30": 56 * 2.048 * 1.44,
    "L40": 142 * 0.512 * 2.49,
    "L4": 58 * 1.024 * 2.04,
    "A40": 84 * 1.024 * 1.74,
    "A10": 72 * 1.024 * 1.695,
    "RTX 6000 Ada Generation": 142 * 1.024 * 2.505,
    "RTX A6000": 84 * 1.024 * 1.8,
    "GeForce RTX 5090": 170 * 0.512 * 2.407,
    "GeForce RTX 4090": 128 * 0.512 * 2.52,
    "GeForce RTX 4080": 76 * 0.512 * 2.505,
    "GeForce RTX 3090 Ti": 84 * 0.512 * 1.86,
    "GeForce RTX 3090": 82 * 0.512 * 1.695,
}
A100 = ("A100-SXM4-40GB", "A100-SXM4-80GB", "A100-PCIE-40GB", "A100 80GB PCIe")


def test_a_sheet_agrees_with_its_chip():
    for name, tflops in {**CHIPS, **dict.fromkeys(A100, 108 * 2.048 * 1.41)}.items():
        peak = table_peak(f"NVIDIA {name}")
        assert peak is not None and peak.source
        assert peak.flops == pytest.approx(tflops * 1e12, rel=4e-3), name


SLICES = ("A100-SXM4-40GB MIG 1g.5gb", "H100 80GB HBM3 MIG 3g.40gb", "H200 MIG 1g.18gb", "A40-48Q")
OTHERS = ("H800 PCIe", "A100-SXM-64GB", "A10G", "L4 of the future", "GeForce RTX 3080")
OTHERS += ("GeForce RTX 4090 Laptop GPU", "GeForce RTX 4090 D")


def test_a_device_that_only_sounds_alike_is_measured(monkeypatch):
    """A slice of a GPU has a fraction of its peak, so MFU by the whole one's is far too low."""
    monkeypatch.setattr(device, "measured_peak", lambda *_: Peak(1e12, "measured"))
    names = [f"NVIDIA {n}" for n in SLICES + OTHERS]
    for name in (*names, "Tesla T4", "AMD Instinct MI300X", ""):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, n=name: n)
        assert Machine(CUDA).peak == Peak(1e12, "measured"), name
        assert Machine(CUDA, peak_tflops=12.5).peak.flops == 12.5e12


def test_a_measured_peak_counts_two_operations_per_multiplication(monkeypatch, tmp_path):
    """By a clock on which a matmul takes five milliseconds: 2 n^3 FLOPs in that time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    clock = itertools.count(step=5e-3)
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(clock))
    with FlopCounterMode(display=False) as counter:
        peak = device.measured_peak(CPU, torch.float32)
    assert peak.flops == pytest.approx(2 * 768**3 / 5e-3)
    # A clock is read once before all, and for each measurement before, after and to go on.
    measured = (round(next(clock) / 5e-3) - 2) // 3
    assert measured > 5 and counter.get_total_flops() == 2 * 768**3 * (measured + 1), "a warm-up"
    assert peak.source.startswith("measured: 768 x 768 float32 matmul, ")


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Returns a function that puts an nvidia-smi on PATH which prints a line."""

    def put(line: str, code: int = 0) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho '{line}'\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    return put


def test_an_unseen_gpu_is_explained(smi, monkeypatch):
    smi("NVIDIA A100-SXM4-40GB, 535.104.05")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    line = unseen_gpu()
    assert line and "\n" not in line
    assert "there is a NVIDIA A100-SXM4-40GB with driver 535.104" in line
    assert "built for CUDA 13.0, does not see it" in line
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in str(unseen_gpu())
    for said, code in (("No devices were found", 6), ("NVIDIA-SMI has failed, badly", 9)):
        smi(said, code)
        assert unseen_gpu() is None
    monkeypatch.setenv("PATH", "")
    assert unseen_gpu() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_training_explains_an_unseen_gpu_and_goes_on(smi, monkeypatch, capsys):
    smi("NVIDIA H100, 535.104.05")
    monkeypatch.setattr(main, "_train", lambda _, name, machine, ranks: machine.device.type)
    assert main.train(replace(laptop(), peak_tflops=1.0), "laptop") == "cpu"
    assert "check CUDA_VISIBLE_DEVICES; using the CPU\n" in capsys.readouterr().out
    main.train(replace(laptop(), device="cpu", peak_tflops=1.0), "laptop")
    assert "using" not in capsys.readouterr().out
