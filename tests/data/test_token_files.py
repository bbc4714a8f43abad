import hashlib
import json
import os
import pickle
import shutil

import numpy as np
import pytest

from fastgpt.data import token_files
from fastgpt.data.prepare import prepare
from fastgpt.data.token_files import (
    HEADER_BYTES,
    MAGIC,
    TokenFile,
    TokenWriter,
    has_tokens,
    header,
    is_token_file,
    open_dataset,
    scan_all,
)
from fastgpt.data.tokenizer import CharTokenizer
from fastgpt.errors import UserError


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def u16(*ids):
    return np.array(ids, "<u2")


def headered(count, ids, version=1):
    return np.array([MAGIC, version, count] + [0] * 253, "<i4").tobytes() + ids.tobytes()


# --- one file


@pytest.mark.parametrize(("dtype", "version"), [(np.uint16, 1), (np.uint32, 2)])
@pytest.mark.parametrize("n", [1, 2, 7, 35])
def test_what_is_written_is_read(tmp_path, monkeypatch, dtype, version, n):
    monkeypatch.setattr(token_files, "SHARD_TOKENS", 10)
    ids = np.arange(35, dtype=dtype) * (1 if version == 1 else 100_000)
    with TokenWriter(tmp_path, "t_train", dtype) as writer:
        for part in np.array_split(ids, n):
            writer.write(part)
    assert [s["tokens"] for s in writer.shards] == [10, 10, 10, 5]
    assert sorted(os.listdir(tmp_path)) == [f"t_train_{i:06d}.bin" for i in range(4)]
    files = [TokenFile(tmp_path / s["file"]) for s in writer.shards]
    assert np.array_equal(np.concatenate([f[:] for f in files]), ids)
    for file, shard in zip(files, writer.shards, strict=True):
        data = file.path.read_bytes()
        assert data == headered(file.count, file[:], version) and is_token_file(file.path)
        assert data[:HEADER_BYTES] == header(file.count, file.dtype)
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert file.scan().max_id == shard["max_id"] == file[:].max()


def test_headered_and_raw_are_told_apart(tmp_path):
    path = tmp_path / "x.bin"
    for data in (headered(3, u16(1, 2, 3)), u16(1, 2, 3).tobytes()):
        path.write_bytes(data)
        assert TokenFile(path)[:].tolist() == [1, 2, 3] and TokenFile(path)[1:2].tolist() == [2]
    path.write_bytes(u16(*range(2000)).tobytes())
    assert len(TokenFile(path)) == 2000 and is_token_file(path)
    path.rename(tmp_path / "x.txt")
    assert not is_token_file(tmp_path / "x.txt")


BROKEN = {
    "empty": (b"", "is empty"),
    "header only": (headered(0, u16()), "is empty"),
    "odd": (b"\1\2\3", "1 tokens take 2 bytes, it has 3"),
    "odd and long": (bytes(2001), "it has 2,001;"),
    "truncated": (headered(1000, u16(*range(999))), "1,000 tokens take 3,024 bytes, it has 3,022"),
    "truncated inside a token": (headered(3, u16(1, 2, 3))[:-1], "cut off"),
    "truncated header": (headered(3, u16(1, 2, 3))[:500], "cut off"),
    "too long": (headered(3, u16(1, 2, 3, 4)), "3 tokens"),
    "negative count": (headered(-1, u16(1)), "no token file"),
    "version 7": (headered(2, u16(1, 2), version=7), "version 7; 1 and 2"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_named(tmp_path, kind):
    path = tmp_path / "x_train_000001.bin"
    data, says = BROKEN[kind]
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"x_train_000001.bin: .*{says}") as e:
        TokenFile(path)
    assert "\n" not in str(e.value)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="x_train_000001.bin: is a folder, a file is wanted"):
        TokenFile(path)


@pytest.mark.parametrize("count", [1, 5_000_000])
def test_scan_sees_every_byte(tmp_path, count):
    path = tmp_path / "x.bin"
    ids = np.zeros(count, "<u2")
    ids[-1] = 777
    path.write_bytes(headered(count, ids))
    advanced: list[int] = []
    found = TokenFile(path).scan(advanced.append)
    assert found.max_id == 777 and sum(advanced) == 2 * count, "progress is bytes of ids"
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_that_changes_while_it_is_open(tmp_path):
    """A mapped one would end the process by SIGBUS; this one says so, whatever is read of it."""
    path = tmp_path / "train.bin"
    np.arange(100_000, dtype=np.uint16).tofile(path)
    ids = TokenFile(path)
    assert len(ids) == 100_000 and ids[99_990:].tolist() == [*range(34_454, 34_464)]
    ids.check_unchanged()
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match="train.bin: changed while it was read"):
        ids.check_unchanged()
    os.truncate(path, 1000)
    assert ids[:500].tolist() == [*range(500)]
    with pytest.raises(UserError, match="train.bin: was cut off while it was read"):
        ids[90_000:90_010]
    with pytest.raises(UserError, match=r"changed while it was read \(200,000 bytes, now 1,000\)"):
        ids.check_unchanged()
    path.unlink()
    with pytest.raises(UserError, match="train.bin: cannot be read: No such file"):
        ids.check_unchanged()


# --- remembering what was checked


@pytest.fixture
def counted(monkeypatch):
    """Names of the files that are really read."""
    names, scan = [], TokenFile.scan
    monkeypatch.setattr(
        TokenFile, "scan", lambda self, *a: names.append(self.path.name) or scan(self, *a)
    )
    return names


def files_in(folder, *names):
    return [TokenFile(folder / name) for name in names]


def test_files_are_read_again_only_when_they_change(tmp_path, counted):
    for name in "ab":
        (tmp_path / name).write_bytes(u16(1, 2, 3).tobytes())
    first = scan_all(files_in(tmp_path, "a", "b"), tmp_path)
    assert sorted(counted) == ["a", "b"]
    assert scan_all(files_in(tmp_path, "a", "b"), tmp_path) == first and len(counted) == 2
    (tmp_path / "b").write_bytes(u16(1, 2, 9).tobytes())
    os.utime(tmp_path / "b", ns=(1, 1))
    assert scan_all(files_in(tmp_path, "a", "b"), tmp_path)[1].max_id == 9
    assert sorted(counted) == ["a", "b", "b"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": 5}', '{"a": {"size": 1}}', "\0", "[" * 100_000]
)
def test_a_damaged_memory_is_no_trouble(tmp_path, counted, text):
    (tmp_path / "a").write_bytes(u16(1, 2, 3).tobytes())
    (tmp_path / ".fastgpt_scan.json").write_text(text)
    assert scan_all(files_in(tmp_path, "a"), tmp_path)[0].max_id == 3
    assert counted == ["a"]


def test_read_only_folders_are_remembered_elsewhere(tmp_path, counted, read_only):
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "a").write_bytes(u16(1, 2, 3).tobytes())
    read_only(folder)
    first, second = (scan_all(files_in(folder, "a"), folder) for _ in range(2))
    assert first == second and counted == ["a"] and os.listdir(folder) == ["a"]


# --- folders


def raw(folder, train=range(1000), val=range(100)):
    """As nanoGPT makes one."""
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
        (folder / file).write_bytes(headered(n, ids))
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


def test_nanogpt_folder_with_a_vocabulary(tmp_path):
    folder = raw(tmp_path / "d", [0, 1, 2] * 50, [2, 1] * 50)
    meta = {"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "c"}, "stoi": {"a": 0, "b": 1, "c": 2}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    (folder / "input.txt").write_text("abc")
    ds = open_dataset(folder)
    assert ds.vocab_size == 3 and ds.tokenizer.decode([2, 0]) == "ca"
    CharTokenizer("xyz").save(folder)
    assert open_dataset(folder).describe().endswith("vocabulary 3 (char)")
    assert open_dataset(folder).tokenizer.decode([2, 0]) == "zx"


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


def test_windows_never_cross_from_shard_to_shard(tmp_path):
    split = open_dataset(shards(tmp_path / "d", 30, 5, 9, 10, 8)).train
    ends = np.cumsum([30, 5, 9, 10, 8])
    for block_size in (1, 4, 7, 8, 9):
        n = split.n_starts(block_size)
        assert n == sum(max(0, length - block_size) for length in (30, 5, 9, 10, 8))
        at = split.positions(np.arange(n), block_size)
        assert len(set(at.tolist())) == n
        first = np.searchsorted(ends, at, side="right")
        assert (first == np.searchsorted(ends, at + block_size, side="right")).all()
        rows = split.gather(at, block_size + 1)
        assert (rows == at[:, None] + np.arange(block_size + 1)).all()
    for starts, length in (([-1], 2), ([27], 6), ([62], 1), ([25], 10)):
        with pytest.raises(IndexError):
            split.gather(np.array(starts), length)
    split.require(29)
    says = "train split in .*d is too short for block_size=30: .* 30 tokens; .*--block_size=29"
    with pytest.raises(UserError, match=says):
        split.require(30)


def test_fingerprint_is_of_the_contents(tmp_path, made):
    one = open_dataset(raw(tmp_path / "a")).fingerprint
    assert open_dataset(raw(tmp_path / "b")).fingerprint == one
    others = [
        open_dataset(raw(tmp_path / "c", train=range(1, 1001))).fingerprint,
        open_dataset(raw(tmp_path / "e", val=range(99))).fingerprint,
        open_dataset(raw(tmp_path / "f", train=range(100), val=range(1000))).fingerprint,
    ]
    assert len({one, *others}) == 4
    shutil.copytree(made, tmp_path / "copy", copy_function=shutil.copy)
    assert open_dataset(tmp_path / "copy").fingerprint == open_dataset(made).fingerprint


def test_what_looks_like_a_dataset(made, tmp_path):
    assert has_tokens(made) and has_tokens(raw(tmp_path / "r"))
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "training.bin").touch()
    assert not has_tokens(tmp_path / "none") and not has_tokens(tmp_path / "absent")


# --- folders that are refused

RAW = {
    "no folder": (shutil.rmtree, r"no dataset folder .*d: run `fastgpt prepare d`"),
    "empty folder": (lambda d: [p.unlink() for p in d.iterdir()], "no train split.*found none"),
    "no val": (
        lambda d: (d / "val.bin").unlink(),
        r"no val split: expected val.bin or files named \*_val_\*.bin, found train.bin;",
    ),
    "no train": (
        lambda d: (d / "train.bin").unlink(),
        r"no train split: .*found val.bin; run `fastgpt prepare d`$",
    ),
    "empty": (lambda d: (d / "train.bin").write_bytes(b""), "train.bin: is empty"),
    "odd": (lambda d: (d / "val.bin").write_bytes(b"123"), "val.bin: is cut off or no token file"),
    "id 50257": (
        lambda d: np.array([5] * 500 + [50257], "<u2").tofile(d / "val.bin"),
        r"val.bin: holds token id 50,257, the vocabulary has 50,257",
    ),
    "text": (lambda d: (d / "train.bin").write_bytes(b"\xf0\xf1 text" * 50), "holds token id"),
    "two train sets": (
        lambda d: shutil.copy(d / "train.bin", d / "x_train_000001.bin"),
        "more than one train set",
    ),
    "meta": (lambda d: (d / "meta.pkl").write_bytes(b"cos\nsystem\n."), "meta.pkl is refused"),
    "meta too small": (
        lambda d: (d / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 999})),
        "train.bin: holds token id 999, the vocabulary has 999",
    ),
    "mixed widths": (
        lambda d: (d / "val.bin").write_bytes(headered(9, np.zeros(9, "<u4"), 2)),
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


TRAIN, JSON = "tokens_train_000000.bin", "dataset.json"


def edit(*keys, value):
    """Puts `value` in the place that `keys` name in dataset.json."""

    def change(folder):
        info = at = json.loads((folder / JSON).read_text())
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value
        (folder / JSON).write_text(json.dumps(info))

    return change


MADE = {
    "shard gone": (lambda d: (d / TRAIN).unlink(), f"{TRAIN}: cannot be read: No such file"),
    "shard cut": (lambda d: os.truncate(d / TRAIN, 2000), f"{TRAIN}: is cut off"),
    "byte changed": (lambda d: change_byte(d / TRAIN), f"{TRAIN}: is damaged, its sha256"),
    "json cut": (lambda d: os.truncate(d / JSON, 100), f"{JSON}: is damaged"),
    "json list": (lambda d: (d / JSON).write_text("[]"), f"{JSON}: is damaged"),
    "json binary": (lambda d: (d / JSON).write_bytes(b"\xff"), f"{JSON}: is damaged"),
    "json nested": (lambda d: (d / JSON).write_text("[" * 100_000), f"{JSON}: is damaged"),
    "json without splits": (edit("splits", value=1), "damaged"),
    "json without tokenizer": (edit("tokenizer", value=1), "damaged"),
    "json of huge numbers": (edit("vocab_size", value=10**50), "damaged.*vocab_size"),
    "json of the future": (edit("version", value=2), "fastgpt-dataset 1"),
    "no val listed": (edit("splits", "val", value=[]), "no val split"),
    "path listed": (edit("splits", "val", 0, "file", value="../../etc/passwd"), "damaged"),
    "endless name": (edit("splits", "val", 0, "file", value="x" * 9000), "File name too long"),
    "other tokenizer": (lambda d: CharTokenizer("xyz").save(d), "not the tokenizer"),
    "tokenizer cut": (lambda d: os.truncate(d / "tokenizer.json", 20), "tokenizer.json: is damage"),
}


@pytest.mark.parametrize("kind", MADE)
def test_broken_prepared_folders(made, kind):
    open_dataset(made)
    action, says = MADE[kind]
    action(made)
    with pytest.raises(UserError, match=says) as e:
        open_dataset(made)
    assert "\n" not in str(e.value)
