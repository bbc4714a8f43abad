"""Commands of the READMEs, without their measurements, and README's measured table."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import all as everything
from bench import compare, curves, processes, results
from bench.__main__ import COMMANDS, main
from bench.curves import Runs
from bench.stats import describe, ratio_of_medians
from tests.bench.test_results import load_only
from tests.bench.test_step import TINY, fake_measure

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "bench/README.md").read_text() + (ROOT / "README.md").read_text()
BLOCKS = "".join(re.findall(r"^```text\n(.*?)^```", TEXT, re.M | re.S))
LINES = [re.split(r"\s{2,}", line)[0] for line in BLOCKS.splitlines()]
DOCUMENTED = sorted({line for line in LINES if line.startswith("python -m bench ")})


@pytest.mark.parametrize("line", [pytest.param(line, id=line[16:]) for line in DOCUMENTED])
def test_documented_command(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *args = shlex.split(re.sub(r"(?<=--peer-path[ =])\S+", str(tmp_path), line))[3:]
    if "--sweep" in args:
        monkeypatch.setattr("bench.kernels.sweep", lambda case, rounds: [])
    monkeypatch.setattr(processes, "measure", fake_measure({}))
    run = {"folder": "", "curve": [[0, 0, 4.0], [9, 1.0, 3.5]], "joules": None}
    monkeypatch.setattr(Runs, "run", lambda *args: run)
    monkeypatch.setattr(curves, "compare", lambda *args: None)
    monkeypatch.setattr(everything, "parts", lambda *args: [])
    monkeypatch.setattr(compare, "check_out", lambda ref, _: re.fullmatch(r"HEAD(~\d)?", ref)[0])
    (tmp_path / "model.py").touch()  # of a peer that is not run
    small = {"waterfall": ["--seconds=0.2", "--n_head=2"], "kernels": ["--rounds=6"], "all": []}
    tiny = [] if name in ("all", "curves") else TINY
    assert main([name, *args, f"--out={tmp_path}", *tiny, *small.get(name, [])]) == 0
    assert load_only(tmp_path, name)["complete"]


@pytest.mark.slow
def test_pytest_benchmark() -> None:
    assert "pytest bench --benchmark-only" in LINES
    assert {line.split()[3] for line in DOCUMENTED} == set(COMMANDS), "all are documented"
    command = "pytest bench --benchmark-only -k layer_norm -p no:cacheprovider -p no:xdist"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    options: Any = {"env": environment, "timeout": 120, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, **options)
    assert "test_kernel[add_layer_norm-backward-eager]" in done.stdout
    assert "benchmark 'layer_norm forward, " in done.stdout and "4 passed" in done.stdout


def test_the_measured_table_is_what_the_results_say() -> None:
    (path,) = (ROOT / "bench/results/nvidia-h200").glob("*-step.json")
    rows = {row["variant"]: row for row in results.load(path)["rows"]}
    peer, shown = rows["nanoGPT, compile"], ["kernels+compile", "kernels", "compile"]
    table = (ROOT / "README.md").read_text().split("\n| step ")[1].splitlines()[2:7]
    for name, line in zip([*shown, "nanoGPT, compile", "eager"], table, strict=True):
        row = rows[name]
        r = ratio_of_medians(row["samples_ms"], peer["samples_ms"])
        ratio = "1" if row is peer else describe(r).rsplit("]")[0] + "]"
        speed = f"{row['median_ms']:.1f}", f"{round(row['tokens_per_second'], -2):,.0f}"
        mfu, gib = 100 * row["mfu"], row["peak_memory_bytes"] / 2**30
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        assert cells == [*speed, f"{mfu:.1f}", f"{gib:.1f}", ratio]
