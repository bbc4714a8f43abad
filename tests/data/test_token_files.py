import hashlib
import json
import os
import pickle
import shutil

import numpy as np
import pytest

from fastgpt.data import token_files
from fastgpt.data.prepare import prepare
from fastgpt.data.token_files import TokenFile, TokenWriter, has_tokens, header, open_dataset
from fastgpt.data.tokenizer import CharTokenizer
from fastgpt.errors import UserError

from .conftest import tree


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def u16(*ids):
    return np.array(ids, "<u2")


def headered(count, ids, version=1):
    return np.array([20240520, version, count] + [0] * 253, "<i4").tobytes() + ids.tobytes()


HEADED = headered(3, u16(1, 2, 3))

# --- one file


@pytest.mark.parametrize(("dtype", "version"), [(np.uint16, 1), (np.uint32, 2)])
@pytest.mark.parametrize("n", [1, 2, 7, 35])
def test_what_is_written_is_read(tmp_path, monkeypatch, dtype, version, n):
    monkeypatch.setattr(token_files, "SHARD_TOKENS", 10)
    monkeypatch.setattr(token_files, "_CHUNK", 8)
    ids, advanced = np.arange(35, dtype=dtype) * (1 if version == 1 else 100_000), []
    with TokenWriter(tmp_path, "t_train", dtype, []) as writer:
        for part in np.array_split(ids, n):
            writer.write(part)
    assert [s["tokens"] for s in writer.shards] == [10, 10, 10, 5]
    assert sorted(os.listdir(tmp_path)) == [f"t_train_{i:06d}.bin" for i in range(4)]
    files = [TokenFile(tmp_path / s["file"]) for s in writer.shards]
    assert np.array_equal(np.concatenate([f[:] for f in files]), ids)
    for file, shard in zip(files, writer.shards, strict=True):
        data = file.path.read_bytes()
        assert data == headered(file.count, file[:], version)
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert file.scan(advanced.append).max_id == shard["max_id"] == file[:].max()
    assert sum(advanced) == ids.nbytes


def test_headered_and_raw_are_told_apart(tmp_path):
    path = tmp_path / "x.bin"
    for data in (HEADED, u16(1, 2, 3).tobytes()):
        path.write_bytes(data)
        assert TokenFile(path)[:].tolist() == [1, 2, 3] and TokenFile(path)[1:2].tolist() == [2]
    path.write_bytes(u16(*range(2000)).tobytes())
    assert len(TokenFile(path)) == 2000
    for name, data, is_ids in (("a.bin", b"12", True), ("a", b"12", False), ("b", HEADED, True)):
        (tmp_path / name).write_bytes(data)
        assert token_files.is_token_file(tmp_path / name) == is_ids


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty.* 0 tokens"),
        (headered(0, u16()), "is empty"),
        (bytes(2001), "1,000 tokens take 2,000 bytes, it has 2,001;"),
        (headered(1000, u16(*range(999))), "1,000 tokens take 3,024 bytes, it has 3,022"),
        (HEADED[:-1], "cut off"),
        (HEADED[:500], "cut off"),
        (headered(3, u16(1, 2, 3, 4)), "3 tokens"),
        (headered(-1, u16(1)), "no token file"),
        (headered(2, u16(1, 2), version=7), "version 7; 1 and 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_files_are_named(tmp_path, data, says):
    path = tmp_path / "x_train_000001.bin"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"x_train_000001.bin: .*{says}"):
        TokenFile(path)


def test_a_file_that_changes_while_it_is_open(tmp_path):
    """Tests that a UserError tells it, where a mapped file would end the process by SIGBUS."""
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
    with pytest.raises(UserError, match=r"train.bin: changed while it was read"):
        ids.check_unchanged()
    path.unlink()
    with pytest.raises(UserError, match="train.bin: cannot be read: No such file"):
        ids.check_unchanged()


# --- remembering what was checked


@pytest.fixture
def counted(monkeypatch):
    """Returns the names of the files that are really read."""
    names, scan = [], TokenFile.scan
    monkeypatch.setattr(TokenFile, "scan", lambda f, *a: names.append(f.path.name) or scan(f, *a))
    return names


def scan_all(folder, *names):
    return token_files.scan_all([TokenFile(folder / name) for name in names], folder)


def test_files_are_read_again_only_when_they_change(tmp_path, counted):
    for name in "ab":
        (tmp_path / name).write_bytes(u16(1, 2, 3).tobytes())
    first, again = (scan_all(tmp_path, "a", "b") for _ in range(2))
    assert first == again and sorted(counted) == ["a", "b"]
    (tmp_path / "b").write_bytes(u16(1, 2, 9).tobytes())
    os.utime(tmp_path / "b", ns=(1, 1))
    assert scan_all(tmp_path, "a", "b")[1].max_id == 9 and sorted(counted) == ["a", "b", "b"]
    memory = tmp_path / ".fastgpt_scan.json"
    for damaged in ("", "[]", '{"a": 5}', '{"a": {"size": 1}}', "[" * 100_000):
        memory.write_text(damaged)
        counted.clear()
        assert scan_all(tmp_path, "a")[0].max_id == 3 and counted == ["a"], damaged
    memory.unlink()
    memory.mkdir()  # what cannot be written there is remembered elsewhere
    first, second = (scan_all(tmp_path, "a") for _ in range(2))
    assert first == second and counted == ["a", "a"] and (tmp_path / "xdg").exists()


# --- folders


def raw(folder, train=range(1000), val=range(100)):
    """Makes a folder like nanoGPT's."""
    folder.mkdir()
    np.array(train, "<u2").tofile(folder / "train.bin")
    np.array(val, "<u2").tofile(folder / "val.bin")
    return folder


def shards(folder, *lengths, name="fineweb"):
    folder.mkdir()
    files = [*(f"{name}_train_{i + 1:06d}.bin" for i in range(len(lengths))), f"{name}_val_0.bin"]
    for file, n, end in zip(files, [*lengths, 50], np.cumsum([*lengths, 50]), strict=True):
        (folder / file).write_bytes(headered(n, np.arange(end - n, end, dtype="<u2")))
    return folder


def made(tmp_path, settings):
    """Returns a folder that `prepare` made."""
    folder = tree(tmp_path / "in", {"text.txt": "one two three\n" * 400})
    return prepare(settings(input=str(folder), tokenizer="char"))


def test_nanogpt_folder(tmp_path):
    ds = open_dataset(raw(tmp_path / "d"))
    assert (len(ds.train), len(ds.val), ds.vocab_size, ds.tokenizer) == (1000, 100, 50257, None)
    assert ds.describe() == (
        f"{tmp_path / 'd'}: 1,000 train and 100 val tokens in 2 files, vocabulary 50,257 "
        "(no tokenizer)"
    )
    folder = raw(tmp_path / "abc", [0, 1, 2] * 50, [2, 1] * 50)  # with a vocabulary
    meta = {"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "c"}, "stoi": {"a": 0, "b": 1, "c": 2}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
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
    os.remove(ds.folder / f"{name}_train_000002.bin")  # llm.c's have no numbers
    for old, new in (("train_000001", "train"), ("val_0", "val")):
        os.rename(ds.folder / f"{name}_{old}.bin", ds.folder / f"{name}_{new}.bin")
    assert len(open_dataset(ds.folder).train) == 300


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
    says = "train split in .*d is too short for block_size=30: .* 30 tokens; .*--block_size=29"
    with pytest.raises(UserError, match=says):
        split.require(30)


def test_fingerprint_is_of_the_contents(tmp_path, settings):
    splits = [(), (), ((range(1, 1001)),), (range(1000), range(99)), (range(100), range(1000))]
    prints = [open_dataset(raw(tmp_path / f"{i}", *s)).fingerprint for i, s in enumerate(splits)]
    assert prints[0] == prints[1] and len(set(prints)) == 4
    folder = made(tmp_path, settings)
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copy)
    assert open_dataset(tmp_path / "copy").fingerprint == open_dataset(folder).fingerprint
    assert has_tokens(folder) and has_tokens(tmp_path / "0")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "training.bin").touch()
    assert not has_tokens(tmp_path / "none") and not has_tokens(tmp_path / "absent")


# --- folders that are refused

TRAIN, JSON = "tokens_train_000000.bin", "dataset.json"


def put(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def remove(name):
    return lambda folder: (folder / name).unlink()


def edit(*keys, value):
    """Puts `value` in the place that `keys` name in dataset.json."""

    def change(folder):
        info = at = json.loads((folder / JSON).read_text())
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value
        (folder / JSON).write_text(json.dumps(info))

    return change


def change_byte(folder):
    data = bytearray((folder / TRAIN).read_bytes())
    data[-4] ^= 1
    (folder / TRAIN).write_bytes(data)
    os.utime(folder / TRAIN, ns=(1, 1))


RAW = [
    (shutil.rmtree, r"no dataset folder .*d: run `fastgpt prepare d`"),
    (lambda d: [p.unlink() for p in d.iterdir()], "no train split.*found none"),
    (remove("val.bin"), r"no val split: expected val.bin or files named \*_val_\*.bin, fou"),
    (remove("train.bin"), r"no train split: .*found val.bin; prepare"),
    (put("val.bin", u16(5, 50257).tobytes()), "val.bin: holds token id 50,257, the .* has 50,257"),
    (put("x_train_000001.bin", bytes(90)), "more than one train set"),
    (put("meta.pkl", b"cos\nsystem\n."), "meta.pkl is refused"),
    (put("meta.pkl", pickle.dumps({"vocab_size": 999})), "train.bin: holds .* has 999"),
    (put("val.bin", headered(9, np.zeros(9, "<u4"), 2)), "mixes"),
]
MADE = [
    (remove(TRAIN), f"{TRAIN}: cannot be read: No such file"),
    (put(TRAIN, header(9, np.dtype("<u2"))), f"{TRAIN}: is empty, cut off"),
    (change_byte, f"{TRAIN}: is damaged, its sha256"),
    *((put(JSON, data), f"{JSON}: is damaged") for data in (b"[]", b"\xff", b"[" * 100_000)),
    (edit("tokenizer", value=1), "damaged"),
    (edit("vocab_size", value=10**50), "damaged.*vocab_size"),
    (edit("version", value=2), "fastgpt-dataset 1"),
    (edit("splits", "val", value=[]), "no val split"),
    (edit("splits", "val", 0, "file", value="../../etc/passwd"), "damaged"),
    (lambda d: CharTokenizer("xyz").save(d), "not the tokenizer"),
]


@pytest.mark.parametrize("number", range(len(RAW) + len(MADE)))
def test_broken_folders(tmp_path, settings, number):
    break_it, says = (RAW + MADE)[number]
    folder = raw(tmp_path / "d") if number < len(RAW) else made(tmp_path, settings)
    open_dataset(folder)
    break_it(folder)
    with pytest.raises(UserError, match=says):
        open_dataset(folder)
