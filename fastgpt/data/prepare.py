"""Cutting a text into pieces whose tokens, one after the other, are the tokens of the whole.

GPT-2's pretokenizer is the pattern
    '(?:[sdmt]|ll|ve|re) | ?\\p{L}+ | ?\\p{N}+ | ?[^\\s\\p{L}\\p{N}]+ | \\s+(?!\\S) | \\s+
applied left to right; merges happen only inside its matches. Take a place between a character that
is not whitespace and one that is. No alternative matches across it: those that hold
non-whitespace have whitespace only as their first character, the others hold nothing else. So a
match ends there, whatever stands around. To the left, the only look-ahead, (?!\\S), is asked at the
end of a run of whitespace, and the left part ends in none. To the right, matching starts afresh:
the pattern never looks back. Hence tokens(text) = tokens(left) + tokens(right) at every such
place, which `tests/data/test_pieces.py` checks against whole texts.

Byte and character tokenizers may be cut anywhere between two characters.

Making the files of a dataset: text through the tokenizer, or ready-made shards downloaded.

Tokenizing runs in threads: tiktoken lets go of Python's lock while it encodes to a buffer, so
threads scale like processes, without copies or start-up, and a kill leaves nothing behind.
Jobs of about 1 MiB are numbered in reading order and written in that order, so the files do not
depend on the number of threads, and "job 12, token 345" is a place at which to go on.

`fastgpt prepare`: find or make the dataset folder that a configuration asks for.

A dataset is made in a hidden folder beside its place (`.NAME.partial`) and renamed as a whole, so
a folder under its name is complete. After a kill the next start goes on behind the last finished
shard. One process at a time makes a dataset; others wait for it and then find it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fcntl
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
from typing import Any, TypeVar

import numpy as np

from fastgpt.config.schema import CorpusConfig, PrepareConfig
from fastgpt.data import token_files
from fastgpt.data.corpora import CORPORA, INPUT, Corpus, Part, Shard, Source, existing, open_input
from fastgpt.data.download import fetch
from fastgpt.data.progress import progress
from fastgpt.data.token_files import (
    DATASET_JSON,
    FORMAT,
    VERSION,
    Dataset,
    Scan,
    TokenWriter,
    has_tokens,
    open_dataset,
)
from fastgpt.data.tokenizer import (
    GPT2_VOCAB,
    BPETokenizer,
    Tokenizer,
    make_tokenizer,
    parse_spec,
    read_vocab_file,
)
from fastgpt.errors import UserError, read_text
from fastgpt.storage.atomic import (
    explain_os_error,
    recover_folder,
    replace_folder,
    sha256_file,
    write_text,
)

PIECE = 1 << 20
# A text of which this many bytes in a row hold no such place (say, 32 MiB of one word) is cut
# between two characters, so that memory stays bounded. Only there may BPE tokens differ.
FORCED = 32 << 20

# Not ASCII whitespace (nor \x1c-\x1f, which only some call whitespace), then whitespace.
_CANDIDATE = re.compile(rb"[^\t-\r\x1c- ][\t-\r ]")
_WINDOW = 1 << 12


def last_cut(text: bytes) -> int:
    """The last offset > 0 of UTF-8 `text` at which it may be cut, or 0 when there is none."""
    high = len(text)
    while high > 1:
        low = max(0, high - _WINDOW)
        for match in reversed(list(_CANDIDATE.finditer(text, low, high))):
            at = match.end() - 1
            if not text[_char_boundary(text, at) : at].decode().isspace():
                return at
        high = low + 1 if low else 0  # one byte of overlap: a candidate is two bytes long
    return 0


def _char_boundary(text: bytes, i: int) -> int:
    """Where the last character of `text` begins whose first byte is before offset `i`."""
    i -= 1
    while i > 0 and text[i] & 0xC0 == 0x80:
        i -= 1
    return i


def cut(chunks: Iterable[bytes], size: int = PIECE, forced: int = FORCED) -> Iterator[bytes]:
    """Re-cut consecutive chunks of one UTF-8 document into pieces of about `size` bytes.

    Chunks may end anywhere, also inside a character. Holds at most `forced` + `size` bytes.
    """
    buffer = bytearray()
    wanted = size
    slices = (chunk[i : i + size] for chunk in chunks for i in range(0, len(chunk), size))
    for part in slices:
        buffer += part
        if len(buffer) < wanted:
            continue
        text = bytes(buffer)
        at = last_cut(text)
        if at == 0 and len(text) >= forced:
            at = _char_boundary(text, len(text))
        # Without a cut, look again only when the buffer has doubled: linear time on odd texts.
        wanted = max(size, size + len(text) - at if at else min(2 * len(text), forced))
        if at:
            yield text[:at]
            del buffer[:at]
    if buffer:
        yield bytes(buffer)


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
        yield from ((split, text) for text in cut(chunks, size))
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
    texts = (text for _, text in _pieces(source, PIECE) if text is not None)
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


# No smaller vocabulary has such ids, and text of any length has one of them in GPT-2's.
_GPT2_LIKELY = 40_000


def prepare(cfg: PrepareConfig) -> Path:
    """Make the dataset that `cfg` describes, unless it is there and whole. Returns its folder."""
    if folder := _ready_made(cfg):
        _say_there(folder)
        return folder
    return _obtain(cfg, _plan(cfg), network=True)


def ensure(cfg: PrepareConfig) -> Path:
    """The dataset folder for training with `cfg`, made first if that takes no network.

    UserError with the `fastgpt prepare` command to run if it does.
    """
    if folder := _ready_made(cfg):
        return folder
    plan = _plan(cfg)
    if folder := _there(cfg, plan):
        return folder
    return _obtain(cfg, plan, network=False)


def check(cfg: PrepareConfig) -> None:
    """Raise the UserErrors of `ensure` that can be known at once: data that is not there."""
    if cfg.input:
        existing(Path(cfg.input).expanduser())
        parse_spec(cfg.tokenizer or INPUT.tokenizer)
    elif _ready_made(cfg) is None:
        _there(cfg, _plan(cfg))


def _there(cfg: PrepareConfig, plan: Plan) -> Path | None:
    """The dataset's folder if it is there. UserError if making it takes the network."""
    folder, there = _locate(Path(cfg.data_dir), plan)
    if there:
        return folder
    if plan.corpus.network and plan.source is None:
        raise UserError(
            f"the data of {plan.corpus.name} is not in {cfg.data_dir}: run `{_command(cfg)}` once "
            "to download it, or train on your own text with --input=FILE"
        )
    return None


def with_tokenizer(dataset: Dataset, cfg: CorpusConfig) -> Dataset:
    """The dataset with the tokenizer of its ids, where its folder has none and it can be known.

    That is the one that --tokenizer and --vocab_file name; else GPT-2's, if it is on this machine
    and the ids say so, as nanoGPT assumes it for all folders without a vocabulary of their own.
    Raises UserError if the named one cannot have made these ids.
    """
    cache = Path(cfg.data_dir) / ".cache"
    named = cfg.tokenizer or ("gpt2" if cfg.vocab_file else "")
    if not named:
        own = CORPORA[cfg.dataset].tokenizer if cfg.dataset in CORPORA and not cfg.input else ""
        likely = own == "gpt2" or _GPT2_LIKELY <= dataset.max_id < GPT2_VOCAB
        if dataset.tokenizer is None and likely:
            with contextlib.suppress(UserError):  # without its merges one can train all the same
                return dataclasses.replace(dataset, tokenizer=make_tokenizer("gpt2", cache=cache))
        return dataset
    kind, _ = parse_spec(named)
    if kind == "char" or kind == "bpe" and not cfg.vocab_file:
        if dataset.tokenizer is None:
            how = "name its ranks with --vocab_file" if kind == "bpe" else "it is made from text"
            raise UserError(f"--tokenizer={named}: {dataset.folder} holds ids without text: {how}")
        return dataset
    if dataset.tokenizer is not None and not cfg.vocab_file:
        if dataset.tokenizer.name.partition(":")[0] != kind:
            raise UserError(
                f"--tokenizer={named}: the ids in {dataset.folder} are of {dataset.tokenizer.name}"
            )
        return dataset
    tokenizer = make_tokenizer(named, vocab_file=cfg.vocab_file, cache=cache)
    if dataset.tokenizer is not None and dataset.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"--tokenizer={named}: the ids in {dataset.folder} are of {dataset.tokenizer.name}, "
            "with another vocabulary"
        )
    if dataset.max_id >= tokenizer.vocab_size:
        raise UserError(
            f"--tokenizer={named}: {dataset.folder} holds id {dataset.max_id:,}, this tokenizer "
            f"has {tokenizer.vocab_size:,}: it is not the one of these ids"
        )
    return dataclasses.replace(dataset, tokenizer=tokenizer)


def _ready_made(cfg: PrepareConfig) -> Path | None:
    """The folder of token files that --dataset names, if it names one and not a corpus."""
    if cfg.input:
        return None
    name = cfg.dataset
    under = Path(cfg.data_dir) / name
    if name not in CORPORA:
        for folder in (under, Path(name)):
            if has_tokens(folder):
                return folder
        near = difflib.get_close_matches(name, CORPORA, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"--dataset={name}: {meant}no corpus of this name and no token files in {under} or "
            f"{name}; corpora: {', '.join(CORPORA)}; or your own text with --input=FILE"
        )
    own = ("", CORPORA[name].tokenizer)
    plain = cfg.tokenizer in own and not (cfg.vocab_file or cfg.val_fraction or cfg.overwrite)
    foreign = has_tokens(under) and not (under / DATASET_JSON).exists()
    return under if plain and foreign else None  # made by nanoGPT's own prepare.py


def _plan(cfg: PrepareConfig) -> Plan:
    corpus = CORPORA.get(cfg.dataset, INPUT)
    if cfg.input and not corpus.sha256:  # a corpus that is one file may come from --input itself
        corpus = dataclasses.replace(INPUT, tokenizer=corpus.tokenizer)
    val_fraction = cfg.val_fraction or corpus.val_fraction
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val_fraction={cfg.val_fraction} must be at least 0 and below 1")
    spec = cfg.tokenizer or corpus.tokenizer
    parse_spec(spec)
    slug = re.sub(r"[^\w]", "", spec)
    recipe: dict[str, Any] = {"corpus": corpus.name, "tokenizer": spec}
    if cfg.vocab_file:
        sha256 = hashlib.sha256(read_vocab_file(Path(cfg.vocab_file))).hexdigest()
        if spec != "gpt2":  # for which only one content is accepted
            recipe["vocab_sha256"] = sha256
    base, source = corpus.name, None
    if slug != corpus.tokenizer:
        base += f"-{slug}"
    if corpus.shards:
        if spec != corpus.tokenizer:
            raise UserError(f"{corpus.name} is made of {corpus.tokenizer} tokens, not {spec}")
        recipe["shards"] = cfg.shards
        if cfg.shards != PrepareConfig.shards:
            base += f"-{cfg.shards}shards"
    else:
        recipe["val_fraction"] = val_fraction
    if cfg.input:
        memory = Path(cfg.data_dir) / ".cache" / "inputs.json"
        source = open_input(Path(cfg.input).expanduser(), val_fraction, memory)
        sha256 = source.look.sha256
        if sha256 != corpus.sha256:
            recipe["input_sha256"] = sha256
            stem = base if corpus.sha256 else f"{_folder_name(cfg)}-{slug}"
            base = f"{stem}-{sha256[:8]}"
    return Plan(corpus, recipe, base, spec, val_fraction, source)


def _folder_name(cfg: PrepareConfig) -> str:
    path = Path(cfg.input).expanduser().resolve()
    name = cfg.dataset if cfg.dataset not in CORPORA else path.stem
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "input"


def _command(cfg: PrepareConfig) -> str:
    parts = ["fastgpt prepare", cfg.dataset]
    for flag in ("tokenizer", "vocab_file", "val_fraction", "shards", "data_dir"):
        if (value := getattr(cfg, flag)) != getattr(PrepareConfig, flag):
            parts.append(f"--{flag}={value}")
    return " ".join(parts)


def _locate(data_dir: Path, plan: Plan) -> tuple[Path, bool]:
    """(folder of this recipe, whether it is there); a second name if the first is taken."""
    text = json.dumps(plan.recipe, sort_keys=True)
    suffix = hashlib.sha256(text.encode()).hexdigest()[:8]
    for folder in (data_dir / plan.base, data_dir / f"{plan.base}-{suffix}"):
        if not folder.exists():
            return folder, False
        try:
            info = json.loads(read_text(folder / DATASET_JSON))
        except (OSError, UserError, ValueError, RecursionError):
            continue
        if isinstance(info, dict) and info.get("recipe") == plan.recipe:
            return folder, True
    raise UserError(f"{folder} holds other data: move it away or name another --data_dir")


def _obtain(cfg: PrepareConfig, plan: Plan, *, network: bool) -> Path:
    data_dir = Path(cfg.data_dir)
    folder, there = _locate(data_dir, plan)
    if there and not cfg.overwrite and _whole(folder):
        return folder
    with _lock(data_dir, folder.name):
        recover_folder(folder)
        folder, there = _locate(data_dir, plan)  # another process may have made it meanwhile
        if there and not cfg.overwrite and _whole(folder):
            return folder
        partial = folder.with_name(f".{folder.name}.partial")
        try:
            build(partial, plan, cfg, cache=data_dir / ".cache", network=network)
            replace_folder(partial, folder)
        except OSError as e:
            raise explain_os_error(e, folder) from e
    print(open_dataset(folder).describe(), flush=True)
    return folder


def _say_there(folder: Path) -> None:
    print(f"{open_dataset(folder).describe()}: already there", flush=True)


def _whole(folder: Path) -> bool:
    """Whether the dataset can be opened; says what it found."""
    try:
        _say_there(folder)
        return True
    except UserError as e:
        print(f"making it anew: {e}", flush=True)
        return False


@contextlib.contextmanager
def _lock(data_dir: Path, name: str) -> Iterator[None]:
    """Hold `.cache/NAME.lock`; the system lets go of it when this process ends, however it ends."""
    path = data_dir / ".cache" / f"{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that prepares {data_dir / name}", flush=True)
                fcntl.flock(f, fcntl.LOCK_EX)
            yield
    except OSError as e:
        raise explain_os_error(e, path) from e
