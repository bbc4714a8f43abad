"""Whole runs: verdicts on known losses, targets met and missed, and real runs on a CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import results, whole_runs
from bench.variants import Variant
from fastgpt_kernels.stats import TOO_FEW
from tests.bench.test_step import TINY, write_peer
from tests.runs import write_text


@pytest.mark.parametrize(
    ("other", "word"),
    [
        ([1.50, 1.52, 1.54], "within seed noise"),
        ([1.53, 1.49, 1.55], "within seed noise"),
        ([1.56, 1.58, 1.60], "off by more than seeds are"),
        ([1.44, 1.46, 1.48], "off by more than seeds are"),
    ],
)
def test_verdicts(other: list[float], word: str) -> None:
    assert whole_runs.verdict([1.50, 1.52, 1.54], other)["verdict"] == word


def test_no_verdict_from_two_seeds() -> None:
    assert "too few" in whole_runs.verdict([1.5, 1.6], [1.5, 1.6])["verdict"]


@pytest.mark.slow
def test_real_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 200)
    argv = ["--steps", "10", "--seeds", "1", "--out", str(tmp_path / "out"), f"--input={text}"]
    argv += [f"--data_dir={tmp_path / 'data'}", "--eval_iters=1", "--n_layer=1", "--n_embd=32"]
    assert whole_runs.curves(argv) == 0
    (path,) = results.files(tmp_path / "out")
    written = results.load(path)
    assert [row["variant"] for row in written["rows"]] == ["eager fp32", "eager bf16"]
    for row in written["rows"]:
        steps = [step for step, _ in row["curve"]]
        assert steps == [0, 2, 4, 6, 8, 10] and row["samples_ms"]
    assert path.with_suffix(".png").stat().st_size > 5000
    assert "too few seeds to tell" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wrong = Variant(whole_runs.ORACLE, {"kernels": "triton"})
    monkeypatch.setattr(whole_runs, "precisions", lambda *_: [wrong])
    data = [f"--input={write_text(tmp_path)}", f"--data_dir={tmp_path}/data"]
    assert whole_runs.curves(["--steps", "5", "--seeds", "2", *data]) == 1
    said = capsys.readouterr().out
    assert said.count("UserError: --kernels=triton: no GPU") == 2, "a problem of every seed"


@pytest.mark.slow
def test_convergence(tmp_path: Path) -> None:
    """Real runs to a loss that they meet."""
    text = write_text(tmp_path)
    peer = write_peer(tmp_path / "peer", 1.0)
    data = [f"--input={text}", "--tokenizer=byte", f"--data_dir={tmp_path}/data"]
    common = [*TINY, *data, "--max_iters=60", "--eval_iters=2", f"--out={tmp_path}/out"]
    assert whole_runs.convergence([*common, "--target=5.4", f"--peer-path={peer}"]) == 0
    (path,) = results.files(tmp_path / "out")
    ours, other = results.load(path)["rows"]
    for row in (ours, other):
        (run,) = row["runs"]
        assert run["reached"] and run["curve"][-1][2] <= 5.4 < run["curve"][-2][2]
        assert 0 < run["seconds"] == run["curve"][-1][0] and "under_way" not in row
    assert other["ratio"]["verdict"] == TOO_FEW  # one seed
    assert ours["runs"][0]["steps"] == other["runs"][0]["steps"]


def test_convergence_that_is_cut_short_keeps_its_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(race: Any, course: Any, progress: Any) -> dict[str, Any]:
        progress({"seconds": 1.0, "steps": 20, "curve": [[1.0, 20, 5.5]], "reached": False})
        raise KeyboardInterrupt

    monkeypatch.setattr(whole_runs, "one_run", run)
    text = write_text(tmp_path)
    data = [f"--input={text}", "--tokenizer=byte", f"--data_dir={tmp_path}/data"]
    with pytest.raises(KeyboardInterrupt):
        whole_runs.convergence([*TINY, *data, f"--out={tmp_path}/out"])
    (path,) = results.files(tmp_path / "out")
    (row,) = results.load(path)["rows"]
    assert row["problem"] == results.NOT_YET and row["under_way"]["curve"] == [[1.0, 20, 5.5]]


def test_a_target_that_was_not_met() -> None:
    run = {"reached": False, "steps": 60, "curve": [[1.0, 30, 2.6], [2.0, 60, 2.5]]}
    row = whole_runs.row_of(Variant("eager"), [run], "", target=0.1)
    assert row["problem"] == "best loss 2.500 after 60 steps, target 0.1"
    assert "samples_ms" not in row
