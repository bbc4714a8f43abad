from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest

from fastgpt.data import token_files
from fastgpt.data.prepare import prepare
from fastgpt.data.token_files import (
    HEADER_BYTES,
    TokenWriter,
    has_tokens,
    header,
    inspect,
    open_dataset,
    scan,
    scan_all,
)
from fastgpt.data.tokenizer import CharTokenizer
from fastgpt.errors import UserError


def u16(*ids):
    return np.array(ids, "<u2")


def write_all(folder, ids, n, dtype=np.uint16, shard_tokens=10):
    writer = TokenWriter(folder, "t_train", dtype, shard_tokens=shard_tokens)
    kept = [writer.write(part) for part in np.array_split(ids, n)]
    writer.close()
    return writer, kept


@pytest.mark.parametrize(("dtype", "version"), [(np.uint16, 1), (np.uint32, 2)])
@pytest.mark.parametrize("n", [1, 2, 7, 35])
def test_what_is_written_is_read(tmp_path, dtype, version, n):
    ids = np.arange(35, dtype=dtype) * (1 if version == 1 else 100_000)
    writer, _ = write_all(tmp_path, ids, n, dtype)
    assert [s["tokens"] for s in writer.shards] == [10, 10, 10, 5]
    files = [inspect(tmp_path / s["file"]) for s in writer.shards]
    assert np.array_equal(np.concatenate([f.open()[:] for f in files]), ids)
    for file, shard in zip(files, writer.shards, strict=True):
        data = file.path.read_bytes()
        assert np.frombuffer(data[:12], "<i4").tolist() == [20240520, version, file.count]
        assert not any(data[12:HEADER_BYTES])
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert scan(file).max_id == shard["max_id"] == file.open()[:].max()
    assert sorted(os.listdir(tmp_path)) == [f"t_train_{i:06d}.bin" for i in range(4)]


def test_writer_tells_where_the_last_finished_shard_ends(tmp_path):
    _, kept = write_all(tmp_path, np.arange(35, dtype=np.uint16), 3)  # 12, 12 and 11 ids
    assert kept == [10, 8, 6]


def test_an_unfinished_shard_has_no_name(tmp_path):
    writer = TokenWriter(tmp_path, "t", np.dtype(np.uint16), shard_tokens=10)
    writer.write(np.arange(15, dtype=np.uint16))
    assert [p for p in os.listdir(tmp_path) if not p.startswith(".")] == ["t_000000.bin"]
    writer.abort()
    assert os.listdir(tmp_path) == ["t_000000.bin"]


def test_an_interrupt_while_a_shard_is_opened_leaves_nothing(tmp_path, monkeypatch):
    """Python hands a signal over after `open` has made the file and before anyone has it."""

    def interrupted(*args, **kwargs):
        open(*args, **kwargs).close()
        raise KeyboardInterrupt

    writer = TokenWriter(tmp_path, "tokens_train", np.dtype("uint16"))
    monkeypatch.setattr(token_files, "open", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        writer.write(np.arange(5))
    assert list(tmp_path.iterdir())
    writer.abort()
    assert not list(tmp_path.iterdir())


def headered(count, ids, version=1, magic=token_files.MAGIC):
    head = bytearray(header(count, np.dtype("<u2")))
    head[0:8] = np.array([magic, version], "<i4").tobytes()
    return bytes(head) + ids.tobytes()


def test_headered_and_raw_are_told_apart(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(headered(3, u16(1, 2, 3)))
    assert inspect(path).open()[:].tolist() == [1, 2, 3]
    path.write_bytes(u16(1, 2, 3).tobytes())
    assert inspect(path).open()[:].tolist() == [1, 2, 3]
    path.write_bytes(u16(*range(2000)).tobytes())
    assert inspect(path).count == 2000


BROKEN = {
    "empty": (b"", "is empty"),
    "header only": (headered(0, u16()), "is empty"),
    "odd": (b"\1\2\3", "odd number of bytes"),
    "odd and long": (bytes(2001), "odd number of bytes"),
    "truncated": (headered(1000, u16(*range(999))), "truncated.*1,000 tokens.*3,022 bytes"),
    "truncated inside a token": (headered(3, u16(1, 2, 3))[:-1], "truncated"),
    "truncated header": (headered(3, u16(1, 2, 3))[:500], "truncated"),
    "too long": (headered(3, u16(1, 2, 3, 4)), "damaged.*3 tokens"),
    "negative count": (headered(-1, u16(1)), "damaged"),
    "version 7": (headered(2, u16(1, 2), version=7), "version 7; versions 1 and 2"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_named(tmp_path, kind):
    path = tmp_path / "x_train_000001.bin"
    data, says = BROKEN[kind]
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"x_train_000001.bin .*{says}") as e:
        inspect(path)
    assert "\n" not in str(e.value)


def test_a_folder_instead_of_a_file(tmp_path):
    (tmp_path / "train.bin").mkdir()
    with pytest.raises(UserError, match="train.bin: is a folder, a file is wanted"):
        inspect(tmp_path / "train.bin")


@pytest.mark.parametrize("count", [1, 5_000_000])
def test_scan_sees_every_byte(tmp_path, count):
    path = tmp_path / "x.bin"
    ids = np.zeros(count, "<u2")
    ids[-1] = 777
    path.write_bytes(headered(count, ids))
    advanced: list[int] = []
    found = scan(inspect(path), advanced.append)
    assert found.max_id == 777 and sum(advanced) == 2 * count, "progress is bytes of ids"
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def counted(monkeypatch):
    """Names of the files that are really read."""
    names = []
    monkeypatch.setattr(
        token_files,
        "scan",
        lambda f, *a, read=token_files.scan: names.append(f.path.name) or read(f),
    )
    return names


def test_files_are_read_again_only_when_they_change(tmp_path, counted):
    for name in "ab":
        (tmp_path / name).write_bytes(u16(1, 2, 3).tobytes())
    files = [inspect(tmp_path / name) for name in "ab"]
    first = scan_all(files, tmp_path)
    assert sorted(counted) == ["a", "b"] and scan_all(files, tmp_path) == first
    assert sorted(counted) == ["a", "b"]
    (tmp_path / "b").write_bytes(u16(1, 2, 9).tobytes())
    os.utime(tmp_path / "b", ns=(1, 1))
    assert scan_all(files, tmp_path)[1].max_id == 9
    assert sorted(counted) == ["a", "b", "b"]
    scan_all(files, tmp_path, verify=True)
    assert len(counted) == 5


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 5}', '{"a": {"size": 1}}', "\0"])
def test_a_damaged_memory_is_no_trouble(tmp_path, counted, text, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    (tmp_path / "a").write_bytes(u16(1, 2, 3).tobytes())
    (tmp_path / ".fastgpt_scan.json").write_text(text)
    assert scan_all([inspect(tmp_path / "a")], tmp_path)[0].max_id == 3
    assert counted == ["a"]


def test_read_only_folders_are_remembered_elsewhere(tmp_path, counted, read_only, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "a").write_bytes(u16(1, 2, 3).tobytes())
    read_only(folder)
    files = [inspect(folder / "a")]
    assert scan_all(files, folder) == scan_all(files, folder)
    assert counted == ["a"] and os.listdir(folder) == ["a"]


def test_a_full_disk_is_said_and_leaves_nothing(full_disk):
    folder = full_disk(64 << 10)
    writer = TokenWriter(folder, "t", np.dtype(np.uint16), shard_tokens=20_000)
    with pytest.raises(UserError, match="no space left.*--data_dir"):
        for _ in range(10):
            writer.write(np.arange(10_000, dtype=np.uint16))
        writer.close()
    assert [name for name in os.listdir(folder) if name.endswith(".tmp")] == []
    assert all(inspect(folder / s["file"]).count == 20_000 for s in writer.shards)


def test_a_file_that_is_cut_off_while_it_is_open(tmp_path):
    """A mapped one would end the process by SIGBUS; this one says so, whatever is read of it."""
    path = tmp_path / "train.bin"
    np.arange(100_000, dtype=np.uint16).tofile(path)
    ids = inspect(path).open()
    assert len(ids) == 100_000 and ids[99_990:].tolist() == [*range(34_454, 34_464)]
    ids.check()
    os.truncate(path, 1000)
    assert ids[:500].tolist() == [*range(500)]
    with pytest.raises(UserError, match="train.bin: was cut off while it was read"):
        ids[90_000:90_010]
    with pytest.raises(UserError, match=r"changed while it was read \(200,000 bytes, now 1,000\)"):
        ids.check()
    path.unlink()
    with pytest.raises(UserError, match="train.bin: is gone while it is read"):
        ids.check()


def test_what_was_found_out_of_a_file_stays():
    file = token_files.TokenFile(Path("x"), 0, 1, np.dtype("<u2"))
    with pytest.raises(FrozenInstanceError):
        file.count = 2


def test_the_same_size_at_another_time_is_another_file(tmp_path):
    path = tmp_path / "val.bin"
    np.arange(10, dtype=np.uint16).tofile(path)
    ids = inspect(path).open()
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match="val.bin: changed while it was read"):
        ids.check()


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def raw(folder, train=range(1000), val=range(100)):
    folder.mkdir(exist_ok=True)
    np.array(train, "<u2").tofile(folder / "train.bin")
    np.array(val, "<u2").tofile(folder / "val.bin")
    return folder


def shards(folder, *lengths, name="fineweb", val=50):
    folder.mkdir(exist_ok=True)
    at = 0
    for i, n in enumerate((*lengths, val)):
        ids = np.arange(at, at + n, dtype="<u2")
        at += n
        file = f"{name}_train_{i + 1:06d}.bin" if i < len(lengths) else f"{name}_val_000000.bin"
        (folder / file).write_bytes(header(n, np.dtype("<u2")) + ids.tobytes())
    return folder


@pytest.fixture
def made(settings, tmp_path):
    """A folder that `prepare` made."""
    text = tmp_path / "text.txt"
    text.write_text("one two three\n" * 400)
    return prepare(settings(input=str(text), tokenizer="char"))


def test_nanogpt_folder(tmp_path):
    ds = open_dataset(raw(tmp_path / "d"))
    assert (len(ds.train), len(ds.val), ds.vocab_size, ds.tokenizer) == (1000, 100, 50257, None)
    assert ds.describe() == (
        f"{tmp_path / 'd'}: 1,000 train and 100 val tokens in 2 files, vocabulary 50,257 "
        "(no tokenizer)"
    )
    assert open_dataset(tmp_path / "d", vocab_size=1000).vocab_size == 1000


def test_nanogpt_folder_with_meta(tmp_path):
    folder = raw(tmp_path / "d", [0, 1, 2] * 50, [2, 1] * 50)
    meta = {"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "c"}, "stoi": {"a": 0, "b": 1, "c": 2}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    (folder / "input.txt").write_text("abc")
    ds = open_dataset(folder)
    assert ds.vocab_size == 3 and ds.tokenizer.decode([2, 0]) == "ca"


@pytest.mark.parametrize("name", ["fineweb", "tokens", "tiny_shakespeare"])
def test_headered_shards(tmp_path, name):
    ds = open_dataset(shards(tmp_path / "d", 300, 200, name=name))
    assert (len(ds.train), len(ds.val)) == (500, 50)
    got = ds.train.gather(np.array([0, 290, 300, 490]), 10)
    assert got.tolist() == [list(range(s, s + 10)) for s in (0, 290, 300, 490)]


def test_llmc_names_without_numbers(tmp_path):
    folder = shards(tmp_path / "d", 300)
    for old, new in (("train_000001", "train"), ("val_000000", "val")):
        os.rename(folder / f"fineweb_{old}.bin", folder / f"tiny_shakespeare_{new}.bin")
    assert len(open_dataset(folder).train) == 300


def test_a_folder_that_carries_a_tokenizer(tmp_path):
    folder = raw(tmp_path / "d", [0, 1, 2] * 50, [2, 1] * 50)
    CharTokenizer("abc").save(folder)
    assert open_dataset(folder).vocab_size == 3
    assert open_dataset(folder).describe().endswith("vocabulary 3 (char)")


# --- windows


def test_windows_never_cross_from_shard_to_shard(tmp_path):
    split = open_dataset(shards(tmp_path / "d", 30, 5, 9, 10, 8)).train
    for block_size in (1, 4, 7, 8, 9):
        n = split.n_starts(block_size)
        assert n == sum(max(0, length - block_size) for length in (30, 5, 9, 10, 8))
        at = split.positions(np.arange(n), block_size)
        assert len(set(at.tolist())) == n
        ends = np.cumsum([30, 5, 9, 10, 8])
        first = np.searchsorted(ends, at, side="right")
        assert (first == np.searchsorted(ends, at + block_size, side="right")).all()
        rows = split.gather(at, block_size + 1)
        assert (rows == at[:, None] + np.arange(block_size + 1)).all()


def test_windows_beyond_the_data_are_refused(tmp_path):
    split = open_dataset(shards(tmp_path / "d", 30, 20)).train
    for starts, length in (([-1], 2), ([45], 6), ([50], 1), ([25], 10)):
        with pytest.raises(IndexError):
            split.gather(np.array(starts), length)
    for index in ([-1], [split.n_starts(8)]):  # 22 windows in the one shard, 12 in the other
        with pytest.raises(IndexError, match=f"start {index[0]} .. {index[0]} not in 0 .. 33$"):
            split.positions(np.array(index), 8)
    assert split.gather(np.array([], np.int64), 8).shape == (0, 8)


@pytest.mark.parametrize(("block_size", "fits"), [(30, False), (29, True)])
def test_too_short_says_what_fits(tmp_path, block_size, fits):
    split = open_dataset(shards(tmp_path / "d", 30, 20)).train
    if fits:
        return split.require(block_size)
    says = "train split in .*d is too short for block_size=30: .* 30 tokens .*fits is 29"
    with pytest.raises(UserError, match=says):
        split.require(block_size)


# --- fingerprint


def test_fingerprint_is_of_the_contents(tmp_path):
    one = open_dataset(raw(tmp_path / "a")).fingerprint
    assert open_dataset(raw(tmp_path / "b")).fingerprint == one
    others = [
        open_dataset(raw(tmp_path / "c", train=range(1, 1001))).fingerprint,
        open_dataset(raw(tmp_path / "e", val=range(99))).fingerprint,
        open_dataset(raw(tmp_path / "f", train=range(100), val=range(1000))).fingerprint,
    ]
    assert len({one, *others}) == 4


# --- what is refused


def break_file(folder, name, action):
    action(folder / name)


RAW = {
    "no folder": (shutil.rmtree, r"no dataset folder .*d: run `fastgpt prepare d`"),
    "empty folder": (lambda d: [p.unlink() for p in d.iterdir()], "no train split"),
    "no val": (
        lambda d: (d / "val.bin").unlink(),
        r"no val split: expected val.bin or files named \*_val_\*.bin \(train.bin\)$",
    ),
    "no train": (
        lambda d: (d / "train.bin").unlink(),
        r"no train split: .*\(val.bin\); run `fastgpt prepare d`$",
    ),
    "empty": (lambda d: (d / "train.bin").write_bytes(b""), "train.bin is empty"),
    "odd": (lambda d: (d / "val.bin").write_bytes(b"123"), "val.bin has an odd number of bytes"),
    "id 50257": (
        lambda d: np.array([5] * 500 + [50257], "<u2").tofile(d / "val.bin"),
        r"val.bin holds token id 50,257, the vocabulary has 50,257",
    ),
    "text": (lambda d: (d / "train.bin").write_bytes(b"\xf0\xf1 text" * 50), "holds token id"),
    "two train sets": (
        lambda d: shutil.copy(d / "train.bin", d / "x_train_000001.bin"),
        "more than one train set",
    ),
    "meta": (lambda d: (d / "meta.pkl").write_bytes(b"cos\nsystem\n."), "meta.pkl is refused"),
    "meta too small": (
        lambda d: (d / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 999})),
        "train.bin holds token id 999, the vocabulary has 999",
    ),
    "mixed widths": (
        lambda d: (d / "val.bin").write_bytes(header(9, np.dtype("<u4")) + bytes(36)),
        "mixes",
    ),
}


@pytest.mark.parametrize("kind", RAW)
def test_broken_raw_folders(tmp_path, kind):
    folder = raw(tmp_path / "d")
    action, says = RAW[kind]
    action(folder)
    with pytest.raises(UserError, match=says) as e:
        open_dataset(folder)
    assert "\n" not in str(e.value)


def change_byte(path):
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))


def change_json(path, *keys, value):
    info = json.loads(path.read_text())
    at = info
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    path.write_text(json.dumps(info))


TRAIN, JSON = "tokens_train_000000.bin", "dataset.json"
MADE = {
    "shard gone": (lambda d: (d / TRAIN).unlink(), f"{TRAIN} is missing"),
    "shard cut": (lambda d: os.truncate(d / TRAIN, 2000), f"{TRAIN} is truncated"),
    "byte changed": (lambda d: change_byte(d / TRAIN), f"{TRAIN} is damaged: its sha256"),
    "json cut": (lambda d: os.truncate(d / JSON, 100), f"{JSON} is damaged"),
    "json list": (lambda d: (d / JSON).write_text("[]"), f"{JSON} is damaged"),
    "json binary": (lambda d: (d / JSON).write_bytes(b"\xff"), f"{JSON} is damaged"),
    "json without splits": (lambda d: change_json(d / JSON, "splits", value=1), "damaged"),
    "json without tokenizer": (lambda d: change_json(d / JSON, "tokenizer", value=1), "damaged"),
    "json of huge numbers": (
        lambda d: change_json(d / JSON, "vocab_size", value=10**50),
        rf"is damaged \(vocab_size 1{'0' * 39}\): prepare",
    ),
    "json of the future": (lambda d: change_json(d / JSON, "version", value=2), "reads .* 1"),
    "no val listed": (lambda d: change_json(d / JSON, "splits", "val", value=[]), "no val file"),
    "path listed": (
        lambda d: change_json(d / JSON, "splits", "val", 0, "file", value="../../etc/passwd"),
        "missing",
    ),
    "endless name listed": (
        lambda d: change_json(d / JSON, "splits", "val", 0, "file", value="x" * 9000),
        f"{'x' * 255} is missing",
    ),
    "other tokenizer": (lambda d: CharTokenizer("xyz").save(d), "not the tokenizer"),
    "tokenizer cut": (lambda d: os.truncate(d / "tokenizer.json", 20), "tokenizer.json is damaged"),
}


@pytest.mark.parametrize("kind", MADE)
def test_broken_prepared_folders(made, kind):
    open_dataset(made)
    action, says = MADE[kind]
    action(made)
    with pytest.raises(UserError, match=says) as e:
        open_dataset(made)
    assert "\n" not in str(e.value)


def test_verify_reads_what_is_remembered(made):
    path = made / TRAIN
    status = path.stat()
    change_byte(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    open_dataset(made)  # same size, same time: believed
    with pytest.raises(UserError, match="sha256"):
        open_dataset(made, verify=True)


def test_a_copy_is_the_same_dataset(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy", copy_function=shutil.copy)
    assert open_dataset(tmp_path / "copy").fingerprint == open_dataset(made).fingerprint


def test_what_looks_like_a_dataset(made, tmp_path):
    assert has_tokens(made) and has_tokens(raw(tmp_path / "r"))
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "training.bin").touch()
    assert not has_tokens(tmp_path / "none") and not has_tokens(tmp_path / "absent")
