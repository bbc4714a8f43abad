"""Checkpoints are whole or absent, and every changed byte shows."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from fastgpt.errors import UserError
from fastgpt.storage import atomic, checkpoint
from tests import runs
from tests.faults import killed_at


def save(run_dir: Path, step: int, *, best=False, keep=3, value: float | None = None) -> Path:
    w = torch.full((3, 4), float(step if value is None else value))
    state = {"format": checkpoint.FORMAT, "val_loss": 1.0}
    tensors = {"w": w}, {"exp_avg.w": w + 1}
    return checkpoint.save(run_dir, step, *tensors, state, best=best, keep=keep)


def load(run_dir: Path, which: str = "latest") -> tuple[checkpoint.Checkpoint, list[str]]:
    said: list[str] = []
    return checkpoint.load(run_dir, which, warn=said.append), said


def put(path: Path, content: bytes | Callable[[Path], object] | None) -> None:
    """Writes a file, or makes what is no file in its place."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        content(path)


def test_round_trip_with_the_modes_of_the_umask(tmp_path: Path):
    for mask, mode in ((0o022, 0o644), (0o027, 0o640), (0o002, 0o664)):
        before, run_dir = os.umask(mask), tmp_path / f"{mask}"
        try:
            folder = save(run_dir, 7)
        finally:
            os.umask(before)
        saved, said = load(run_dir)
        assert saved.folder == folder == run_dir / "checkpoints" / "step_00000007" and not said
        assert torch.equal(saved.model["w"], torch.full((3, 4), 7.0))
        assert torch.equal(saved.optimizer["exp_avg.w"], torch.full((3, 4), 8.0))
        assert saved.state["step"] == 7
        pointer = folder.with_name("latest")
        assert pointer.read_text() == "step_00000007\n"
        modes = {p.name: p.stat().st_mode & 0o777 for p in (*folder.iterdir(), pointer)}
        assert set(modes.values()) == {mode}, modes


def test_keeps_the_last_and_the_best(tmp_path: Path):
    for step in range(1, 8):
        save(tmp_path, step, best=step == 2, keep=3)
    assert checkpoint.names(tmp_path) == [checkpoint.name_of(s) for s in (7, 6, 5, 2)]
    assert load(tmp_path, "best")[0].state["step"] == 2
    assert load(tmp_path, "step_00000005")[0].state["step"] == 5
    with pytest.raises(UserError, match="step_00000001: .* has step_00000007, step_00000006"):
        load(tmp_path, "step_00000001")
    save(tmp_path, 4)
    assert checkpoint.names(tmp_path) == [checkpoint.name_of(s) for s in (4, 2)], "7 was abandoned"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_damage_anywhere_is_named_and_the_one_before_is_used(name, tmp_path: Path):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    good = path.read_bytes()
    flips = {0, len(good) // 3, len(good) // 2, len(good) - 2, len(good) - 1}
    contents = [good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :] for at in flips]
    for content in (*contents, b"", b"\0" * 9999, None, Path.mkdir):
        path.unlink()
        put(path, content)
        saved, said = load(tmp_path)
        assert saved.state["step"] == 1, content
        assert len(said) == 1 and str(path) in said[0]
        path.exists() and atomic.remove(path)
        path.write_bytes(good)
        assert load(tmp_path)[0].state["step"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -5}, "step is -5"),
        ({"step": 8}, "step is 8"),
        ({"step": {"a": 1}}, "step is {'a': 1}"),
        ({"rows": -1}, "rows -1"),
        ({"rows": 10**400}, "rows 1000"),
        ({"val_loss": float("nan")}, "val_loss is nan"),
        ({"val_loss": [1.0]}, "val_loss is [1.0]"),
        ({"model": {"n_head": 0}}, "n_head=0: wanted a whole number >= 1 and <= 1,000,000"),
        ({"model": {"n_head": 5}}, "n_head=5: must divide n_embd=768; the nearest"),
        ({"model": {"n_layer": [[1]]}}, "n_layer=[[1]]: wanted a whole number"),
        ({"model": []}, "model is []"),
        ({"config": "x"}, "config is 'x'"),
        ({"scaler": {"scale": "x"}}, "scaler holds no numbers"),
        ({"ops": [{"op": []}]}, "is damaged"),
        ({"metrics": {}}, None),
        ({"metrics": {"sha": 1}}, "is damaged"),
        ({"best_val_loss": float("inf"), "scaler": {"scale": 8.0}}, None),
    ],
    ids=str,
)
def test_a_state_that_no_save_writes_is_refused(changes, message, tmp_path: Path):
    """Checks intact files too, since sums show damage only."""
    folder = save(tmp_path, 7)
    state = json.loads((folder / "state.json").read_text()) | changes
    (folder / "state.json").write_text(json.dumps(state))
    runs.seal(folder)
    if message is None:
        assert load(tmp_path)[0].state == state
        return
    with pytest.raises(UserError, match=f"{folder}/state.json: ") as e:
        load(tmp_path)
    assert message in str(e.value) and len(str(e.value)) < 1100


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s, contextlib.chdir(path.parent):  # for a short name
        s.bind(path.name)


POINTERS = [Path.mkdir, os.mkfifo, make_socket, lambda path: path.symlink_to(path)]
POINTERS += [b"step_00000003\n", b"", b"\xff\xfe", b"../../etc\n", b"step_2"]


@pytest.mark.parametrize("content", POINTERS)
def test_a_bad_pointer_is_named_and_the_newest_good_one_is_used(content, tmp_path: Path):
    save(tmp_path, 1)
    pointer = save(tmp_path, 2).with_name("latest")
    pointer.unlink()
    put(pointer, content)
    saved, said = load(tmp_path)
    assert saved.state["step"] == 2 and (not pointer.exists() or str(pointer) in said[0])


def test_nothing_usable_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="has no checkpoint yet"):
        load(tmp_path)
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"no checkpoint is intact \(2 tried\)"):
        load(tmp_path)
    checkpoint.save(tmp_path, 3, {}, {}, {"format": 99}, best=False, keep=1)
    with pytest.raises(UserError, match="format 99, this fastgpt reads 1"):
        load(tmp_path)


def test_a_save_cut_off_anywhere_loses_nothing(tmp_path: Path):
    """Kills before every change of a file; the old or the new one loads, and saving goes on."""
    found = []
    for n in range(1, 99):
        run_dir = tmp_path / f"{n}"
        save(run_dir, 1)
        killed = killed_at(n, lambda to=run_dir: save(to, 2, best=True, keep=1))
        found.append(load(run_dir)[0].state["step"])
        save(run_dir, 2, value=5.0, keep=1)
        saved, said = load(run_dir)
        assert saved.state["step"] == 2 and saved.model["w"].eq(5.0).all() and not said
        leftovers = {p.name for p in (run_dir / "checkpoints").iterdir()}
        assert leftovers <= {"latest", "best", "step_00000002"}
        if not killed:
            break
    assert n > 10 and found == sorted(found) and {*found} == {1, 2}


def test_a_kill_while_a_checkpoint_is_saved_again_keeps_it(tmp_path: Path):
    """Stops between the two renames, when neither name is there."""
    folder = save(tmp_path, 5)
    for again in (lambda: load(tmp_path), lambda: save(tmp_path, 6)):
        folder.rename(folder.with_name(f".{folder.name}.old"))
        again()
    assert checkpoint.names(tmp_path) == ["step_00000006", "step_00000005"]


def test_a_sealed_but_foreign_manifest_is_named(tmp_path: Path):
    folder = save(tmp_path, 5)
    for text in ("[]", '{"files": 3}', '{"files": {"../x": {"bytes": 1}}}', "[" * 9999):
        (folder / "manifest.json").write_text(atomic.sealed(text))
        assert "manifest.json: is damaged" in str(checkpoint.fault(folder))


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch):
    save(tmp_path, 1)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(checkpoint, "sha256_file", Mock(side_effect=full))
    with pytest.raises(UserError, match="no space left"):
        save(tmp_path, 2)
    left = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert left == {"latest", "step_00000001"}
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write .*file"):
        save(tmp_path / "file", 1)
