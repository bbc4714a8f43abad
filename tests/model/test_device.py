"""Device and precision by name; those that a machine lacks are refused in words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fastgpt.config.schema import Config
from fastgpt.config.settings import replace
from fastgpt.errors import UserError
from fastgpt.model import build, peaks
from fastgpt.model.device import Machine
from fastgpt.model.peaks import Peak

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_cpu():
    assert Machine.of("cpu") == Machine(CPU, "float32", False)
    assert Machine.of("cpu", "bfloat16").torch_dtype == torch.bfloat16
    assert Machine.of("cpu", compile="auto").compile is False
    assert Machine.of("cpu", compile=True).compile is True


def test_cuda_by_itself_when_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert Machine.of(compile="auto") == Machine(CUDA, "bfloat16", True)
    assert Machine.of("cuda:1").settings == {
        "device": "cuda:1",
        "dtype": "bfloat16",
        "compile": False,
    }
    with pytest.raises(UserError, match="cuda:2: there are 2, cuda:0 to cuda:1"):
        Machine.of("cuda:2")
    # As on Turing, where PyTorch computes in fp32.
    emulated = {"including_emulation": True}
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda **given: (emulated | given) == emulated
    )
    assert Machine.of().dtype == Machine.of(dtype="float16").dtype == "float16"


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "meta", "xla"])
def test_names_that_mean_nothing(name):
    with pytest.raises(UserError, match="wanted auto, cpu, cuda, cuda:N or mps"):
        Machine.of(name)


def test_float16_needs_loss_scaling():
    with pytest.raises(UserError, match="--dtype=float16: needs a GPU"):
        Machine.of("cpu", "float16")


def test_the_peak_is_found_once(monkeypatch):
    asked = []

    def measured(device, dtype):
        asked.append(dtype)
        return Peak(1e12, "measured")

    monkeypatch.setattr(peaks, "measured_peak", measured)
    machine = Machine.of("cpu", "bfloat16")
    assert asked == [], "nobody has wanted it yet"
    assert machine.peak == machine.peak == Peak(1e12, "measured") and asked == [torch.bfloat16]
    assert Machine.of("cpu", peak_tflops=2).peak.flops == 2e12 and len(asked) == 1


@pytest.mark.quick("flags0*", "flags1*")
@pytest.mark.parametrize(
    ("flags", "precision"),
    [([], "highest"), (["--tf32=True"], "high"), (["--dtype=bfloat16"], "high")],
)
def test_float32_is_exact_unless_asked(flags, precision, tmp_path, monkeypatch):
    """The run's own setting, and that checking the ops leaves it."""
    from fastgpt import cli

    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("some text " * 400)
    small = ["--max_iters=1", "--eval_iters=1", "--sample_tokens=0", "--input=text.txt"]
    before = torch.get_float32_matmul_precision()
    try:
        with pytest.raises(SystemExit) as e:
            cli.main(["train", "laptop", "--device=cpu", *small, *flags])
        assert not e.value.code
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_deterministic(monkeypatch):
    """Asked for, it holds for the whole process; not asked for, it is left as the caller has it."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cpu = Machine.of("cpu")
    try:
        for asked, holds in ((False, False), (True, True), (False, True)):
            build.set_precision(replace(Config(), deterministic=asked), cpu)
            assert torch.are_deterministic_algorithms_enabled() is holds
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
