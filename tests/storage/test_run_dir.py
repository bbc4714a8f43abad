"""Run folders: found, made, locked, never overwritten unasked."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastgpt.config import settings
from fastgpt.config.schema import Config
from fastgpt.errors import SharedError, UserError
from fastgpt.storage import checkpoint
from fastgpt.storage import run_dir as run
from fastgpt.storage.atomic import unsealed
from tests.faults import killed_at


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_two_runs_in_one_second_get_two_folders(monkeypatch):
    monkeypatch.setattr(run.time, "strftime", lambda form: "2026-01-01_000000")
    name = "a name/with: things"
    with run.begin("", name, False) as a, run.begin("", name, False) as b:
        wanted = tuple(f"2026-01-01_000000-a-name-with-things{s}" for s in ("", "-2"))
        assert (a.name, b.name) == wanted


def test_newest_is_the_one_that_saved_last():
    with pytest.raises(UserError, match="no run with a checkpoint under runs/ yet"):
        run.find("")
    for name, when in (("z", 100), ("a", 200)):
        run.save_config(Path("runs", name), Config())
        save(Path("runs", name), 1)
        os.utime(f"runs/{name}/checkpoints/latest", (when, when))
    run.save_config(Path("runs/failed-at-once"), Config())
    assert run.find("") == run.find("runs/a") == Path("runs/a")
    with pytest.raises(UserError, match="--out_dir=there: no run there"):
        run.find("there")


def old_run(folder: Path) -> dict[str, bytes]:
    """Makes a run with a checkpoint and a file of the user. Returns the contents of its files."""
    run.save_config(folder, Config())
    (folder / "metrics.jsonl").write_text("old\n")
    (folder / "nonfinite" / "step_00000003").mkdir(parents=True)
    (folder / "nonfinite" / "step_00000003" / "report.json").write_text("{}")
    save(folder, 7)
    (folder / "mine.txt").write_text("keep")
    return contents(folder)


def save(folder: Path, step: int) -> None:
    saved = folder / "checkpoints" / checkpoint.name_of(step)
    aside = folder / "checkpoints" / ".tmp-x"
    aside.mkdir(parents=True)
    state = {"format": checkpoint.FORMAT, "step": step, "last_eval": step}
    (aside / "state.json").write_text(json.dumps(state))
    os.rename(aside, saved)
    (folder / "checkpoints" / "latest").write_text(saved.name + "\n")


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def new_run(folder: Path, *, saves: bool) -> None:
    """Writes the files of training in a folder that it has begun."""
    run.save_config(folder, settings.replace(Config(), n_layer=3))
    (folder / "metrics.jsonl").write_text("new\n")
    if saves:
        save(folder, 2)
        run.settle(folder)


def each_kill(action, template: str = "") -> Iterator[int]:
    """Yields n after `action` on out/ was killed at its n-th change of a file; then its end."""
    for n in range(1, 200):
        shutil.rmtree("out", ignore_errors=True)
        if template:
            shutil.copytree(template, "out")
        killed = killed_at(n, action)
        yield n
        if not killed:
            return


def overwrite() -> None:
    with run.begin("out", "x", True) as folder:
        new_run(folder, saves=True)


def half_overwritten(folder: str) -> dict[str, bytes]:
    """Makes a run whose overwrite was killed early. Returns the contents of the old run's files."""
    before = old_run(Path("out"))
    with pytest.raises(SystemExit), run.begin("out", "x", True) as out:
        new_run(out, saves=False)
        shutil.copytree(out, folder)
        raise SystemExit
    return before


def test_a_run_is_not_overwritten_unasked():
    """Gets the same answers from check_free, which makes nothing, and from begin."""
    run.check_free("", False)
    run.check_free("new/deep", False)
    assert not Path("new").exists()
    before = old_run(Path("out"))
    with pytest.raises(UserError, match="--out_dir=out: a run stands there; go on with"):
        run.check_free("out", False)
    run.check_free("out", True)
    assert not Path("out/.lock").exists()
    with run.begin("new", "x", False) as folder:
        new_run(folder, saves=False)
    for name, why in (("out", "; go on with"), ("new", ", without a checkpoint to go on from;")):
        refused = pytest.raises(UserError, match=f"--out_dir={name}: a run stands there{why}")
        with refused, run.begin(name, "x", False):
            pass
    assert contents(Path("out")) == before


def test_one_command_for_a_run_and_its_continuation():
    """Leaves the error about a folder of other files to the beginning of a run."""
    config = settings.replace(Config(), out_dir="out", vocab_size=0)
    begun = {"overwrite": "True"}
    for make_ready, wanted in (
        (lambda: Path("out").mkdir(), {}),
        (lambda: run.save_config(Path("out"), settings.replace(config, vocab_size=65)), begun),
        (lambda: Path("out/metrics.jsonl").write_text("x"), begun),
        (lambda: save(Path("out"), 7), {"init_from": "resume"}),
    ):
        make_ready()
        assert run.continuation(config) == wanted
    for name, value in (("seed", 2), ("n_layer", 3), ("learning_rate", 1.0), ("input", "x")):
        with pytest.raises(UserError, match=f"with {name}=.* instead of {value!r};"):
            run.continuation(settings.replace(config, **{name: value}))
    assert run.continuation(settings.replace(config, init_from="gpt2", n_layer=3)) == wanted
    with pytest.raises(SharedError, match="out: finished at step 7"):
        run.continuation(settings.replace(config, max_iters=7))
    save(Path("out"), 9)
    Path("out/checkpoints/latest").write_text("step_00000007\n")  # killed before it moved
    assert run.continuation(settings.replace(config, max_iters=9)) == wanted
    with pytest.raises(UserError, match="which run. name its folder with --out_dir"):
        run.continuation(Config())


def test_an_overwrite_takes_effect_with_the_first_checkpoint(capsys):
    before = old_run(Path("out"))
    with pytest.raises(ValueError), run.begin("out", "x", True) as folder:
        new_run(folder, saves=False)
        (folder / "nonfinite" / "step_00000000").mkdir(parents=True)
        raise ValueError
    assert contents(Path("out")) == before
    assert (folder / "nonfinite" / "step_00000000").exists(), "what an error message named"
    with run.begin("out", "x", True) as folder:
        aside = {n if n == "mine.txt" else f".replaced/{n}" for n in before}
        assert set(contents(folder)) == aside, "the old run whole; what is not its own stays"
        new_run(folder, saves=False)
    assert contents(Path("out")) == before
    assert "the run that stood there is back" in capsys.readouterr().out
    with run.begin("out", "x", True) as folder:
        new_run(folder, saves=True)
        assert not (folder / ".replaced").exists()
    assert run.load_config(folder).model.n_layer == 3
    assert checkpoint.names(folder) == ["step_00000002"]
    assert (folder / "mine.txt").read_text() == "keep" and not (folder / "nonfinite").exists()


def test_every_crash_of_an_overwrite_leaves_one_of_the_two_runs():
    """Finds the old run or the new one by the next command."""
    before, found = old_run(Path("template")), []
    for _ in each_kill(overwrite, "template"):
        assert run.find("out") == Path("out")
        found.append({k: v for k, v in contents(Path("out")).items() if ".tmp" not in k})
        with run.begin("out", "x", True):  # the same command works now
            pass
    n, first = len(found), found.count(before)
    assert n > 20 and 0 < first < n and found[:first] == [before] * first
    for files in found:  # a new id, and a file that is written after the checkpoint
        del files["run.json"]
        files.pop("checkpoints/latest", None)
    assert found[first:] == found[-1:] * (n - first)


def test_every_crash_of_putting_the_old_run_back_is_mended():
    before = half_overwritten("half")
    for n in each_kill(lambda: run.find("out"), "half"):
        run.find("out")
        assert contents(Path("out")) == before, f"killed at change {n}"
    assert n > 8


def test_a_start_that_fails_or_is_killed_can_be_repeated():
    def start(out_dir: str = "out", fails: bool = False) -> None:
        with run.begin(out_dir, "x", False) as folder:
            run.save_config(folder, Config())
            (folder / "metrics.jsonl").touch()
            (folder / "tokenizer.json").write_text("{}")
            if fails:
                raise UserError("no tracker")

    for out_dir in ("", "new/deep"):
        with pytest.raises(UserError, match="no tracker"):
            start(out_dir, fails=True)
        assert not Path("runs").exists() and not Path("new").exists()
    for n in each_kill(start):
        with run.begin("out", "x", False) as folder:
            left = {p.name for p in folder.iterdir()}
            assert left == {".lock"}, f"killed at change {n}: {left}"
            run.save_config(folder, Config())
    assert n > 5


@pytest.mark.parametrize("name", ["config.toml", "thesis.tex"])
def test_a_folder_of_other_things_is_not_touched(name: str):
    """Takes another program's config.toml for no run either."""
    Path("other").mkdir()
    (Path("other") / name).write_text("baseURL = 'x'\n")
    for out_dir, overwrite, message in (
        ("other", False, "--out_dir=other: is not empty and not a run"),
        ("other", True, "--out_dir=other: is not empty and not a run"),
        (f"other/{name}", False, "cannot write other/"),
    ):
        refused = pytest.raises(UserError, match=message)
        with refused, run.begin(out_dir, "x", overwrite):
            pass
    assert contents(Path("other")) == {name: b"baseURL = 'x'\n"}


def test_config_comes_back_and_repeats_in_a_new_folder():
    changes = {"n_layer": 3, "out_dir": "out", "init_from": "resume", "overwrite": True}
    folder, config = Path("out"), settings.replace(Config(), **changes)
    run.save_config(folder, config)
    again = settings.load_toml(folder / "config.toml")
    assert again.model.n_layer == 3
    assert (again.run.out_dir, again.run.init_from, again.run.overwrite) == ("", "scratch", False)
    assert run.load_config(folder).run.out_dir == "out"
    body = json.loads(unsealed((folder / "run.json").read_bytes()) or "")
    assert body["format"] == 1 and body["config"] == (folder / "config.toml").read_text()
    state = {"format": 1, "config": settings.to_dict(settings.replace(Config(), n_layer=5))}
    checkpoint.save(Path("lost"), 3, {}, {}, state, best=True, keep=1)
    assert run.find("lost") == Path("lost"), "the settings are in the checkpoint too"
    assert run.load_config(Path("lost")).model.n_layer == 5


def test_a_config_that_is_not_what_the_run_wrote_is_named():
    """Names a flipped bit or an edit; the run's own settings count."""
    folder, path, said = Path("out"), Path("out/config.toml"), []
    run.save_config(folder, Config())
    good, want = path.read_bytes(), run.load_config(folder)
    at = good.index(b"learning_rate = 0.0006") + len(b"learning_rate = 0.000")
    path.write_bytes(good[:at] + b"7" + good[at + 1 :])
    assert run.load_config(folder, said.append) == want
    assert said == [
        "out/config.toml: is not what the run wrote: learning_rate 0.0007 (was 0.0006); "
        "the run's own settings count, which training changes by --learning_rate=0.0007"
    ]
    path.write_bytes(b"\xff" + good)
    assert run.load_config(folder, said.append) == want and "not a TOML file" in said[1]
    path.unlink()
    assert run.load_config(folder, said.append) == want and "cannot be read" in said[2]
    path.write_bytes(good)
    identity = folder / "run.json"
    data = bytearray(identity.read_bytes())
    data[40] ^= 1
    identity.write_bytes(data)
    assert run.load_config(folder, said.append) == want and "run.json: is damaged" in said[3]


def test_what_goes_on_is_whole_and_held(monkeypatch):
    """Mends a run that another process has put aside between `find` and the lock."""
    before = half_overwritten("half")
    (Path("half") / ".config.toml.x.tmp").touch()
    monkeypatch.setattr(run, "find", Path)
    with run.resumed("half") as folder:
        assert folder == Path("half") and contents(folder) == before
        with pytest.raises(UserError, match="another process"), run.lock(folder):
            pass
    with run.lock(folder):
        pass
