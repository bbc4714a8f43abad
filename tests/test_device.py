"""Device and precision by name; those that a machine lacks are refused in words."""

from __future__ import annotations

import pytest
import torch

from fastgpt import device
from fastgpt.errors import UserError

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
