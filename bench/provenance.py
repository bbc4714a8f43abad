"""Where numbers come from: sources, commit, machine, versions. Imports nothing heavy by itself."""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# What a result depends on, by part. Tools that measure nothing are left out, so that changing them
# does not make results look old.
_PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "kernels": ("kernels/fastgpt_kernels", ("aot", "tune", "specs", "_attention_specs")),
    "bench": ("bench", ("__main__", "all", "check", "compare", "report", "tables", "picture")),
}
_FILES: dict[str, tuple[str, ...]] = {
    "model": ("fastgpt/model.py", "fastgpt/ops.py", "fastgpt/selfcheck.py"),
    "training": tuple(
        f"fastgpt/{name}.py"
        for name in ("presets", "device", "mfu", "optim", "step", "train", "data/batches")
    ),
    "sampling": ("fastgpt/generate.py", "fastgpt/decode.py"),
}
_NEEDS: dict[str, tuple[str, ...]] = {
    "kernels": ("kernels", "bench"),
    "generate": ("kernels", "model", "sampling", "bench"),
}
_QUERY = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "clocks_throttle_reasons.active",
)


def sources(root: Path = ROOT) -> dict[str, str]:
    """A hash by part: kernels, model, training, sampling, bench."""
    paths = {part: [root / p for p in files] for part, files in _FILES.items()}
    for part, (folder, without) in _PARTS.items():
        found = (root / folder).glob("*.py")
        paths[part] = [p for p in found if p.stem not in without and not p.stem.startswith("test_")]
    return {part: _digest(root, files) for part, files in sorted(paths.items())}


def needed_parts(name: str) -> tuple[str, ...]:
    """The parts that a result of command `name` depends on."""
    return _NEEDS.get(name, ("kernels", "model", "training", "bench"))


def _digest(root: Path, paths: list[Path]) -> str:
    total = hashlib.sha256()
    for path in sorted(p for p in paths if p.exists()):
        total.update(f"{path.relative_to(root).as_posix()}\n".encode())
        total.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return total.hexdigest()[:16]


def output_of(*command: str, cwd: Path = ROOT) -> str:
    """A command's output, or why there is none: provenance must not stop a measurement."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({type(error).__name__})"
    return done.stdout.strip() or "unknown"


def commit(folder: Path = ROOT) -> str:
    """The commit checked out in a folder, with "-dirty" where tracked files differ from it."""
    name = output_of("git", "rev-parse", "--short=10", "HEAD", cwd=folder)
    if not re.fullmatch(r"[0-9a-f]{7,40}", name):
        return "unknown"
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no", cwd=folder)
    return name if changed == "unknown" else f"{name}-dirty"


def gpu_state() -> dict[str, str]:
    """Clocks, power, temperature and throttling of GPU 0 right now; empty without nvidia-smi."""
    line = output_of(
        "nvidia-smi", "--id=0", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"
    )
    values = [v.strip() for v in line.split(",")]
    return dict(zip(_QUERY, values, strict=True)) if len(values) == len(_QUERY) else {}


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
