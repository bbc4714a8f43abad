"""Energy, clock and throttling of an NVIDIA GPU, read from the driver's NVML."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch

INTERVAL_S = 0.05
SM_CLOCK = 1  # NVML_CLOCK_SM
# Bits of NVML's clock event reasons that lower the clock under load.
REASONS = {
    0x4: "power limit", 0x8: "hardware slowdown", 0x20: "temperature", 0x40: "temperature",
    0x80: "power brake",
}  # fmt: skip


class Gpu:
    """The GPU that PyTorch calls the first. Raises RuntimeError where NVML cannot read it."""

    def __init__(self) -> None:
        if not torch.cuda.is_available() or torch.version.hip:
            raise RuntimeError("no NVIDIA GPU")
        try:
            self.nvml: Any = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            raise RuntimeError("there is no libnvidia-ml.so.1, which the driver brings") from None
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
        """Returns the energy since the driver was loaded."""
        return self._read("TotalEnergyConsumption", kind=ctypes.c_ulonglong) / 1e3

    def clock(self) -> tuple[int, int]:
        """Returns the SM clock in MHz, and the bits of what holds it down."""
        reasons = self._read("CurrentClocksThrottleReasons", kind=ctypes.c_ulonglong)
        return self._read("ClockInfo", SM_CLOCK), reasons

    def state(self) -> dict[str, str]:
        """Returns driver, clock, power, temperature and throttling, named as nvidia-smi does."""
        version, (clock, reasons) = ctypes.create_string_buffer(80), self.clock()
        self._call("nvmlSystemGetDriverVersion", version, 80)
        return {
            "driver_version": version.value.decode(),
            "clocks.sm": f"{clock} MHz",
            "power.draw": f"{self._read('PowerUsage') / 1e3:.2f} W",
            "power.limit": f"{self._read('EnforcedPowerLimit') / 1e3:.2f} W",
            "temperature.gpu": f"{self._read('Temperature', 0)}",
            "throttling": f"{reasons:#018x}",
        }


def open_gpu() -> tuple[Gpu | None, str]:
    """Returns the GPU, or None and why NVML cannot read it."""
    try:
        return Gpu(), ""
    except RuntimeError as e:
        return None, str(e)


class Meter:
    """A context in which a GPU's energy is counted and its clock sampled by a thread.

    joules and clock_mhz  spent, and the mean, inside; None without a GPU to read
    throttled             names of what held the clock down at any time
    """

    def __init__(self, gpu: Gpu | None):
        self.gpu, self.throttled = gpu, list[str]()
        self.joules: float | None = None
        self.clock_mhz: float | None = None

    def __enter__(self) -> Meter:
        if self.gpu is not None:
            self._seen, self._ended = list[tuple[int, int]](), threading.Event()
            self._thread = threading.Thread(target=self._sample, args=(self.gpu,), daemon=True)
            self._before = self.gpu.joules()
            self._thread.start()
        return self

    def _sample(self, gpu: Gpu) -> None:
        while not self._ended.wait(INTERVAL_S):
            self._seen.append(gpu.clock())

    def __exit__(self, *exc: object) -> None:
        if self.gpu is not None:
            self.joules = self.gpu.joules() - self._before
            self._ended.set()
            self._thread.join()
            self._seen.append(self.gpu.clock())
            self.clock_mhz = sum(clock for clock, _ in self._seen) / len(self._seen)
            held = {name for bit, name in REASONS.items() for _, bits in self._seen if bits & bit}
            self.throttled = sorted(held)
