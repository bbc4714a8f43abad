"""The memory estimate against what autograd keeps, and on a GPU against the allocator's peak."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastgpt.config import settings
from fastgpt.config.presets import PRESETS, gpt2, laptop
from fastgpt.config.schema import Config
from fastgpt.errors import UserError
from fastgpt.model.build import build
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.train import memory
from fastgpt.train.trainer import Trainer
from tests.fakes import FakeTensorMode, fake_model, fused_table

BATCH = 7  # so that tokens are no size that a weight has
GPT2_SIZES = ("gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl")


def shape_of(preset: str, bias: bool = False) -> ModelShape:
    return ModelShape.of(settings.replace(PRESETS[preset](), bias=bias).model, 50257)


def kept(model: GPT, batch_size: int) -> dict[str, int]:
    """Bytes that autograd keeps after a forward pass: of activations, of weights cast, of loss."""
    storages: dict[int, tuple[int, torch.Size, torch.Tensor]] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        storages[storage._cdata] = (storage.nbytes(), t.shape, t)
        return t

    tokens = torch.zeros(batch_size, model.shape.block_size, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(tokens, tokens)
    masters = {p.untyped_storage()._cdata for p in model.parameters()}
    matrices = {s for p in model.parameters() if p.ndim == 2 for s in (p.shape, p.shape[::-1])}
    out = {"casts": 0, "loss": 0, "activations": 0}
    for key, (size, shape, t) in storages.items():
        if key in masters or t.dtype == torch.long:
            continue
        vocabulary = model.shape.padded_vocab_size, model.shape.vocab_size
        if any(n in vocabulary for n in shape) and t.dtype == torch.float32:
            out["loss"] += size
        elif shape in matrices:
            out["casts"] += size
        else:
            out["activations"] += size
    return out


@pytest.mark.quick("gpt2-*", "gpt2_medium-True")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("preset", GPT2_SIZES)
def test_fused_ops_keep_what_the_estimate_says(preset, bias, monkeypatch):
    shape = shape_of(preset, bias)
    table = fused_table(monkeypatch)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(shape, table, monkeypatch)
        found = kept(model, BATCH)
        assert sum(p.numel() for p in model.parameters()) == memory.n_parameters(shape)
    says = memory.estimate(shape, BATCH, torch.float16)
    loss_gradient = BATCH * shape.block_size * shape.n_embd * 2
    assert found["activations"] == pytest.approx(says.activations + loss_gradient, rel=0.01)
    assert found["loss"] == 4 * shape.padded_vocab_size * shape.n_embd
    blocks = 12 * shape.n_embd**2 * shape.n_layer * 2
    assert found["casts"] == pytest.approx(blocks, rel=1e-3), "the head's cast is not kept"


def test_nothing_grows_with_t_squared(monkeypatch):
    """At four times the context and a quarter of the batch as much is kept."""
    table, sizes = fused_table(monkeypatch), []
    for block_size, batch_size in ((1024, 28), (4096, 7)):
        shape = dataclasses.replace(shape_of("gpt2"), block_size=block_size)
        with FakeTensorMode(allow_non_fake_inputs=True):
            sizes.append(kept(fake_model(shape, table, monkeypatch), batch_size)["activations"])
    assert sizes[0] == sizes[1]


def test_checkpointing_keeps_two_tensors_a_block(monkeypatch):
    shape, table = shape_of("gpt2_xl"), fused_table(monkeypatch)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(shape, table, monkeypatch)
        model.checkpointing = True
        found = kept(model, BATCH)
    says = memory.estimate(shape, BATCH, torch.float16, checkpointing=True)
    plain = memory.estimate(shape, BATCH, torch.float16)
    loss_gradient = BATCH * shape.block_size * shape.n_embd * 2
    assert found["activations"] == pytest.approx(says.activations + loss_gradient, rel=0.01)
    assert says.activations < plain.activations / 7


def test_eager_ops_keep_more(monkeypatch):
    shape = shape_of("gpt2")
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = kept(fake_model(shape, None, monkeypatch), BATCH)
    says = memory.estimate(shape, BATCH, torch.float16, fused=False)
    assert found["activations"] == pytest.approx(says.activations, rel=0.03)
    assert says.total > 1.3 * memory.estimate(shape, BATCH, torch.float16).total


def test_the_presets_fit_where_they_should():
    """By the estimate: each preset's own batch in 80 GB, and 124M at 64 x 1024 in 40 GB."""
    for preset in GPT2_SIZES:
        batch_size = PRESETS[preset]().optim.batch_size
        total = memory.estimate(shape_of(preset), batch_size, torch.bfloat16).total
        assert total < 0.9 * 80e9, f"{preset}: {total / 1e9:.1f} GB"
    assert memory.estimate(shape_of("gpt2"), 64, torch.bfloat16).total < 40e9


def test_micro_batches_cut_the_rows_evenly():
    assert list(memory.micro_batches(12)) == [12, 6, 4, 3, 2, 1]


GPU = Machine(torch.device("cuda"))


def tiny(**values) -> tuple[GPT, Config]:
    config = settings.replace(laptop(), n_layer=2, n_head=2, n_embd=64, **values)
    return build(config, 61, Machine(torch.device("cpu"))), config


def test_auto_batch_size_is_a_flag_that_leaves_the_global_batch():
    config = settings.apply_flags(gpt2(), {"batch_size": "auto"})
    assert config.optim.auto_batch_size
    assert config.optim.batch_size == gpt2().optim.batch_size
    with pytest.raises(UserError, match="--batch_size=all: wanted a whole number >= 1"):
        settings.apply_flags(gpt2(), {"batch_size": "all"})


def test_auto_batch_size_on_a_cpu_stays_and_says_why(capsys):
    model, config = tiny(batch_size=3, gradient_accumulation_steps=4)
    assert memory.fit_batch_size(model, config, Machine(torch.device("cpu"))) == 3
    assert "needs a GPU" in capsys.readouterr().out


@pytest.mark.parametrize(("room", "size"), [(12, 12), (5, 4), (1, 1)])
def test_the_largest_micro_batch_that_runs_is_taken(room, size, monkeypatch, capsys):
    """The search alone: a device on which more than `room` sequences run out of memory."""
    model, config = tiny(batch_size=2, gradient_accumulation_steps=6)
    monkeypatch.setattr(memory, "_free", lambda device: 1 << 40)
    monkeypatch.setattr(memory, "_fits", lambda model, machine, n: n <= room)
    assert memory.fit_batch_size(model, config, GPU) == size
    assert f"batch_size {size} x {12 // size}" in capsys.readouterr().out
    t = Trainer(model, config, Machine(torch.device("cpu")), batch_size=size)
    assert t.micro_batch == size
    o = t.resolved.optim
    assert (o.batch_size, o.gradient_accumulation_steps) == (size, 12 // size)


def test_not_even_one_sequence(monkeypatch):
    model, config = tiny(auto_batch_size=True)
    monkeypatch.setattr(memory, "_free", lambda device: 1 << 40)
    monkeypatch.setattr(memory, "_fits", lambda model, machine, n: False)
    with pytest.raises(UserError, match="not one sequence of --block_size=64") as e:
        memory.fit_batch_size(model, config, GPU)
    assert "--activation_checkpointing=True" in str(e.value)


def test_out_of_memory_names_what_was_tried_and_what_helps():
    (model, config), cpu = tiny(batch_size=4, gradient_accumulation_steps=2), torch.device("cpu")
    line = memory.out_of_memory(config, model, cpu, 8)
    assert "--batch_size=8 x --block_size=64" in line and "GiB" in line
    assert "--batch_size=auto" in line and "--activation_checkpointing=True" in line
    assert "--gradient_accumulation_steps (1)" in line
    config = settings.replace(config, activation_checkpointing=True, auto_batch_size=True)
    line = memory.out_of_memory(config, model, cpu, 8)
    assert "checkpointing" not in line and "--batch_size=auto" not in line


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_estimate_against_the_real_peak(checkpointing):
    config = settings.replace(gpt2(), batch_size=16, activation_checkpointing=checkpointing)
    machine = Machine(torch.device("cuda"), "bfloat16")
    model = build(config, 50257, machine)
    t = Trainer(model, config, machine)
    tokens = torch.randint(50257, (32, 1025), device=t.device)  # two micro-batches
    t.step(0, tokens)
    torch.cuda.reset_peak_memory_stats()
    t.step(1, tokens)
    peak = torch.cuda.max_memory_allocated()
    assert peak == pytest.approx(memory.of_model(model, 16).total, rel=0.15)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_batch_size_on_a_gpu_runs_and_keeps_the_rows():
    config = tiny(batch_size=2, gradient_accumulation_steps=6)[1]
    model = build(config, 61, GPU)
    assert memory.fit_batch_size(model, config, GPU) == 12
    assert all(p.grad is None for p in model.parameters())
