"""Everything inside a budget: parts that fail, overrun, or find the budget spent."""

import sys
import time
from pathlib import Path

import pytest

from bench import all as everything
from bench import results

COPY = "import shutil; shutil.copy({source!r}, {target!r}); print('said something'); {then}"


def part(name: str, out: Path, n: int = 1, then: str = "", wants: float = 8) -> everything.Part:
    """A part that writes a result of n rows, and then does something else."""
    result = results.Result(name, [], {})
    result.data["complete"] = "sleep" not in then
    result.rows.extend(
        {"key": f"row {i}", "problem": "", "samples_ms": [float(i + 1)]} for i in range(n)
    )
    made = result.save(out / "made")
    assert made is not None
    code = COPY.format(source=str(made), target=str(out / "out" / made.name), then=then)
    return everything.Part(name, ("-c", code), 1, wants)


def test_failures_and_overruns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = "import time; time.sleep(100)"
    chosen = [
        part("ablate", tmp_path, then="raise SystemExit(3)"),
        part("step", tmp_path, then=slow, wants=2),
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
    assert everything.main(["--budget=5.5", f"--out={tmp_path / 'out'}"]) == 0
    assert "step: not run: it takes 1 s, 0 s were left" in capsys.readouterr().out
    (path,) = results.files(tmp_path / "out")
    (row,) = results.load(path)["rows"]
    assert row["problem"].startswith("not run: it takes 1 s")


def test_what_a_part_says_at_its_end() -> None:
    assert everything.outcome(0) == "done"
    assert everything.outcome(None) == "stopped at its time; what it had is written"
    assert everything.outcome(3) == "exit code 3: something in it failed"


def test_what_is_missing() -> None:
    assert everything.missing() == []
    assert everything.missing({"nowhere_at_all": "pictures"}) == ["nowhere_at_all (pictures)"]


CORE = ["step", "waterfall", "kernels"]
REST = ["ablate", "convergence"]


def rehearse(
    budget: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, takes: float = 1.0
) -> dict[str, tuple[float, float]]:
    """A run of `all` in which parts take a share of the time they get, by a clock that is turned:
    (seconds since the start, seconds given) by part.
    """
    now, given = [1000.0], {}

    def run(part: everything.Part, seconds: float, log: object) -> tuple[int | None, float]:
        given[part.name] = (now[0] - 1000.0, seconds)
        assert part.command[:2] != ("-m", "bench") or part.command[-1].startswith("--out=")
        now[0] += takes * seconds
        return (None if takes == 1.0 else 0), takes * seconds

    everything_parts = everything.parts
    monkeypatch.setattr(everything, "parts", lambda gpu, peer: everything_parts(True, peer))
    monkeypatch.setattr(everything, "clock", lambda: now[0])
    monkeypatch.setattr(everything, "run", run)
    assert everything.main([f"--budget={budget}", f"--out={tmp_path}"]) == 0  # cut is no error
    assert now[0] - 1000.0 <= budget - everything.CLOSING_S + 1e-6
    return given


@pytest.mark.parametrize(
    ("budget", "takes", "names"),
    [
        (120, 1.0, CORE),
        (300, 1.0, CORE),
        (540, 1.0, CORE),
        (1800, 1.0, [*CORE, *REST]),
        (540, 0.6, [*CORE, "ablate"]),
        (45, 1.0, ["step"]),
    ],
)
def test_what_runs_in_a_budget(
    budget, takes, names, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    given = rehearse(budget, tmp_path, monkeypatch, takes)
    ran = [*given]
    assert ran == [name for name in [*CORE, *REST] if name in ran], "in order of worth"
    assert ran[: len(names)] == names, given
    said = capsys.readouterr().out
    assert "nanoGPT is not compared with" in said and "picture: none" in said
    for name in {*CORE, *REST} - set(ran):
        assert f"{name}: not run: it takes" in said
    least = {p.name: p.least for p in everything.parts(True, "")}
    assert all(seconds >= least[name] for name, (_, seconds) in given.items())


def test_attention_and_the_head_come_first() -> None:
    kernels = next(p for p in everything.parts(True, "") if p.name == "kernels")
    assert kernels.command[3:5] == ("attention", "linear_cross_entropy")
    assert "-x" not in " ".join(word for p in everything.parts(True, "") for word in p.command)
    with_peer = {p.name for p in everything.parts(True, "nano") if "--peer-path=nano" in p.command}
    assert with_peer == {"step", "convergence"}
    assert sys.executable
