import hashlib
import os
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest

from fastgpt.data import token_files
from fastgpt.data.token_files import HEADER_BYTES, TokenWriter, header, inspect, scan, scan_all
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
