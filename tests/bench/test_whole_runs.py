"""Whole runs: verdicts on known losses, and real runs on a CPU."""

from pathlib import Path

import pytest
import torch

from bench import results, whole_runs
from bench.variants import Variant
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
