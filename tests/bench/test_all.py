"""Everything inside a budget, by a clock that is turned: order, failures, rules, what is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import all as everything
from bench import results
from bench.results import Row


def row(variant: str, *ms: float | None) -> Row:
    named = {"key": f"gpt2 {variant}", "variant": variant, "median_ms": 50.0, "mfu": 0.5}
    return named | {"samples_ms": [50.0], "problem": "", **({"difference_ms": ms} if ms else {})}


GAP = {"kernel": "k", "kind": "dW", "shape": "8 x 8", "ms": 2.0, "bound_ms": 0.5}
RATIO = {"to": "triton", "ratio": 0.8, "low": 0.7, "high": 0.9, "verdict": "faster"}
ROWS = {
    "step": [row("kernels+compile"), row("op.attention=hopper", -2.4, -2.9, -1.9)],
    "waterfall": [row("gpt2") | {"waterfall": {"budget": [GAP] * 5}}],
    "kernels": [row("FA4") | {"key": "attention | FA4", "ratio": RATIO}],
}
Rehearse = Callable[..., dict[str, float]]


@pytest.fixture
def rehearse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rehearse:
    """Runs `all` on a GPU that is none; parts take a share of their time. Returns seconds given."""
    now, parts = [1000.0], everything.parts
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(everything, "parts", lambda gpu, peer: parts(True, peer))
    monkeypatch.setattr(everything, "clock", lambda: now[0])

    def rehearsed(budget: float, share: float = 1.0, fails: str = "") -> dict[str, float]:
        end, given = now[0] + budget, dict[str, float]()

        def run(command: list[str], seconds: float, log: Any) -> int | None:
            name = "swap" if "--swap=each" in command else command[0]
            given[name] = seconds
            now[0] += share * seconds
            result = results.Result(command[0], [name], {})
            result.data["date"] = f"2026-01-01T00:00:{len(given):02}Z"
            result.rows += ROWS[command[0]]
            result.save(Path(command[-1].removeprefix("--out=")))
            return int(name == fails) if share < 1 else None

        monkeypatch.setattr(everything, "run", run)
        code = everything.main([f"--budget={budget}", f"--out={tmp_path}"])
        assert code == bool(fails), "a part that is cut is no error"
        assert now[0] <= end
        return given

    return rehearsed


ALL = ["step", "swap", "waterfall", "kernels"]  # in order of worth


@pytest.mark.parametrize(
    ("budget", "names"), [(540, ALL), (240, ALL), (60, ["step", "waterfall"]), (30, ["waterfall"])]
)
def test_parts_of_a_budget(
    budget: float, names: list[str], rehearse: Rehearse, capsys: Any
) -> None:
    given, said = rehearse(budget), capsys.readouterr().out
    assert [*given] == names
    for part in everything.parts(True, ""):
        assert part.name in given or f"{part.name}: not run: it takes {part.least:g} s" in said
        assert given.get(part.name, part.least) >= part.least


def test_decisions_and_failures(rehearse: Rehearse, tmp_path: Path, capsys: Any) -> None:
    rehearse(540, share=0.5, fails="waterfall")
    said = capsys.readouterr().out
    assert "op.attention=hopper: 50.00 ms, 50.0 % MFU; make it the default: it saves 2.40" in said
    assert "waterfall: exit code 1: see all.log" in said and "kernels: done" in said
    assert said.count("k dW 8 x 8: 2.000 ms, of which 0.500 are its bound") == 3
    assert "attention | FA4: 0.800 [0.700, 0.900] faster than triton" in said
    (path,) = tmp_path.glob("**/*-all.json")
    assert [r["outcome"] for r in results.load(path)["rows"]][1] == "done"


@pytest.mark.parametrize("ms", [(-0.2, -0.25, -0.15), (-2.0, -4.1, 0.1), (-2.0, None, None)])
def test_no_default_without_proof(ms: tuple[float | None, ...]) -> None:
    assert "default" not in everything.keep_what_pays([row("op.attention=hopper", *ms)])[0]


def test_a_real_part_is_stopped_at_its_time(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        assert everything.run(["nothing"], 60, log) == 2
        assert everything.run(["step", "laptop"], 0.2, log) is None
