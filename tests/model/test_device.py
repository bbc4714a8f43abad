"""Device and precision by name; those that a machine lacks are refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastgpt.errors import UserError
from fastgpt.model import device

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_cpu():
    assert device.resolve_device("cpu") == CPU
    assert device.resolve_dtype("auto", CPU) == "float32"
    assert device.resolve_dtype("bfloat16", CPU) == "bfloat16"
    assert device.resolve_compile("auto", CPU) is False
    assert device.resolve_compile(True, CPU) is True


def test_cuda_by_itself_when_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert device.resolve_device("auto") == CUDA
    assert device.resolve_device("cuda:1") == torch.device("cuda:1")
    assert device.resolve_dtype("auto", CUDA) == "bfloat16"
    assert device.resolve_compile("auto", CUDA) is True
    with pytest.raises(UserError, match="cuda:2: there are 2, cuda:0 to cuda:1"):
        device.resolve_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert device.resolve_dtype("auto", CUDA) == "float16"
    assert device.resolve_dtype("float16", CUDA) == "float16"


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "meta", "xla"])
def test_names_that_mean_nothing(name):
    with pytest.raises(UserError, match="wanted auto, cpu, cuda, cuda:N or mps"):
        device.resolve_device(name)


def test_float16_needs_loss_scaling():
    with pytest.raises(UserError, match="--dtype=float16: needs a GPU"):
        device.resolve_dtype("float16", CPU)


def test_autocast():
    with device.autocast(CPU, "bfloat16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with device.autocast(CPU, "float32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


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
