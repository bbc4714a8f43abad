"""Every command in the README runs: as it stands, but for flags that make it small."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgpt.config.presets import PRESETS
from tests.process import fastgpt
from tests.weights.test_nanogpt import Reference

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```sh([^\n]*)\n(.*?)^```", README, re.M | re.S)
SMALL = """--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=2 --max_iters=2
--eval_iters=1 --gradient_accumulation_steps=2 --sample_tokens=5 --peak_tflops=1 --device=cpu
--compile=False"""


def commands(kind: str = "") -> list[str]:
    lines = [line for k, block in BLOCKS if k.strip() == kind for line in block.splitlines()]
    assert lines
    return lines


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with the user's text, and the two corpora that would have to be downloaded."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "my_text.txt").write_text(Path(argparse.__file__).read_text())
    (folder / "my_prompts.txt").write_text("def\nimport argparse\n")
    torch.save(Reference(bias=False).checkpoint(3), folder / "ckpt.pt")
    (folder / "my_folder").mkdir()
    for i in range(20):
        (folder / "my_folder" / f"{i}.txt").write_text(f"Text {i} of a folder.\n" * 50)
    rng = np.random.default_rng(0)
    for name in ("shakespeare_char", "openwebtext"):
        data = folder / "data" / name
        data.mkdir(parents=True)
        for split in ("train", "val"):
            rng.integers(0, 60, 4000).astype(np.uint16).tofile(data / f"{split}.bin")
    return folder


@pytest.mark.slow
def test_the_commands_in_their_order(home: Path):
    """One after the other, as a reader would: later ones use what the ones before left."""
    done = 0
    for line in commands():
        if line.startswith("make"):
            continue
        program, command, *args = shlex.split(line)
        assert program == "fastgpt"
        resuming = "--init_from=resume" in args
        if command == "train" and "--help" not in args:
            args += ["--max_iters=4"] if resuming else SMALL.split()
        if command == "sample":
            args += ["--max_new_tokens=3", "--num_samples=1"]
        said = fastgpt(home, command, *args)
        assert said, line
        done += 1
    assert done >= 15


@pytest.mark.slow
def test_commands_that_need_the_network(tmp_path: Path, monkeypatch):
    """They begin, and without a network end in one line that says what to do."""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *shlex.split(line)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in commands("network")
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2, errors
        assert errors.splitlines()[-1].startswith("fastgpt: ") and "Traceback" not in errors


@pytest.mark.slow
def test_make_train_and_make_test(tmp_path: Path):
    """The recipes, with this interpreter standing for an environment that is already made."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    entry = venv / "bin" / "fastgpt"
    entry.write_text(f'#!/bin/sh\nexec {sys.executable} -m fastgpt "$@"\n')
    for path in (python, entry):
        path.chmod(0o755)
    for marker in (".installed", ".installed-test"):
        (venv / marker).touch()
    args = " ".join([*SMALL.split(), f"--out_dir={tmp_path}/out", f"--data_dir={tmp_path}/data"])
    (tmp_path / "text.txt").write_text("some text " * 400)
    args += f" --input={tmp_path}/text.txt"
    assert "continue: fastgpt train" in make(f"VENV={venv}", "train", f"ARGS={args}")
    got = make(
        f"VENV={venv}", "test", "PYTEST_ARGS=tests/storage/test_atomic.py -p no:cacheprovider"
    )
    assert "passed" in got


def make(*args: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "PYTEST_"))}
    got = subprocess.run(
        ["make", *args], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert got.returncode == 0, got.stdout + got.stderr
    return got.stdout


def test_the_table_names_real_commands():
    rows = re.findall(r"^\| `(python [^`]*)` \| `(fastgpt [^`]*)` \|", README, re.M)
    assert len(rows) == 5
    ran = [c.replace("X", "runs/deeper") for c in commands() + commands("network")]
    for _, command in rows:
        words = command.split()[:3]
        assert any(r.split()[: len(words)] == words or words[1] in r for r in ran), command


def test_presets_are_named_and_links_lead_somewhere():
    assert all(f"`{name}`" in README for name in PRESETS)
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
