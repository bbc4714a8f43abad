"""Token files and folders of them, with their format, writing, checking and reading.

A file of llm.c and modded-nanogpt begins with 256 int32, the first three of which are the magic
number, the version and the number of tokens. The ids follow, as uint16 in version 1 and as uint32
in version 2, which only fastgpt writes. A file of nanoGPT is uint16 ids without a header. As
uint16 the magic number begins with id 55,432, past GPT-2's vocabulary, so the two kinds cannot be
confused. All numbers are little-endian.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.data.progress import progress
from fastgpt.data.tokenizer import GPT2_VOCAB, JSON_NAME, Tokenizer, load_tokenizer, read_meta_pkl
from fastgpt.errors import UserError, open_regular, read_text, reading
from fastgpt.storage.atomic import write_text

MAGIC = 20240520
HEADER_BYTES = 256 * 4
DTYPES: dict[int, np.dtype] = {1: np.dtype("<u2"), 2: np.dtype("<u4")}
SHARD_TOKENS = 100_000_000
DATASET_JSON = "dataset.json"
FORMAT, VERSION = "fastgpt-dataset", 1
_SPLIT_NAME = re.compile(r"(?:.*_)?(train|val)(_\d+)?\.bin")
_AGAIN = "prepare or download it again"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Scan:
    """Result of reading every byte of a file, and the file's state at that time."""

    size: int
    mtime_ns: int
    sha256: str
    max_id: int


class TokenFile:
    """An open file of `count` token ids, of which `file[a:b]` reads some.

    The ids are read, since a mapped file that is cut off ends the process by SIGBUS. Raises
    UserError if the file's length is not what its header says, or once the file has changed.
    """

    def __init__(self, path: Path):
        self.path, self.offset, self.dtype = path, 0, DTYPES[1]
        with reading(path, "cannot be read"):
            self._file = open_regular(path)
            head = self._file.read(12)
            self.status = self._status(os.fstat(self._file.fileno()))
        size = self.status[0]
        self.count = size // 2
        if len(head) == 12 and (words := np.frombuffer(head, "<i4").tolist())[0] == MAGIC:
            _, version, self.count = words
            if version not in DTYPES:
                raise UserError(f"{path}: has format version {version}; 1 and 2 can be read")
            self.offset, self.dtype = HEADER_BYTES, DTYPES[version]
        want = self.offset + self.count * self.dtype.itemsize
        if size != want or self.count < 1:
            wrong = f"{self.count:,} tokens take {want:,} bytes, it has {size:,}"
            raise UserError(f"{path}: is empty, cut off or no token file: {wrong}; {_AGAIN}")

    @staticmethod
    def _status(status: os.stat_result) -> tuple[int, int, int]:
        return status.st_size, status.st_mtime_ns, status.st_ino

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.count)
        size = max(0, stop - start) * self.dtype.itemsize
        data = os.pread(self._file.fileno(), size, self.offset + start * self.dtype.itemsize)
        if len(data) != size:
            raise UserError(f"{self.path}: was cut off while it was read; {_AGAIN}")
        return np.frombuffer(data, self.dtype)

    def check_unchanged(self) -> None:
        """Raises UserError if size or time of change are not those of the opened file."""
        with reading(self.path, "cannot be read"):
            now = self._status(os.stat(self.path))
        if now != self.status:
            go_on = "and go on from the last checkpoint"
            raise UserError(f"{self.path}: changed while it was read; {_AGAIN}, {go_on}")

    def scan(self, advance: Callable[[int], object] = lambda n: None) -> Scan:
        """Reads the whole file. Returns the sha256 of its bytes and the largest id."""
        with reading(self.path, "cannot be read"):
            self._file.seek(0)
            digest, max_id = hashlib.sha256(self._file.read(self.offset)), 0
            while chunk := self._file.read(_CHUNK):
                digest.update(chunk)
                max_id = max(max_id, int(np.frombuffer(chunk, self.dtype).max()))
                advance(len(chunk))
        return Scan(self.status[0], self.status[1], digest.hexdigest(), max_id)

    def entry(self) -> dict[str, Any]:
        """Returns its entry in `dataset.json`."""
        scan, name = self.scan(), self.path.name
        own = dict(file=name, tokens=self.count, bytes=scan.size)
        return dict(**own, sha256=scan.sha256, max_id=scan.max_id)


def header(count: int, dtype: np.dtype) -> bytes:
    """Returns the 1,024 bytes before the ids."""
    version = next(v for v, d in DTYPES.items() if d == dtype)
    head = np.zeros(256, "<i4")
    head[:3] = MAGIC, version, count
    return head.tobytes()


def is_token_file(path: Path) -> bool:
    """Returns True for a file of ids, which has the header or a name like nanoGPT's, *.bin."""
    if path.suffix == ".bin":
        return True
    with reading(path, "cannot be read"), open_regular(path) as f:
        return f.read(4) == header(0, DTYPES[1])[:4]


class TokenWriter:
    """A stream of ids into files of at most SHARD_TOKENS each, `<prefix>_000000.bin` and so on.

    `shards` lists the files on disk as `dataset.json` does; new ones are appended to it. Use it as
    a context manager, which finishes the last file.
    """

    def __init__(self, folder: Path, prefix: str, dtype: np.dtype, shards: list[dict[str, Any]]):
        self.folder, self.prefix, self.shards = folder, prefix, shards
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._file: BufferedWriter | None = None
        self._count = 0

    def write(self, ids: np.ndarray) -> None:
        """Appends (n,) ids."""
        ids = np.ascontiguousarray(ids, self.dtype)
        while len(ids):
            if self._file is None:
                name = f"{self.prefix}_{len(self.shards):06d}.bin"
                self._file = open(self.folder / name, "wb")  # noqa: SIM115
                self._file.write(header(0, self.dtype))
            part, ids = np.split(ids, [SHARD_TOKENS - self._count])
            self._file.write(part.data)
            self._count += len(part)
            if self._count == SHARD_TOKENS:
                self._finish(self._file)

    def _finish(self, f: BufferedWriter) -> None:
        with f:
            f.seek(0)
            f.write(header(self._count, self.dtype))
            f.flush()
            os.fsync(f.fileno())
        self._file, self._count = None, 0
        self.shards.append(TokenFile(Path(f.name)).entry())

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if self._file is not None and kind is None:
            self._finish(self._file)
        elif self._file is not None:
            with contextlib.suppress(OSError):  # a full disk fails again
                self._file.close()


def scan_all(files: list[TokenFile], folder: Path) -> list[Scan]:
    """Scans the files in `folder`, except those whose size and mtime are as remembered.

    `.fastgpt_scan.json` in the folder, or in the user's cache if that is read-only, remembers them.
    """
    known = load_scans(folder)

    def remembered(file: TokenFile) -> bool:
        scan = known.get(file.path.name)
        return scan is not None and (scan.size, scan.mtime_ns) == file.status[:2]

    if unread := [file for file in files if not remembered(file)]:
        total = sum(file.count * file.dtype.itemsize for file in unread)
        with progress(f"checking {folder.name}", total) as advance, ThreadPoolExecutor(4) as pool:
            scans = pool.map(lambda file: file.scan(advance), unread)
            known |= {file.path.name: scan for file, scan in zip(unread, scans, strict=True)}
        save_scans(folder, known)
    return [known[file.path.name] for file in files]


def _scan_paths(folder: Path) -> tuple[Path, Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not cache.is_absolute():  # without a home folder, and by XDG's rule for its variable
        cache = Path(os.devnull)
    key = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return folder / ".fastgpt_scan.json", cache / "fastgpt" / "scans" / f"{key}.json"


def load_scans(folder: Path) -> dict[str, Scan]:
    """Returns remembered scans by file name, none if they cannot be read."""
    for path in _scan_paths(folder):
        with contextlib.suppress(UserError), reading(path, "is damaged"):
            return {name: Scan(**entry) for name, entry in json.loads(read_text(path)).items()}
    return {}


def save_scans(folder: Path, scans: dict[str, Scan]) -> None:
    """Remembers `scans` for the next start, if there is anywhere to write."""
    text = json.dumps({name: asdict(found) for name, found in scans.items()}, indent=1)
    for path in _scan_paths(folder):
        with contextlib.suppress(OSError, UserError):
            return write_text(path, text + "\n")


class TokenSplit:
    """Shards of one split as one sequence of token positions.

    A window is `block_size + 1` consecutive tokens of one shard.
    """

    def __init__(self, name: str, shards: list[TokenFile]):
        self.name, self.shards = name, shards
        counts = np.array([file.count for file in shards], np.int64)
        self._ends = np.cumsum(counts)
        self._first = self._ends - counts

    def __len__(self) -> int:
        """Returns the number of tokens."""
        return int(self._ends[-1])

    def _start_ends(self, block_size: int) -> np.ndarray:
        return np.cumsum(np.maximum(self._ends - self._first - block_size, 0))

    def n_starts(self, block_size: int) -> int:
        """Returns the number of positions where a window of block_size + 1 tokens may start."""
        return int(self._start_ends(block_size)[-1])

    def positions(self, index: np.ndarray, block_size: int) -> np.ndarray:
        """Returns int64 positions of the starts number `index` (each in 0 .. n_starts - 1)."""
        ends = self._start_ends(block_size)
        shard = np.searchsorted(ends, index, side="right")
        return self._first[shard] + index - np.append(0, ends)[shard]

    def check_unchanged(self) -> None:
        """Raises UserError if a file has changed since it was opened."""
        for file in self.shards:
            file.check_unchanged()

    def require(self, block_size: int) -> None:
        """Raises UserError when no window of this block size fits into any shard."""
        if self.n_starts(block_size) == 0:
            longest = max(file.count for file in self.shards)
            wrong = f"is too short for block_size={block_size}: its longest file has {longest:,}"
            split = f"the {self.name} split in {self.shards[0].path.parent}"
            raise UserError(f"{split} {wrong} tokens; use more text or --block_size={longest - 1}")

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Returns (n, length) tokens from the n positions `starts` on, in the files' dtype."""
        shard = np.searchsorted(self._ends[:-1], starts, side="right")
        if (starts < 0).any() or (starts + length > self._ends[shard]).any():
            raise IndexError(f"windows of {length} tokens do not fit at all of these positions")
        out = np.empty((len(starts), length), self.shards[0].dtype)
        for row, i, at in zip(out, shard, starts - self._first[shard], strict=True):
            row[:] = self.shards[i][at : at + length]
        return out


@dataclass(frozen=True)
class Dataset:
    """Opened and checked folder of token files.

    `fingerprint` is a hash of the contents of all files. `vocab_size` counts ids without padding,
    and `max_id` is the largest id that occurs.
    """

    folder: Path
    train: TokenSplit
    val: TokenSplit
    vocab_size: int
    tokenizer: Tokenizer | None
    fingerprint: str
    max_id: int = 0

    def describe(self) -> str:
        """Returns a line with the folder, its numbers of tokens and files, and its vocabulary."""
        n_files = len(self.train.shards + self.val.shards)
        kind = self.tokenizer.name if self.tokenizer else "no tokenizer"
        tokens = f"{len(self.train):,} train and {len(self.val):,} val tokens in {n_files} files"
        return f"{self.folder}: {tokens}, vocabulary {self.vocab_size:,} ({kind})"


def has_tokens(folder: Path) -> bool:
    """Returns True if `folder` looks like a dataset, even a broken one."""
    if not folder.is_dir():
        return False
    return any(p.name == DATASET_JSON or _SPLIT_NAME.fullmatch(p.name) for p in folder.iterdir())


def open_dataset(folder: Path) -> Dataset:
    """Opens `folder` and checks lengths, splits, and every id against the vocabulary.

    It reads what `fastgpt prepare` writes (`dataset.json` beside headered files), nanoGPT's
    `train.bin` and `val.bin` (and `meta.pkl`), and the headered shards of llm.c and modded-nanogpt
    (`*_train_*.bin`, `*_val_*.bin`). Each file is read whole once, and again when its size or time
    of change differs. Prepared data must have the sha256 of `dataset.json`. Raises UserError,
    which names the file, if the folder cannot be trained on.
    """
    folder = Path(folder)
    if not folder.is_dir():
        how = f"run `fastgpt prepare {folder.name}`, or give your own text with --input=FILE"
        raise UserError(f"there is no dataset folder {folder}: {how}")
    info = _read_json(folder)
    listing = _listing(folder, info)
    files = [TokenFile(folder / name) for _, name, _ in listing]
    if len({file.dtype for file in files}) > 1:
        raise UserError(f"{folder} mixes files of 2-byte and 4-byte tokens: prepare it again")
    vocab_size, tokenizer = _vocabulary(folder, info)
    digest, max_id = hashlib.sha256(), 0
    splits: dict[str, list[TokenFile]] = {"train": [], "val": []}
    for file, found, (split, _, entry) in zip(files, scan_all(files, folder), listing, strict=True):
        if entry and (entry["tokens"], entry["sha256"]) != (file.count, found.sha256):
            wrong = f"its sha256 or length is not the one in {DATASET_JSON}"
            raise UserError(f"{file.path}: is damaged, {wrong}; {_AGAIN}")
        if found.max_id >= vocab_size:
            wrong = f"{found.max_id:,}, the vocabulary has {vocab_size:,}"
            raise UserError(f"{file.path}: holds token id {wrong}: another's, or damaged; {_AGAIN}")
        digest.update(f"{split} {found.sha256}\n".encode())
        max_id = max(max_id, found.max_id)
        splits[split].append(file)
    train, val = (TokenSplit(name, part) for name, part in splits.items())
    return Dataset(folder, train, val, vocab_size, tokenizer, digest.hexdigest(), max_id)


def _read_json(folder: Path) -> dict[str, Any] | None:
    path = folder / DATASET_JSON
    if not os.path.lexists(path):
        return None
    with reading(path, "is damaged: prepare the data again"):
        info = json.loads(read_text(path))
        if (info["format"], info["version"]) != (FORMAT, VERSION):
            raise ValueError(f"this fastgpt reads {FORMAT} {VERSION}")
        for entry in info["splits"]["train"] + info["splits"]["val"]:
            if Path(entry["file"]).name != entry["file"] or not {"tokens", "sha256"} <= {*entry}:
                raise ValueError("splits")
        if type(info["vocab_size"]) is not int or not 1 <= info["vocab_size"] < 1 << 32:
            raise ValueError("vocab_size")
        return {**info, "fingerprint": info["tokenizer"]["fingerprint"]}


def _listing(
    folder: Path, info: dict[str, Any] | None
) -> list[tuple[str, str, dict[str, Any] | None]]:
    """Lists (split, name, entry of `dataset.json` or None) of each file, train first."""
    if info:
        splits = info["splits"]
        found = [(s, entry["file"], entry) for s in ("train", "val") for entry in splits[s]]
    else:
        matches = filter(None, (_SPLIT_NAME.fullmatch(p.name) for p in folder.iterdir()))
        found = sorted((match[1], match[0], None) for match in matches)
    for split in ("train", "val"):
        names = [name for s, name, _ in found if s == split]
        if not names:
            others = ", ".join(name for _, name, _ in found) or "none"
            wanted = f"expected {split}.bin or files named *_{split}_*.bin, found {others}"
            raise UserError(f"{folder} has no {split} split: {wanted}; {_AGAIN}")
        if len(names) > 1 and any(name.endswith(f"{split}.bin") for name in names):
            raise UserError(f"{folder} has more than one {split} set ({', '.join(names[:3])})")
    return found


def _vocabulary(folder: Path, info: dict[str, Any] | None) -> tuple[int, Tokenizer | None]:
    """Returns (size, tokenizer) of the folder, or GPT-2's size as nanoGPT assumes it."""
    if (folder / JSON_NAME).exists():
        tokenizer = load_tokenizer(folder)
        if info and info["fingerprint"] != tokenizer.fingerprint:
            raise UserError(f"{folder / JSON_NAME} is not the tokenizer of these files: {_AGAIN}")
        return tokenizer.vocab_size, tokenizer
    if info:
        return info["vocab_size"], None
    meta = folder / "meta.pkl"
    return read_meta_pkl(meta) if meta.exists() else (GPT2_VOCAB, None)
