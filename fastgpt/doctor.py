"""Report of `fastgpt doctor`: the machine, and the implementation of each op with its reason."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import distributions
from pathlib import Path

import torch

from fastgpt import __version__
from fastgpt.config.presets import default_name
from fastgpt.config.schema import Config
from fastgpt.data.prepare import cores
from fastgpt.data.token_files import open_dataset
from fastgpt.errors import UserError
from fastgpt.model.build import select_kernels
from fastgpt.model.device import Machine, unseen_gpu
from fastgpt.storage import run_dir as run
from fastgpt.train.main import as_trained


def _gpus() -> str:
    """Returns a line per GPU."""
    if not torch.cuda.is_available():
        none = "none that PyTorch sees: training runs on the CPU, on eager PyTorch"
        return "\n".join(filter(None, (none, unseen_gpu())))
    lines = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        memory, arch = f"{p.total_memory / 2**30:.0f} GiB", f"sm_{p.major}{p.minor}"
        lines.append(f"cuda:{i} {p.name}, {memory}, {arch}, {p.multi_processor_count} SMs")
    return "\n".join(lines)


def _data_folders() -> str:
    """Returns a line per folder of token files."""
    lines = []
    for folder in sorted(Path("data").glob("[!.]*/")):
        try:
            lines.append(open_dataset(folder).describe())
        except UserError as e:
            lines.append(f"unusable: {e}")
    return "\n".join(lines) or "none under data/ yet; python_stdlib is made by itself when needed"


def doctor(config: Config, name: str) -> None:
    """Prints the report. Ops, precision and peak are those of `fastgpt train` with this config.

    Raises UserError if this machine lacks something that the config asks for.
    """
    s, config = config.system, as_trained(config)
    machine = Machine.of(s.device, s.dtype, s.compile, s.peak_tflops)
    kernels = select_kernels(config, config.model.vocab_size, machine)
    try:
        runs = f"newest: {run.find('')}"
    except UserError as e:
        runs = str(e)
    triton = [*distributions(name="triton")]
    system = f"{platform.system()} {platform.machine()}, {cores()} cores"
    rows = {
        "fastgpt": f"{__version__}, Python {platform.python_version()}, {system}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "triton": triton[0].version if triton else "not installed",
        "GPU": _gpus(),
        "precision": machine.dtype,
        "peak": str(machine.peak),
        f"ops of {name}": "\n".join(
            f"{c.op}: {c.implementation} ({c.reason})" for c in kernels.selected
        ),
        "disk": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free in {Path.cwd()}",
        "data": _data_folders(),
        "runs": runs,
        "preset": f"fastgpt train alone means: fastgpt train {default_name()}",
    }
    width = max(map(len, rows)) + 2
    for title, text in rows.items():
        print(title.ljust(width) + text.replace("\n", "\n" + " " * width))
