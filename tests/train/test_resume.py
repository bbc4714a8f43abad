"""Checkpoints are loaded as they were saved; resuming whole runs is in test_main.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from fastgpt.data.token_files import Dataset
from fastgpt.errors import UserError
from fastgpt.model.gpt import ModelShape
from fastgpt.train import distributed, optim, resume
from fastgpt.train import trainer as trainer_module
from fastgpt.train.resume import Progress
from fastgpt.train.trainer import Trainer
from tests.train.helpers import batch, make_trainer

SHAPE = ModelShape(1, 2, 16, 8, 50, bias=True)


def trainer(seed: int = 0, shape: ModelShape = SHAPE, **settings) -> Trainer:
    return make_trainer(shape, seed=seed, rows=4, **settings)


def step(t: Trainer, number: int = 0) -> None:
    t.step(number, batch(number, 4, SHAPE))


def dataset(fingerprint: str = "abc") -> Dataset:
    return cast(Dataset, SimpleNamespace(folder="text", fingerprint=fingerprint, tokenizer=None))


@pytest.mark.parametrize(
    ("dtype", "accumulation"), [("float32", 1), ("float16", 1), ("bfloat16", 1), ("bfloat16", 2)]
)
def test_loaded_is_what_was_saved(dtype: str, accumulation: int, tmp_path: Path, monkeypatch):
    """Weights, their copies, moments, loss scale, progress: the next step is the same to the bit.

    With dropout; two micro-batches accumulate as on a GPU.
    """
    monkeypatch.setattr(trainer_module, "accumulates_in_fp32", lambda device: True)
    settings = {"dtype": dtype, "accumulation": accumulation, "dropout": 0.2}
    a, b = (trainer(seed, **settings) for seed in range(2))
    if dtype == "float16":
        a.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # not what a new run begins with
    step(a, 0)
    step(a, 1)
    progress = Progress(2, 1, 3.5, 3.25, {"sha256": "ab"}, 1.5, 2.5, 8)
    folder = resume.save(a, progress, dataset(), tmp_path, best=True)
    assert folder == tmp_path / "checkpoints" / "step_00000002" and folder.is_dir()
    assert resume.load(b, dataset(), tmp_path) == progress
    assert a.scaler.state_dict() == b.scaler.state_dict()
    copies = b.model.weight_copies.items()
    assert all(torch.equal(copy, p.to(copy.dtype)) for p, copy in copies)
    for t in (a, b):
        step(t, 2)
    moments = [optim.state_tensors(t.optimizer, t.model) for t in (a, b)]
    for x, y in ((a.model.state_dict(), b.model.state_dict()), moments):
        assert x.keys() == y.keys()
        assert all(torch.equal(x[k], y[k]) for k in x)
    with pytest.raises(UserError, match="checkpoint does not fit the model: .*wte"):
        b.load({**a.model.state_dict(), "transformer.wte.weight": torch.zeros(3, 3)}, {}, {})


@pytest.mark.parametrize(
    ("key", "value"),
    {"n_layer": 2, "n_head": 1, "n_embd": 32, "block_size": 9, "vocab_size": 51, "bias": 0}.items(),
)
def test_the_shape_of_a_run_is_frozen(key: str, value, tmp_path: Path):
    """Each part of it, also where the tensors would fit."""
    resume.save(trainer(), Progress(1), dataset(), tmp_path, best=False)
    other, was = trainer(shape=replace(SHAPE, **{key: value})), getattr(SHAPE, key)
    with pytest.raises(UserError, match=f"--{key}={value}: the run in .* has {key}={was}"):
        resume.load(other, dataset(), tmp_path)


def test_optimizer_tensors_are_checked(tmp_path: Path, monkeypatch):
    """Fused AdamW would crash on a moment of another shape, and start anew without a word."""
    a = trainer()
    step(a)
    resume.save(a, Progress(1), dataset(), tmp_path, best=True)
    good = optim.state_tensors(a.optimizer, a.model)
    name = "exp_avg.transformer.h.0.attn.c_attn.weight"
    changes: list[tuple[dict, str]] = [
        (good | {name: torch.zeros(3)}, r"c_attn.weight is torch.float32 \(3,\), wanted .*48, 16"),
        (good | {name: good[name].half()}, "is torch.float16"),
        ({k: v for k, v in good.items() if k != name}, f"{name} is missing"),
        (good | {"exp_avg.other": torch.zeros(3)}, "exp_avg.other is .* wanted no such tensor"),
    ]
    for tensors, message in changes:
        with pytest.raises(UserError, match=message):
            optim.load_state_tensors(trainer(1).optimizer, a.model, tensors)
    (tmp_path / "empty").mkdir()
    a.optimizer.state.clear()
    resume.save(a, Progress(1), dataset(), tmp_path / "empty", best=True)
    with pytest.raises(UserError, match="has no optimizer state; --reset_optimizer=True"):
        resume.load(trainer(1), dataset(), tmp_path / "empty")
    monkeypatch.setattr(distributed, "write_shards", lambda tensors, to: tensors or pytest.fail())
    for a.layout in ("fsdp", ""):  # before the first update there are none
        resume.save(a, Progress(0), dataset(), tmp_path / a.layout / "0", best=True)
        assert resume.load(trainer(1), dataset(), tmp_path / a.layout / "0").step == 0
    b = trainer(1, reset_optimizer=True)
    resume.load(b, dataset(), tmp_path)
    assert not b.optimizer.state and torch.equal(*(t.model.transformer.wte.weight for t in (a, b)))


@pytest.mark.parametrize("plan", ['{"threads": 33}', '{"threads": 0}', "[", "[]"])
def test_threads_of_an_old_plan_are_compared(plan: str, tmp_path: Path, monkeypatch, capsys):
    """Checkpoints of version 0.1.0 do not tell them."""
    a = trainer()
    step(a)
    monkeypatch.setattr(resume, "_threads", lambda t: None)
    resume.save(a, Progress(1), dataset(), tmp_path, best=True)
    monkeypatch.undo()
    (tmp_path / "plan.json").write_text(plan)
    resume.load(trainer(1), dataset(), tmp_path)
    assert ("(was 33)" in capsys.readouterr().out) == ("33" in plan)


@pytest.mark.parametrize("which", ["weight", "moment"])
def test_what_is_not_finite_is_not_resumed(which: str, tmp_path: Path):
    a = trainer()
    step(a)
    p = a.model.transformer.wte.weight
    (p if which == "weight" else a.optimizer.state[p]["exp_avg"]).data[0, 0] = float("nan")
    resume.save(a, Progress(1), dataset(), tmp_path, best=True)
    with pytest.raises(UserError, match="wte.weight is not finite; resume from an older"):
        resume.load(trainer(1), dataset(), tmp_path)
