"""Result files: what is refused, where they lie, and what they say of sources and the GPU."""

import ctypes
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import power, results
from bench.__main__ import COMMANDS, main

ROW = {"key": "gpt2 eager", "problem": "", "samples_ms": [1.0, 2.0], "median_ms": 1.5}


@pytest.fixture
def result() -> results.Result:
    result = results.Result("step", ["gpt2", "--out", "x", "--rounds=6", "--out=y"], {})
    result.rows.append(dict(ROW))
    return result


def test_written_and_read_back(result: results.Result, tmp_path: Path) -> None:
    path = result.save(tmp_path)
    assert results.load(path) == result.data and not result.data["complete"]
    assert result.data["command"] == "python -m bench step gpt2 --rounds=6"
    assert path.parent.name.startswith("cpu-") or torch.cuda.is_available()
    date, clock, commit, *_ = path.stem.split("-")
    assert (len(date), len(clock)) == (8, 6) and commit == results.commit().split("-")[0]
    assert path.name.endswith("-step.json") and results.files(tmp_path) == [path]
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
        ({"rows": [ROW | {"samples_ms": [float("nan")]}]}, "not JSON compliant"),
    ],
)
def test_what_is_no_result(
    result: results.Result, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    result.data |= change
    with pytest.raises(ValueError, match=message):
        result.save(tmp_path)
    assert not results.files(tmp_path)


def test_committed_results_are_results() -> None:
    """Those that a GPU gave, from before this program was written too."""
    committed = results.files(results.FOLDER / "nvidia-h200")
    assert {results.load(path)["name"] for path in committed} == {"step", "waterfall"}
    assert all(results.load(path)["environment"]["gpu"] for path in committed)


def test_every_source_counts(tmp_path: Path) -> None:
    for name in ("kernels/fastgpt_kernels/a.py", "bench/step.py", "fastgpt/data/new/deep.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    before = results.sources(tmp_path)
    (tmp_path / "bench/test_step.py").write_text("measures for itself\n")
    path.write_bytes(b"x = 1\r\n")
    assert results.sources(tmp_path) == before
    path.write_text("x = 2\n")
    assert results.sources(tmp_path) != before


def test_dispatch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stepp"]) == 2 and "no such benchmark" in capsys.readouterr().err
    assert main([]) == 2
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)


# --- NVML ----------------------------------------------------------------------------------------


class FakeNvml:
    """The driver's library: 100 W, a clock that falls, and at the end the power limit."""

    def __init__(self) -> None:
        self.started, self.clocks, self.missing = time.monotonic(), iter(range(1980, 0, -10)), ""

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            if name == self.missing:
                return 3
            target = getattr(args[-1], "_obj", None) if args else None
            if name == "nvmlDeviceGetTotalEnergyConsumption":
                target.value = round(1e5 * (time.monotonic() - self.started))
            elif name == "nvmlDeviceGetClockInfo":
                assert args[1] == 1, "the SM clock"
                target.value = next(self.clocks)
            elif name == "nvmlDeviceGetCurrentClocksThrottleReasons":
                target.value = 0x1 | 0x4 * (time.monotonic() - self.started > 0.05)
            elif name == "nvmlSystemGetDriverVersion":
                args[0].value = b"580.159"
            elif name.startswith("nvmlDeviceGet") and target is not None and "Handle" not in name:
                target.value = 700_000
            return 0

        return call


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(uuid="0-1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    return fake


def test_energy_clock_and_throttling(nvml: FakeNvml) -> None:
    gpu, why = power.open_gpu()
    assert gpu is not None and not why
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

    def no_library(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert "libnvidia-ml.so.1" in power.open_gpu()[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert power.open_gpu() == (None, "no NVIDIA GPU")
    with power.Meter(None) as meter:
        pass
    assert (meter.joules, meter.clock_mhz, meter.throttled) == (None, None, [])
