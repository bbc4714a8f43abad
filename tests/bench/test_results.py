"""Result files: what is refused, where they lie, and when they count as old."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import check, provenance, report, results
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


def test_check_is_silent_until_a_source_changes(
    result: results.Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = result.save(tmp_path)
    assert path is not None
    assert main(["check", str(tmp_path)]) == 0 and capsys.readouterr().out == ""
    data = copy.deepcopy(result.data)
    data["environment"]["sources"] |= {"bench/turns.py": "old", "fastgpt/gone.py": "gone"}
    results.write(path, data)
    assert main(["check", str(tmp_path)]) == 1
    assert capsys.readouterr().out.endswith(
        "measured other sources than these: bench/turns.py, fastgpt/gone.py changed since\n"
    )
    path.write_text("{")
    assert check.main([str(tmp_path)]) == 1 and "cannot be read" in capsys.readouterr().out


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
        "kernels/fastgpt_kernels/register.py",
        "bench/picture.py",
        "fastgpt/train/trainer.py",
    } <= hashed


def test_a_run_that_was_cut_short_says_so(result: results.Result, tmp_path: Path) -> None:
    path = result.save(tmp_path)
    assert path is not None and not results.load(path)["complete"]
    assert result.finish(tmp_path) == path and results.load(path)["complete"]


def test_report(result: results.Result, tmp_path: Path) -> None:
    result.rows[0] |= {
        "variant": "eager",
        "preset": "gpt2",
        **dict.fromkeys(("mfu", "mfu_causal", "mfu_6n"), 0.25),
        "tokens_per_second": 1000.0,
    }
    result.rows.append({"key": "gpt2 kernels", "problem": "no GPU"})
    path = result.save(tmp_path / "results")
    assert path is not None
    assert report.main([str(tmp_path / "results")]) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert "This run was cut short" in text
    assert "| gpt2 eager " in text and "no GPU" in text and provenance.commit() in text
    assert path.with_suffix(".svg").exists() and path.with_suffix(".svg").name in text


def test_sizes_of_a_sweep_in_their_order() -> None:
    sizes = ["B=64 T=1024 12x64 causal", "B=128 T=512 12x64 causal", "B=16 T=4096 12x64 causal"]
    assert [s.split()[1] for s in sorted(sizes, key=report._numbers)] == [
        "T=512",
        "T=1024",
        "T=4096",
    ]


def test_report_of_a_sweep_and_of_kernels(tmp_path: Path) -> None:
    """Lines with the roof among them, in text that a reader of the SVG can find."""
    step = results.Result("step", ["--sweep=n_layer"], {})
    for n in (2, 4):
        step.rows.append(
            ROW
            | {"key": f"gpt2 n_layer={n} eager", "preset": "gpt2", "variant": "eager"}
            | {"n_layer": n, "mfu": 0.5, "mfu_causal": 0.4, "mfu_6n": 0.3, "median_ms": 2.0 * n}
            | {"tokens_per_second": 1e6}
        )
    kernels = results.Result("kernels", [], {"roofs": {"GB/s": 4000.0}})
    for size in ("8 x 768 bfloat16", "8 x 1024 bfloat16"):
        names = {"op": "layer_norm", "size": size, "pass": "forward", "provider": "fastgpt"}
        rate = {"rate": 3000.0, "unit": "GB/s", "share_of_roof": 0.75}
        kernels.rows.append(ROW | names | rate | {"key": size})
    paths = [result.finish(tmp_path / "results") for result in (step, kernels)]
    assert report.main([str(tmp_path / "results")]) == 0
    drawn = [path.with_suffix(".svg").read_text() for path in paths if path is not None]
    assert "100 % MFU" in drawn[0] and "roof 4,000" in drawn[1]
    text = (tmp_path / "RESULTS.md").read_text()
    assert all(path is not None and path.with_suffix(".svg").name in text for path in paths)


def test_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        report.main([str(tmp_path / "nowhere")])
    assert e.value.code == 2 and "there is no such folder" in capsys.readouterr().err
    (tmp_path / "results").mkdir()
    assert report.main([str(tmp_path / "results")]) == 0
    assert "No result is committed yet" in (tmp_path / "RESULTS.md").read_text()


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


def test_check_needs_no_torch() -> None:
    """Whoever reads results need not be able to measure."""
    root = Path(__file__).parents[2]
    program = "import sys; sys.path.append('kernels'); "
    program += "sys.modules['torch'] = sys.modules['numpy'] = None; "
    program += "from bench.check import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode in (0, 1) and not done.stderr, done.stderr
