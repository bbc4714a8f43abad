"""`fastgpt doctor`: one screen of what this machine has, and what will run on it and why."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fastgpt import __version__
from fastgpt.config.presets import default_name
from fastgpt.data.build import cores
from fastgpt.data.tokens import open_dataset
from fastgpt.errors import UserError
from fastgpt.model import ops
from fastgpt.model.device import Machine
from fastgpt.storage import run
from fastgpt.train import optim


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that PyTorch sees: training runs on the CPU, on eager PyTorch"
    lines = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        memory = f"{p.total_memory / 2**30:.0f} GiB"
        arch = f"sm_{p.major}{p.minor}"
        lines.append(f"cuda:{i} {p.name}, {memory}, {arch}, {p.multi_processor_count} SMs")
    return "\n".join(lines)


def _data_folders() -> str:
    lines = []
    for folder in sorted(Path("data").glob("[!.]*/")):
        try:
            lines.append(open_dataset(folder).describe())
        except UserError as e:
            lines.append(f"unusable: {e}")
    return "\n".join(lines) or "none under data/ yet; python_stdlib is made by itself when needed"


def _runs() -> str:
    try:
        return f"newest: {run.newest()}"
    except UserError as e:
        return str(e)


def doctor() -> None:
    """Print the screen."""
    machine = Machine.of()
    device = machine.device
    free = shutil.disk_usage(".").free / 2**30
    bf16 = "yes" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "not used here"
    choices = (*ops.choose(device, machine.torch_dtype).choices, optim.choose(device)[0])
    table = Table.grid(padding=(0, 2))
    rows = {
        "fastgpt": f"{__version__}, Python {platform.python_version()}, {platform.system()} "
        f"{platform.machine()}, {cores()} cores",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "triton": _version("triton"),
        "GPU": _gpus(),
        "precision": f"{machine.dtype}; bf16 on a GPU: {bf16}",
        "peak": str(machine.peak),
        "ops": "\n".join(f"{c.op}: {c.implementation} ({c.reason})" for c in choices),
        "disk": f"{free:.1f} GiB free in {Path.cwd()}",
        "data": _data_folders(),
        "runs": _runs(),
        "preset": f"fastgpt train alone means: fastgpt train {default_name()}",
    }
    for name, text in rows.items():
        table.add_row(f"[bold]{name}[/bold]", text)
    Console(highlight=False, soft_wrap=True).print(table)
