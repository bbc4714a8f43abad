"""Verdicts on result files with known times, and worktrees of refs."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from bench import compare, results


def write(folder: Path, factor: float, seed: int, name: str = "step") -> str:
    noise = np.random.default_rng(seed).normal(1, 0.01, size=(2, 30))
    result = results.Result(name, [], {})
    result.rows.append({"key": "fixed", "problem": "", "samples_ms": list(noise[0])})
    result.rows.append({"key": "scaled", "problem": "", "samples_ms": list(factor * noise[1])})
    path = result.save(folder)
    assert path is not None
    return str(path)


@pytest.mark.parametrize(
    ("factor", "verdict", "code"),
    [(1.0, "no difference", 0), (1.05, "slower", 1), (0.95, "faster", 0)],
)
def test_two_files(
    tmp_path: Path, factor: float, verdict: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write(tmp_path / "a", 1.0, 1), write(tmp_path / "b", factor, 2)
    assert compare.main([a, b]) == code
    fixed, scaled = capsys.readouterr().out.splitlines()[-2:]
    assert "no difference" in fixed and scaled.endswith(verdict)


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", 1.0, 1), write(tmp_path / "b", 1.0, 2, name="ablate")
    assert compare.main([a, b]) == 2 and "is of step" in capsys.readouterr().err
    assert compare.main([a, str(tmp_path / "no.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_checkouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*args: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, *args], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    for text in ("one", "two"):
        (tmp_path / "file").write_text(text)
        git("add", "file")
        git("commit", "-m", text)
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    with compare.checkouts(["HEAD~1", "HEAD"]) as places:
        assert [Path(p, "file").read_text() for p in places] == ["one", "two"]
    assert not any(Path(p).exists() for p in places)
    with pytest.raises(ValueError, match="nowhere"), compare.checkouts(["HEAD", "nowhere"]):
        pass
    listed = subprocess.run(["git", "worktree", "list"], cwd=tmp_path, capture_output=True)
    assert len(listed.stdout.splitlines()) == 1
