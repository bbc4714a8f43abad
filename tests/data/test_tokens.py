import json
import os
import pickle
import shutil

import numpy as np
import pytest

from fastgpt.data.prepare import prepare
from fastgpt.data.token_files import header
from fastgpt.data.tokenizers import CharTokenizer
from fastgpt.data.tokens import has_tokens, open_dataset
from fastgpt.errors import UserError


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
