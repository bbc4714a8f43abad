"""Files that are not what they should be: read as they were, or refused in one line; nothing hangs.

A good file is changed by its bytes (flips, cuts, insertions), by its JSON (other types, huge
numbers, deep nesting, missing and unknown keys), or put aside for something that is no file, and
read by what reads it. What carries checksums must come out as it was, or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgpt.config import settings
from fastgpt.config.schema import Config
from fastgpt.data.token_files import open_dataset
from fastgpt.data.tokenizer import BPETokenizer, CharTokenizer, load_tokenizer, read_meta_pkl
from fastgpt.errors import UserError
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.storage import checkpoint
from fastgpt.storage import run_dir as run
from fastgpt.train import metrics
from fastgpt.weights import hf_tokenizer, hugging_face, nanogpt
from tests.chaos.conftest import Try, cases
from tests.weights.test_nanogpt import Reference

SHAPE = ModelShape(2, 2, 8, 8, 40, True)


def make_run(home: Path) -> None:
    """Makes a run with two checkpoints, whose tensors hold the step, and three lines of log."""
    run.save_config(home, Config())
    state = {"format": checkpoint.FORMAT, "config": settings.to_dict(Config()), "val_loss": 1.0}
    for step in (1, 2):
        w = {"w": torch.full((2, 2), float(step))}
        checkpoint.save(home, step, w, w, state, best=True, keep=3)
    trained = {"kind": "train", "step": 1, "loss": 2.0, "tokens": 10, "time_ms": 1.0}
    evaluated = {"kind": "eval", "step": 1, "train_loss": 2.0, "val_loss": 2.5, "tokens": 10}
    lines = [json.dumps(record) + "\n" for record in (trained, trained, evaluated)]
    (home / "metrics.jsonl").write_text("".join(lines))


def read_run(home: Path) -> None:
    """Reads settings and checkpoint; a change is said, or changes nothing."""
    said: list[str] = []
    run.load_config(home, said.append)
    saved = checkpoint.load(home, warn=said.append)
    assert all(line and "\n" not in line for line in said)
    w = torch.full((2, 2), float(saved.state["step"]))
    assert torch.equal(saved.model["w"], w) and torch.equal(saved.optimizer["w"], w), "not named"


def make_weights(home: Path) -> None:
    hugging_face.write(home, SHAPE, GPT(SHAPE).init_weights(0).state_dict())
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256, b"abc": 257}
    hf_tokenizer.write(home, BPETokenizer("bpe:259", ranks))
    shutil.rmtree(home / "fastgpt")
    index = {"weight_map": {"lm_head.weight": "model.safetensors"}}
    (home / "model.safetensors.index.json").write_text(json.dumps(index))


def make_dataset(home: Path) -> None:
    tokenizer = CharTokenizer("abcdefgh")
    tokenizer.save(home)
    for split in ("train", "val"):
        (np.arange(80, dtype=np.uint16) % 8).tofile(home / f"{split}.bin")
    (home / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 8}))
    split = {s: [{"file": f"{s}.bin", "tokens": 80, "sha256": "0" * 64}] for s in ("train", "val")}
    info = {"format": "fastgpt-dataset", "version": 1, "vocab_size": 8, "splits": split}
    info["tokenizer"] = {"name": "char", "fingerprint": tokenizer.fingerprint}
    (home / "dataset.json").write_text(json.dumps(info))


def make_nanogpt(home: Path) -> None:
    torch.save(Reference(bias=True).checkpoint(3), home / "ckpt.pt")


def read_nanogpt(home: Path) -> None:
    nanogpt.read(home / "ckpt.pt", "erf")


def make_configs(home: Path) -> None:
    (home / "a.toml").write_text(settings.to_toml(Config()))
    (home / "a.py").write_text("batch_size = 5 * 8\nout_dir = 'x'\nlearning_rate = 6e-4 / 2\n")


def make_meta(home: Path) -> None:
    meta = {"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "c"}, "stoi": {"a": 0, "b": 1, "c": 2}}
    (home / "meta.pkl").write_bytes(pickle.dumps(meta))


# Makers of good files, readers of their folder, and the files that are changed.
_STEP = "checkpoints/step_00000002/"
_RUN = f"config.toml run.json checkpoints/latest checkpoints/best {_STEP}manifest.json "
_RUN += f"{_STEP}state.json {_STEP}model.safetensors {_STEP}optimizer.safetensors"
_DATASET = "dataset.json tokenizer.json train.bin val.bin meta.pkl"
_WEIGHTS = "config.json model.safetensors model.safetensors.index.json"
TARGETS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any], str]] = {
    "a run's folder": (make_run, read_run, _RUN),
    "metrics.jsonl": (make_run, lambda home: metrics.read(home / "metrics.jsonl"), "metrics.jsonl"),
    "a Hugging Face model": (make_weights, hugging_face.read, _WEIGHTS),
    "a Hugging Face tokenizer": (make_weights, hf_tokenizer.read, "vocab.json merges.txt"),
    "a dataset": (make_dataset, open_dataset, _DATASET),
    "a tokenizer": (make_dataset, load_tokenizer, "tokenizer.json"),
    "nanoGPT's ckpt.pt": (make_nanogpt, read_nanogpt, "ckpt.pt"),
    "nanoGPT's meta.pkl": (make_meta, lambda home: read_meta_pkl(home / "meta.pkl"), "meta.pkl"),
    "a TOML file": (make_configs, lambda home: settings.load_toml(home / "a.toml"), "a.toml"),
    "a Python file": (make_configs, lambda home: settings.load_python(home / "a.py"), "a.py"),
}

ODD: tuple[Any, ...] = (None, True, -1, 0, 2**31, 2**63, 10**400, 1e999, -0.0, "", "x" * 5000)
ODD += ("\x1b[31m\n\r\u2028", "\ud800", [], {}, [[]], [1, "a"], {"a": 1}, "../../x", "/dev/zero")


def odd_json(value: Any, rng: random.Random) -> Any:
    """Returns `value` with one part of it, somewhere, replaced, removed, doubled or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key, kind = rng.choice(list(value)), rng.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return {**value, rng.choice(["x", "", "\n", key + " "]): value[key]}
        return {**value, key: odd_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], odd_json(value[at], rng), *value[at + 1 :]]
    return rng.choice(ODD)


def odd_bytes(data: bytes, rng: random.Random) -> bytes:
    """Returns `data` with a bit flipped, cut off, with bytes put in or overwritten, or others."""
    kind, at = rng.randrange(6), rng.randrange(len(data) + 1)
    if kind == 0 and data:
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + rng.randbytes(rng.randint(1, 20)) + data[at:]
    if kind == 3:
        nested = rng.choice([b"[" * 9000, b'{"a":' * 9000, b"9" * 9000, b"(" * 500])
        return data[:at] + nested + data[at:]
    if kind == 4:
        return data[:at] + bytes(rng.randint(1, 50)) + data[at + 20 :]
    return rng.choice([b"", b"\0", b"\xff\xfe", b"null", b"[]", b"{}", b"3", b'"x"'])


def put_special(path: Path, rng: random.Random) -> None:
    """Puts a FIFO, a folder, a bad link or a device in a file's place, or nothing."""
    links = (path.name, "/dev/zero", "/dev/null", "/proc/self/mem", "/nowhere", "x" * 255)
    kind = rng.randrange(8)
    path.unlink()
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind > 2:
        path.symlink_to(rng.choice(links))


def change(path: Path, rng: random.Random) -> None:
    """Puts something else in the place of a good file."""
    data, kind = path.read_bytes(), rng.random()
    if kind < 0.12:
        return put_special(path, rng)
    if kind < 0.6:
        with contextlib.suppress(ValueError):
            if path.suffix != ".safetensors":
                path.write_text(json.dumps(odd_json(json.loads(data), rng)))
                return
            length = int.from_bytes(data[:8], "little")
            header = json.dumps(odd_json(json.loads(data[8 : 8 + length]), rng)).encode()
            path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
            return
    path.write_bytes(odd_bytes(data, rng))


@contextlib.contextmanager
def in_time(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in the block if it takes longer, or waits for another process."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read_changed(name: str, rng: random.Random, home: Path) -> None:
    """Changes a file of a good folder and reads it: as it was, or refused in one line."""
    _, read, files = TARGETS[name]
    change(home / rng.choice(files.split()), rng)
    try:
        with in_time(30):
            read(home)
    except UserError as e:
        said = str(e)
        assert said and said.isprintable() or said.isascii(), repr(said)
        assert "\n" not in said and "\x1b" not in said and len(said) <= 1100


@pytest.fixture
def template(tmp_path: Path, one_try: Try, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "template").mkdir()
    return tmp_path / "template"


@pytest.mark.parametrize(("name", "tries"), cases(0.35, TARGETS))
def test_files_that_are_not_what_they_should_be(name: str, tries, template: Path, one_try: Try):
    TARGETS[name][0](template)
    for k in tries:
        with one_try(f"a changed file: {name}", k) as rng:
            read_changed(name, rng, Path.cwd())


# Seeds at which something did not hold once; each has to hold from now on.
REGRESSIONS: tuple[tuple[str, str], ...] = (("a dataset", "a dataset 2 38"),)


@pytest.mark.parametrize(("name", "seed"), REGRESSIONS)
def test_what_did_not_hold_once(name: str, seed: str, template: Path):
    TARGETS[name][0](template)
    read_changed(name, random.Random(seed), template)


WORDS = ("5 * 8", "1e999", "9" * 5000, "", "True", "-1", "nan", "\x1b[2J", "\udcff", "x\ny", "0x10")


@pytest.mark.parametrize(("what", "tries"), cases(0.04, ["flags"]))
def test_flags_that_mean_nothing(what: str, tries, one_try: Try):
    names = [*settings.leaves(Config), "nope", "--", "op.", "x" * 300]
    for k in tries:
        with one_try("flags with odd values", k) as rng:
            flags = {rng.choice(names): rng.choice(WORDS) for _ in range(rng.randint(1, 3))}
            try:
                settings.check(settings.apply_flags(Config(), flags))
            except UserError as e:
                assert "\n" not in str(e) and "\x1b" not in str(e)
