"""The memory estimate against what autograd keeps, and on a GPU against the allocator's peak."""

from __future__ import annotations

import math

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
from fastgpt.train.distributed import Ranks
from fastgpt.train.trainer import Trainer
from tests.fakes import FakeTensorMode, fake_model, fused_table

BATCH = 7  # so that tokens are no size that a weight has
GPT2_SIZES = ("gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl")


@pytest.fixture
def model_of(monkeypatch):
    """Makes a preset's model of fake tensors, on the Triton ops or eager."""

    def make(preset: str, fused: bool = True, **changes) -> GPT:
        shape = ModelShape.of(settings.replace(PRESETS[preset](), **changes).model, 50257)
        table = fused_table(monkeypatch) if fused else None
        with FakeTensorMode(allow_non_fake_inputs=True):
            return fake_model(shape, table, monkeypatch)

    return make


def kept(model: GPT, batch_size: int = BATCH) -> dict[str, int]:
    """Bytes that autograd keeps after a forward pass: of activations, of weights cast, of loss."""
    storages: dict[int, tuple[int, torch.Size, torch.Tensor]] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        storages[storage._cdata] = (storage.nbytes(), t.shape, t)
        return t

    with FakeTensorMode(allow_non_fake_inputs=True):
        tokens = torch.zeros(batch_size, model.shape.block_size, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(tokens, tokens)
    masters = {p.untyped_storage()._cdata for p in model.parameters()}
    matrices = {s for p in model.parameters() if p.ndim == 2 for s in (p.shape, p.shape[::-1])}
    vocabulary = model.shape.padded_vocab_size, model.shape.vocab_size
    out = {"casts": 0, "loss": 0, "activations": 0}
    for key, (size, shape, t) in storages.items():
        if key in masters or t.dtype == torch.long:
            continue
        of_loss = t.dtype == torch.float32 and any(n in vocabulary for n in shape)
        out["loss" if of_loss else "casts" if shape in matrices else "activations"] += size
    return out


def total(model: GPT, batch_size: int = BATCH, optimizer: str = "adamw") -> int:
    return sum(memory.estimate(model, batch_size, optimizer).values())


def activations(model: GPT) -> int:
    """The estimate, with the loss's gradient."""
    loss_gradient = BATCH * model.shape.block_size * model.shape.n_embd * 2
    return memory.estimate(model, BATCH)["activations"] + loss_gradient


@pytest.mark.quick("gpt2-*", "gpt2_medium-True")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("preset", GPT2_SIZES)
def test_fused_ops_keep_what_the_estimate_says(preset, bias, model_of):
    model = model_of(preset, bias=bias)
    found, shape = kept(model), model.shape
    assert found["activations"] == pytest.approx(activations(model), rel=0.01)
    assert found["loss"] == 4 * shape.padded_vocab_size * shape.n_embd
    blocks = 12 * shape.n_embd**2 * shape.n_layer * 2
    assert found["casts"] == pytest.approx(blocks, rel=1e-3), "the head's cast is not kept"


def test_nothing_grows_with_t_squared(model_of):
    """At four times the context and a quarter of the batch as much is kept."""
    short, long = (model_of("gpt2", block_size=n) for n in (1024, 4096))
    assert kept(short, 28)["activations"] == kept(long, 7)["activations"]


def test_checkpointing_keeps_two_tensors_a_block(model_of):
    model = model_of("gpt2_xl")
    plain = memory.estimate(model, BATCH)
    model.checkpointing = True
    assert kept(model)["activations"] == pytest.approx(activations(model), rel=0.01)
    assert memory.estimate(model, BATCH)["activations"] < plain["activations"] / 7


def test_eager_ops_keep_more(model_of):
    eager = model_of("gpt2", fused=False)
    says = memory.estimate(eager, BATCH)
    assert kept(eager)["activations"] == pytest.approx(says["activations"], rel=0.03)
    assert total(eager) > 1.3 * total(model_of("gpt2"))


def test_the_presets_fit_where_they_should(model_of):
    """By the estimate: each preset's own batch in 80 GB, and 124M at 64 x 1024 in 40 GB."""
    for preset in GPT2_SIZES:
        bytes = total(model_of(preset), PRESETS[preset]().optim.batch_size)
        assert bytes < 0.9 * 80e9, f"{preset}: {bytes / 1e9:.1f} GB"
    model = model_of("gpt2")
    assert total(model, 64) < 40e9
    assert total(model, optimizer="muon") == total(model) - 4 * 12 * 12 * 768**2


CPU, GPU = Machine(torch.device("cpu")), Machine(torch.device("cuda"))


def tiny(**values) -> tuple[GPT, Config]:
    config = settings.replace(laptop(), n_layer=2, n_head=2, n_embd=64, **values)
    return build(config, 61, CPU), config


def test_auto_batch_size_is_a_flag_that_leaves_the_global_batch():
    config = settings.apply_flags(gpt2(), {"batch_size": "auto"})
    assert config.optim.auto_batch_size
    assert config.optim.batch_size == gpt2().optim.batch_size
    with pytest.raises(UserError, match="--batch_size=all: wanted a whole number >= 1"):
        settings.apply_flags(gpt2(), {"batch_size": "all"})


class TwoRanks(Ranks):
    """Rank 0 of two; on the other one everything takes as long, and `slow` sizes twice as long."""

    def __init__(self):
        super().__init__(0, 2)

    def gather(self, value):
        return [value, 2 * value]


def pretend(monkeypatch, room: int, speeds: dict[int, float]) -> list[int]:
    """A device on which more than `room` sequences do not fit; returns the sizes that were run.

    speeds: thousand tokens per second by size, 100 for all others
    """
    tried: list[int] = []

    def seconds(model, machine, size, steps):
        tried.append(size)
        tokens = steps * size * model.shape.block_size
        return tokens / speeds.get(size, 100) / 1000 if size <= room else math.inf

    monkeypatch.setattr(memory, "_free", lambda device: 1 << 40)
    monkeypatch.setattr(memory, "_seconds", seconds)
    return tried


@pytest.mark.parametrize(
    ("device", "room", "speeds", "wanted"),
    [
        (GPU, 12, {}, 12),  # of equals the largest
        (GPU, 12, {4: 100.9}, 12),
        (GPU, 12, {4: 102, 2: 101}, 4),
        (GPU, 12, {3: 200}, 12),  # more than 2/3 of 4, which is timed
        (GPU, 5, {4: 50, 2: 60, 1: 55}, 2),
        (GPU, 1, {}, 1),
        (CPU, 12, {12: 900, 6: 900}, 3),  # at most the config's
        (CPU, 12, {1: 101.5}, 1),
    ],
)
def test_the_fastest_micro_batch_that_fits_is_taken(
    device, room, speeds, wanted, monkeypatch, capsys
):
    model, config = tiny(batch_size=3, gradient_accumulation_steps=4)
    tried = pretend(monkeypatch, room, speeds)
    assert memory.fastest_batch_size(model, config, device, Ranks()) == wanted
    lines = capsys.readouterr().out.splitlines()
    sizes = {12: [12, 6, 4, 2], 5: [4, 2, 1], 1: [1]}[room] if device is GPU else [3, 2, 1]
    assert [int(line.split()[1]) for line in lines] == sizes
    (chosen,) = (line for line in lines if line.endswith(", chosen"))
    speed = 1000 * speeds.get(wanted, 100)
    assert chosen == f"batch_size {wanted} x {12 // wanted}: {speed:,.0f} tokens/s, chosen"
    assert tried[-3 * len(sizes) :] == [*sizes[::-1], *sizes, *sizes[::-1]], "in turns"
    t = Trainer(model, config, CPU, batch_size=wanted)
    o = t.resolved.optim
    assert (o.batch_size, o.gradient_accumulation_steps) == (wanted, 12 // wanted)


def test_the_slowest_rank_counts(monkeypatch, capsys):
    model, config = tiny(batch_size=3, gradient_accumulation_steps=4)
    pretend(monkeypatch, 12, {3: 103})
    assert memory.fastest_batch_size(model, config, GPU, TwoRanks()) == 3
    assert "batch_size 3 x 2: 103,000 tokens/s, chosen" in capsys.readouterr().out.splitlines()


def test_one_round_is_enough_where_it_takes_long(monkeypatch):
    model, config = tiny(batch_size=3, gradient_accumulation_steps=4)
    tried = pretend(monkeypatch, 12, dict.fromkeys(range(13), 0.01))
    memory.fastest_batch_size(model, config, GPU, Ranks())
    assert tried == [12, 2, 4, 6, 12]


def test_not_one_sequence_fits(monkeypatch):
    model, config = tiny(batch_size=2, gradient_accumulation_steps=6)
    tried = pretend(monkeypatch, 0, {})
    wrong = "not one sequence of --block_size=64 .*--activation_checkpointing=True"
    with pytest.raises(UserError, match=wrong):
        memory.fastest_batch_size(model, config, GPU, Ranks())
    assert tried == [12, 6, 4, 3, 2, 1], "micro-batches of one size"


def test_timing_leaves_everything_as_it_was():
    """Weights, gradients and the random generator, on which exact resume depends."""
    model, config = tiny(batch_size=2, gradient_accumulation_steps=2, dropout=0.1)
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    assert memory.fastest_batch_size(model, config, CPU, Ranks()) in (1, 2)
    assert all(map(torch.equal, before, model.parameters()))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_out_of_memory_names_what_was_tried_and_what_helps():
    model, config = tiny(batch_size=4, gradient_accumulation_steps=2)
    line = memory.out_of_memory(config, model, CPU.device, 8)
    assert "--batch_size=8 x --block_size=64" in line and "GiB" in line
    assert "--batch_size=auto" in line and "--activation_checkpointing=True" in line
    assert "--gradient_accumulation_steps (1)" in line
    config = settings.replace(config, activation_checkpointing=True, auto_batch_size=True)
    line = memory.out_of_memory(config, model, CPU.device, 8)
    assert "checkpointing" not in line and "--batch_size=auto" not in line


@pytest.mark.cuda
@pytest.mark.parametrize("checkpointing", [False, True])
def test_estimate_against_the_real_peak(checkpointing):
    split = {"batch_size": 16, "gradient_accumulation_steps": 2}
    config = settings.replace(gpt2(), **split, activation_checkpointing=checkpointing)
    machine = Machine(torch.device("cuda"), "bfloat16")
    t = Trainer(build(config, 50257, machine), config, machine)
    tokens = torch.randint(50257, (32, 1025), device=t.device)
    t.step(0, tokens)
    torch.cuda.reset_peak_memory_stats()
    t.step(1, tokens)
    peak = torch.cuda.max_memory_allocated()
    assert peak == pytest.approx(total(t.model, 16), rel=0.15)


@pytest.mark.cuda
def test_auto_batch_size_on_a_gpu_runs_and_keeps_the_rows():
    config = tiny(batch_size=2, gradient_accumulation_steps=6)[1]
    model = build(config, 61, GPU)
    assert memory.fastest_batch_size(model, config, GPU, Ranks()) in (12, 6, 4, 2)
    assert all(p.grad is None for p in model.parameters())
