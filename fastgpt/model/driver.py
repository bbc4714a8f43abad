"""Why PyTorch sees no GPU on a machine that has one, and what helps."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable

import torch

# The oldest Linux driver for all releases of a CUDA version (NVIDIA, "CUDA compatibility": minor
# version compatibility), and an index of PyTorch's with wheels for it.
NEEDED = {13: "580.65.06", 12: "525.60.13", 11: "450.80.02"}
WHEELS = ((580, "cu130"), (525, "cu126"))
INDEX = "https://download.pytorch.org/whl"


def _smi() -> str:
    """What nvidia-smi says: "NVIDIA H100, 535.104.05"; empty without it or a GPU."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout.strip().splitlines()[0] if not said.returncode and said.stdout else ""


def why_no_gpu(ask: Callable[[], str] = _smi, cuda: str | None = torch.version.cuda) -> str:
    """One line that names the driver that PyTorch needs and what to install; empty if this machine
    has no NVIDIA GPU either.
    """
    said = ask()
    name, _, driver = said.rpartition(", ")
    found = re.match(r"(\d+)\.", driver)
    if not name or not found:
        return ""
    major = int(found[1])
    tag = next((wheel for least, wheel in WHEELS if major >= least), "")
    version = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    command = f"pip install 'torch=={version}.*' --index-url {INDEX}/{tag}"
    helps = f"install one that fits: {command}" if tag else f"install a driver >= {NEEDED[12]}"
    here = f"there is a {name} with driver {driver}"
    if cuda is None:
        return f"{here}, but this PyTorch is built without CUDA; {helps}"
    needed = NEEDED.get(int(cuda.split(".")[0]), "")
    if needed and _numbers(driver) < _numbers(needed):
        return (
            f"{here}, but PyTorch {version} for CUDA {cuda} needs driver {needed} or newer; "
            f"update it, or {helps}"
        )
    return f"{here}, but PyTorch does not see it: is CUDA_VISIBLE_DEVICES empty? {helps}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version))
