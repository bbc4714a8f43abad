"""The rows of `fastgpt doctor` that depend on what is found."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from fastgpt import doctor


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
    doctor.doctor()
    out = capsys.readouterr().out
    assert "unusable: " in out and "broken" in out
    assert "no run with a checkpoint under runs/ yet" in out
