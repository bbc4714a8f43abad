"""Everything inside a budget, by a clock that is turned: order, failures, rules, what is kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import all as everything
from bench import results

DIFFERENCE = {"median_ms": 50.0, "mfu": 0.5, "samples_ms": [50.0], "problem": ""}


def row(variant: str, *ms: float | None) -> dict[str, Any]:
    named = {"key": f"gpt2 {variant}", "variant": variant}
    return DIFFERENCE | named | ({"difference_ms": list(ms)} if ms else {})


ROWS = {
    "step": [row("kernels+compile"), row("op.attention=hopper", -2.4, -2.9, -1.9)],
    "waterfall": [
        {"key": "gpt2", "problem": "", "samples_ms": [1.0], "waterfall": {"budget": [
            {"kernel": "k", "kind": "dW", "shape": "8 x 8", "ms": 2.0, "bound_ms": 0.5}
        ] * 5}}
    ],
    "kernels": [
        {"key": "attention | FA4", "problem": "", "samples_ms": [1.0],
         "ratio": {"to": "triton", "ratio": 0.8, "low": 0.7, "high": 0.9, "verdict": "faster"}}
    ],
}  # fmt: skip


def rehearse(
    budget: float,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    share: float = 1.0,
    fails: str = "",
) -> dict[str, float]:
    """A run of `all` in which parts take a share of the time they get: seconds given, by part."""
    now, given = [1000.0], dict[str, float]()

    def run(command: Sequence[str], seconds: float, log: Any) -> int | None:
        name = "swap" if "--swap=each" in command else command[0]
        given[name] = seconds
        now[0] += share * seconds
        result = results.Result(command[0], [name], {})
        result.data["date"] = f"2026-01-01T00:00:{len(given):02}Z"
        result.rows += ROWS[command[0]]
        result.save(Path(command[-1].removeprefix("--out=")))
        return (1 if name == fails else 0) if share < 1 else None

    parts = everything.parts
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(everything, "parts", lambda gpu, peer: parts(True, peer))
    monkeypatch.setattr(everything, "clock", lambda: now[0])
    monkeypatch.setattr(everything, "run", run)
    code = everything.main([f"--budget={budget}", f"--out={folder}"])
    assert code == (1 if fails else 0), "a part that is cut is no error"
    assert now[0] - 1000.0 <= budget
    return given


@pytest.mark.parametrize(
    ("budget", "share", "names"),
    [
        (540, 1.0, ["step", "swap", "waterfall", "kernels"]),
        (240, 1.0, ["step", "swap", "waterfall", "kernels"]),
        (60, 1.0, ["step", "waterfall"]),
        (30, 1.0, ["waterfall"]),
    ],
)
def test_what_runs_in_a_budget(
    budget: float, share: float, names: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    given = rehearse(budget, tmp_path, monkeypatch, share)
    assert [*given] == names, "in order of worth"
    said = capsys.readouterr().out
    for part in everything.parts(True, ""):
        assert part.name in given or f"{part.name}: not run: it takes {part.least:g} s" in said
        assert given.get(part.name, part.least) >= part.least


def test_decisions_and_failures(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    rehearse(540, tmp_path, monkeypatch, share=0.5, fails="waterfall")
    said = capsys.readouterr().out
    assert "op.attention=hopper: 50.00 ms, 50.0 % MFU; make it the default: it saves 2.40" in said
    assert "waterfall: exit code 1: see all.log" in said and "kernels: done" in said
    assert said.count("k dW 8 x 8: 2.000 ms, of which 0.500 are its bound") == 3
    assert "attention | FA4: 0.800 [0.700, 0.900] faster than triton" in said
    (path,) = tmp_path.glob("**/*-all.json")
    assert [r["outcome"] for r in results.load(path)["rows"]][1] == "done"


@pytest.mark.parametrize("ms", [(-0.2, -0.25, -0.15), (-2.0, -4.1, 0.1), (-2.0, None, None)])
def test_what_is_not_proven_does_not_become_the_default(ms: tuple[float | None, ...]) -> None:
    (text,) = everything.keep_what_pays([row("op.attention=hopper", *ms)])
    assert "default" not in text


def test_a_real_part_is_stopped_at_its_time(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        assert everything.run(["--help"], 60, log) == 0
        assert everything.run(["nothing"], 60, log) == 2
        assert everything.run(["step", "laptop"], 0.2, log) is None
