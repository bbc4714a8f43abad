"""Where numbers come from: sources, commit, machine, versions. Imports nothing heavy by itself."""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# What a result depends on: every module of these packages, so that no new one is forgotten.
PACKAGES = ("fastgpt", "kernels/fastgpt_kernels", "bench")
_CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
_QUERY = ("name", "driver_version", *_CLOCKS)
# What drivers since 535 and those before call the same bits.
_THROTTLING = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")


def sources(root: Path = ROOT) -> dict[str, str]:
    """A hash by file of all that a result measured, by its path in the checkout.

    pytest's modules in bench/ measure for themselves and are left out.
    """
    paths = [p for package in PACKAGES for p in (root / package).rglob("*.py")]
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(_text(path)).hexdigest()[:12]
        for path in sorted(paths)
        if not path.name.startswith("test_")
    }


def _text(path: Path) -> bytes:
    """A file's bytes, with the same line ends on every system."""
    return path.read_bytes().replace(b"\r\n", b"\n")


def output_of(*command: str, cwd: Path = ROOT) -> str:
    """A command's output, or why there is none: provenance must not stop a measurement."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({type(error).__name__})"
    return done.stdout.strip() or "unknown"


def commit(folder: Path = ROOT) -> str:
    """The commit checked out in a folder, with "-dirty" if tracked files differ from it."""
    name = output_of("git", "rev-parse", "--short=10", "HEAD", cwd=folder)
    if not re.fullmatch(r"[0-9a-f]{7,40}", name):
        return "unknown"
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no", cwd=folder)
    return name if changed == "unknown" else f"{name}-dirty"


def peer(path: str) -> dict[str, str]:
    """The setting that says which commit of another project took part; {} without one."""
    return {"peer_commit": commit(Path(path).expanduser())} if path else {}


def gpu_state() -> dict[str, str]:
    """Clocks, power, temperature and throttling of the GPU right now; empty without nvidia-smi.

    `throttling` is a bit mask in hexadecimal, of which 1 is idle and 4 the power limit.
    """
    for which in dict.fromkeys((_uuid(), "0")):
        for throttling in _THROTTLING:
            query = ",".join([*_QUERY, throttling])
            line = output_of(
                "nvidia-smi", f"--id={which}", f"--query-gpu={query}", "--format=csv,noheader"
            )
            values = [v.strip() for v in line.splitlines()[0].split(",")]
            if len(values) == len(_QUERY) + 1:
                return dict(zip((*_QUERY, "throttling"), values, strict=True))
            if "FileNotFoundError" in line:
                return {}
    return {}


def _uuid() -> str:
    """How nvidia-smi names the GPU that PyTorch calls the first; its "0" may be another one."""
    import torch

    if not torch.cuda.is_available():
        return "0"
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    return f"GPU-{uuid}" if uuid else "0"


def device_name() -> str:
    """The GPU's name, or "CPU x86_64"."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"CPU {platform.machine()}"


def environment() -> dict[str, Any]:
    """What the numbers hold for."""
    import torch

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    return {
        "device": device_name(),
        "gpu": torch.cuda.is_available(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": triton_version,
        "cpu_threads": torch.get_num_threads(),
        "commit": commit(),
        "sources": sources(),
    }
