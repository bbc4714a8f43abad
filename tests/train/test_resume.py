"""What is saved is what is loaded; resuming whole runs is in test_train.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from fastgpt.config import settings
from fastgpt.config.presets import laptop
from fastgpt.data.token_files import Dataset
from fastgpt.errors import UserError
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.train import optim, resume
from fastgpt.train.resume import Progress
from fastgpt.train.trainer import Trainer


def trainer(seed: int, dtype: str = "float32", n_embd: int = 16, **changes) -> Trainer:
    model = GPT(ModelShape(1, 2, n_embd, 8, 50, bias=True)).init_weights(seed)
    config = settings.replace(laptop(), **changes)
    return Trainer(model, config, Machine(torch.device("cpu"), dtype))


def dataset(fingerprint: str = "abc") -> Dataset:
    return cast(Dataset, SimpleNamespace(folder="text", fingerprint=fingerprint, tokenizer=None))


def tokens(step: int) -> torch.Tensor:
    return torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_loaded_is_what_was_saved(dtype: str, tmp_path: Path):
    """Weights, moments, loss scale and progress: the next step is the same to the bit."""
    a, b = trainer(0, dtype), trainer(1, dtype)
    if dtype == "float16":
        a.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # not what a new run begins with
    for step in range(2):
        a.step(step, tokens(step))
    progress = Progress(2, 1, 3.5, 3.25)
    folder = resume.save(a, progress, dataset(), tmp_path, best=True)
    assert folder == tmp_path / "checkpoints" / "step_00000002" and folder.is_dir()
    assert resume.load(b, dataset(), tmp_path) == progress
    assert a.state_dict() == b.state_dict()
    for t in (a, b):
        t.step(2, tokens(2))
    moments = [optim.state_tensors(t.optimizer, t.model) for t in (a, b)]
    for x, y in ((a.model.state_dict(), b.model.state_dict()), moments):
        assert x.keys() == y.keys()
        assert all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize(
    ("key", "value"),
    [("n_layer", 2), ("n_head", 1), ("block_size", 9), ("vocab_size", 51), ("bias", False)],
)
def test_the_shape_of_a_run_is_frozen(key: str, value, tmp_path: Path):
    """Each part of it, also where the tensors would fit."""
    resume.save(trainer(0), Progress(1), dataset(), tmp_path, best=False)
    shape = replace(ModelShape(1, 2, 16, 8, 50, bias=True), **{key: value})
    other = Trainer(GPT(shape), laptop(), Machine(torch.device("cpu"), "float32"))
    was = getattr(ModelShape(1, 2, 16, 8, 50, bias=True), key)
    with pytest.raises(UserError, match=f"--{key}={value}: the run in .* has {key}={was}"):
        resume.load(other, dataset(), tmp_path)


def test_another_model_or_other_data_is_refused(tmp_path: Path):
    resume.save(trainer(0), Progress(1), dataset(), tmp_path, best=False)
    with pytest.raises(UserError, match="--n_embd=32: the run in .* has n_embd=16"):
        resume.load(trainer(0, n_embd=32), dataset(), tmp_path)
    with pytest.raises(UserError, match="was trained on other data than text holds"):
        resume.load(trainer(0), dataset("xyz"), tmp_path)


def test_optimizer_tensors_are_checked(tmp_path: Path):
    """Fused AdamW would crash on a moment of another shape, and start anew without a word."""
    a = trainer(0)
    a.step(0, tokens(0))
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
    b = trainer(1, reset_optimizer=True)
    resume.load(b, dataset(), tmp_path)
    assert not b.optimizer.state and torch.equal(*(t.model.transformer.wte.weight for t in (a, b)))


@pytest.mark.parametrize("which", ["weight", "moment"])
def test_what_is_not_finite_is_not_resumed(which: str, tmp_path: Path):
    a = trainer(0)
    a.step(0, tokens(0))
    p = a.model.transformer.wte.weight
    (p if which == "weight" else a.optimizer.state[p]["exp_avg"]).data[0, 0] = float("nan")
    resume.save(a, Progress(1), dataset(), tmp_path, best=True)
    with pytest.raises(UserError, match="wte.weight is not finite; resume from an older"):
        resume.load(trainer(1), dataset(), tmp_path)
