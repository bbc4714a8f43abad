"""The number of lines by folder: a feature must earn its own.

A commit that deletes code lowers the budget; one that raises it explains why.
"""

import contextlib
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]

# The goal: fastgpt 8,600, kernels 4,800, bench 2,600, tests 14,500.
BUDGET = {"fastgpt": 9_065, "kernels": 6_195, "bench": 2_591, "tests": 16_933}


def python_files() -> list[Path]:
    """Those that git tracks; in a source archive all that there are."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "*.py"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if (ROOT / ".git").exists():
            listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found = [ROOT / name for name in listed.split("\0") if name]
            return [path for path in found if path.exists()]
    return [path for folder in BUDGET for path in (ROOT / folder).rglob("*.py")]


def test_lines_stay_within_the_budget():
    lines = dict.fromkeys(BUDGET, 0)
    for path in python_files():
        top = os.path.relpath(path, ROOT).split(os.sep)[0]
        if top in lines:
            lines[top] += len(path.read_bytes().splitlines())
    over = {top: (n, BUDGET[top]) for top, n in lines.items() if n > BUDGET[top]}
    assert all(lines.values()) and not over, f"lines, budget: {over} of {lines}"
