"""`fastgpt doctor`: one screen about the machine, and the ops that will run on it and why."""

from __future__ import annotations

import contextlib
import platform
import shutil
from importlib.metadata import distributions
from pathlib import Path

import torch

from fastgpt import __version__
from fastgpt.config import settings
from fastgpt.config.presets import default_name
from fastgpt.config.schema import Config
from fastgpt.data.corpora import CORPORA
from fastgpt.data.prepare import cores
from fastgpt.data.token_files import open_dataset
from fastgpt.data.tokenizer import GPT2_VOCAB
from fastgpt.errors import UserError
from fastgpt.model.build import select_kernels
from fastgpt.model.device import Machine, unseen_gpu
from fastgpt.storage import run_dir as run
from fastgpt.weights.hugging_face import SIZES, shape_of_size


def _gpus() -> str:
    if not torch.cuda.is_available():
        none = "none that PyTorch sees: training runs on the CPU, on eager PyTorch"
        return "\n".join(filter(None, (none, unseen_gpu())))
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


def vocab_size(config: Config) -> int:
    """Returns the vocabulary's size of the prepared data, or else that of its tokenizer."""
    data = config.data
    with contextlib.suppress(UserError):
        return config.model.vocab_size or open_dataset(Path(data.data_dir, data.dataset)).vocab_size
    own = CORPORA[data.dataset].tokenizer if data.dataset in CORPORA else ""
    return {"byte": 256, "char": 65}.get(data.tokenizer or own, GPT2_VOCAB)


def as_trained(config: Config) -> Config:
    """Returns the config with the shape of the weights it starts from, if that is known."""
    if config.run.init_from not in SIZES:
        return config
    size = shape_of_size(config.run.init_from)
    block_size = min(config.model.block_size, size.block_size)
    return settings.replace(config, **{**vars(size), "block_size": block_size})


def doctor(config: Config, name: str) -> None:
    """Prints the screen; ops, precision and peak are those of `fastgpt train` with this config.

    Raises UserError if this machine cannot do what the config asks for.
    """
    s = config.system
    machine = Machine.of(s.device, s.dtype, s.compile, s.peak_tflops)
    kernels = select_kernels(as_trained(config), vocab_size(config), machine)
    try:
        runs = f"newest: {run.newest()}"
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
