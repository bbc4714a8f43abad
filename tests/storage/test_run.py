"""Run folders: found, made, locked, never overwritten unasked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastgpt.config import settings
from fastgpt.config.schema import Config
from fastgpt.errors import UserError
from fastgpt.storage import run


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(folder: Path) -> Path:
    run.save_config(folder, Config())
    return folder


def test_two_runs_in_one_second_get_two_folders(monkeypatch):
    monkeypatch.setattr(run.time, "strftime", lambda form: "2026-01-01_000000")
    a, b = (
        run.create("", "a name/with: things", False),
        run.create("", "a name/with: things", False),
    )
    assert (a.name, b.name) == tuple(f"2026-01-01_000000-a-name-with-things{s}" for s in ("", "-2"))


def test_newest_is_the_one_that_saved_last():
    with pytest.raises(UserError, match="no run with a checkpoint under runs/ yet"):
        run.newest()
    for name, when in (("z", 100), ("a", 200)):
        latest = make(Path("runs") / name) / "checkpoints" / "latest"
        latest.parent.mkdir()
        latest.touch()
        os.utime(latest, (when, when))
    make(Path("runs") / "failed-at-once")
    assert run.newest() == run.find("") == Path("runs/a")


def test_find_named():
    make(Path("here"))
    assert run.find("here") == Path("here")
    with pytest.raises(UserError, match="--out_dir=there: no run there"):
        run.find("there")


def test_a_run_is_not_overwritten_unasked():
    folder = run.create("out", "x", False)
    make(folder)
    (folder / "mine.txt").write_text("keep")
    (folder / "checkpoints").mkdir()
    with pytest.raises(UserError, match="--out_dir=out: a run stands there; go on with"):
        run.create("out", "x", False)
    assert (folder / "config.toml").exists()
    assert run.create("out", "x", True) == folder
    left = {p.name for p in folder.iterdir()}
    assert left == {"mine.txt", ".lock"}, "only the run's own files are removed"


def test_a_folder_of_other_things_is_not_touched():
    Path("other").mkdir()
    (Path("other") / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="--out_dir=other: is not empty and not a run"):
            run.create("other", "x", overwrite)
    Path("file").write_text("x")
    with pytest.raises(UserError, match="cannot write file"):
        run.create("file", "x", False)


def test_config_comes_back_and_repeats_in_a_new_folder():
    config = settings.replace(
        Config(), n_layer=3, out_dir="out", init_from="resume", overwrite=True
    )
    make_dir = Path("out")
    run.save_config(make_dir, config)
    again = settings.load_toml(make_dir / "config.toml")
    assert again.model.n_layer == 3
    assert (again.run.out_dir, again.run.init_from, again.run.overwrite) == ("", "scratch", False)
    assert run.load_config(make_dir).run.out_dir == "out"


def test_one_process_at_a_time():
    folder = run.create("out", "x", False)
    with (
        run.lock(folder),
        pytest.raises(UserError, match="another process is training this run"),
        run.lock(folder),
    ):
        pass
    with run.lock(folder):
        pass
