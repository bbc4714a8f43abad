"""Results that stay: help, log lines, resumed runs and single steps, as tests/golden/ has them.

After a wanted change `python -m tests.golden.make PART` writes them anew; the commit says why.
"""

# Text is compared to the last character, and losses in log lines to the last digit. Exact floats
# are rounded by the CPU's own vector instructions, so they get a tight tolerance; what must hold to
# the bit on any one CPU is compared between a run and its repetition.

import json
from typing import Any

import pytest

from tests.golden import make

TOLERANCE = 1e-5

RUNS = json.loads((make.HERE / "runs.json").read_text())
STEPS = json.loads((make.HERE / "presets.json").read_text())


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Fails with all values that differ; a tensor's weighted sum is held against its norm."""
    a, b = dict(found), dict(wanted)
    tensors, others = a.pop("tensors"), b.pop("tensors")
    assert tensors.keys() == others.keys()
    for key, value in b.items():
        same = value if "sample" in key or "eval" in key else pytest.approx(value, rel=TOLERANCE)
        assert a[key] == same, key
    differ = {
        name: (tensors[name], values)
        for name, values in others.items()
        if any(
            abs(x - y) > TOLERANCE * values[0] for x, y in zip(tensors[name], values, strict=True)
        )
    }
    assert not differ, f"found, wanted: {differ}"


@pytest.mark.parametrize("command", make.COMMANDS)
def test_help(command: str):
    assert make.help_of(command) == (make.HERE / make.help_file(command)).read_text()


def test_log_lines_of_a_seeded_run():
    assert make.log_lines() == (make.HERE / "log.txt").read_text()


@pytest.mark.parametrize("name", make.RUNS)
def test_old_run_resumes(name: str):
    found = make.resumed(name)
    assert_same(found, RUNS[name])
    if name == "old":
        assert make.resumed(name) == found


@pytest.mark.parametrize("preset", make.PRESETS)
def test_one_step_of_a_preset(preset: str):
    assert_same(make.one_step(preset), STEPS[preset])
