"""Token files on disk: what is in one, writing them, and reading each byte once to check it.

A headered file (magic 20240520, as llm.c and modded-nanogpt write them): 256 int32, the first three
magic, version and number of tokens; then the ids. Version 1 has uint16 ids, version 2, which is
ours, uint32. nanoGPT's files are uint16 ids without a header. They cannot be mixed up: as uint16
the magic begins with id 55,432, past GPT-2's vocabulary. All numbers are little-endian.

A dataset is a folder of token files: finding out what is in it, and reading windows from it.

Three kinds are read as they are: what `fastgpt prepare` writes (`dataset.json` beside headered
files), nanoGPT's `train.bin` and `val.bin` (with or without `meta.pkl`), and the public headered
shards of llm.c and modded-nanogpt (`*_train_*.bin`, `*_val_*.bin`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.data.progress import progress
from fastgpt.data.tokenizer import GPT2_VOCAB, JSON_NAME, Tokenizer, load_tokenizer, read_meta
from fastgpt.errors import UserError, open_regular, read_text, reading
from fastgpt.storage.atomic import explain_os_error, fsync_dir, write_text

MAGIC = 20240520
HEADER_BYTES = 256 * 4
DTYPES: dict[int, np.dtype] = {1: np.dtype("<u2"), 2: np.dtype("<u4")}
SHARD_TOKENS = 100_000_000
_AGAIN = "prepare or download it again"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class TokenFile:
    """One file: `count` ids of `dtype` from byte `offset` on."""

    path: Path
    offset: int
    count: int
    dtype: np.dtype

    def open(self) -> Ids:
        """Its ids, read where they are asked for."""
        return Ids(self)


class Ids:
    """The ids of an open token file: `ids[a:b]` reads them, `len(ids)` counts them.

    They are read, not mapped: a mapped file that is cut off ends the process by SIGBUS. Raises
    UserError once the file is no longer what it was.
    """

    def __init__(self, file: TokenFile):
        self.file = file
        self._open = open_regular(file.path)
        self._was = self._status(os.fstat(self._open.fileno()))

    def __len__(self) -> int:
        return self.file.count

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        out = np.empty(max(0, stop - start), self.file.dtype)
        self.read_into(out, start)
        return out

    def read_into(self, out: np.ndarray, at: int) -> None:
        """Fill the contiguous array `out` (n,) with the ids from position `at` on."""
        if not len(out):
            return
        view = memoryview(out.data).cast("B")
        offset = self.file.offset + at * self.file.dtype.itemsize
        while view:
            n = os.preadv(self._open.fileno(), [view], offset)
            if n == 0:
                raise UserError(f"{self.file.path}: was cut off while it was read; {_AGAIN}")
            view, offset = view[n:], offset + n

    def check(self) -> None:
        """Raise UserError if the file is not what was opened, by its size and time of change."""
        try:
            now = self._status(os.stat(self.file.path))
        except OSError as e:
            raise UserError(f"{self.file.path}: is gone while it is read: {e.strerror}") from e
        if now != self._was:
            raise UserError(
                f"{self.file.path}: changed while it was read ({self._was[0]:,} bytes, now "
                f"{now[0]:,}); {_AGAIN}, and go on from the last checkpoint"
            )

    @staticmethod
    def _status(status: os.stat_result) -> tuple[int, int, int]:
        return status.st_size, status.st_mtime_ns, status.st_ino


def header(count: int, dtype: np.dtype) -> bytes:
    """The 1,024 bytes before the ids."""
    version = next(v for v, d in DTYPES.items() if d == dtype)
    head = np.zeros(256, "<i4")
    head[:3] = MAGIC, version, count
    return head.tobytes()


def is_token_file(path: Path) -> bool:
    """Whether `path` is to be read as ids: with the header, or named *.bin as nanoGPT's are."""
    if path.suffix == ".bin":
        return True
    with reading(path, "cannot be read"), open_regular(path) as f:
        return f.read(4) == header(0, DTYPES[1])[:4]


def inspect(path: Path) -> TokenFile:
    """What `path` holds. UserError that names the file when its length is not what it says."""
    try:
        with open_regular(path) as f:
            size = os.fstat(f.fileno()).st_size
            head = np.frombuffer(f.read(12), "<i4") if size >= 12 else None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    if size == 0:
        raise UserError(f"{path} is empty: {_AGAIN}")
    if head is None or head[0] != MAGIC:
        if size % 2:
            raise UserError(
                f"{path} has an odd number of bytes ({size:,}), no whole number of 2-byte tokens: "
                f"truncated, or no token file; {_AGAIN}"
            )
        return TokenFile(path, 0, size // 2, DTYPES[1])
    version, count = int(head[1]), int(head[2])
    if version not in DTYPES:
        raise UserError(
            f"{path} is a token file of version {version}; versions 1 and 2 can be read"
        )
    dtype = DTYPES[version]
    want = HEADER_BYTES + count * dtype.itemsize
    if size != want or count < 0:
        what = "truncated" if size < want else "damaged"
        raise UserError(
            f"{path} is {what}: its header says {count:,} tokens ({want:,} bytes), the file has "
            f"{size:,} bytes; {_AGAIN}"
        )
    if count == 0:
        raise UserError(f"{path} is empty (0 tokens): {_AGAIN}")
    return TokenFile(path, HEADER_BYTES, count, dtype)


@dataclass(frozen=True)
class Scan:
    """What reading every byte of a file showed, and the file's state at that time."""

    size: int
    mtime_ns: int
    sha256: str
    max_id: int


def scan(file: TokenFile, advance=lambda n: None) -> Scan:
    """Read the whole file once: sha256 of its bytes, the largest of its ids."""
    digest, top = hashlib.sha256(), 0
    try:
        with open_regular(file.path) as f:
            stat = os.fstat(f.fileno())
            digest.update(f.read(file.offset))
            while chunk := f.read(_CHUNK):
                digest.update(chunk)
                top = max(top, int(np.frombuffer(chunk, file.dtype).max()))
                advance(len(chunk))
    except OSError as e:
        raise UserError(f"cannot read {file.path}: {e.strerror}") from None
    return Scan(stat.st_size, stat.st_mtime_ns, digest.hexdigest(), top)


def scan_all(files: list[TokenFile], folder: Path, *, verify: bool = False) -> list[Scan]:
    """`scan` of each file in `folder`; files whose size and mtime are as remembered are not read.

    Remembered in `.fastgpt_scan.json` there or, if the folder is read-only, in the user's cache.
    """
    known = {} if verify else load_scans(folder)
    result: dict[str, Scan] = {}
    for file in files:
        stat, old = file.path.stat(), known.get(file.path.name)
        if old and (old.size, old.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            result[file.path.name] = old
    unread = [file for file in files if file.path.name not in result]
    if unread:
        total = sum(file.count * file.dtype.itemsize for file in unread)
        with progress(f"checking {folder.name}", total) as advance, ThreadPoolExecutor(4) as pool:
            scans = pool.map(lambda file: scan(file, advance), unread)
            result |= {file.path.name: found for file, found in zip(unread, scans, strict=True)}
        save_scans(folder, result)
    return [result[file.path.name] for file in files]


def _scan_paths(folder: Path) -> tuple[Path, Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return folder / ".fastgpt_scan.json", cache / "fastgpt" / "scans" / f"{key}.json"


def load_scans(folder: Path) -> dict[str, Scan]:
    """Remembered scans by file name; none if there are none or they cannot be read."""
    for path in _scan_paths(folder):
        try:
            return {name: Scan(**entry) for name, entry in json.loads(read_text(path)).items()}
        except (OSError, UserError, ValueError, TypeError, AttributeError, RecursionError):
            continue  # only a memory of work that can be done again
    return {}


def save_scans(folder: Path, scans: dict[str, Scan]) -> None:
    """Remember `scans` for the next start, if there is anywhere to write."""
    text = json.dumps({name: asdict(found) for name, found in scans.items()}, indent=1)
    for path in _scan_paths(folder):
        try:
            write_text(path, text + "\n")
            return
        except (OSError, UserError):
            continue  # a full or read-only disk: the files will be read again next time


class TokenWriter:
    """Streams ids into `<prefix>_000000.bin`, `<prefix>_000001.bin`, ... of at most `shard_tokens`.

    A shard has its name only once it is complete and on disk: `shards` lists these, in the form of
    `dataset.json`. `finished` lists those that the folder holds already.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        dtype: np.dtype,
        shard_tokens: int = SHARD_TOKENS,
        finished: Iterable[dict[str, Any]] = (),
    ):
        self.folder, self.prefix, self.dtype = folder, prefix, np.dtype(dtype).newbyteorder("<")
        self.shard_tokens = shard_tokens
        self.shards = list(finished)
        self._file: BufferedWriter | None = None
        self._path = self._temporary = folder
        self._count = 0

    def write(self, ids: np.ndarray) -> int:
        """Append (n,) ids. Returns how many of them are in finished shards now (n: all)."""
        ids = np.ascontiguousarray(ids, self.dtype)
        done = kept = 0
        with self._errors():
            while done < len(ids):
                f = self._file or self._open()
                part = ids[done : done + self.shard_tokens - self._count]
                f.write(part.data)
                self._count += len(part)
                done += len(part)
                if self._count == self.shard_tokens:
                    self._finish(f)
                    kept = done
        return kept

    def close(self) -> None:
        """Finish the last shard."""
        with self._errors():
            if self._file is not None:
                self._finish(self._file)

    def abort(self) -> None:
        """Drop the unfinished shard."""
        if self._file is not None:
            # A full disk says so again; what is lost is unwanted.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
        if self._temporary != self.folder:
            self._temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            self.abort()
            raise explain_os_error(e, self._path) from e

    def _open(self) -> BufferedWriter:
        self._path = self.folder / f"{self.prefix}_{len(self.shards):06d}.bin"
        # Known before the file is there: an interrupt may come before `open` has returned it.
        self._temporary = self._path.with_name(f".{self._path.name}.tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115
        self._file.write(header(0, self.dtype))
        self._count = 0
        return self._file

    def _finish(self, f: BufferedWriter) -> None:
        f.seek(0)
        f.write(header(self._count, self.dtype))
        f.flush()
        os.fsync(f.fileno())
        f.close()
        self._file = None
        found = scan(TokenFile(self._temporary, HEADER_BYTES, self._count, self.dtype))
        os.replace(self._temporary, self._path)
        fsync_dir(self.folder)
        self.shards.append(
            dict(
                file=self._path.name,
                tokens=self._count,
                bytes=found.size,
                sha256=found.sha256,
                max_id=found.max_id,
            )
        )


DATASET_JSON = "dataset.json"
FORMAT = "fastgpt-dataset"
VERSION = 1
_SPLIT_NAME = re.compile(r"(?:.*_)?(train|val)(_\d+)?\.bin")


class TokenSplit:
    """The shards of one split as one sequence of token positions, in which windows are found.

    A window is `block_size + 1` consecutive tokens and never crosses from one shard to the next.
    """

    def __init__(self, name: str, files: list[TokenFile], folder: Path):
        self.name = name
        self.folder = folder
        self.shards = files
        self._ids = [file.open() for file in files]
        counts = np.array([file.count for file in files], np.int64)
        self._ends = np.cumsum(counts)
        self._first = self._ends - counts

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self._ends[-1])

    def n_starts(self, block_size: int) -> int:
        """Number of positions at which a window of block_size + 1 tokens may start."""
        return int(self._starts(block_size)[-1])

    def positions(self, index: np.ndarray, block_size: int) -> np.ndarray:
        """int64 positions of the admissible starts number `index` (each in 0 .. n_starts - 1)."""
        index = np.asarray(index, np.int64)
        ends = self._starts(block_size)
        if index.size and (index.min() < 0 or index.max() >= ends[-1]):
            raise IndexError(f"start {index.min()} .. {index.max()} not in 0 .. {ends[-1] - 1}")
        shard = np.searchsorted(ends, index, side="right")
        before = np.concatenate([[0], ends[:-1]])
        return self._first[shard] + index - before[shard]

    def _starts(self, block_size: int) -> np.ndarray:
        return np.cumsum(np.maximum(self._ends - self._first - block_size, 0))

    def check(self) -> None:
        """Raise UserError if a file changed since it was opened; asked before each evaluation."""
        for ids in self._ids:
            ids.check()

    def require(self, block_size: int) -> None:
        """UserError when no window of this block size fits into any shard."""
        if self.n_starts(block_size) == 0:
            longest = max(file.count for file in self.shards)
            fits = f"the largest that fits is {longest - 1}" if longest > 1 else "none fits"
            raise UserError(
                f"the {self.name} split in {self.folder} is too short for block_size={block_size}: "
                f"its longest file has {longest:,} tokens ({fits}); use a smaller --block_size or "
                "more text"
            )

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(n, length) tokens, of the files' dtype, from the n positions `starts` on."""
        starts = np.asarray(starts, np.int64)
        out = np.empty((len(starts), length), self.shards[0].dtype)
        shard = np.searchsorted(self._ends[:-1], starts, side="right")
        if (starts < 0).any() or (starts + length > self._ends[shard]).any():
            raise IndexError(f"windows of {length} tokens do not fit at all of these positions")
        offsets = starts - self._first[shard]
        for row, i, at in zip(out, shard.tolist(), offsets.tolist(), strict=True):
            self._ids[i].read_into(row, at)
        return out


@dataclass(frozen=True)
class Dataset:
    """An opened, checked folder of token files.

    `fingerprint` is a hash of the contents of all files, whatever their folder is called.
    `vocab_size` counts real ids, without padding; `max_id` is the largest that occurs. `tokenizer`
    is None if the folder has none.
    """

    folder: Path
    train: TokenSplit
    val: TokenSplit
    vocab_size: int
    tokenizer: Tokenizer | None
    fingerprint: str
    max_id: int = 0
    info: dict[str, Any] = field(default_factory=dict, repr=False)

    def describe(self) -> str:
        """One line for people."""
        shards = len(self.train.shards + self.val.shards)
        kind = self.tokenizer.name if self.tokenizer else "no tokenizer"
        return (
            f"{self.folder}: {len(self.train):,} train and {len(self.val):,} val tokens in "
            f"{shards} files, vocabulary {self.vocab_size:,} ({kind})"
        )


def has_tokens(folder: Path) -> bool:
    """Whether `folder` looks like a dataset (it may still be broken)."""
    if not folder.is_dir():
        return False
    return any(p.name == DATASET_JSON or _SPLIT_NAME.fullmatch(p.name) for p in folder.iterdir())


def open_dataset(folder: Path, *, verify: bool = False, vocab_size: int | None = None) -> Dataset:
    """Open `folder` and check it: lengths, both splits, every id below the vocabulary's size.

    Each file is read whole once, and again when its size or time of change differs (`verify`: in
    any case); for prepared data its sha256 must then be that of `dataset.json`. `vocab_size` is for
    folders that do not say theirs; without it GPT-2's 50,257 is assumed, as in nanoGPT.
    UserError, one line that names the file, for whatever cannot be trained on.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"there is no dataset folder {folder}: run `fastgpt prepare {folder.name}`, or give "
            "your own text with --input=FILE"
        )
    info = _read_json(folder)
    names = _listed(folder, info) if info else _found(folder)
    files = {split: [inspect(folder / n) for n in names[split]] for split in names}
    dtypes = {file.dtype for part in files.values() for file in part}
    if len(dtypes) > 1:
        raise UserError(f"{folder} mixes files of 2-byte and 4-byte tokens: prepare it again")
    size, tokenizer = _vocabulary(folder, info, vocab_size)
    every = [(split, file) for split, part in files.items() for file in part]
    scans = scan_all([file for _, file in every], folder, verify=verify)
    digest = hashlib.sha256()
    for (split, file), found in zip(every, scans, strict=True):
        _check(file, found, size, info)
        digest.update(f"{split} {found.sha256}\n".encode())
    train, val = (TokenSplit(split, files[split], folder) for split in ("train", "val"))
    largest = max(found.max_id for found in scans)
    return Dataset(folder, train, val, size, tokenizer, digest.hexdigest(), largest, info or {})


def _read_json(folder: Path) -> dict[str, Any] | None:
    path = folder / DATASET_JSON
    if not os.path.lexists(path):
        return None
    try:
        info = json.loads(read_text(path))
        if info["format"] != FORMAT or info["version"] != VERSION:
            raise UserError(
                f"{path} is of format {info['format']} {info['version']}, this fastgpt reads "
                f"{FORMAT} {VERSION}: prepare the data again"
            )
        for split in ("train", "val"):
            for entry in info["splits"][split]:
                Path(entry["file"]).name.encode(), int(entry["tokens"]), entry["sha256"][:16]
        size = info["vocab_size"]
        if type(size) is not int or not 1 <= size < 1 << 32:
            raise ValueError(f"vocab_size {str(size)[:40]}")
        info["tokenizer"]["fingerprint"]
        return info
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({e}): prepare the data again") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None


def _listed(folder: Path, info: dict[str, Any]) -> dict[str, list[str]]:
    names = {s: [entry["file"] for entry in info["splits"][s]] for s in ("train", "val")}
    for split, part in names.items():
        if not part:
            raise UserError(f"{folder / DATASET_JSON} lists no {split} file: prepare it again")
        for name in part:
            if len(name) > 255 or Path(name).name != name or not (folder / name).is_file():
                listed = f"{folder / name[:255]} is missing, though {DATASET_JSON} lists it"
                raise UserError(f"{listed}: prepare the data again")
    return names


def _found(folder: Path) -> dict[str, list[str]]:
    """Token files of a folder without dataset.json, by split."""
    names: dict[str, list[str]] = {"train": [], "val": []}
    for path in sorted(folder.iterdir()):
        if match := _SPLIT_NAME.fullmatch(path.name):
            names[match[1]].append(path.name)
    for split, part in names.items():
        if not part:
            found = "; ".join(sorted(names["train"] + names["val"])) or "found none"
            prepare = f"; run `fastgpt prepare {folder.name}`" if split == "train" else ""
            raise UserError(
                f"{folder} has no {split} split: expected {split}.bin or files named "
                f"*_{split}_*.bin ({found}){prepare}"
            )
        if len(part) > 1 and any(name.endswith(f"{split}.bin") for name in part):
            raise UserError(
                f"{folder} has more than one {split} set ({', '.join(part[:3])}): keep one of them"
            )
    return names


def _vocabulary(
    folder: Path, info: dict[str, Any] | None, asked: int | None
) -> tuple[int, Tokenizer | None]:
    meta = folder / "meta.pkl"
    tokenizer: Tokenizer | None = None
    if (folder / JSON_NAME).exists():
        tokenizer = load_tokenizer(folder)
        size = tokenizer.vocab_size
    elif info:
        size = int(info["vocab_size"])
    elif meta.exists():
        size, tokenizer = read_meta(meta)
    else:
        size = asked or GPT2_VOCAB
    if tokenizer and info and info["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
        raise UserError(
            f"{folder / JSON_NAME} is not the tokenizer these files were made with: prepare again"
        )
    return size, tokenizer


def _check(file: TokenFile, found: Scan, vocab_size: int, info: dict[str, Any] | None) -> None:
    if info:
        entries = info["splits"]["train"] + info["splits"]["val"]
        entry = next(e for e in entries if e["file"] == file.path.name)
        if (entry["tokens"], entry["sha256"]) != (file.count, found.sha256):
            raise UserError(
                f"{file.path} is damaged: its sha256 is {found.sha256[:16]}..., {DATASET_JSON} "
                f"says {entry['sha256'][:16]}...; prepare the data again"
            )
    if found.max_id >= vocab_size:
        raise UserError(
            f"{file.path} holds token id {found.max_id:,}, the vocabulary has {vocab_size:,} "
            "(ids from 0): not made with this vocabulary, or damaged; prepare the data again or "
            "give the right --vocab_size"
        )
