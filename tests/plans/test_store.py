"""Plans on disk: whole or absent, whoever writes, wherever they lie."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from fastgpt_kernels.plans import device, store
from fastgpt_kernels.plans.store import Store, folder

CPU = torch.device("cpu")
KEY = {"device": "a GPU", "arch": "sm_90", "driver": "570.1", "what": {"op": "attention"}}


def test_where_plans_lie(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("FASTGPT_PLANS", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert folder() == tmp_path / "mine"
    monkeypatch.delenv("FASTGPT_PLANS")
    assert folder() == tmp_path / "cache/fastgpt/plans"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder() == tmp_path / ".cache/fastgpt/plans"
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert folder() is None
    homeless = Store()
    assert "FASTGPT_PLANS" in homeless.problem and homeless.load(KEY) is None
    assert homeless.update(KEY, lambda old: {"choice": "x"}) == {"choice": "x"}


def test_one_file_a_key(tmp_path: Path):
    plans = Store(tmp_path)
    plans.update(KEY, lambda old: {"choice": "triton"})
    plans.update({**KEY, "arch": "sm_80"}, lambda old: {"choice": "flash"})
    assert plans.load(KEY) == {"choice": "triton"}
    assert Store(tmp_path).load(dict(reversed(KEY.items()))) == {"choice": "triton"}
    assert len(list(tmp_path.glob("*.json"))) == 2 and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"format": 1}', b"\xff\xfe", b'{"format": 99}', b'"text"'],
)
def test_what_cannot_be_read_is_absent_and_written_anew(content, tmp_path: Path):
    plans = Store(tmp_path)
    path = plans.path(KEY)
    path.write_bytes(content)
    assert plans.load(KEY) is None
    plans.update(KEY, lambda old: {"old": old})
    assert plans.load(KEY) == {"old": None}


@pytest.mark.parametrize(("part", "value"), [("format", 2), ("key", {"other": 1}), ("entry", 3)])
def test_another_format_key_or_kind_is_absent(part, value, tmp_path: Path):
    plans = Store(tmp_path)
    plans.update(KEY, lambda old: {"choice": "triton"})
    path = plans.path(KEY)
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: value}))
    assert plans.load(KEY) is None


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch):
    plans = Store(tmp_path)
    plans.update(KEY, lambda old: {"choice": "triton"})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    assert plans.update(KEY, lambda old: {"choice": "flash"}) == {"choice": "flash"}
    assert plans.load(KEY) == {"choice": "triton"} and "No space" in plans.problem
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    plans = Store(tmp_path / "file" / "plans")  # a home that is read-only, for root too
    assert plans.load(KEY) is None
    assert plans.update(KEY, lambda old: {"choice": "x"}) == {"choice": "x"}
    assert "Not a directory" in plans.problem
    with plans.measuring("a GPU") as alone:
        assert alone


def add(place: Path, name: str) -> None:
    for i in range(20):
        Store(place).update(KEY, lambda old, i=i: {**(old or {}), f"{name}{i}": i})


def test_writers_take_turns(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=add, args=(tmp_path, name)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    entry = Store(tmp_path).load(KEY)
    assert len(entry) == 60


def test_one_measures_at_a_time(tmp_path: Path):
    plans = Store(tmp_path)
    with plans.measuring("a GPU") as first, Store(tmp_path).measuring("a GPU") as second:
        assert first and not second
        with plans.measuring("another") as other:
            assert other
    with plans.measuring("a GPU") as again:
        assert again


def test_the_packages_own_plans(tmp_path: Path):
    """For any driver, and behind the user's own; those that ship are of the format."""
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    document = {"format": 1, "plans": [{"key": KEY, "entry": {"choice": "hopper"}}]}
    (shipped / "sm_90.json").write_text(json.dumps(document))
    plans = Store(tmp_path / "own", shipped)
    newer = {**KEY, "driver": "999.9"}
    assert plans.load(KEY) == plans.load(newer) == {"choice": "hopper"}
    assert plans.load({**KEY, "device": "another"}) is None
    plans.update(KEY, lambda old: {**old, "choice": "triton"})
    assert plans.load(KEY) == {"choice": "triton"}
    found = list(store.SHIPPED.glob("*.json"))
    assert found
    for path in found:
        document = json.loads(path.read_text())
        assert document["format"] == store.FORMAT and isinstance(document["plans"], list)
        assert document["plans"] or "nobody" in document["note"]


PARTS = ("device", "sms", "arch", "driver", "torch", "triton", "cudnn", "sources", "what")


def test_the_key_has_all_parts():
    key = device.key(CPU, {"op": "attention"})
    assert set(key) == set(PARTS)
    assert key["sms"] >= 1 and key["torch"] == torch.__version__ and key["device"]


@pytest.mark.parametrize("part", PARTS)
def test_each_part_of_the_key_counts(part, tmp_path: Path):
    plans, key = Store(tmp_path), device.key(CPU, {"op": "attention"})
    plans.update(key, lambda old: {"choice": "flash"})
    other = {"op": "linear"} if part == "what" else "other"
    assert plans.load({**key, part: other}) is None
    assert plans.load(key) == {"choice": "flash"}


def test_a_changed_kernel_is_another_key(tmp_path: Path):
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text("x = 1")
    b.write_text("y = 1")
    before = device.hash_of(a, b)
    assert device.hash_of(a, b) == before
    b.write_text("y = 2")
    assert device.hash_of(a, b) != before


def test_a_gpus_key(monkeypatch):
    class Properties:
        name, multi_processor_count, major, minor = "NVIDIA H100", 132, 9, 0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Properties)
    monkeypatch.setattr(device.host, "arch", lambda i: "sm_90")
    monkeypatch.setattr(device, "driver", lambda: "570.86.10")
    key = device.key(torch.device("cuda", 0), {})
    assert (key["device"], key["sms"], key["driver"]) == ("NVIDIA H100", 132, "570.86.10")
    assert key["arch"] == "sm_90"
