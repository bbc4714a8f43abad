"""The acceptance of a fast path: verdicts on known losses, and real runs on a CPU."""

from pathlib import Path

import pytest
import torch

from bench import curves, results


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
    assert curves.verdict([1.50, 1.52, 1.54], other)["verdict"] == word


def test_no_verdict_from_two_seeds() -> None:
    assert "too few" in curves.verdict([1.5, 1.6], [1.5, 1.6])["verdict"]


def test_real_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 200)
    argv = ["--steps", "10", "--seeds", "1", "--out", str(tmp_path / "out"), f"--input={text}"]
    argv += [f"--data_dir={tmp_path / 'data'}", "--eval_iters=1", "--n_layer=1", "--n_embd=32"]
    assert curves.main(argv) == 0
    (path,) = results.files(tmp_path / "out")
    written = results.load(path)
    assert [row["variant"] for row in written["rows"]] == list(curves.variants(False))
    for row in written["rows"]:
        steps = [step for step, _ in row["curve"]]
        assert steps == [0, 2, 4, 6, 8, 10] and row["samples_ms"]
    assert path.with_suffix(".png").stat().st_size > 5000
    assert "too few seeds to tell" in capsys.readouterr().out


def test_a_run_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(curves, "variants", lambda gpu: {curves.ORACLE: ["--n_head=3"]})
    assert curves.main(["--steps", "5", "--seeds", "1"]) == 1
    assert "must divide n_embd" in capsys.readouterr().out
