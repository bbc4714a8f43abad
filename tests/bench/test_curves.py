"""Races and curves: chosen rates, targets met or missed, compared pairs, and kept runs."""

from pathlib import Path
from typing import Any

import pytest

from bench import curves
from bench.__main__ import main
from bench.curves import Runs, row_of
from bench.results import Row
from fastgpt_kernels.worker import TaskFailed
from tests.bench.test_results import load_only
from tests.runs import TINY, write_text


def made(losses: list[float], ms: float = 10.0, joules: float | None = None) -> Row:
    curve = [[i * 20, i * 20 * ms / 1e3, x] for i, x in enumerate(losses)]
    return {"folder": "", "curve": curve, "joules": joules}


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs in which 2e-3 is the best rate, and Muon ends lower than AdamW in slower steps."""
    done: list[str] = []

    def run(self: Runs, name: str, own: dict[str, Any], seed: int) -> Row:
        rate = own.get("learning_rate", 2e-3)
        done.append(f"{own['optimizer']} {rate:g} {seed}")
        if rate > 1:
            raise TaskFailed("ValueError: it broke")
        luck = 0.01 * (seed % 3) + abs(rate - 2e-3)
        if own["optimizer"] == "muon":
            return made([4.0, 2.4, 2.15, 2.0 + luck], 12.0, 1200.0)
        return made([4.0, 2.4, 2.3, 2.2 + luck], 10.0 + 0.1 * (seed % 3), 1000.0)

    monkeypatch.setattr(Runs, "run", run)
    monkeypatch.setattr(curves, "compare", lambda folders, config: None)
    return done


def test_a_race_to_the_firsts_last_loss(tmp_path: Path, races: list[str], capsys: Any) -> None:
    argv = ["laptop", "--target=first", "--rates=1e-3,2e-3,4e-3", "--variants=adamw,muon"]
    argv += [f"--keep={tmp_path}/keep", f"--out={tmp_path}/out", "--seeds=3"]
    assert curves.main(argv) == 0
    said = capsys.readouterr().out
    assert "adamw: learning rate 0.002 (" in said
    assert races[:6] == [f"{o} {r} 1340" for o in ("adamw", "muon") for r in (0.001, 0.002, 0.004)]
    assert races[6:] == [f"{o} 0.002 {s}" for s in (1337, 1338, 1339) for o in ("adamw", "muon")]
    adamw, muon = load_only(tmp_path / "out", "curves")["rows"]
    assert adamw["steps"] == [60, 60, 60] and muon["steps"] == [40, 40, 40]
    assert muon["samples_ms"] == pytest.approx([480.0] * 3)
    assert muon["joules"] == pytest.approx([800.0] * 3), "two thirds of a run's 1,200 J"
    assert muon["paired last loss"] == pytest.approx([-0.2] * 3)
    assert "last loss: -0.2000 [-0.2000, -0.2000], lower" in said
    assert "steps: 0.667 times [0.667 times, 0.667 times], lower" in said


def test_too_few_seeds_and_failures(tmp_path: Path, races: list[str], capsys: Any) -> None:
    argv = ["laptop", f"--keep={tmp_path}", f"--out={tmp_path}", "--seeds=1", "--variants"]
    assert curves.main([*argv, "adamw,muon", "--target=0.1"]) == 1
    said = capsys.readouterr().out
    assert "last loss: -0.2000 a single run is never enough" in said
    assert "muon: the best loss is 2.020, the target 0.100" in said
    assert curves.main([*argv, "adamw,muon:learning_rate=9"]) == 1
    assert capsys.readouterr().out.count("it broke") == 1
    for target, step in ((2.4, 40), (9.0, 20)):  # the first evaluation after step 0 that is low
        assert row_of("a", [made([4.0, 2.5, 2.3, 2.4])], [target], "")["steps"] == [step]


@pytest.mark.slow
def test_real_runs_are_kept(tmp_path: Path, capsys: Any) -> None:
    flags = [f for f in TINY[1:] if "eval" not in f and "_iters" not in f]
    argv = ["curves", "laptop", f"--out={tmp_path}/out", f"--keep={tmp_path}/keep", "--seeds=1"]
    argv += [*flags, f"--input={write_text(tmp_path)}", "--tokenizer=byte"]
    argv += [f"--data_dir={tmp_path}/data", "--variants=adamw,muon", "--steps=20", "--eval_iters=1"]
    assert main(argv) == 0
    assert next(tmp_path.glob("out/*/*.png")).stat().st_size > 5000
    for row in load_only(tmp_path / "out", "curves")["rows"]:
        (run,) = row["runs"]
        assert [p[0] for p in run["curve"]] == [*range(0, 21, 2)] and row["samples_ms"][0] > 0
    kept = {p: p.stat().st_mtime for p in tmp_path.glob("keep/*/*/joules.json")}
    assert main(argv) == 0 and {p: p.stat().st_mtime for p in kept} == kept, "none is done again"
