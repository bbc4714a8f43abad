"""`fastgpt prepare`: find or make the dataset folder that a configuration asks for.

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
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastgpt.config.schema import CorpusConfig, PrepareConfig
from fastgpt.data.build import Plan, build
from fastgpt.data.corpora import CORPORA, INPUT
from fastgpt.data.sources import existing, open_input
from fastgpt.data.tokenizers import make_tokenizer, parse_spec
from fastgpt.data.tokens import DATASET_JSON, Dataset, has_tokens, open_dataset
from fastgpt.data.vocabulary import GPT2_VOCAB, read_vocab_file
from fastgpt.errors import UserError, read_text
from fastgpt.storage.files import explain_os_error, recover_folder, replace_folder

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
