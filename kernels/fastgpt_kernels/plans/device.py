"""What a measurement is valid for: the device, the versions, the kernels' sources.

`key(device, what)` is all of that and the question itself; if any part is another, so is the key,
and what was measured under the old one is not found.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastgpt_kernels import host

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def sources() -> str:
    """A hash of the package's modules, but for the tools."""
    return hash_of(*(p for p in sorted(ROOT.rglob("*.py")) if "tools" not in p.parts))


def hash_of(*paths: Path) -> str:
    """Of the contents of files, and their names."""
    found = hashlib.sha256()
    for path in paths:
        found.update(f"{path.name} ".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def driver() -> str:
    """The NVIDIA driver's version, "570.86.10"; empty if there is none that says."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found[0] if found else ""


@functools.cache
def _cpu() -> str:
    """The model of this machine's processor."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def cores() -> int:
    """CPUs that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


@functools.cache
def _version(module: str) -> str:
    try:
        from importlib.metadata import version

        return version(module)
    except ImportError:  # PackageNotFoundError is one
        return ""


def facts(device: torch.device) -> dict[str, Any]:
    """Device and versions: what a plan's figures depend on besides the question."""
    found: dict[str, Any] = {
        "torch": torch.__version__, "triton": _version("triton"), "sources": sources(),
    }  # fmt: skip
    if device.type == "cuda":
        index = device.index or 0
        properties = torch.cuda.get_device_properties(index)
        return found | {
            "device": properties.name,
            "sms": properties.multi_processor_count,
            "arch": host.arch(index),
            "driver": driver(),
            "cudnn": torch.backends.cudnn.version() or 0,
        }
    name = _cpu() if device.type == "cpu" else platform.machine()
    return found | {
        "device": name, "sms": cores(), "arch": device.type, "driver": "", "cudnn": 0,
    }  # fmt: skip


def key(device: torch.device, what: Mapping[str, Any]) -> dict[str, Any]:
    """The key of a question about a device, such as which attention is the fastest there."""
    return {**facts(device), "what": dict(what)}


def name(device: torch.device) -> str:
    """The device as a user knows it."""
    return str(facts(device)["device"])
