"""A broken cache of torch.compile's is cleared, and what is in it compiled anew, once."""

from __future__ import annotations

import pytest
import torch

from fastgpt.config import settings
from fastgpt.config.presets import laptop
from fastgpt.errors import UserError
from fastgpt.model.build import build
from fastgpt.model.device import Machine
from fastgpt.train import trainer as trainer_module
from fastgpt.train.trainer import Trainer


@pytest.fixture
def trainer(monkeypatch) -> Trainer:
    config = settings.replace(
        laptop(), n_layer=1, n_head=1, n_embd=16, block_size=8, device="cpu", compile=True,
        peak_tflops=1.0,
    )  # fmt: skip
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    monkeypatch.setattr(trainer_module, "compile_errors", lambda: (OSError,))
    machine = Machine.of("cpu", compile=True)
    return Trainer(build(config, 64, machine), config, machine)


def failing(trainer: Trainer, monkeypatch, times: int) -> list[str]:
    """Have forward passes fail so many times; what happens is in the list."""
    happened: list[str] = []
    plain = trainer.forward

    def forward(*tokens):
        happened.append("forward")
        if happened.count("forward") <= times:
            raise OSError("cabc.so: file too short")
        return plain(*tokens)

    trainer.forward = forward
    monkeypatch.setattr(
        trainer_module, "clear_compile_cache", lambda: happened.append("cleared") or "the-folder"
    )
    return happened


def test_it_is_cleared_and_compiled_anew(trainer, monkeypatch, capsys):
    happened = failing(trainer, monkeypatch, 1)
    trainer.warm_up(0, torch.zeros(2, 9, dtype=torch.int64))
    assert happened == ["forward", "cleared", "forward"]
    assert capsys.readouterr().out == (
        "torch.compile failed (OSError: cabc.so: file too short): the-folder is cleared, "
        "compiling anew\n"
    )
    assert all(p.grad is None for p in trainer.model.parameters())


def test_once(trainer, monkeypatch):
    happened = failing(trainer, monkeypatch, 5)
    with pytest.raises(UserError, match="torch.compile failed .*--compile=False goes without"):
        trainer.warm_up(0, torch.zeros(2, 9, dtype=torch.int64))
    assert happened == ["forward", "cleared", "forward"]


def test_what_is_cleared_is_pytorchs_own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    (tmp_path / "inductor/ab").mkdir(parents=True)
    (tmp_path / "inductor/ab/cut.so").write_bytes(b"\x7fELF")
    (tmp_path / "other").write_text("stays")
    assert trainer_module.clear_compile_cache() == str(tmp_path / "inductor")
    assert [p.name for p in tmp_path.iterdir()] == ["other"]
    assert (
        OSError in trainer_module.compile_errors()
        and ImportError in trainer_module.compile_errors()
    )
