"""A GPU that PyTorch does not see: which driver it needs, and what to install."""

from __future__ import annotations

import pytest
import torch

from fastgpt.errors import UserError
from fastgpt.model import driver, ops
from fastgpt.model.driver import why_no_gpu
from fastgpt.train import main
from fastgpt_kernels import host, versions
from fastgpt_kernels.registry import Sizes
from tests.model.test_ops import CPU, choices

OLD = "NVIDIA A100-SXM4-40GB, 535.104.05"


@pytest.mark.parametrize(
    ("said", "cuda", "parts"),
    [
        (OLD, "13.0", ("driver 535.104.05", "for CUDA 13.0 needs driver 580.65.06", "/cu126")),
        ("NVIDIA H100, 580.82.07", None, ("without CUDA", "/cu130", "pip install 'torch==2.")),
        ("Tesla T4, 470.57.02", "12.6", ("needs driver 525.60.13", "install a driver >= 525")),
        ("NVIDIA H100, 580.82.07", "13.0", ("does not see it", "CUDA_VISIBLE_DEVICES")),
    ],
)
def test_it_says_what_is_needed_and_how_to_get_it(said, cuda, parts):
    line = why_no_gpu(lambda: said, cuda)
    assert "\n" not in line and said.split(",")[0] in line
    for part in parts:
        assert part in line, line


@pytest.mark.parametrize("said", ["", "No devices were found", "NVIDIA-SMI has failed, badly"])
def test_without_a_gpu_nothing_is_said(said):
    assert why_no_gpu(lambda: said, "13.0") == ""


def test_without_nvidia_smi_nothing_is_asked(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert driver._smi() == ""


def test_training_says_it_and_goes_on(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    from fastgpt.config import settings
    from fastgpt.config.presets import laptop

    monkeypatch.setattr(main, "why_no_gpu", lambda: why_no_gpu(lambda: OLD, "13.0"))
    monkeypatch.setattr(main, "_train", lambda _, name, machine, ranks: (machine.device.type, None))
    assert main.train(settings.replace(laptop(), peak_tflops=1.0), "laptop") == "cpu"
    assert capsys.readouterr().out.strip().endswith("; going on on the CPU")
    main.train(settings.replace(laptop(), device="cpu", peak_tflops=1.0), "laptop")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({"torch": "2.11.0+cu130", "triton": "3.6.0"}, ""),
        ({"torch": "2.15.1", "triton": "3.9.0"}, ""),
        ({"torch": "2.13.0+cpu"}, ""),
        ({"torch": "2.16.0", "triton": "3.9.0"}, "torch 2.16.0 is not among 2.11 to 2.15"),
        ({"torch": "2.15.0", "triton": "4.0.0"}, "triton 4.0.0 is not among 3.6 to 3.9"),
        ({"torch": "2.9.1", "triton": "3.5.0"}, "torch 2.9.1 is not among 2.11 to 2.15"),
        ({"torch": "3.0", "triton": "3.10.0"}, "torch 3.0 is not"),
    ],
)
def test_which_versions_are_tested(installed, said):
    assert versions.outside(installed).startswith(said) and bool(said) == bool(
        versions.outside(installed)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run for real here")
def test_untested_versions_run_eager_unless_asked_and_warn_once(monkeypatch, capsys):
    monkeypatch.setattr(host, "INTERPRETED", True)
    monkeypatch.setattr(versions, "untested", lambda: "torch 9.9 is not among 2.11 to 2.15")
    ops._warn_of_versions.cache_clear()
    for _ in range(2):
        chosen = choices(sizes=Sizes())
        assert {c.implementation for c in chosen.values()} == {"eager"}
        assert chosen["bias_gelu"].reason == "torch 9.9 is not among 2.11 to 2.15"
    assert capsys.readouterr().out.count("warning: torch 9.9 is not among") == 1
    assert choices(ops.Wish("triton"))["bias_gelu"].implementation == "triton"
    monkeypatch.setattr(host, "INTERPRETED", False)
    with pytest.raises(UserError, match="no GPU"):
        ops.choose(CPU, wish=ops.Wish("triton"))
