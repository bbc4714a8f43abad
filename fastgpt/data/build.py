"""Making the files of a dataset: text through the tokenizer, or ready-made shards downloaded.

Tokenizing runs in threads: tiktoken lets go of Python's lock while it encodes to a buffer, so
threads scale like processes, without copies or start-up, and a kill leaves nothing behind.
Jobs of about 1 MiB are numbered in reading order and written in that order, so the files do not
depend on the number of threads, and "job 12, token 345" is a place at which to go on.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fastgpt.config.schema import PrepareConfig
from fastgpt.data import pieces, token_files
from fastgpt.data.corpora import Corpus, Shard
from fastgpt.data.download import fetch
from fastgpt.data.progress import progress
from fastgpt.data.sources import Part, Source
from fastgpt.data.token_files import Scan, TokenWriter
from fastgpt.data.tokenizers import BPETokenizer, Tokenizer, make_tokenizer
from fastgpt.data.tokens import DATASET_JSON, FORMAT, VERSION
from fastgpt.errors import UserError, read_text
from fastgpt.storage.files import sha256_file, write_text

STATE = "state.json"
JOB_BYTES = 1 << 20
BPE_TRAIN_BYTES = 256 << 20  # text that a `bpe:N` vocabulary is trained on at most, evenly spread

A = TypeVar("A")
B = TypeVar("B")
Shards = dict[str, list[dict[str, Any]]]  # by split, as `dataset.json` lists them


@dataclass(frozen=True)
class Plan:
    """A dataset to be made or found: equal `recipe` (JSON) means equal data."""

    corpus: Corpus
    recipe: dict[str, Any]
    base: str  # the preferred name of its folder
    tokenizer: str
    val_fraction: float
    source: Source | None = None  # set if --input was looked through already


def build(partial: Path, plan: Plan, cfg: PrepareConfig, *, cache: Path, network: bool) -> None:
    """Fill the folder `partial` with a whole dataset, going on from what a killed run left."""
    if plan.corpus.shards:
        _download(partial, plan, cfg, plan.corpus.shards(cfg.shards), cache)
        return
    source = plan.source
    if source is None:
        assert plan.corpus.text is not None
        source = plan.corpus.text(cache, plan.val_fraction)
    state = _State(partial, {"recipe": plan.recipe, "source": source.identity})
    try:
        tokenizer = make_tokenizer(
            plan.tokenizer,
            vocab_file=cfg.vocab_file,
            texts=_training_texts(source, plan.tokenizer),
            cache=cache,
            download=network,
        )
        tokenizer.save(partial)
        _tokenize(state, source, tokenizer, cfg.workers or cores())
        for split, shards in state.shards.items():
            if not shards:
                state.shards = {}  # nothing worth keeping
                raise UserError(
                    f"too little text for a {split} split with --val_fraction={plan.val_fraction}: "
                    "give more text or another fraction"
                )
    except BaseException:
        if not any(state.shards.values()):
            shutil.rmtree(partial, ignore_errors=True)  # nothing worth going on from
        raise
    _finish(partial, plan, tokenizer, source.identity, state.shards)
    (partial / STATE).unlink(missing_ok=True)


class _State:
    """The finished shards of each split: they end after `token` tokens of job `job`.

    Takes up what is saved in `folder` if it is for the same purpose; all else there is removed.
    """

    def __init__(self, folder: Path, purpose: dict[str, Any]):
        self.folder, self.purpose = folder, purpose
        self.shards: Shards = {"train": [], "val": []}
        self.job = {"train": 0, "val": 0}
        self.token = {"train": 0, "val": 0}
        keep = set()
        try:
            saved = json.loads(read_text(folder / STATE))
            sums = {s["file"]: s["sha256"] for part in saved["shards"].values() for s in part}
            intact = all(sha256_file(folder / name) == sum for name, sum in sums.items())
            if saved["purpose"] == purpose and intact:
                self.shards, self.job, self.token = saved["shards"], saved["job"], saved["token"]
                keep = set(sums)
        except (OSError, UserError, ValueError, LookupError, TypeError, AttributeError):
            pass  # none, or from before a change: from the start
        folder.mkdir(parents=True, exist_ok=True)
        _keep_only(folder, keep)
        if keep:
            print(f"going on after {len(keep)} finished files of an interrupted run", flush=True)
            self.save()

    def save(self) -> None:
        state = dict(purpose=self.purpose, shards=self.shards, job=self.job, token=self.token)
        write_text(self.folder / STATE, json.dumps(state) + "\n")


def _keep_only(folder: Path, names: set[str]) -> None:
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


def _tokenize(state: _State, source: Source, tokenizer: Tokenizer, workers: int) -> None:
    writers = {
        split: TokenWriter(
            state.folder, f"tokens_{split}", tokenizer.dtype, token_files.SHARD_TOKENS, shards
        )
        for split, shards in state.shards.items()
    }

    def encode(numbered: tuple[int, list[Part]]) -> tuple[dict[str, np.ndarray], int]:
        number, job = numbered
        parts: dict[str, list[np.ndarray]] = {}
        for split, text in job:
            if number < state.job[split]:
                continue  # in a finished shard
            part = parts.setdefault(split, [])
            if text is not None:
                part.append(tokenizer.encode_bytes(text))
            elif tokenizer.eot is not None:
                part.append(np.array([tokenizer.eot], tokenizer.dtype))
        n_bytes = sum(len(text or b"") for _, text in job)
        return {split: np.concatenate(part) for split, part in parts.items()}, n_bytes

    # Byte and character ids are faster made than handed to a thread.
    threads = workers if isinstance(tokenizer, BPETokenizer) else 1
    try:
        with progress("tokenizing", source.n_bytes) as advance:
            results = ordered_map(encode, enumerate(_jobs(source)), threads)
            for number, (arrays, n_bytes) in enumerate(results):
                for split, ids in arrays.items():
                    skip = state.token[split] if number == state.job[split] else 0
                    kept = writers[split].write(ids[skip:])
                    if kept:
                        state.shards[split] = writers[split].shards
                        state.job[split], state.token[split] = number, skip + kept
                        state.save()
                advance(n_bytes)
        for split, writer in writers.items():
            writer.close()
            state.shards[split] = writer.shards
    finally:
        for writer in writers.values():
            writer.abort()


def _pieces(source: Source, size: int) -> Iterator[Part]:
    """The documents with each one's text of a split re-cut into pieces of about `size` bytes."""
    for (split, is_end), parts in itertools.groupby(
        source.documents(), key=lambda part: (part[0], part[1] is None)
    ):
        chunks = (text for _, text in parts if text is not None)
        yield from ((split, text) for text in pieces.cut(chunks, size))
        if is_end:
            yield split, None


def _jobs(source: Source) -> Iterator[list[Part]]:
    """Pieces of all documents, in lists of about JOB_BYTES."""
    job: list[Part] = []
    size = 0
    for split, text in _pieces(source, JOB_BYTES):
        if size >= JOB_BYTES and text is not None:
            yield job
            job, size = [], 0
        job.append((split, text))
        size += len(text or b"")
    if job:
        yield job


def ordered_map(function: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """`map`, with at most 2 * threads items in work or waiting; the first error ends it."""
    if threads <= 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[B]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 2 * threads:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def _training_texts(source: Source, spec: str) -> Iterator[str]:
    """All pieces of the text; for BPE, if there is more than enough, evenly spread ones."""
    texts = (text for _, text in _pieces(source, pieces.PIECE) if text is not None)
    if not spec.startswith("bpe"):
        yield from (text.decode() for text in texts)
        return
    share = min(1.0, BPE_TRAIN_BYTES / source.n_bytes) if source.n_bytes else 1.0
    taken = 0
    for i, text in enumerate(texts):
        if int((i + 1) * share) > int(i * share):
            yield text.decode()
            taken += len(text)
            if taken >= BPE_TRAIN_BYTES and source.n_bytes is None:
                return  # of unknown length, in shuffled order


def _download(
    partial: Path, plan: Plan, cfg: PrepareConfig, shards: list[Shard], cache: Path
) -> None:
    """Fetch ready-made shards into `partial`, linking those that a sibling dataset has."""
    partial.mkdir(parents=True, exist_ok=True)
    spec = plan.tokenizer
    tokenizer = make_tokenizer(spec, vocab_file=cfg.vocab_file, cache=cache, download=True)
    missing = [s for s in shards if not _link_from_sibling(partial, plan, s)]
    total = sum(s.bytes for s in missing if not (partial / s.file).exists())
    if total > (free := shutil.disk_usage(partial).free):
        raise UserError(
            f"{plan.corpus.name} needs {total / 1e9:.1f} GB more in {cfg.data_dir}, "
            f"{free / 1e9:.1f} GB are free: choose fewer --shards or another --data_dir"
        )
    for shard in missing:
        fetch(shard.url, partial / shard.file, sha256=shard.sha256, size=shard.bytes)
    _keep_only(partial, {s.file for s in shards})
    tokenizer.save(partial)
    entries: Shards = {"train": [], "val": []}
    for s in shards:
        file = token_files.inspect(partial / s.file)
        max_id = token_files.scan(file).max_id
        entries[s.split].append(
            dict(file=s.file, tokens=file.count, bytes=s.bytes, sha256=s.sha256, max_id=max_id)
        )
    _finish(partial, plan, tokenizer, {"url": shards[0].url.rsplit("/", 1)[0]}, entries)


def _link_from_sibling(partial: Path, plan: Plan, shard: Shard) -> bool:
    for folder in partial.parent.glob(f"{plan.corpus.name}*"):
        known = token_files.load_scans(folder).get(shard.file)
        if known and known.sha256 == shard.sha256 and not (partial / shard.file).exists():
            with contextlib.suppress(OSError):  # no such links on this file system: download it
                os.link(folder / shard.file, partial / shard.file)
                return True
    return False


def _finish(
    folder: Path, plan: Plan, tokenizer: Tokenizer, source: dict[str, Any], shards: Shards
) -> None:
    """Write `dataset.json`, and remember the files as checked."""
    info = {
        "format": FORMAT,
        "version": VERSION,
        "recipe": plan.recipe,
        "source": source,
        "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
        "vocab_size": tokenizer.vocab_size,
        "splits": shards,
    }
    write_text(folder / DATASET_JSON, json.dumps(info, indent=1) + "\n")
    scans = {}
    for shard in shards["train"] + shards["val"]:
        name = shard["file"]
        stat = (folder / name).stat()
        scans[name] = Scan(stat.st_size, stat.st_mtime_ns, shard["sha256"], shard["max_id"])
    token_files.save_scans(folder, scans)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
