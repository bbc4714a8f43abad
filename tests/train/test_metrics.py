"""Log lines as nanoGPT prints them, records, and what resuming keeps."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from fastgpt.config.schema import Config
from fastgpt.config.settings import replace
from fastgpt.data import progress
from fastgpt.errors import UserError
from fastgpt.train import metrics, plots

RECORD = {
    "loss": 0.80104,
    "lr": 1e-3,
    "grad_norm": 2.0,
    "mfu": 0.11066,
    "mfu_causal": 0.1,
    "mfu_6n": 0.09,
}


def log(run_dir: Path, start: int = 0) -> metrics.Metrics:
    return metrics.Metrics(run_dir, Config(), start_step=start, tokens_per_step=100)


def test_lines_are_nanogpts(tmp_path: Path, capsys):
    with log(tmp_path) as m:
        m.train(4980, 0.033222, RECORD)
        m.evaluation(5000, 0.62241, 1.70444)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "iter 4980: loss 0.8010, time 33.22ms, mfu 11.07%"
    assert lines[1] == "step 5000: train loss 0.6224, val loss 1.7044"
    # What people's parsers look for.
    assert re.fullmatch(r"iter (\d+): loss ([\d.]+), time ([\d.]+)ms, mfu ([\d.]+)%", lines[0])
    assert lines[2] == "500k tokens seen, 3.01k tok/s, ETA 5h 29m", "595,000 steps of 33.222 ms"


def test_at_the_end_nothing_is_left(tmp_path: Path, capsys):
    config = replace(Config(), max_iters=100)
    with metrics.Metrics(tmp_path, config, start_step=0, tokens_per_step=100) as m:
        m.train(98, 2.0, RECORD)
        m.evaluation(99, 1.0, 2.0)
        m.evaluation(100, 1.0, 2.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "9.9k tokens seen, 50 tok/s, ETA 2s"
    assert lines[4] == "10k tokens seen, 50 tok/s"


def test_a_terminal_has_a_bar(tmp_path: Path, capsys, monkeypatch):
    """It says what is done and left; lines are printed above it, whole and as they are."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    config = replace(Config(), max_iters=100)
    with metrics.Metrics(tmp_path, config, start_step=20, tokens_per_step=100) as m:
        (task,) = m._progress.tasks
        assert m._progress.live.is_started and (task.completed, task.total) == (20, 100)
        m.train(29, 2.0, RECORD)
        assert task.completed == 30
        assert task.description == "30/100 3k tokens, 50 tok/s, ETA 2m 20s"
        m.working("evaluating train", 30, 4, 20)
        assert (task.completed, task.description) == (30, "evaluating train 4/20")
        m.evaluation(30, 1.0, 2.0)
        m.say("[red]" + "x" * 80)
    assert not m._progress.live.is_started
    out = capsys.readouterr().out
    assert "iter 29: loss 0.8010, time 2000.00ms, mfu 11.07%\n" in out
    assert "[red]" + "x" * 80 + "\n" in out and "tokens seen" not in out


def test_the_first_rank_alone_keeps_the_log(tmp_path: Path, monkeypatch):
    synced: list[int] = []
    monkeypatch.setattr(metrics.os, "fsync", synced.append)
    with log(tmp_path) as m:
        synced.clear()
        m.sync()
        assert synced == [m._file.fileno()]
    with metrics.Metrics(
        tmp_path / "other", Config(), start_step=0, tokens_per_step=1, keeps=False
    ) as m:
        m.train(0, 0.5, RECORD)
        m.sync()
    assert len(synced) == 1 and not (tmp_path / "other").exists()


def test_an_evaluation_in_a_pipe_says_how_far_it_is(tmp_path: Path, capsys, monkeypatch):
    """At most every ten seconds, counted from the last line of the log."""
    now = 0.0
    monkeypatch.setattr(progress, "_clock", lambda: now)
    with log(tmp_path) as m:
        for k in range(1, 31):
            now = 1.0 * k
            m.working("evaluating train", 0, k, 60)
            if k == 15:
                m.train(0, 0.5, RECORD)
    lines = [line for line in capsys.readouterr().out.splitlines() if "evaluating" in line]
    assert lines == ["evaluating train 10/60", "evaluating train 25/60"]


def test_records(tmp_path: Path):
    with log(tmp_path) as m:
        m.train(2, 0.5, RECORD)
        m.evaluation(3, 1.0, 2.0)
    train, evaluation = metrics.read(tmp_path / "metrics.jsonl")
    assert train == {
        **RECORD,
        "kind": "train",
        "step": 2,
        "time_ms": 500.0,
        "tokens_per_second": 200.0,
        "tokens": 300,
    }
    want = {"kind": "eval", "step": 3, "train_loss": 1.0, "val_loss": 2.0, "tokens": 300}
    assert evaluation == want


def test_resuming_keeps_what_came_before_the_checkpoint(tmp_path: Path):
    with log(tmp_path) as m:
        for step in range(5):
            m.evaluation(step, 1.0, 2.0)
            m.train(step, 0.5, RECORD)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "train", "st')  # cut off by a kill
    with log(tmp_path, start=3) as m:
        m.train(3, 0.5, RECORD)
    kept = [(r["kind"], r["step"]) for r in metrics.read(path)]
    first = [(kind, step) for step in range(3) for kind in ("eval", "train")]
    assert kept == [*first, ("eval", 3), ("train", 3)]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train"\n{"kind": "eval"}\n')
    with pytest.raises(UserError, match="line 1 is not JSON"):
        metrics.read(path)


def test_a_log_that_is_not_what_it_was_is_named(tmp_path: Path, capsys):
    """Its sha256 is kept with the checkpoint; a digit that changed is said when the run goes on."""
    with log(tmp_path) as m:
        m.train(0, 0.5, RECORD)
        m.evaluation(1, 1.0, 2.0)
        seal = m.seal()
        m.train(1, 0.5, RECORD)
    path = tmp_path / "metrics.jsonl"
    text = path.read_text()

    def resumed() -> str:
        arguments = dict(start_step=1, tokens_per_step=100, seal=seal)
        capsys.readouterr()
        with metrics.Metrics(tmp_path, Config(), **arguments):  # type: ignore[arg-type]
            return capsys.readouterr().out

    assert resumed() == ""
    path.write_text(text.replace("0.80104", "0.80105", 1))
    assert "metrics.jsonl: is not what it was at step 1" in resumed()


@pytest.mark.parametrize("line", ["[]", "3", '{"kind": "train"}', '{"kind": "train", "step": "x"}'])
def test_a_line_that_is_no_record_is_named(line: str, tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="line 1 is not JSON, or no record"):
        metrics.read(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((5, "5s"), (65, "1m 05s"), (7380, "2h 03m"), (273600, "3d 04h")),
        *((59.4, "59s"), (59.6, "1m 00s"), (3599, "59m 59s"), (3600, "1h 00m")),
        *((86399, "23h 59m"), (86400, "1d 00h")),
    ],
)
def test_durations(seconds, text):
    assert metrics.duration(seconds) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [
        *((980, "980"), (12345, "12.3k"), (4.56e6, "4.56M"), (7.89e9, "7.89B")),
        *((999, "999"), (1000, "1k"), (1e6, "1M"), (1e9, "1B")),
    ],
)
def test_counts(n, text):
    assert metrics.count(n) == text


def test_loss_curve_is_a_picture(tmp_path: Path):
    assert plots.loss_curve(tmp_path) is None
    with log(tmp_path) as m:
        m.evaluation(0, 3.0, 3.1)
        m.train(0, 0.5, RECORD)
        m.evaluation(1, 2.0, 2.1)
    path = plots.loss_curve(tmp_path)
    assert path == tmp_path / "loss.png"
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 5000
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 3
