"""Result files: what is refused, where they lie, and what they say of sources and the GPU."""

import ctypes
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from bench import power, results

ROW = {"key": "gpt2 eager", "problem": "", "samples_ms": [1.0, 2.0], "median_ms": 1.5}


def test_written_and_read_back(tmp_path: Path) -> None:
    result = results.Result("step", ["gpt2", "--out", "x", "--rounds=6", "--out=y"], {})
    result.rows.append(dict(ROW))
    path = result.save(tmp_path)
    assert results.load(path) == result.data and not result.data["complete"]
    assert result.data["command"] == "python -m bench step gpt2 --rounds=6"
    assert path.parent.name.startswith("cpu-") or torch.cuda.is_available()
    assert re.fullmatch(rf"\d{{8}}-\d{{6}}-{results.commit()}-step.json", path.name)
    assert results.files(tmp_path) == [path]
    assert result.end(tmp_path) == 0 and results.load(path)["complete"]
    result.rows.append({"key": "other", "problem": "no GPU"})
    assert result.end(tmp_path) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "no result of schema 1"),
        ({"rows": [ROW, ROW]}, "every row needs a key of its own"),
        ({"rows": [{"key": "a"}]}, "a: a row has either samples_ms or a problem"),
        ({"rows": [ROW | {"problem": "wrong"}]}, "has either samples_ms or a problem"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        results.check({"schema": 1, "rows": [ROW]} | change, "a file")


def test_committed_results_are_results() -> None:
    """Those that a GPU gave, from before this program was written too."""
    committed = [results.load(path) for path in results.files(results.FOLDER / "nvidia-h200")]
    assert {data["name"] for data in committed} == {"step", "waterfall"}
    assert all(data["environment"]["gpu"] for data in committed)


def test_every_source_counts(tmp_path: Path) -> None:
    def sources(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
        return results.sources(tmp_path)

    names = "kernels/fastgpt_kernels/a.py", "bench/step.py", "fastgpt/data/new/deep.py"
    *_, before = seen = [sources(name, f"x = {i}\n") for name in names for i in (1, 2)]
    assert len({*seen}) == 6
    assert sources("bench/test_step.py", "measures for itself") == before
    assert sources(names[0], "x = 2\r\n") == before


# --- NVML ----------------------------------------------------------------------------------------


class FakeNvml:
    """The driver's library: 100 W, a clock that falls, and at the end the power limit."""

    started, clocks, missing = 0.0, iter(range(1980, 0, -10)), ""

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            seconds = time.monotonic() - self.started
            if name == "nvmlSystemGetDriverVersion":
                args[0].value = b"580.159"
            elif name == "nvmlDeviceGetClockInfo":
                args[-1]._obj.value = next(self.clocks) if args[1] == 1 else 0  # the SM's
            elif name not in ("nvmlInit_v2", "nvmlDeviceGetHandleByUUID"):
                values = {"Tot": round(1e5 * seconds), "Cur": 0x1 | 0x4 * (seconds > 0.05)}
                args[-1]._obj.value = values.get(name[13:16], 700_000)
            return 3 * (name == self.missing)

        return call


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake, properties = FakeNvml(), SimpleNamespace(uuid="0-1")
    fake.started = time.monotonic()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    return fake


def test_energy_clock_and_throttling(nvml: FakeNvml) -> None:
    gpu, _ = power.open_gpu()
    assert gpu is not None
    with power.Meter(gpu) as meter:
        time.sleep(0.2)
    assert meter.joules == pytest.approx(20, rel=0.5) and meter.throttled == ["power limit"]
    assert meter.clock_mhz is not None and 1900 < meter.clock_mhz < 1980
    state = gpu.state()
    assert state["driver_version"] == "580.159" and state["power.limit"] == "700.00 W"
    assert state["throttling"] == "0x0000000000000005" and state["clocks.sm"].endswith(" MHz")


def test_without_nvml_the_reason_is_said(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.missing = "nvmlDeviceGetTotalEnergyConsumption"  # before Volta
    assert power.open_gpu() == (None, f"NVML: {nvml.missing} failed with code 3")
    monkeypatch.setattr(ctypes, "CDLL", Mock(side_effect=OSError))
    assert "libnvidia-ml.so.1" in power.open_gpu()[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert power.open_gpu() == (None, "no NVIDIA GPU")
    with power.Meter(None) as meter:
        assert (meter.joules, meter.clock_mhz, meter.throttled) == (None, None, [])
