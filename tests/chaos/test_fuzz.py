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
from tests.chaos.conftest import chunks
from tests.weights.test_nanogpt import Reference

SHAPE = ModelShape(2, 2, 8, 8, 40, True)
Reader = Callable[[Path], Any]


def make_run(home: Path) -> None:
    run.save_config(home, Config())
    w = {"w": torch.arange(6.0), "v": torch.ones(2, 2)}
    state = {"format": checkpoint.FORMAT, "config": settings.to_dict(Config()), "val_loss": 1.0}
    for step in (1, 2):
        checkpoint.save(home, step, w, w, state, best=True, keep=3)
    record = {"kind": "train", "step": 1, "loss": 2.0, "tokens": 10, "time_ms": 1.0}
    (home / "metrics.jsonl").write_text((json.dumps(record) + "\n") * 3)


def read_run(home: Path) -> Any:
    said: list[str] = []
    config = run.load_config(home, said.append)
    saved = checkpoint.load(home, warn=said.append)
    assert all(line and "\n" not in line for line in said)
    w = torch.arange(6.0)
    assert torch.equal(saved.model["w"], w) and torch.equal(saved.optimizer["w"], w), "not named"
    return config


def make_weights(home: Path) -> None:
    hugging_face.write(home, SHAPE, GPT(SHAPE).init_weights(0).state_dict())
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256, b"abc": 257}
    hf_tokenizer.write(home, BPETokenizer("bpe:259", ranks))
    shutil.rmtree(home / "fastgpt")
    header = (home / "model.safetensors").read_bytes()
    index = {"weight_map": {"lm_head.weight": "model.safetensors"}}
    (home / "model.safetensors.index.json").write_text(json.dumps(index))
    assert header


def make_dataset(home: Path) -> None:
    tokenizer = CharTokenizer("abcdefgh")
    tokenizer.save(home)
    for split in ("train", "val"):
        np.arange(80, dtype=np.uint16).__mod__(8).tofile(home / f"{split}.bin")
    (home / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 8}))
    split = {s: [{"file": f"{s}.bin", "tokens": 80, "sha256": "0" * 64}] for s in ("train", "val")}
    info = {"format": "fastgpt-dataset", "version": 1, "vocab_size": 8, "splits": split}
    info["tokenizer"] = {"name": "char", "fingerprint": tokenizer.fingerprint}
    (home / "dataset.json").write_text(json.dumps(info))


def make_nanogpt(home: Path) -> None:
    torch.save(Reference(bias=True).checkpoint(3), home / "ckpt.pt")


def read_nanogpt(home: Path) -> Any:
    path = home / "ckpt.pt"
    data = nanogpt.load(path)
    shape, tensors = nanogpt.model_of(path, data, "erf")
    nanogpt.optimizer_of(path, data, shape, tensors)
    return nanogpt.config_of(path, data, shape)


def make_configs(home: Path) -> None:
    (home / "a.toml").write_text(settings.to_toml(Config()))
    (home / "a.py").write_text("batch_size = 5 * 8\nout_dir = 'x'\nlearning_rate = 6e-4 / 2\n")


def make_meta(home: Path) -> None:
    meta = {"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "c"}, "stoi": {"a": 0, "b": 1, "c": 2}}
    (home / "meta.pkl").write_bytes(pickle.dumps(meta))


# What makes the files, what reads them, and which of them are changed.
TARGETS: dict[str, tuple[Callable[[Path], None], Reader, tuple[str, ...]]] = {
    "a run's folder": (
        make_run,
        read_run,
        ("config.toml", "run.json", "checkpoints/latest", "checkpoints/best")
        + tuple(
            f"checkpoints/step_00000002/{name}"
            for name in (
                "manifest.json",
                "state.json",
                "model.safetensors",
                "optimizer.safetensors",
            )
        ),
    ),
    "metrics.jsonl": (
        make_run,
        lambda home: metrics.read(home / "metrics.jsonl"),
        ("metrics.jsonl",),
    ),
    "a Hugging Face model": (
        make_weights,
        hugging_face.read,
        ("config.json", "model.safetensors", "model.safetensors.index.json"),
    ),
    "a Hugging Face tokenizer": (make_weights, hf_tokenizer.read, ("vocab.json", "merges.txt")),
    "a dataset": (
        make_dataset,
        open_dataset,
        ("dataset.json", "tokenizer.json", "train.bin", "val.bin", "meta.pkl"),
    ),
    "a tokenizer": (make_dataset, load_tokenizer, ("tokenizer.json",)),
    "nanoGPT's ckpt.pt": (make_nanogpt, read_nanogpt, ("ckpt.pt",)),
    "nanoGPT's meta.pkl": (make_meta, lambda home: read_meta_pkl(home / "meta.pkl"), ("meta.pkl",)),
    "a TOML file": (make_configs, lambda home: settings.load_toml(home / "a.toml"), ("a.toml",)),
    "a Python file": (make_configs, lambda home: settings.load_python(home / "a.py"), ("a.py",)),
}

_ODD: tuple[Any, ...] = (None, True, -1, 0, 2**31, 2**63, 10**400, 1e999, -0.0, "", "x" * 5000)
_ODD += ("\x1b[31m\n\r\u2028", "\ud800", [], {}, [[]], [1, "a"], {"a": 1}, "../../x", "/dev/zero")


def odd_json(value: Any, rng: random.Random) -> Any:
    """`value` with one part of it, somewhere, replaced, removed, doubled or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return {**value, rng.choice(["x", "", "\n", key + " "]): value[key]}
        return {**value, key: odd_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], odd_json(value[at], rng), *value[at + 1 :]]
    return rng.choice(_ODD)


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(6)
    at = rng.randrange(len(data) + 1)
    if kind == 0 and data:
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + rng.randbytes(rng.randint(1, 20)) + data[at:]
    if kind == 3:
        return (
            data[:at]
            + rng.choice([b"[" * 9000, b'{"a":' * 9000, b"9" * 9000, b"(" * 500])
            + data[at:]
        )
    if kind == 4:
        return data[:at] + bytes(rng.randint(1, 50)) + data[at + 20 :]
    return rng.choice([b"", b"\0", b"\xff\xfe", b"null", b"[]", b"{}", b"3", b'"x"'])


def change(path: Path, rng: random.Random) -> None:
    """Put something else in the place of a good file."""
    kind = rng.random()
    if kind < 0.12:
        path.unlink()
        special = rng.randrange(6)
        if special == 0:
            os.mkfifo(path)
        elif special == 1:
            path.mkdir()
        elif special == 2:
            path.symlink_to(path.name)  # a loop
        elif special == 3:
            path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/proc/self/mem", "/nowhere"]))
        elif special == 4:
            path.symlink_to("x" * 255)
        return
    data = path.read_bytes()
    if kind < 0.6:
        with contextlib.suppress(ValueError):
            changed = data
            if path.suffix == ".safetensors":
                length = int.from_bytes(data[:8], "little")
                header = json.dumps(odd_json(json.loads(data[8 : 8 + length]), rng)).encode()
                changed = len(header).to_bytes(8, "little") + header + data[8 + length :]
            else:
                changed = json.dumps(odd_json(json.loads(data), rng)).encode()
            path.write_bytes(changed)
            return
    path.write_bytes(change_bytes(data, rng))


@contextlib.contextmanager
def in_time(seconds: int) -> Iterator[None]:
    """Nothing may take long, or wait for somebody."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(name: str, seed: str, tmp_path: Path) -> str:
    """One try; what came of it."""
    make, read, files = TARGETS[name]
    rng = random.Random(seed)
    home = tmp_path / "home"
    shutil.copytree(template(name, tmp_path), home, symlinks=True)
    file = rng.choice(files)
    change(home / file, rng)
    try:
        with in_time(30):
            read(home)
        return "read"
    except UserError as e:
        said = str(e)
        assert said and said.isprintable() or said.isascii(), repr(said)
        assert "\n" not in said and "\x1b" not in said and len(said) <= 1100
        return "refused"
    except BaseException as e:
        raise AssertionError(f"{name}, {file}, seed {seed!r}: {type(e).__name__}: {e}") from e
    finally:
        shutil.rmtree(home)


def template(name: str, tmp_path: Path) -> Path:
    folder = tmp_path / "template"
    if not folder.exists():
        folder.mkdir()
        TARGETS[name][0](folder)
    return folder


CASES = [
    pytest.param(name, chunk, tries, id=f"{name}-{chunk}")
    for name in TARGETS
    for chunk, tries in chunks(0.5 / len(TARGETS))
]


@pytest.mark.parametrize(("name", "chunk", "tries"), CASES)
def test_files_that_are_not_what_they_should_be(name, chunk, tries, tmp_path, monkeypatch, held):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for k in range(tries):
        attempt(name, f"{name} {chunk} {k}", tmp_path)
        held(f"a changed file: {name}")


# Seeds at which something did not hold once; each has to hold from now on.
REGRESSIONS: tuple[tuple[str, str], ...] = (("a dataset", "a dataset 2 38"),)


@pytest.mark.parametrize(("name", "seed"), REGRESSIONS)
def test_what_did_not_hold_once(name: str, seed: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    attempt(name, seed, tmp_path)


WORDS = ("5 * 8", "1e999", "9" * 5000, "", "True", "-1", "nan", "\x1b[2J", "\udcff", "x\ny", "0x10")


@pytest.mark.parametrize(("seed", "tries"), chunks(0.1))
def test_flags_that_mean_nothing(seed: int, tries: int, held):
    rng = random.Random(f"flags {seed}")
    names = [*settings.leaves(Config), "nope", "--", "op.", "x" * 300]
    for _ in range(tries):
        flags = {rng.choice(names): rng.choice(WORDS) for _ in range(rng.randint(1, 3))}
        try:
            settings.check(settings.apply_flags(Config(), flags))
        except UserError as e:
            assert "\n" not in str(e) and "\x1b" not in str(e)
        held("flags with odd values")
