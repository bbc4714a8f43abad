"""Energy, clock and throttling of an NVIDIA GPU, read from the driver's NVML."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import torch

INTERVAL_S = 0.05
# Bits of NVML's clock event reasons that lower the clock under load
REASONS = {4: "power limit", 8: "hardware slowdown", 0x60: "temperature", 0x80: "power brake"}


class Gpu:
    """PyTorch's first GPU, read by NVML. Raises RuntimeError if NVML cannot read it."""

    def __init__(self) -> None:
        if not torch.cuda.is_available() or torch.version.hip:
            raise RuntimeError("no NVIDIA GPU")
        try:
            self.nvml: Any = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            raise RuntimeError("the driver's libnvidia-ml.so.1 is missing") from None
        self.handle = ctypes.c_void_p()
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}".encode()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByUUID", uuid, ctypes.byref(self.handle))
        self.joules()

    def _call(self, name: str, *args: Any) -> None:
        if code := getattr(self.nvml, name)(*args):
            raise RuntimeError(f"NVML: {name} failed with code {code}")

    def _read(self, name: str, *args: int, kind: Any = ctypes.c_uint) -> int:
        value = kind()
        self._call(f"nvmlDeviceGet{name}", self.handle, *args, ctypes.byref(value))
        return value.value

    def joules(self) -> float:
        """Returns the energy spent since the driver was loaded."""
        return self._read("TotalEnergyConsumption", kind=ctypes.c_ulonglong) / 1e3

    def clock(self) -> tuple[int, int]:
        """Returns the SM clock in MHz, and the bits of the reasons that lower it."""
        reasons = self._read("CurrentClocksThrottleReasons", kind=ctypes.c_ulonglong)
        return self._read("ClockInfo", 1), reasons  # 1: NVML_CLOCK_SM

    def state(self) -> dict[str, str]:
        """Returns driver, clock, power, temperature and throttling by nvidia-smi's names."""
        version, (clock, reasons) = ctypes.create_string_buffer(80), self.clock()
        self._call("nvmlSystemGetDriverVersion", version, 80)
        draw, limit = (self._read(name) / 1e3 for name in ("PowerUsage", "EnforcedPowerLimit"))
        return {
            "driver_version": version.value.decode(), "clocks.sm": f"{clock} MHz",
            "power.draw": f"{draw:.2f} W", "power.limit": f"{limit:.2f} W",
            "temperature.gpu": f"{self._read('Temperature', 0)}", "throttling": f"{reasons:#018x}",
        }  # fmt: skip


def open_gpu() -> tuple[Gpu | None, str | None]:
    """Returns the GPU, or None and the reason."""
    try:
        return Gpu(), None
    except RuntimeError as e:
        return None, str(e)


@contextlib.contextmanager
def metered(gpu: Gpu | None) -> Iterator[dict[str, Any]]:
    """Yields a dict with joules, clock_mhz and throttled of the context, empty without a GPU.

    A thread samples the clock, whose mean is taken, and the reasons that lower it.
    """
    found: dict[str, Any] = {"joules": None, "clock_mhz": None, "throttled": []}
    if gpu is None:
        yield found
        return
    seen, ended = list[tuple[int, int]](), threading.Event()

    def sample() -> None:
        while not ended.wait(INTERVAL_S):
            seen.append(gpu.clock())

    thread, before = threading.Thread(target=sample, daemon=True), gpu.joules()
    thread.start()
    try:
        yield found
    finally:
        found["joules"] = gpu.joules() - before
        ended.set()
        thread.join()
        seen.append(gpu.clock())
        found["clock_mhz"] = sum(clock for clock, _ in seen) / len(seen)
        held = {name for bit, name in REASONS.items() for _, bits in seen if bits & bit}
        found["throttled"] = sorted(held)
