"""Golden results: what commands print and compute, through the command line and files alone.

`python -m tests.golden.make [help|log|runs|presets ...]` writes them anew, from the present code.
Say in the commit why a result changes. The folders in runs/ are three steps of version 0.1.0 and
stay as they are: they must resume for good. `old` has settings and a plan.json of that version
alone: `tune`, `op.linear`, `op.mlp`, `op.adamw`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fastgpt import cli
from fastgpt.config.presets import PRESETS
from tests.runs import latest, records, words

HERE = Path(__file__).parent
COMMANDS = ("", *cli.COMMANDS)
RUNS = ("plain", "muon", "old")

DATA = ("--input=text.txt", "--tokenizer=char")
SMALL = words("""--device=cpu --dtype=float32 --compile=False --kernels=eager --peak_tflops=1
--eval_iters=2 --sample_tokens=0 --log_interval=1 --n_layer=1 --n_head=2 --block_size=16
--batch_size=4""")
RUN = (*DATA, *SMALL, "--n_embd=8", "--warmup_iters=2")


def fastgpt(*args: str) -> str:
    """Runs a command in this process, on one thread. Returns what it prints."""
    threads, out = torch.get_num_threads(), io.StringIO()
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(out):
            cli.main(args)
    except SystemExit as e:
        assert not e.code, f"exit code {e.code} of fastgpt {' '.join(args)}:\n{out.getvalue()}"
    finally:
        torch.set_num_threads(threads)
    return out.getvalue()


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """An empty folder with the text, as working directory."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        shutil.copy(HERE / "text.txt", "text.txt")
        yield Path(folder)


def help_file(command: str) -> str:
    return f"help/{command or 'fastgpt'}.txt"


def help_of(command: str) -> str:
    os.environ["COLUMNS"] = "100"
    try:
        return fastgpt(*command.split(), "--help")
    finally:
        del os.environ["COLUMNS"]


def log_lines() -> str:
    """Returns log lines and sample of a short run with dropout, without times."""
    flags = words("--n_layer=2 --dropout=0.1 --eval_interval=4 --max_iters=8 --lr_decay_iters=2000")
    with workplace():
        said = fastgpt("train", "laptop", *RUN, *flags, "--sample_tokens=40", "--out_dir=run")
    said = re.sub(r"time \S+ms, mfu \S+%", "time *ms, mfu *%", said)
    log, sample = said.split("--- sample")
    kept = ("iter ", "step ", "tokens per iteration", "number of parameters", "val loss")
    lines = [line for line in log.splitlines() if line.startswith(kept)]
    return "\n".join([*lines, *sample.split("-" * 72)[0].strip("- \n").splitlines()]) + "\n"


def resumed(name: str) -> dict[str, Any]:
    """Resumes a run folder of runs/. Returns its next steps, a sample, its loss, final norms."""
    with workplace() as here:
        shutil.copytree(HERE / "runs" / name, here / name)
        fastgpt("prepare", *DATA)
        fastgpt("train", "--init_from=resume", f"--out_dir={name}", "--max_iters=6")
        said = fastgpt("sample", f"--out_dir={name}", "--num_samples=2", "--max_new_tokens=40")
        loss = re.search(r"loss (\d+\.\d+)", fastgpt("eval", f"--out_dir={name}"))
        assert loss
        found = {
            "train": [r["loss"] for r in records(here / name)],
            "val": [r["val_loss"] for r in records(here / name, "eval")],
            "sample": said.splitlines(),
            "eval": loss[1],
            "tensors": tensors(here / name),
        }
    return found


def one_step(preset: str) -> dict[str, Any]:
    """Loss, gradient norm, and tensors after one step of a preset with all sizes made small."""
    flags = words("""--n_embd=32 --gradient_accumulation_steps=2 --max_iters=1 --init_from=scratch
    --warmup_iters=0 --out_dir=run --always_save_checkpoint=True --target_val_loss=0""")
    with workplace() as here:
        fastgpt("train", preset, *DATA, *SMALL, *flags)
        step = records(here / "run")[0]
        return {k: step[k] for k in ("loss", "grad_norm", "lr")} | {
            "tensors": tensors(here / "run")
        }


def tensors(run_dir: Path) -> dict[str, list[float]]:
    """(norm, weighted sum) of each tensor of the latest checkpoint but step counts."""
    found = {}
    for path in sorted(latest(run_dir).glob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            t = tensor.double().flatten()
            weights = torch.linspace(-1, 1, t.numel(), dtype=t.dtype)
            values = (t.norm().item(), (t @ weights).item())
            if not name.startswith("step."):
                found[name] = [float(f"{v:.9g}") for v in values]
    return found


def write(name: str, found: Any) -> None:
    text = json.dumps(found)
    (HERE / name).write_text(re.sub(r'(?<=[\]}"\d]), (?=")', ",\n", text) + "\n")


def main() -> None:
    parts = sys.argv[1:] or ["help", "log", "runs", "presets"]
    if "help" in parts:
        (HERE / "help").mkdir(exist_ok=True)
        for command in COMMANDS:
            (HERE / help_file(command)).write_text(help_of(command))
    if "log" in parts:
        (HERE / "log.txt").write_text(log_lines())
    if "runs" in parts:
        write("runs.json", {name: resumed(name) for name in RUNS})
    if "presets" in parts:
        write("presets.json", {preset: one_step(preset) for preset in PRESETS})


if __name__ == "__main__":
    main()
