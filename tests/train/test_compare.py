"""Curves of runs side by side: the table's figures, and verdicts on runs whose noise is known."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from fastgpt.cli import main
from fastgpt.config.schema import CompareConfig, Config
from fastgpt.config.settings import replace
from fastgpt.errors import UserError
from fastgpt.storage import run_dir as run
from fastgpt.train import plots
from fastgpt.train.compare import compare, open_runs, verdict
from fastgpt.train.plots import Curves, smooth, time_axis


def make(name: str, level: float, noise: float, **settings) -> str:
    """A run of 1,000 steps whose validation loss falls to `level`, within noise of its own."""
    rng = random.Random(name)
    folder = Path(name)
    run.save_config(folder, replace(Config(), **settings))
    records: list[dict] = []
    for step in range(0, 1001, 10):
        loss = level + 2.0 * 0.9 ** (step / 10)
        if step % 100 == 0:
            val = loss + rng.gauss(0, noise)
            losses = {"train_loss": loss, "val_loss": val}
            records.append({"kind": "eval", "step": step, **losses, "tokens": step * 100})
        if step < 1000:
            speed = {"time_ms": 36.0, "tokens_per_second": 2777.8, "mfu": 0.25}
            train = {"kind": "train", "step": step, "loss": loss, "lr": 1e-3, **speed}
            records.append(train | {"tokens": (step + 1) * 100})
    text = "".join(json.dumps(r) + "\n" for r in records)
    (folder / "metrics.jsonl").write_text(text)
    return name


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (figures.append(f), save(f, *a, **k)))
    return figures


def test_a_single_run_is_never_enough():
    """However smooth the curves are, other seeds may end elsewhere. Each pair has its line."""
    names = [make(n, 1.5 - i / 10, 0.0, n_layer=i) for i, n in enumerate("abc", 1)]
    lines = verdict(open_runs(names))
    assert [line.split(":")[0] for line in lines] == ["a and b", "a and c", "b and c"]
    assert ["0.1000" in line for line in lines] == [True, False, True] and "0.2000" in lines[1]
    assert lines[0].startswith("a and b: val loss 1.4001 and 1.3001 at step 1000, apart by 0.1000")
    assert lines[0].endswith("a single run is never enough: give runs of other seeds of each")
    (line,) = verdict(open_runs([*names[:2], make("b2", 1.45, 0.002, n_layer=2, seed=2)]))
    assert line.endswith("never enough: give runs of other seeds of each"), "one of a, two of b"


def test_runs_of_other_seeds_are_the_noise():
    """Three seeds each; each curve alone is smooth, and would call a difference of 0.01 one."""

    def seeds(name: str, level: float, **settings) -> list[str]:
        return [
            make(f"{name}{i}", level + d, 0, seed=i, **settings)
            for i, d in enumerate((-0.02, 0.0, 0.02))
        ]

    a, b, far = seeds("a", 1.50), seeds("b", 1.49, n_layer=3), seeds("c", 1.40, n_layer=4)
    (line,) = verdict(open_runs([*a, *b]))
    assert line.startswith("a0 (and 2 more) and b0 (and 2 more): no difference beyond noise")
    # The mean of three from a spread of 0.02, twice: 0.02 sqrt(1/3 + 1/3), times t of 4: 2.776.
    assert "apart by 0.0100 +- 0.0453 (95 %, between seeds)" in line
    (alone,) = verdict(open_runs(a))
    assert "differ only in their seed" in alone and "standard deviation is 0.0200" in alone
    (line,) = verdict(open_runs([*a, *far]))
    assert line.startswith("c0 (and 2 more) is better than a0 (and 2 more) by 0.1000 +- 0.0453")
    (line,) = verdict(open_runs([*a[::2], *far[::2]]))
    assert line.startswith("a0+a2 and c0+c2: no difference beyond noise"), "t of 2 is 4.3"


def test_too_little_to_judge():
    names = [make("a", 1.5, 0), make("b", 1.4, 0, n_layer=3)]
    path = Path("b/metrics.jsonl")
    lines = [line for line in path.read_text().splitlines() if '"step": 0,' in line]
    path.write_text("\n".join(lines).replace('"step": 0,', '"step": 1,') + "\n")
    assert verdict(open_runs(names)) == ["a and b: no step was evaluated in both"]
    path.write_text("")
    with pytest.raises(UserError, match="b: has no evaluation with finite losses"):
        open_runs(names)


def test_figures_and_picture(capsys):
    names = [make("a", 1.5, 0.0), make("b", 1.2, 0.0, n_layer=3)]
    with pytest.raises(SystemExit) as e:
        main(["compare", *names, "--to=pictures/both.png"])
    assert e.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[0].split()) == "run steps tokens hours train val best val tok/s mfu"
    row = "a 1000 100k 0.01 1.5001 1.5001 1.5001 at 1000 2.78k 25.0%"
    assert lines[1].split() == row.split()
    assert lines[3].startswith("a and b: val loss 1.5001 and 1.2001 at step 1000, apart by 0.3000")
    assert lines[4] == "curves pictures/both.png"
    width, height = struct.unpack(">II", Path("pictures/both.png").read_bytes()[16:24])
    assert (width, height) == (960, 504), "8 by 4.2 inches of 120 dots: tokens are steps here"


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["x/runs/a", "x/runs/b"], ["a", "b"]),
        (["runs/a", "other/a"], ["runs/a", "other/a"]),
        (["runs/a", "runs/a/b"], ["a", "a/b"]),
        (["runs/a"], ["a"]),
    ],
)
def test_names_tell_runs_apart(folders, names):
    made = [make(folder, 1.5, 0.0) for folder in folders]
    assert [r.name for r in open_runs([made[0], *map(os.path.abspath, made[1:])])] == names


def test_the_comparison_is_drawn_on_bare_axes(drawn):
    """One colour per recipe."""
    kinds = [("a", 2, 0), ("a", 2, 1), ("b", 3, 0), ("b", 3, 1)]
    names = [make(f"{n}{i}", 1.5, 0.0, seed=i, n_layer=layers) for n, layers, i in kinds]
    compare(names, CompareConfig())
    assert [axes.get_xlabel() for axes in drawn[0].axes] == ["step", "minutes of training"]
    low, high = zip(*(Curves.of(Path(n)).useful_range for n in names), strict=True)
    for axes in drawn[0].axes:
        assert axes.get_xgridlines()[0].get_visible()
        assert not axes.spines["top"].get_visible() and not axes.spines["right"].get_visible()
        assert axes.get_ylim() == (min(low), max(high)) and len(axes.lines) == 8
        evals = [line for line in axes.lines if line.get_marker() == "o"]
        assert [line.get_color() for line in evals] == ["C0", "C0", "C1", "C1"]
    assert [t.get_text() for t in drawn[0].axes[0].get_legend().get_texts()] == ["a0+a1", "b0+b1"]


def test_other_data_is_said(capsys):
    names = [make("a", 1.5, 0.0), make("b", 1.2, 0.0, dataset="shakespeare")]
    compare(names, CompareConfig())
    assert "other data or tokenizers: their losses are not of the same" in capsys.readouterr().out


def test_hours_are_those_of_the_steps():
    """1,000 steps of 36 ms, logged every ten: 36 s, and half of it at half."""
    make("a", 1.5, 0.0)
    curves = Curves.of(Path("a"))
    for step in (0, 500, 991, 1000):  # the last one is after the last record
        assert curves.hours(step) * 3600 == pytest.approx(step * 0.036)
    assert time_axis(0.3) == ("minutes of training", 60) and time_axis(2)[0] == "hours of training"


def test_the_useful_range_begins_with_an_eighth_of_the_run():
    def record(step: int, **losses: float) -> dict:
        return {"step": step, **losses}

    # Of 72 steps those from 9 on; a loss of 4 at step 8 does not count, the ones at 9 do.
    train = [record(s, loss=x) for s, x in ((0, 9.0), (8, 4.0), (9, 3.0), (72, 1.0))]
    assert Curves(train, []).useful_range == pytest.approx((0.9, 3.2))
    evals = [record(r["step"], train_loss=r["loss"], val_loss=r["loss"]) for r in train]
    assert Curves([], evals).useful_range == pytest.approx((0.9, 3.2))
    late = [record(80, train_loss=1.0, val_loss=1.0)]
    assert Curves(train, late).useful_range == pytest.approx((0.9, 3.2)), "of the log lines"
    assert smooth([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    assert smooth([float(i % 2) for i in range(200)])[-1] == 0.5
    assert smooth([float(i) for i in range(60)])[:5] == [0.0, 0.5, 1.0, 2.0, 3.0]


def test_the_picture_has_its_parts(drawn):
    """All losses with marked evaluations, the rate below, tokens and time in the label."""
    assert plots.loss_curve(Path()) is None, "of no records"
    make("a", 1.5, 0.0)
    assert plots.loss_curve(Path("a")) == Path("a/loss.png")
    assert Path("a/loss.png").read_bytes().startswith(b"\x89PNG")
    axes, rates = drawn[0].axes
    labels = [line.get_label() for line in axes.lines]
    assert {"batches, smoothed", "train, last 1.5001", "val, last 1.5001"} <= set(labels)
    val = next(line for line in axes.lines if line.get_label().startswith("val"))
    assert val.get_marker() == "o" and len(val.get_xdata()) == 11
    assert axes.get_ylim()[0] < 1.5 and axes.get_ylim()[1] > 3.5, "the first step is in it"
    assert rates.get_ylabel() == "learning rate" and len(rates.lines[0].get_xdata()) == 100
    assert rates.get_xlabel() == "step (99.1k tokens, 0.595 minutes of training)"


def test_a_diverged_run_is_named_and_compared_up_to_there(capsys):
    for name in ("a", "b"):
        make(name, 1.5, 0.0)
    log = Path("b/metrics.jsonl")
    lines = log.read_text().splitlines()
    cut = next(i for i, line in enumerate(lines) if '"eval"' in line and '"step": 500' in line)
    lines[cut] = lines[cut].replace('"val_loss": ', '"val_loss": NaN, "was": ')
    log.write_text("\n".join(lines) + "\n")
    assert compare(["a", "b"], CompareConfig(to="x.png")) == 0
    said = capsys.readouterr().out
    assert "b: diverged at step 500; later steps are left out" in said
    assert "at step 400" in said and plots.loss_curve(Path("b")) == Path("b/loss.png")
    lines[cut] = lines[cut].replace('"step": 500', '"step": ' + "5" * 400)
    log.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl: line \d+ is not JSON, or no record"):
        compare(["a", "b"], CompareConfig(to="x.png"))
