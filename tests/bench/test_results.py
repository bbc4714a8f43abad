"""Result files, their hash of sources, and the GPU's state by a fake NVML."""

import ctypes
import re
from itertools import count, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from bench import power, results
from fastgpt.errors import UserError


def load_only(folder: Path, name: str) -> dict[str, Any]:
    """Returns the only result below a folder, which is of a command."""
    (path,) = folder.glob("**/*.json")
    assert path.name.endswith(f"-{name}.json")
    return results.load(path)


ROW = {"key": "gpt2 eager", "problem": "", "samples_ms": [1.0, 2.0], "median_ms": 1.5}


def test_written_and_read_back(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    hashes = {results.sources(tmp_path)}
    for name, text in (("a", "1"), ("a", "2"), ("test_a", "measures for itself")):
        (tmp_path / f"bench/{name}.py").write_text(text)
        hashes.add(results.sources(tmp_path))
    assert len(hashes) == 3
    result = results.Result("step", ["gpt2", "--out", "x", "--rounds=6", "--out=y"], {})
    result.rows.append(dict(ROW))
    path = result.save(tmp_path)
    assert results.load(path) == result.data and not result.data["complete"]
    assert result.data["command"] == "python -m bench step gpt2 --rounds=6"
    assert re.fullmatch(rf"\d{{8}}-\d{{6}}-{results.commit()}-step.json", path.name)
    assert result.end(tmp_path) == 0 and results.load(path)["complete"]
    result.rows.append({"key": "other", "problem": "no GPU"})
    assert result.end(tmp_path) == 1


def test_refused() -> None:
    both = "a row has either samples_ms or a problem"
    for change, message in (
        ({"schema": 99}, "no result of schema 1"),
        ({"rows": [ROW, ROW]}, "every row needs a key of its own"),
        ({"rows": [{"key": "a"}]}, f"a: {both}"),
        ({"rows": [ROW | {"problem": "wrong"}]}, both),
    ):
        with pytest.raises(UserError, match=message):
            results.check({"schema": 1, "rows": [ROW]} | change, "a file")


# --- NVML ----------------------------------------------------------------------------------------


class FakeNvml:
    """The driver's library, which reads 20 J more each time."""

    missing = ""

    def __init__(self) -> None:
        self.values = {"CurrentClocksThrottleReasons": repeat(5), "Temperature": repeat(55)}
        self.values |= {"PowerUsage": repeat(685_330), "EnforcedPowerLimit": repeat(700_000)}
        self.values |= {"TotalEnergyConsumption": count(0, 20_000), "ClockInfo": repeat(1605)}

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            if name == "nvmlSystemGetDriverVersion":
                args[0].value = b"580.159"
            if value := self.values.get(name.removeprefix("nvmlDeviceGet")):
                args[-1]._obj.value = next(value)
            return 3 * (name == self.missing)

        return call


def test_energy_clock_and_throttling(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml, properties = FakeNvml(), SimpleNamespace(uuid="0-1")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: nvml)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    gpu, _ = power.open_gpu()
    assert gpu is not None and gpu.state() == {
        "driver_version": "580.159", "clocks.sm": "1605 MHz", "power.draw": "685.33 W",
        "power.limit": "700.00 W", "temperature.gpu": "55", "throttling": "0x0000000000000005",
    }  # fmt: skip
    with power.metered(gpu) as found:
        pass
    assert found == {"joules": 20.0, "clock_mhz": 1605.0, "throttled": ["power limit"]}
    nvml.missing = "nvmlDeviceGetTotalEnergyConsumption"  # before Volta
    assert power.open_gpu() == (None, f"NVML: {nvml.missing} failed with code 3")
    monkeypatch.setattr(ctypes, "CDLL", Mock(side_effect=OSError))
    assert power.open_gpu() == (None, "the driver's libnvidia-ml.so.1 is missing")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert power.open_gpu() == (None, "no NVIDIA GPU")
    with power.metered(None) as found:
        assert found == {"joules": None, "clock_mhz": None, "throttled": []}
