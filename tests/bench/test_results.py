"""Result files: what is refused, where they lie, and when they count as old."""

import json
import os
import sys
from pathlib import Path

import pytest

from bench import provenance, results
from bench.__main__ import COMMANDS, main

ROW = {"key": "gpt2 eager", "problem": "", "samples_ms": [1.0, 2.0], "median_ms": 1.5}


@pytest.fixture
def result() -> results.Result:
    result = results.Result("step", ["gpt2", "--out", "x", "--rounds=6", "--out=y"], {})
    result.rows.append(dict(ROW))
    return result


def test_written_and_read_back(result: results.Result, tmp_path: Path) -> None:
    path = result.save(tmp_path)
    assert path is not None and results.load(path) == result.data
    assert result.data["command"] == "python -m bench step gpt2 --rounds=6"
    assert path.parent.name == results.slug(provenance.device_name())
    date, clock, commit, *_ = path.stem.split("-")
    assert (len(date), len(clock)) == (8, 6) and commit == provenance.commit().split("-")[0]
    assert path.name.endswith("-step.json") and list(results.files(tmp_path)) == [path]


def test_of_two_that_begin_in_one_second_none_is_lost(tmp_path: Path) -> None:
    made = [results.Result("step", ["gpt2", f"--seed={i}"], {}) for i in range(3)]
    for result in made:
        result.data["date"] = made[0].data["date"]
        result.rows.append(dict(ROW))
        result.save(tmp_path)
    paths = [result.finish(tmp_path) for result in made]
    assert [p.stem.rpartition("step")[2] for p in paths if p] == ["", "-2", "-3"]
    for path, result in zip(paths, made, strict=True):
        assert path and results.load(path) == result.data and result.data["complete"]
    assert len(list(tmp_path.rglob("*"))) == 1 + 3, "nothing is left aside"


def test_slug() -> None:
    assert results.slug("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090"


def test_nowhere(result: results.Result) -> None:
    assert result.save(None) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "schema 99, this program reads 1"),
        ({"rows": [ROW, ROW]}, "every row needs a key of its own"),
        ({"rows": [{"key": "a"}]}, "a: a row has either samples_ms or a problem"),
        ({"rows": [ROW | {"problem": "wrong"}]}, "has either samples_ms or a problem"),
        ({"environment": None}, "environment should be dict"),
    ],
)
def test_what_is_no_result(result: results.Result, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        results.check(result.data | change, "here")


def test_not_a_number_is_not_written(result: results.Result, tmp_path: Path) -> None:
    result.rows[0]["samples_ms"] = [float("nan")]
    with pytest.raises(ValueError):
        result.save(tmp_path)
    assert not list(results.files(tmp_path))


def test_every_source_counts(tmp_path: Path) -> None:
    for name in ("kernels/fastgpt_kernels/a.py", "bench/step.py", "fastgpt/data/new/deep.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    before = provenance.sources(tmp_path)
    (tmp_path / "bench/test_step.py").write_text("measures for itself\n")
    assert provenance.sources(tmp_path) == before and len(before) == 3
    (tmp_path / "fastgpt/data/new/deep.py").write_bytes(b"x = 1\r\n")
    assert provenance.sources(tmp_path) == before
    (tmp_path / "fastgpt/data/new/deep.py").write_text("x = 2\n")
    (tmp_path / "bench/later.py").write_text("")
    after = provenance.sources(tmp_path)
    assert {k for k in after if after[k] != before.get(k)} == {
        "fastgpt/data/new/deep.py",
        "bench/later.py",
    }


def test_a_source_that_measured_was_hashed() -> None:
    """Whatever is imported from the checkout while benchmarks run is among the hashed files."""
    hashed = provenance.sources().keys()
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None) or ""
        top = module.__name__.split(".")[0]
        if top in ("fastgpt", "fastgpt_kernels", "bench") and file.startswith(str(provenance.ROOT)):
            assert Path(file).relative_to(provenance.ROOT).as_posix() in hashed
    assert {
        "kernels/fastgpt_kernels/library.py",
        "bench/picture.py",
        "fastgpt/train/trainer.py",
    } <= hashed


def test_a_run_that_was_cut_short_says_so(result: results.Result, tmp_path: Path) -> None:
    path = result.save(tmp_path)
    assert path is not None and not results.load(path)["complete"]
    assert result.finish(tmp_path) == path and results.load(path)["complete"]


def test_dispatch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stepp"]) == 2 and "no such benchmark" in capsys.readouterr().err
    assert main([]) == 2
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)


def test_committed_results_are_results() -> None:
    for path in results.committed():
        assert json.loads(path.read_text())["environment"]["gpu"], f"{path}: not from a GPU"
        results.load(path)


FAKE_SMI = """#!/bin/sh
case "$*" in
  *clocks_event_reasons*) echo 'Field "clocks_event_reasons.active" is not a valid field.'; exit 6;;
esac
echo "NVIDIA H200, 580.1, 1980 MHz, 3201 MHz, 693.12 W, 700.00 W, 61, 0x0000000000000004"
"""


def test_state_of_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the driver has the older of two names for throttling."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(FAKE_SMI)
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    state = provenance.gpu_state()
    assert state["throttling"] == "0x0000000000000004" and state["power.draw"] == "693.12 W"
    assert (state["name"], state["driver_version"], len(state)) == ("NVIDIA H200", "580.1", 8)
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert provenance.gpu_state() == {}
