"""Races to a loss: rates chosen, targets met or missed, verdicts over seeds, runs that are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import convergence, results, whole_runs
from bench.stats import ONE_PAIR
from bench.variants import Variant
from fastgpt.config.schema import CompareConfig
from fastgpt.train.compare import compare
from tests.bench.test_step import TINY, write_peer
from tests.runs import write_text


def run(losses: list[float], ms: float = 10.0, every: int = 20) -> dict[str, Any]:
    """A run with these validation losses, an evaluation each `every` steps."""
    curve = [[i * every * ms / 1e3, i * every, x] for i, x in enumerate(losses)]
    steps = every * (len(losses) - 1)
    found = {"seconds": steps * ms / 1e3, "steps": steps, "warm_up_s": 0.1, "reached": False}
    return found | {"curve": curve, "train_losses": [0.0, *losses[1:]], "step_ms": [ms] * 3}


def fake_races(monkeypatch: pytest.MonkeyPatch, done: list[str] | None = None) -> None:
    """Muon halves AdamW's last part of the loss in dearer steps; 2e-3 is the best rate of both."""

    def one_run(race: Any, course: Any, progress: Any) -> dict[str, Any]:
        v = race.values
        if done is not None:
            done.append(f"{v['optimizer']} {v['learning_rate']:g} {v['seed']}")
        luck = 0.01 * (v["seed"] % 3) + abs(v["learning_rate"] - 2e-3)
        low, ms = (2.0, 12.0) if v["optimizer"] == "muon" else (2.2, 10.0 + 0.1 * (v["seed"] % 3))
        return run([4.0, 2.4, 2.3 if low > 2.1 else 2.15, low + luck], ms)

    monkeypatch.setattr(convergence, "one_run", one_run)


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    text = write_text(tmp_path)
    return [*TINY, f"--input={text}", "--tokenizer=byte", f"--data_dir={tmp_path}/data"]


def result_of(tmp_path: Path) -> dict[str, Any]:
    (path,) = results.files(tmp_path / "out")
    assert path.with_suffix(".png").stat().st_size > 5000
    return results.load(path)


def test_a_race_to_the_firsts_last_loss(tmp_path: Path, data, monkeypatch, capsys) -> None:
    done: list[str] = []
    fake_races(monkeypatch, done)
    argv = ["laptop", *data, "--target=first", "--rates=1e-3,2e-3,4e-3", "--seeds=3"]
    argv += ["--max_iters=60", f"--keep={tmp_path}/keep", f"--out={tmp_path}/out"]
    assert convergence.main(argv) == 0
    said = capsys.readouterr().out
    assert "adamw: learning rate 0.002\n" in said and "at the edge" not in said
    assert done[:6] == [f"{o} {r} 1340" for o in ("adamw", "muon") for r in (0.001, 0.002, 0.004)]
    assert done[6:] == [f"{o} 0.002 {s}" for s in (1337, 1338, 1339) for o in ("adamw", "muon")]
    adamw, muon = result_of(tmp_path)["rows"]
    assert adamw["steps"] == [60, 60, 60] and muon["steps"] == [40, 40, 40]
    assert muon["samples_ms"] == [480.0] * 3 and muon["against"] == "adamw"
    assert muon["paired_loss"]["mean"] == pytest.approx(-0.2)
    assert muon["ratio"]["verdict"] == "faster" and muon["ratio"]["high"] < 1
    assert muon["paired_step_ms"]["verdict"] == "higher"
    assert "last loss: -0.2000 [-0.2000, -0.2000] p 0 lower" in said
    # Drawn as `fastgpt train` runs are.
    kept = sorted(str(p) for p in (tmp_path / "keep").glob("*-0.002-seed133[789]"))
    assert len(kept) == 6
    assert compare(kept, CompareConfig(to=str(tmp_path / "both.png"))) == 0
    assert "2.2000" in capsys.readouterr().out


def test_finished_runs_are_not_done_again(tmp_path: Path, data, monkeypatch) -> None:
    done: list[str] = []
    fake_races(monkeypatch, done)
    argv = ["laptop", *data, "--target=first", "--max_iters=60", f"--keep={tmp_path}/keep"]
    assert convergence.main([*argv, "--seeds=1"]) == 0 and len(done) == 2
    assert convergence.main([*argv, "--seeds=2"]) == 0 and len(done) == 4
    assert convergence.main([*argv, "--seeds=2", "--weight_decay=0.2"]) == 0
    assert len(done) == 8, "with other settings they are other runs"
    for path in (tmp_path / "keep").glob("*/race.jsonl"):
        path.write_text(path.read_text()[:100])  # as a full disk would leave it
    assert convergence.main([*argv, "--seeds=1", "--weight_decay=0.2"]) == 0 and len(done) == 10


def test_one_seed_is_never_enough(tmp_path: Path, data, monkeypatch, capsys) -> None:
    fake_races(monkeypatch)
    argv = ["laptop", *data, "--target=first", "--max_iters=60", "--seeds=1"]
    assert convergence.main([*argv, f"--out={tmp_path}/out"]) == 0
    assert f"last loss: -0.2000 ({ONE_PAIR})" in capsys.readouterr().out
    assert result_of(tmp_path)["rows"][1]["ratio"]["verdict"] == ONE_PAIR


def test_several_at_a_time(tmp_path: Path, data, monkeypatch, capsys) -> None:
    """The same runs in the same order; their times are said not to count."""
    fake_races(monkeypatch)
    argv = ["laptop", *data, "--target=first", "--max_iters=60", "--seeds=3", "--jobs=3"]
    assert convergence.main([*argv, f"--out={tmp_path}/out"]) == 0
    found = result_of(tmp_path)
    assert [len(row["runs"]) for row in found["rows"]] == [3, 3]
    assert found["problems"] == ["3 runs at a time: their seconds are not comparable"]


def test_rates_that_break_off_are_not_taken() -> None:
    broke = run([4.0, 1.0])
    assert convergence.best_rate([(1e-3, run([4.0, 2.0, 2.0])), (1e-1, broke)]) == 1e-3


def test_who_arrives_when() -> None:
    found = run([4.0, 2.5, 2.3, 2.4])
    assert convergence.arrival(found, 2.4) == (0.4, 40), "not at the end, which is lower no more"
    assert convergence.arrival(found, 2.3) == (0.4, 40)
    assert convergence.arrival(found, 2.2) is None
    assert convergence.arrival(found, 9.0) == (0.2, 20), "where all begin is no arrival"


def test_a_target_that_was_not_met() -> None:
    row = convergence.row_of("text", "eager", [run([4.0, 2.6, 2.5])], [0.1])
    assert row["problem"] == "best loss 2.500 after 40 steps, target 0.1"
    assert "samples_ms" not in row


def test_a_failed_contender_is_named_once(tmp_path: Path, data, monkeypatch, capsys) -> None:
    fake_races(monkeypatch)
    good = convergence.one_run

    def one_run(race: Any, course: Any, progress: Any) -> dict[str, Any]:
        if race.variant.name == "muon":
            raise convergence.TaskFailed("ValueError: it broke")
        return good(race, course, progress)

    monkeypatch.setattr(convergence, "one_run", one_run)
    argv = ["laptop", *data, "--target=first", "--max_iters=60", "--rates=1e-3,2e-3"]
    assert convergence.main([*argv, f"--out={tmp_path}/out"]) == 1
    rows = result_of(tmp_path)["rows"]
    assert [row["problem"] for row in rows] == ["", "ValueError: it broke"]
    assert capsys.readouterr().out.count("it broke") == 1


@pytest.mark.slow
def test_real_races(tmp_path: Path, data) -> None:
    """Real runs to a loss that they meet, a peer among them."""
    peer = write_peer(tmp_path / "peer", 1.0)
    common = [*data, "--max_iters=60", "--eval_iters=2", f"--out={tmp_path}/out"]
    common += ["--variants=eager,muon", f"--peer-path={peer}", "--seeds=1"]
    assert convergence.main([*common, "--target=5.4"]) == 0
    for row in (rows := result_of(tmp_path)["rows"]):
        (found,) = row["runs"]
        assert found["reached"] and found["curve"][-1][2] <= 5.4 < found["curve"][-2][2]
        assert 0 < found["seconds"] == found["curve"][-1][0] and "under_way" not in row
        assert len(found["train_losses"]) == len(found["curve"])
    assert [row["variant"] for row in rows] == ["eager", "muon", "peer, eager"]


def test_a_race_that_is_cut_short_keeps_its_curve(tmp_path: Path, data, monkeypatch) -> None:
    def one_run(race: Any, course: Any, progress: Any) -> dict[str, Any]:
        progress({"seconds": 1.0, "steps": 20, "curve": [[1.0, 20, 5.5]], "reached": False})
        raise KeyboardInterrupt

    monkeypatch.setattr(convergence, "one_run", one_run)
    with pytest.raises(KeyboardInterrupt):
        convergence.main([*data, f"--out={tmp_path}/out"])
    (path,) = results.files(tmp_path / "out")
    adamw, _ = results.load(path)["rows"]
    assert adamw["problem"] == results.NOT_YET
    assert adamw["under_way"]["curve"] == [[1.0, 20, 5.5]]


def test_contenders_have_settings_of_their_own(tmp_path: Path, data, monkeypatch) -> None:
    seen: list[tuple[str, float]] = []

    def one_run(race: Any, course: Any, progress: Any) -> dict[str, Any]:
        seen.append((race.values["lr_schedule"], race.values["lr_decay_fraction"]))
        return run([4.0, 3.0])

    monkeypatch.setattr(convergence, "one_run", one_run)
    names = "muon,muon:lr_schedule=wsd:lr_decay_fraction=0.2"
    argv = ["laptop", *data, f"--variants={names}", "--seeds=1", "--target=first"]
    assert convergence.main([*argv, f"--keep={tmp_path}/keep"]) == 0
    assert seen == [("cosine", 0.4), ("wsd", 0.2)]
    assert len([*(tmp_path / "keep").iterdir()]) == 2


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("--target=low", "--target"),
        ("--rates=1e-3,x", "--rates"),
        ("--seeds=0", "at least 1"),
        ("--variants=muon,muun", "no 'muun'; there are "),
        ("--variants=muon:lr_shedule=wsd", "did you mean --lr_schedule?"),
        ("--variants=muon:lr_schedule=wst", "--lr_schedule=wst: wanted one of cosine, wsd"),
    ],
)
def test_mistakes(arg: str, message: str, capsys) -> None:
    with pytest.raises(SystemExit) as e:
        convergence.main([arg])
    assert e.value.code == 2 and message in capsys.readouterr().err


def test_a_run_of_a_gone_folder_is_none(tmp_path: Path) -> None:
    entry = convergence.Entry(Variant("muon"), 0.01, 7)
    assert entry.place(tmp_path).name == "muon-0.01-seed7"
    assert convergence._kept(entry.place(tmp_path), {}) is None
    (tmp_path / "race.jsonl").write_text(json.dumps([1]))
    assert convergence._kept(tmp_path, {}) is None
    assert whole_runs.Course(60, 20, 20, 9.0).target < 0
