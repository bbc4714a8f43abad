"""A dataset is a folder of token files: finding out what is in it, and reading windows from it.

Three kinds are read as they are: what `fastgpt prepare` writes (`dataset.json` beside headered
files), nanoGPT's `train.bin` and `val.bin` (with or without `meta.pkl`), and the public headered
shards of llm.c and modded-nanogpt (`*_train_*.bin`, `*_val_*.bin`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.data import token_files
from fastgpt.data.meta_pkl import read_meta
from fastgpt.data.token_files import Scan, TokenFile
from fastgpt.data.tokenizers import JSON_NAME, Tokenizer, load_tokenizer
from fastgpt.data.vocabulary import GPT2_VOCAB
from fastgpt.errors import UserError, read_text

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
    files = {split: [token_files.inspect(folder / n) for n in names[split]] for split in names}
    dtypes = {file.dtype for part in files.values() for file in part}
    if len(dtypes) > 1:
        raise UserError(f"{folder} mixes files of 2-byte and 4-byte tokens: prepare it again")
    size, tokenizer = _vocabulary(folder, info, vocab_size)
    every = [(split, file) for split, part in files.items() for file in part]
    scans = token_files.scan_all([file for _, file in every], folder, verify=verify)
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
