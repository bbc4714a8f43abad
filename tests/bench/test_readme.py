"""Every command that the READMEs name is there and runs; measuring itself is made short here.

What steps take is made up, since test_step.py takes real ones; the rest runs at a tiny size.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import all as everything
from bench import compare, convergence, results, turns
from bench.__main__ import COMMANDS, main
from bench.stats import ratio_of_medians
from tests.bench.test_step import TINY, fake_measure
from tests.runs import write_text

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "bench/README.md").read_text() + (ROOT / "README.md").read_text()
BLOCKS = "".join(re.findall(r"^```text\n(.*?)^```", TEXT, re.M | re.S))
# A comment follows a command after two spaces or more.
LINES = [re.split(r"\s{2,}", line)[0] for line in BLOCKS.splitlines()]
DOCUMENTED = sorted({line for line in LINES if line.startswith("python -m bench ")})


def given(name: str, folder: Path) -> list[str]:
    """What makes a documented command small."""
    out = [f"--out={folder}"]
    corpus = [f"--input={folder}/text.txt", "--tokenizer=byte", f"--data_dir={folder}/data"]
    return {
        "step": [*out, *TINY],
        "ablate": [*out, *TINY],
        "compare": TINY,
        "kernels": [*out, "--rounds=6"],
        "waterfall": [*out, *TINY, "--seconds=0.2", "--batch_size=2", "--n_head=2"],
        "convergence": [*out, *TINY, *corpus],
        "all": out,
    }[name]


# These have tests of their own, which run them.
ELSEWHERE = ("curves",)


def test_every_command_is_documented() -> None:
    named = {line.split()[3] for line in DOCUMENTED}
    assert named | set(ELSEWHERE) == set(COMMANDS) | set(ELSEWHERE) and len(DOCUMENTED) >= 12
    assert "pytest bench --benchmark-only" in LINES


@pytest.mark.parametrize(
    "line",
    [pytest.param(x, marks=[pytest.mark.slow] * ("waterfall gpt2" in x)) for x in DOCUMENTED],
)
def test_documented_command(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(race: Any, course: Any, progress: Callable[[Any], None]) -> dict[str, Any]:
        found = {"seconds": 1.0, "steps": 20, "warm_up_s": 0.1, "reached": True}
        return found | {"curve": [[1.0, 20, 3.5]], "train_losses": [3.6], "step_ms": [50.0]}

    monkeypatch.setattr(turns, "measure", fake_measure({}))
    monkeypatch.setattr(convergence, "one_run", run)
    monkeypatch.setattr(everything, "parts", lambda *_: [])
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    (tmp_path / "model.py").touch()  # of a peer that is not run
    line = re.sub(r"(?<=--peer-path[ =])\S+", str(tmp_path), line)
    name, *args = shlex.split(line)[3:]
    if name in ELSEWHERE:
        try:
            code: Any = main([name, *args, "--help"])
        except SystemExit as e:  # argparse's
            code = e.code
        assert code == 0
        return
    if name == "compare":
        ref_or_file(args, tmp_path, monkeypatch)
    files = args[0].endswith(".json") if args else False
    assert main([name, *args, *([] if files else given(name, tmp_path))]) == 0
    if name in ("step", "ablate", "kernels", "waterfall", "convergence"):
        (path,) = tmp_path.glob(f"*/*-{name}.json")
        data = results.load(path)
        assert data["name"] == name and data["complete"] and data["rows"]


def ref_or_file(args: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the two files that are compared; a clone of one commit has no tag v0.1."""
    if not args[0].endswith(".json"):
        monkeypatch.setattr(compare, "checkouts", lambda refs: _Places(refs))
        return
    for name in args[:2]:
        result = results.Result("step", [], {})
        result.rows.append({"key": "a", "problem": "", "samples_ms": [1.0] * 6})
        results.write(folder / name, result.data)


class _Places(list[str]):
    """Stands for `compare.checkouts`, which test_compare.py tests."""

    def __enter__(self) -> list[str]:
        return list(self)

    def __exit__(self, *exc: object) -> None:
        return None


@pytest.mark.slow
def test_pytest_benchmark() -> None:
    """As people know it: a table by group, from real runs of kernels and of the step."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-k", "layer_norm or gpt2"]
        + ["-p", "no:cacheprovider", "-p", "no:xdist"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_kernel[layer_norm-backward-fastgpt]" in done.stdout
    assert "test_step[eager-gpt2]" in done.stdout or "test_step[kernels+compile-" in done.stdout
    assert "Rounds" in done.stdout and re.search(r"(9|1\d) passed", done.stdout)


def test_the_measured_table_is_what_the_results_say() -> None:
    """README's rows of the H200, the ratios to nanoGPT with their intervals included."""
    (path,) = (ROOT / "bench/results/nvidia-h200").glob("*-step.json")
    rows = {row["variant"]: row for row in results.load(path)["rows"]}
    names = {
        "fastgpt kernels, torch.compile": "kernels+compile",
        "fastgpt kernels": "kernels",
        "fastgpt eager, torch.compile": "compile",
        "nanoGPT, torch.compile": "nanoGPT, compile",
        "fastgpt eager": "eager",
    }
    lines = (ROOT / "README.md").read_text().splitlines()
    table = [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    shown = {cells[0]: cells[1:] for cells in table if cells[0] in names}
    peer = rows["nanoGPT, compile"]
    for title, variant in names.items():
        row = rows[variant]
        r = ratio_of_medians(row["samples_ms"], peer["samples_ms"])
        ratio = "1" if row is peer else f"{r.ratio:.3f} [{r.low:.3f}, {r.high:.3f}]"
        assert shown[title] == [
            f"{row['median_ms']:.1f}",
            f"{round(row['tokens_per_second'], -2):,.0f}",
            f"{100 * row['mfu']:.1f}",
            f"{row['peak_memory_bytes'] / 2**30:.1f}",
            ratio,
        ]
