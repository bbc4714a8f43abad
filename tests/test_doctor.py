"""The rows of `fastgpt doctor` that depend on what is found."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastgpt import doctor
from fastgpt.config.presets import PRESETS, laptop
from fastgpt.config.settings import replace
from fastgpt.model import build
from fastgpt.model.kernels import Kernels, Selected


def test_gpus_are_listed(monkeypatch):
    properties = SimpleNamespace(
        name="NVIDIA H200", total_memory=140 * 2**30, major=9, minor=0, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    assert doctor._gpus() == "cuda:0 NVIDIA H200, 140 GiB, sm_90, 132 SMs"


def test_broken_data_is_named_and_does_not_stop_the_doctor(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    broken = tmp_path / "data" / "broken"
    broken.mkdir(parents=True)
    (broken / "train.bin").write_bytes(b"x")
    doctor.doctor(laptop(), "laptop")
    out = capsys.readouterr().out
    assert "unusable: " in out and "broken" in out
    assert "no run with a checkpoint under runs/ yet" in out


@pytest.mark.parametrize(
    ("preset", "wanted"),
    [
        ("laptop", (12, 64, 4, 128, 256, 256, 0.0, False, "erf")),
        ("shakespeare_char", (64, 256, 6, 384, 65, 128, 0.2, False, "erf")),
        ("gpt2", (32, 1024, 12, 768, 50257, 50304, 0.0, False, "tanh")),
        ("finetune_shakespeare", (1, 1024, 25, 1600, 50257, 50304, 0.0, True, "tanh")),
    ],
)
def test_the_ops_are_those_of_the_run(preset, wanted, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    asked = []

    def select(device, dtype, sizes, options, compile):
        asked.append((tuple(vars(sizes).values()), dtype, options.kernels))
        return Kernels({}, [Selected("attention", "eager", "asked")])

    monkeypatch.setattr(build, "select", select)
    doctor.doctor(replace(PRESETS[preset](), dtype="bfloat16", kernels="eager"), preset)
    assert asked == [(wanted, torch.bfloat16, "eager")]
    out = capsys.readouterr().out
    assert f"ops of {preset}" in out and "attention: eager (asked)" in out
