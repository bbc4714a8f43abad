"""Preparation of the dataset folder that a configuration asks for.

A dataset is made in a hidden folder beside its place (`.NAME.partial`) and renamed as a whole, so
a folder under its name is complete. One process at a time makes a dataset, and others wait for it.
Threads tokenize jobs of about 1 MB, which are written in reading order, so the files do not depend
on the number of threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import itertools
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.config.schema import CorpusConfig, PrepareConfig
from fastgpt.data import token_files
from fastgpt.data.corpora import CORPORA, INPUT, Corpus, Part, Source, TextFiles
from fastgpt.data.progress import progress
from fastgpt.data.token_files import DATASET_JSON, Dataset, TokenWriter, has_tokens, open_dataset
from fastgpt.data.tokenizer import GPT2_VOCAB, Tokenizer, load_tokenizer, make_tokenizer, parse_spec
from fastgpt.errors import UserError, one_line, read_bytes, read_text, reading
from fastgpt.storage import atomic

JOB_CHARS = 1 << 20
# To bound memory, this many characters without a safe place (one endless word) are cut anywhere.
# Only there may BPE tokens differ from those of the whole text.
FORCED_CHARS = 32 << 20
PARTS_JSON = "parts.json"  # lists the finished parts of a folder that is being made
BPE_TRAIN_CHARS = 256 << 20  # most text, evenly spread, that a `bpe:N` vocabulary is trained on

Shards = dict[str, list[dict[str, Any]]]  # by split, as `dataset.json` lists them


@dataclass(frozen=True)
class Plan:
    """A dataset to be made or found. Plans with an equal `recipe` (JSON) have equal data."""

    cfg: PrepareConfig
    corpus: Corpus
    recipe: dict[str, Any]
    name: str  # of its folder, if that is free


def prepare(cfg: PrepareConfig) -> Path:
    """Makes the dataset that `cfg` describes unless it is there and whole. Returns its folder."""
    folder, there = _ready_made(cfg), True
    if folder and cfg.dataset not in CORPORA:
        why = f"{folder} holds tokens already, so nothing is prepared; leave the flag out"
        _refuse(cfg, ("tokenizer", "vocab_file", "overwrite"), why)
    if folder is None:
        plan = _plan(cfg)
        folder, there = _locate(plan)
        there = there and not cfg.overwrite and _whole(folder)
        folder = folder if there else _make(plan, network=True)
    print(open_dataset(folder).describe() + ": already there" * there, flush=True)
    return folder


def ensure(cfg: PrepareConfig) -> Path:
    """Returns the dataset folder for training, made first if that takes no network.

    Raises UserError with the `fastgpt prepare` command to run if it does.
    """
    if folder := _ready_made(cfg):
        return folder
    plan = _plan(cfg)
    return _there(plan) or _make(plan, network=False)


def check_data(cfg: PrepareConfig) -> None:
    """Raises those UserErrors of `ensure` that need no reading of the data."""
    if cfg.input:
        _input(cfg)
        parse_spec(cfg.tokenizer or INPUT.tokenizer)
    elif _ready_made(cfg) is None:
        _there(_plan(cfg))


def with_tokenizer(dataset: Dataset, cfg: CorpusConfig) -> Dataset:
    """Returns the dataset with the tokenizer of its ids, if its folder has none.

    That is the one that --tokenizer and --vocab_file name. Else it is GPT-2's, if that is on this
    machine and the ids say so. Raises UserError if the named one cannot have made these ids.
    """
    own, named = dataset.tokenizer, cfg.tokenizer or ("gpt2" if cfg.vocab_file else "")
    if not named:
        corpus = CORPORA.get(cfg.dataset) if not cfg.input else None
        likely = 40_000 <= dataset.max_id < GPT2_VOCAB  # as in GPT-2's alone
        if own is None and (likely or (corpus and corpus.tokenizer == "gpt2")):
            with contextlib.suppress(UserError):  # training needs no tokenizer
                own = make_tokenizer("gpt2", cache=_cache(cfg))
        return dataclasses.replace(dataset, tokenizer=own)
    kind, _ = parse_spec(named)
    wrong = f"--tokenizer={named}: {dataset.folder} holds ids"
    if own is None and kind in ("char", "bpe") and not cfg.vocab_file:
        raise UserError(f"{wrong} and no text to make it from: --vocab_file can name a BPE's ranks")
    tokenizer = own
    if tokenizer is None or cfg.vocab_file:
        tokenizer = make_tokenizer(named, cfg.vocab_file, cache=_cache(cfg))
    if own and (own.name.partition(":")[0] != kind or own.fingerprint != tokenizer.fingerprint):
        raise UserError(f"{wrong} of {own.name} or of another vocabulary")
    if dataset.max_id >= tokenizer.vocab_size:
        most = f"up to {dataset.max_id:,}, this tokenizer has {tokenizer.vocab_size:,}"
        raise UserError(f"{wrong} {most}: it is not the one of these ids")
    return dataclasses.replace(dataset, tokenizer=tokenizer)


def _input(cfg: PrepareConfig) -> Path:
    path = Path(os.path.expanduser(cfg.input))
    if not (path.is_file() or path.is_dir()):
        raise UserError(f"--input={path}: there is no such file or folder")
    return path


def _cache(cfg: CorpusConfig) -> Path:
    return Path(cfg.data_dir) / ".cache"


# --- which dataset, and where ---------------------------------------------------------------------


def _ready_made(cfg: PrepareConfig) -> Path | None:
    """Returns the folder of token files that --dataset names, if it names one and no corpus."""
    if cfg.input:
        return None
    name = cfg.dataset
    under = Path(cfg.data_dir) / name
    if name not in CORPORA:
        for folder in (under, Path(name)):
            if has_tokens(folder):
                why = f"{folder} holds tokens, which are used as they are; leave the flag out"
                _refuse(cfg, ("val_fraction", "shards"), why)
                return folder
        near = difflib.get_close_matches(name, CORPORA, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"--dataset={name}: {meant}no corpus of this name and no token files in {under} or "
            f"{name}; corpora: {', '.join(CORPORA)}; or your own text with --input=FILE"
        )
    plain = cfg.tokenizer in ("", CORPORA[name].tokenizer)
    plain = plain and not (cfg.vocab_file or cfg.val_fraction or cfg.overwrite)
    foreign = has_tokens(under) and not (under / DATASET_JSON).exists()
    return under if plain and foreign else None  # made by nanoGPT's own prepare.py


def _refuse(cfg: PrepareConfig, flags: Iterable[str], why: str) -> None:
    """Raises UserError if one of the flags, which would have no effect, was given."""
    for flag in flags:
        if (value := getattr(cfg, flag)) != getattr(PrepareConfig, flag):
            raise UserError(f"--{flag}={value}: {why}")


def _plan(cfg: PrepareConfig) -> Plan:
    corpus = CORPORA.get(cfg.dataset, INPUT)
    if cfg.input:
        corpus = dataclasses.replace(INPUT, tokenizer=corpus.tokenizer)
    spec = cfg.tokenizer or corpus.tokenizer
    parse_spec(spec)
    slug = re.sub(r"[^\w]", "", spec)
    recipe: dict[str, Any] = {"corpus": corpus.name, "tokenizer": spec}
    name = corpus.name if slug == corpus.tokenizer else f"{corpus.name}-{slug}"
    if cfg.vocab_file and spec != "gpt2":  # of GPT-2's only one content is accepted
        with reading(f"--vocab_file={cfg.vocab_file}", "cannot be read"):
            recipe["vocab_sha256"] = hashlib.sha256(read_bytes(cfg.vocab_file)).hexdigest()
    if corpus.shards:
        if spec != corpus.tokenizer:
            raise UserError(f"{corpus.name} is made of {corpus.tokenizer} tokens, not {spec}")
        _refuse(cfg, ["val_fraction"], f"{corpus.name} has a val file of its own")
        recipe["shards"] = cfg.shards
        if cfg.shards != PrepareConfig.shards:
            name += f"-{cfg.shards}shards"
    else:
        _refuse(cfg, ["shards"], "goes with fineweb10B only")
        recipe["val_fraction"] = cfg.val_fraction or corpus.val_fraction
    if cfg.input:
        path = _input(cfg)
        source = TextFiles(path, recipe["val_fraction"])
        corpus = dataclasses.replace(corpus, text=lambda *_: source)
        recipe["input_sha256"] = source.sha256
        own = cfg.dataset if cfg.dataset not in CORPORA else path.resolve().stem
        own = re.sub(r"[^\w.-]+", "_", own).strip("._") or "input"
        name = f"{own}-{slug}-{source.sha256[:8]}"
    return Plan(cfg, corpus, recipe, name)


def _locate(plan: Plan) -> tuple[Path, bool]:
    """Returns (folder of this recipe, True if it is there), by a second name if one is taken."""
    text = json.dumps(plan.recipe, sort_keys=True)
    suffix = hashlib.sha256(text.encode()).hexdigest()[:8]
    for name in (plan.name, f"{plan.name}-{suffix}"):
        folder = Path(plan.cfg.data_dir) / name
        if not folder.exists():
            return folder, False
        with contextlib.suppress(UserError), reading(folder, "is damaged"):
            if json.loads(read_text(folder / DATASET_JSON))["recipe"] == plan.recipe:
                return folder, True
    raise UserError(f"{folder} holds other data: move it away or name another --data_dir")


def _there(plan: Plan) -> Path | None:
    """Returns the folder if it is there. Raises UserError if making it takes the network."""
    cfg, (folder, there) = plan.cfg, _locate(plan)
    if there:
        return folder
    if plan.corpus.network:
        flags = ("tokenizer", "vocab_file", "val_fraction", "shards", "data_dir")
        given = {flag: getattr(cfg, flag) for flag in flags}
        changed = [f"--{k}={v}" for k, v in given.items() if v != getattr(PrepareConfig, k)]
        command = " ".join(["fastgpt prepare", cfg.dataset, *changed])
        raise UserError(
            f"the data of {plan.corpus.name} is not in {cfg.data_dir}: run `{command}` once "
            "to download it, or train on your own text with --input=FILE"
        )
    return None


def _whole(folder: Path) -> bool:
    """Returns True if the dataset can be opened, else prints the reason."""
    try:
        return bool(open_dataset(folder))
    except UserError as e:
        print(f"making it anew: {e}", flush=True)
        return False


# --- making it ------------------------------------------------------------------------------------


def _make(plan: Plan, *, network: bool) -> Path:
    folder, _ = _locate(plan)
    try:
        with atomic.lock_in_turn(_cache(plan.cfg) / f"{folder.name}.lock", folder):
            atomic.recover_folder(folder)
            folder, there = _locate(plan)  # another process may have made it meanwhile
            if not there or plan.cfg.overwrite or not _whole(folder):
                partial = folder.with_name(f".{folder.name}.partial")
                fill = _download if plan.corpus.shards else _tokenize
                tokenizer, source, shards = fill(partial, plan, network)
                listed = {entry["file"] for entries in shards.values() for entry in entries}
                for path in partial.iterdir():
                    if path.name not in listed:
                        atomic.remove(path)
                tokenizer.save(partial)
                info = {
                    "format": token_files.FORMAT,
                    "version": token_files.VERSION,
                    "recipe": plan.recipe,
                    "source": source,
                    "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
                    "vocab_size": tokenizer.vocab_size,
                    "splits": shards,
                }
                atomic.write_text(partial / DATASET_JSON, json.dumps(info, indent=1) + "\n")
                atomic.replace_folder(partial, folder)
    except OSError as e:
        raise atomic.explain_os_error(e, folder) from e
    return folder


def _need_room(folder: Path, name: str, needed: float, hint: str = "") -> str:
    """Returns the bytes needed and free in words. Raises UserError if they are not free."""
    free = shutil.disk_usage(folder).free
    room = f"{needed / 1e9:.1f} GB more in {folder.parent}, {free / 1e9:.1f} GB are free"
    if needed > free:
        raise UserError(f"{name} needs {room}: choose {hint}another --data_dir")
    return room


def _download(partial: Path, plan: Plan, network: bool) -> tuple[Tokenizer, Any, Shards]:
    """Fetches ready-made shards into `partial`, linking those that a sibling dataset has."""
    assert plan.corpus.shards is not None
    partial.mkdir(parents=True, exist_ok=True)
    shards, spec = plan.corpus.shards(plan.cfg.shards), plan.recipe["tokenizer"]
    tokenizer = make_tokenizer(spec, plan.cfg.vocab_file, (), _cache(plan.cfg), network)
    for sibling in partial.parent.glob(f"{plan.corpus.name}*"):
        known = token_files.load_scans(sibling)
        for s in shards:
            if s.file in known and known[s.file].sha256 == s.sha256:
                with contextlib.suppress(OSError):  # it is there, or no links on this file system
                    os.link(sibling / s.file, partial / s.file)
    needed = sum(s.bytes for s in shards if not (partial / s.file).exists())
    _need_room(partial, plan.corpus.name, needed, "fewer --shards or ")
    entries: Shards = {"train": [], "val": []}
    for s in shards:
        path = s.fetch(partial)
        entries["val" if "_val_" in s.file else "train"].append(token_files.TokenFile(path).entry())
    return tokenizer, {"url": shards[0].url.rsplit("/", 1)[0]}, entries


def _tokenize(partial: Path, plan: Plan, network: bool) -> tuple[Tokenizer, Any, Shards]:
    """Writes the text's tokens into `partial`, after the parts that an earlier call finished.

    If it fails, finished parts stay. Without any, the folder is removed.
    """
    assert plan.corpus.text is not None
    source = plan.corpus.text(_cache(plan.cfg), plan.recipe["val_fraction"])
    if skipped := [one_line(f"  {name}: {why}") for name, why in source.skipped.items()]:
        more = ["  ..."] * (len(skipped) > 20)
        print(f"skipped {len(skipped)} files that are no text:", *skipped[:20], *more, sep="\n")
    spec, parts = plan.recipe["tokenizer"], len(source.sizes)
    if spec == "char" and parts > 1:
        raise UserError(f"--tokenizer=char: {plan.corpus.name} is too large: choose byte or bpe:N")
    about = {"recipe": plan.recipe, "sha256": source.identity["sha256"]}
    done, shards = _finished_parts(partial, about)
    try:
        if done:
            tokenizer = load_tokenizer(partial)
        else:
            texts = _training_texts(source, spec)
            tokenizer = make_tokenizer(spec, plan.cfg.vocab_file, texts, _cache(plan.cfg), network)
            tokenizer.save(partial)
        n_chars, sizes, name = source.n_chars, source.sizes, plan.corpus.name
        with progress("tokenizing", n_chars, n_chars * done // parts, "characters") as advance:
            for part in range(done, parts):
                # GPT-2's tokens take 0.75 bytes per byte of parquet; others are measured.
                written = sum(entry["bytes"] for entry in shards["train"] + shards["val"])
                rate = written / sum(sizes[:part]) if part else 0.75
                room = _need_room(partial, name, sizes[part] + rate * sum(sizes[part:]))
                if parts > 1 and part == done:
                    rest = f"{sum(sizes[done:]) / 1e9:.1f} GB to download; needs {room}"
                    print(f"{name}: {done} of {parts} files are done,", rest, flush=True)
                documents, threads = source.documents(part), plan.cfg.workers or cores()
                _write_shards(partial, documents, tokenizer, threads, shards, advance)
                if part + 1 < parts:
                    record = {**about, "done": part + 1, "splits": shards}
                    atomic.write_text(partial / PARTS_JSON, json.dumps(record))
        for split, entries in shards.items():
            if not entries:
                wrong = f"too little text for a {split} split"
                raise UserError(f"{wrong}: give more text or another --val_fraction")
    except BaseException:
        if not (partial / PARTS_JSON).exists():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return tokenizer, source.identity, shards


def _finished_parts(partial: Path, about: dict[str, Any]) -> tuple[int, Shards]:
    """Returns (number of parts, their shards) that an interrupted run of the same data wrote."""
    with contextlib.suppress(UserError), reading(partial / PARTS_JSON, "is damaged"):
        record = json.loads(read_text(partial / PARTS_JSON))
        if about.items() <= record.items():
            return record["done"], record["splits"]
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return 0, {"train": [], "val": []}


def _write_shards(
    folder: Path,
    documents: Iterator[Part],
    tokenizer: Tokenizer,
    threads: int,
    shards: Shards,
    advance: Callable[[int], object],
) -> None:
    """Writes the documents' tokens into files that follow those in `shards`, and lists them."""
    eot = np.array([] if tokenizer.eot is None else [tokenizer.eot], tokenizer.dtype)

    def encode(job: list[Part]) -> list[tuple[str, np.ndarray]]:
        return [(s, eot if text is None else tokenizer.encode(text)) for s, text in job]

    train, val = (
        TokenWriter(folder, f"tokens_{s}", tokenizer.dtype, shards[s]) for s in ("train", "val")
    )
    with train, val:
        for job in ordered_map(encode, _jobs(_pieces(documents, advance)), threads):
            for split, ids in job:
                (val if split == "val" else train).write(ids)


def _training_texts(source: Source, spec: str) -> Iterator[str]:
    """Yields pieces of the first part; for BPE, if there are more than enough, evenly spread."""
    n_chars = source.n_chars // len(source.sizes)
    every = -(-n_chars // BPE_TRAIN_CHARS) if spec.startswith("bpe") else 1
    with progress(f"reading for {spec}", n_chars, unit="characters") as advance:
        texts = (text for _, text in _pieces(source.documents(), advance) if text is not None)
        yield from itertools.islice(texts, 0, None, max(1, every))


def _jobs(pieces: Iterator[Part]) -> Iterator[list[Part]]:
    """Yields the pieces in lists of about JOB_CHARS."""
    job: list[Part] = []
    size = 0
    for split, text in pieces:
        if size >= JOB_CHARS and text is not None:
            yield job
            job, size = [], 0
        job.append((split, text))
        size += len(text or "")
    if job:
        yield job


def _pieces(documents: Iterator[Part], advance: Callable[[int], object]) -> Iterator[Part]:
    """Yields the documents, with each one's text of a split cut into about JOB_CHARS."""
    for (split, is_end), parts in itertools.groupby(
        documents, key=lambda part: (part[0], part[1] is None)
    ):
        for text in cut((text for _, text in parts if text), JOB_CHARS, FORCED_CHARS):
            advance(len(text))
            yield split, text
        if is_end:
            yield split, None


# A safe place lies between a character that is not whitespace and one that is. The pretokenizer
#     '(?:[sdmt]|ll|ve|re) | ?\p{L}+ | ?\p{N}+ | ?[^\s\p{L}\p{N}]+ | \s+(?!\S) | \s+
# is applied left to right, and merges happen inside its matches. A match ends at a safe place,
# since alternatives with non-whitespace have whitespace only at their beginning. The look-ahead
# (?!\S) is asked only after whitespace. So tokens(text) = tokens(left) + tokens(right).
# Python's \S excludes all that tiktoken calls \s.
_SAFE = re.compile(r"(?s).*\S(?=[\t-\r ])")


def cut(texts: Iterable[str], size: int, forced: int) -> Iterator[str]:
    """Cuts parts of one document into pieces of about `size` characters, at safe places.

    The pieces have the tokens of the whole. At most `forced` characters and one part are held.
    """
    held, wanted = "", size
    for text in texts:
        held += text
        if len(held) < wanted:
            continue
        match = _SAFE.match(held)
        at = match.end() if match else len(held) if len(held) >= forced else 0
        if at:
            yield held[:at]
            held = held[at:]
        # Without a place, look again only when there is twice as much, for linear time.
        wanted = len(held) + size if at else min(2 * len(held), forced)
    if held:
        yield held


def ordered_map(function: Callable, items: Iterable, threads: int) -> Iterator:
    """Maps in threads, with at most 2 * threads items in work or waiting."""
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 2 * threads:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
