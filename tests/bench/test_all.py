"""Everything inside a budget: parts that fail, overrun, or find the budget spent."""

import sys
import time
from pathlib import Path

import pytest

from bench import all as everything
from bench import results

COPY = "import shutil; shutil.copy({source!r}, {target!r}); print('said something'); {then}"


def part(name: str, out: Path, n: int = 1, then: str = "", share: float = 0.5) -> everything.Part:
    """A part that writes a result of n rows, and then does something else."""
    result = results.Result(name, [], {})
    result.data["complete"] = "sleep" not in then
    result.rows.extend(
        {"key": f"row {i}", "problem": "", "samples_ms": [float(i + 1)]} for i in range(n)
    )
    made = result.save(out / "made")
    assert made is not None
    code = COPY.format(source=str(made), target=str(out / "out" / made.name), then=then)
    return everything.Part(name, ("-c", code), share)


def test_failures_and_overruns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = "import time; time.sleep(100)"
    chosen = [
        part("ablate", tmp_path, then="raise SystemExit(3)"),
        part("step", tmp_path, then=slow, share=0.4),
        part("kernels", tmp_path, n=100),
        part("waterfall", tmp_path, n=90),
    ]
    monkeypatch.setattr(everything, "parts", lambda *_: chosen)
    started = time.monotonic()
    assert everything.main(["--budget=20", f"--out={tmp_path / 'out'}"]) == 1
    assert time.monotonic() - started < 20
    said = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ablate: exit code 3") for line in said)
    assert any(line.startswith("step: stopped at its time") for line in said)
    assert any(line.startswith("kernels: done") for line in said)
    table = said[next(i for i, line in enumerate(said) if line.split()[:2] == ["part", "what"]) :]
    assert 40 < len(table) <= everything.MAX_LINES and "more in" in "".join(table)
    names = [results.load(p)["name"] for p in results.files(tmp_path / "out")]
    assert sorted(names) == ["ablate", "all", "kernels", "step", "waterfall"]
    (path,) = (tmp_path / "out").glob("**/*-all.json")
    recorded = results.load(path)
    outcomes = {row["key"]: row["outcome"].split(":")[0] for row in recorded["rows"]}
    assert recorded["complete"] and list(outcomes) == [p.name for p in chosen]
    assert outcomes["ablate"] == "exit code 3" and outcomes["kernels"] == "done"
    assert any("step, cut short" in line for line in said)
    assert (tmp_path / "out/all.log").read_text().count("said something\n") == 4


def test_a_spent_budget_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(everything, "parts", lambda *_: [part("step", tmp_path)])
    assert everything.main(["--budget=6", f"--out={tmp_path / 'out'}"]) == 1
    assert "step: not run, the budget is spent" in capsys.readouterr().out
    (path,) = results.files(tmp_path / "out")
    (row,) = results.load(path)["rows"]
    assert row["problem"] == "not run, the budget is spent"


def test_outcomes_of_the_correctness_tests() -> None:
    tests = everything.Part(everything.TESTS, (), 1.0)
    said = ["..F.s [ 40%]", "...E", "1 failed, 6 passed"]
    assert everything.outcome(tests, 1, said) == "1 failed, 6 passed"
    assert everything.outcome(tests, 5, said) == "exit code 5: 1 failed, 6 passed"
    stopped = everything.outcome(tests, None, said[:2])
    assert stopped == "stopped at its time, after 6 passed, 2 failed, 1 skipped"


def test_what_is_missing() -> None:
    assert everything.missing() == []
    assert everything.missing({"nowhere_at_all": "pictures"}) == ["nowhere_at_all (pictures)"]


def test_worth_knowing_first() -> None:
    names = [p.name for p in everything.parts(gpu=True, peer_path="")]
    assert names[:2] == ["correctness tests", "step"]
    assert sys.executable and {"kernels", "ablate", "convergence"} <= set(names)
