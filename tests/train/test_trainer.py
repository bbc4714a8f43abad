"""One optimizer step: equal to the same batch in one piece, and never from bad numbers."""

from __future__ import annotations

import copy
import math
import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from torch._dynamo.utils import counters

from fastgpt.config.settings import replace
from fastgpt.errors import UserError
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.model.kernels import Kernels, Selected
from fastgpt.train import cuda_graph, optim
from fastgpt.train import trainer as trainer_module
from fastgpt.train.trainer import NonFinite, Trainer, dropout_seed
from tests.fakes import interpreted
from tests.train.helpers import DEVICE, SHAPE, batch, make_trainer, weights


def state(t: Trainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in optim.state_tensors(t.optimizer, t.model).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- the update -----------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_is_the_batch_in_pieces(accumulation):
    a, b = make_trainer(), make_trainer(accumulation=accumulation)
    for step in range(3):
        (loss_a, norm_a), (loss_b, norm_b) = (t.step(step, batch(step)) for t in (a, b))
        torch.testing.assert_close(loss_a, loss_b)
        torch.testing.assert_close(norm_a, norm_b, rtol=1e-4, atol=1e-6)
    for p, q in zip(weights(a), weights(b), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("grad_clip", [0.0, 0.3, 1e6])
def test_is_adamw_with_clipping_and_schedule(grad_clip):
    """Against the same update written with PyTorch's unfused AdamW."""
    t = make_trainer(grad_clip=grad_clip)
    model, c = copy.deepcopy(t.model), t.config.optim
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": c.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    oracle = torch.optim.AdamW(groups, lr=0.0, betas=(c.beta1, c.beta2), foreach=False)
    for step in range(4):
        _, norm = t.step(step, batch(step))
        optim.set_learning_rate(oracle, optim.learning_rate(step, c))
        oracle.zero_grad()
        model(batch(step)[:, :-1], batch(step)[:, 1:]).backward()
        want = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        assert norm.item() == pytest.approx(want.item(), rel=1e-5) and want > 0.3
        oracle.step()
    for p, q in zip(weights(t), model.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-5, atol=1e-7)


def test_dropout_depends_on_the_step_alone():
    """Its seeds are SplitMix64's published first outputs from 0, without the sign bit."""
    a, b, c = (make_trainer(dropout=0.2) for _ in range(3))
    torch.rand(7)  # another draw from the generator
    first = a.step(5, batch())[0]
    torch.rand(3)
    assert torch.equal(first, b.step(5, batch())[0])
    assert not torch.equal(first, c.step(6, batch())[0])
    known = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    assert [dropout_seed(0, step) for step in range(3)] == [x % 2**63 for x in known]


def test_evaluation_changes_nothing_and_repeats():
    t = make_trainer(dropout=0.2)
    before = weights(t)
    assert torch.equal(t.losses(batch(1)), t.losses(batch(1))) and t.model.training
    assert all(map(torch.equal, before, weights(t)))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_threads_train_to_the_same_bit(compiled):
    """A run that is resumed equals one that is not, and several threads add up one gradient."""
    shape = ModelShape(1, 2, 128, 64, 50, bias=False)  # enough rows that each thread has some

    def grow() -> list[torch.Tensor]:
        t = make_trainer(shape, rows=12, compile=compiled)
        for step in range(3):
            t.step(step, batch(rows=12, shape=shape))
        return weights(t)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = (grow() for _ in range(6))
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(map(torch.equal, first, other))


# --- numbers that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_numbers_never_reach_the_weights(value):
    """The update of the bad step is skipped, and so are later ones until the host looks."""
    t = make_trainer()
    t.step(0, batch())
    before, moments = weights(t), state(t)
    weight = t.model.transformer.h[1].mlp.c_fc.weight.data
    good = weight[0, 0].item()
    weight[0, 0] = value
    t.step(1, batch(1))
    assert "transformer.h.1.mlp.c_fc.weight" in t.diagnose(1, batch(1))["not_finite"]
    weight[0, 0] = good
    t.step(2, batch(2))
    assert all(map(torch.equal, before, weights(t))) and same(state(t), moments)
    with pytest.raises(NonFinite) as e:
        t.check()
    assert e.value.step == 1


def test_an_optimizer_that_cannot_skip_is_not_asked_to():
    """Gradients are divided before the update, and the host looks at once (mps)."""
    t, plain = make_trainer(grad_clip=0.3), make_trainer(grad_clip=0.3)
    groups = t.optimizer.param_groups
    t.optimizer = torch.optim.AdamW([{**g, "fused": False} for g in groups], betas=(0.9, 0.99))
    for step in range(2):
        a, b = (x.step(step, batch(step)) for x in (t, plain))
        torch.testing.assert_close(a, b)
    for p, q in zip(weights(t), weights(plain), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    t.model.transformer.wpe.weight.data[0, 0] = math.nan
    with pytest.raises(NonFinite, match="step 2"):
        t.step(2, batch())


@pytest.mark.parametrize("scaled", [False, True])
def test_a_gradient_that_is_not_finite_is_a_fault_unless_a_scale_is_sought(scaled):
    """The loss itself is finite, at the very first step."""
    t = make_trainer()
    t.scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    t.model.transformer.wpe.weight.register_hook(lambda g: g * math.inf)
    before = weights(t)
    if scaled:
        loss, norm = t.step(0, batch())
        assert loss.isfinite() and not norm.isfinite()
        t.check()
    else:
        t.step(0, batch())
        with pytest.raises(NonFinite, match="step 0"):
            t.check()
    assert all(map(torch.equal, before, weights(t)))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_skips_the_update_of_an_infinite_loss(optimizer):
    """Its gradients are finite, so loss scaling alone would take them, and those that follow."""
    t = make_trainer(dtype="float16", optimizer=optimizer, warmup_iters=0)
    t.step(0, batch())
    before, moments, forward = weights(t), state(t), t.forward
    t.forward = lambda *inputs: forward(*inputs) + math.inf
    t.step(1, batch(1))
    t.forward = forward
    t.step(2, batch(2))
    assert all(map(torch.equal, before, weights(t))) and same(state(t), moments)
    with pytest.raises(NonFinite, match="step 1"):
        t.check()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_finds_its_scale_and_learns(optimizer):
    """Infinite gradients skip the update and halve the scale; then the loss falls."""
    t = make_trainer(dtype="float16", optimizer=optimizer, warmup_iters=0)
    t.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    before = weights(t)
    t.step(0, batch())
    assert all(map(torch.equal, before, weights(t))), "an infinite gradient reached the weights"
    losses = [t.step(step, batch())[0].item() for step in range(1, 40)]
    assert t.scaler.get_scale() < 2.0**40 and losses[-1] < losses[0] - 0.1


# --- 16-bit weight copies and main grads ----------------------------------------------------------


def copies_follow(model: GPT) -> bool:
    return all(torch.equal(copy, p.to(copy.dtype)) for p, copy in model.weight_copies.items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weight_copies_change_no_bit(dtype, optimizer, monkeypatch):
    settings = {"dtype": dtype, "accumulation": 2, "optimizer": optimizer}
    copied = make_trainer(**settings)
    monkeypatch.setattr(GPT, "make_weight_copies", lambda model: None)
    plain = make_trainer(**settings)
    assert len(copied.model.weight_copies) == 8 and not plain.model.weight_copies
    for step in range(4):
        a, b = (t.step(step, batch(step)) for t in (copied, plain))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        assert copies_follow(copied.model)
    assert torch.equal(copied.losses(batch(9)), plain.losses(batch(9)))
    assert same(copied.model.state_dict(), plain.model.state_dict())
    assert all(p.dtype == torch.float32 for p in weights(copied))


def test_what_has_a_copy():
    """The matrices of the blocks, and the head's if its op takes a copy."""
    assert not make_trainer().model.weight_copies

    def copied(implementation: str) -> set[str]:
        selected = Selected("linear_cross_entropy", implementation, "")
        model = GPT(SHAPE, 0.0, Kernels({}, (selected,)), torch.bfloat16)
        model.make_weight_copies()
        names = {p: n for n, p in model.named_parameters()}
        return {names[p] for p in model.weight_copies}

    blocks = {n for n, p in make_trainer().model.named_parameters() if ".h." in n and p.ndim == 2}
    assert copied("eager") == blocks
    assert copied("triton") == blocks | {"transformer.wte.weight"}


@pytest.fixture
def main_grads(monkeypatch):
    """Lets gradients of several micro-batches add to tensors that stay, as they do on a GPU."""

    def use(use: bool) -> None:
        monkeypatch.setattr(trainer_module, "accumulates_in_fp32", lambda device: use)

    use(True)
    return use


@pytest.mark.parametrize(
    ("kernels", "optimizer"),
    [("eager", "adamw"), ("eager", "muon"),
     pytest.param("triton", "adamw", marks=pytest.mark.slow)],
)  # fmt: skip
def test_main_grads_train_as_without_them(kernels, optimizer, main_grads, monkeypatch):
    """In bf16, or fp16 where kernels are interpreted."""
    settings = {"kernels": kernels, "dtype": "bfloat16", "accumulation": 2, "optimizer": optimizer}
    if kernels == "triton":
        if torch.cuda.is_available():
            pytest.skip("the kernels run for real here")
        interpreted(monkeypatch)
        settings |= {"dtype": "float16", "shape": ModelShape(2, 2, 64, 16, 50, bias=True)}
    added = make_trainer(**settings)
    main_grads(False)
    plain = make_trainer(**settings)
    kept = {n: p.grad for n, p in added.model.named_parameters() if p.grad is not None}
    assert len(kept) == 8 + (kernels == "triton")  # the head's is with its kernel
    assert all(p.grad is None for p in plain.model.parameters())
    if kernels == "triton":  # whose scale starts where gradients overflow
        for t in (added, plain):
            t.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    added.warm_up(0, batch()[:4])
    for step in range(2 if kernels == "triton" else 4):  # interpreted: a minute
        (loss, norm), (wanted, its_norm) = (t.step(step, batch(step)) for t in (added, plain))
        torch.testing.assert_close(loss, wanted, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(norm, its_norm, rtol=1e-2, atol=1e-3)
        parameters = added.model.named_parameters()
        assert all(n not in kept or (p.grad is kept[n] and not p.grad.any()) for n, p in parameters)
    found, wanted = (t.diagnose(4, batch(4))["gradient_norms"] for t in (added, plain))
    for name, norm in wanted.items():
        assert float(found[name]) == pytest.approx(float(norm), rel=3e-2, abs=1e-4), name
    assert added.model.state_dict().keys() == plain.model.state_dict().keys()


def test_of_one_micro_batch_there_is_nothing_to_add(main_grads):
    assert all(p.grad is None for p in make_trainer(dtype="bfloat16").model.parameters())


# --- on the Triton kernels: on a GPU, or interpreted, in fp32 -------------------------------------

ONE_LAYER = ModelShape(1, 1, 32, 20, 61, bias=True)  # the interpreter is slow


@pytest.fixture
def on_kernels(monkeypatch):
    """A trainer that takes one row per step."""
    if DEVICE.type == "cpu":
        interpreted(monkeypatch)

    def make(kernels: str, dropout: float = 0.0, bias: bool = True, **settings) -> Trainer:
        shape = ModelShape(**vars(ONE_LAYER) | {"bias": bias})
        settings |= {"warmup_iters": 2, "learning_rate": 1e-2, "dropout": dropout}
        t = make_trainer(shape, kernels, device=DEVICE, rows=1, **settings)
        assert {c.implementation for c in t.selected if c.op != "mlp"} == {kernels}
        return t

    return make


def row(step: int) -> torch.Tensor:
    return batch(step, 1, ONE_LAYER).to(DEVICE)


def test_gradients_are_the_eager_ones(on_kernels):
    grads = []
    for t in (on_kernels("eager", bias=False), on_kernels("triton", bias=False)):
        t._backward(0, row(0))
        grads.append({n: p.grad for n, p in t.model.named_parameters()})
    for name, want in grads[0].items():
        torch.testing.assert_close(grads[1][name], want, rtol=1e-3, atol=1e-6, msg=name)


def test_dropout_in_the_kernels_repeats_with_the_step(on_kernels):
    a, b, c = (on_kernels("triton", dropout=0.3) for _ in range(3))
    first = a.step(4, row(0))[0]
    assert torch.equal(first, b.step(4, row(0))[0])
    assert not torch.equal(first, c.step(5, row(0))[0])


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_steps_are_the_plain_ones(on_kernels, dropout):
    plain, checkpointed = on_kernels("triton", dropout), on_kernels("triton", dropout)
    checkpointed.model.checkpointing = True
    for step in range(2):
        a, b = (t.step(step, row(step)) for t in (plain, checkpointed))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# --- compiled -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_graph_and_no_recompile(on_kernels, checkpointing):
    """fullgraph refuses any break; after the first step and evaluation nothing compiles again."""
    t = on_kernels("triton", dropout=0.3)
    t.model.checkpointing = checkpointing
    torch._dynamo.reset()
    counters.clear()
    t.forward = torch.compile(t.model, backend="aot_eager", fullgraph=True)
    for step in range(3):
        assert torch.isfinite(t.step(step, row(step))[0])
        t.losses(row(step))
        assert counters["stats"]["unique_graphs"] == 2, "a step was compiled again"
    assert not counters["graph_break"]


@pytest.mark.quick("*aot_eager-bfloat16-2")
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_step_is_the_eager_one(backend, dtype, accumulation, main_grads):
    """aot_eager traces forward and backward as on a GPU, without needing a C++ compiler."""
    torch._dynamo.reset()
    eager, compiled = (make_trainer(dtype=dtype, accumulation=accumulation) for _ in range(2))
    compiled.forward = torch.compile(compiled.model, backend=backend, fullgraph=True)
    close = 1e-5 if backend == "aot_eager" else 1e-3
    for step in range(2):
        a, b = (t.step(step, batch(step))[0] for t in (eager, compiled))
        torch.testing.assert_close(a, b, rtol=close, atol=close)


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_warm_up_changes_nothing_and_tries_a_failed_compilation_once_more(
    failures, monkeypatch, capsys
):
    t = make_trainer(dropout=0.2)
    forward, before, calls = t.forward, weights(t), 0

    def broken(*args):
        nonlocal calls
        calls += 1
        if calls <= failures:
            raise OSError("a library that was cut off")
        return forward(*args)

    t.forward = broken
    monkeypatch.setattr(trainer_module, "use_private_compile_cache", lambda: "FOLDER")
    if failures < 2:
        t.warm_up(0, batch())
    else:
        with pytest.raises(UserError, match=r"compile failed \(.*cut off\); pass --compile=False"):
            t.warm_up(0, batch())
    said = capsys.readouterr().out
    assert calls == max(1, 1 + (failures > 0))
    assert ("cut off): compiling anew in FOLDER" in said) == (failures > 0)
    assert all(p.grad is None for p in t.model.parameters()) and not t.optimizer.state
    assert all(map(torch.equal, before, weights(t)))


def test_compiling_anew_leaves_the_shared_cache_alone(tmp_path: Path, monkeypatch):
    """Other projects and running jobs use that folder."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "shared"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    library = tmp_path / "shared/ab/cut.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"\x7fELF")
    folder = trainer_module.use_private_compile_cache()
    assert library.exists() and Path(folder).parent == tmp_path
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == folder


@pytest.mark.slow
def test_a_machine_that_cannot_compile_is_told_so(monkeypatch):
    monkeypatch.setattr(trainer_module, "use_private_compile_cache", lambda: "FOLDER")
    t = make_trainer(compile=True)
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent"), "fx_graph_cache": False}),
        pytest.raises(UserError, match=r"compile failed \(.*C.. compiler.*pass --compile=False"),
    ):
        t.warm_up(0, batch())


# --- as a CUDA graph ------------------------------------------------------------------------------


class Graph:
    """Stand-in for a CUDA graph of a micro-step: its loss and gradients, times a factor."""

    factor = 1.0

    def __init__(self, micro_step, micro_batch):
        self.micro_step = micro_step

    def __call__(self, micro_batch):
        return self.micro_step(micro_batch) * self.factor


@pytest.fixture
def graph(monkeypatch):
    """Lets a CUDA graph be wanted on a CPU; call it with the graph's factor."""
    monkeypatch.setattr(trainer_module, "StepGraph", Graph)
    monkeypatch.setattr(cuda_graph, "wanted", lambda *_: (True, "why"))
    return lambda factor: monkeypatch.setattr(Graph, "factor", factor)


@pytest.mark.parametrize("factor", [1.0, 1.019, 1.021, 0.979, math.nan])
def test_a_graph_is_compared_with_a_plain_step(factor, graph):
    graph(factor)
    t, plain = (make_trainer(accumulation=2, dropout=0.1) for _ in range(2))
    said = t.capture(0, batch()[:4])
    if abs(factor - 1) < 0.02:
        assert said == "each micro-batch is one CUDA graph (why)" and isinstance(t.graph, Graph)
        assert all(p.grad is None or not p.grad.any() for p in t.model.parameters())
    else:
        assert said.startswith("no CUDA graph (the graph gives ") and t.graph is None
        assert all(p.grad is None for p in t.model.parameters())
        assert torch.equal(t.step(0, batch())[0], plain.step(0, batch())[0])


def test_a_graph_may_give_exactly_nothing(graph, monkeypatch):
    t = make_trainer()
    monkeypatch.setattr(t, "micro_step", lambda tokens: torch.zeros(()))
    assert t.capture(0, batch()).startswith("each micro-batch")


def test_steps_go_on_without_a_graph_unless_it_was_asked_for(graph, monkeypatch):
    error: Exception = RuntimeError("no capture\nmore")

    def broken(micro_step, micro_batch):
        raise error

    t = make_trainer()
    assert make_trainer().capture(0, batch()) == "each micro-batch is one CUDA graph (why)"
    monkeypatch.setattr(trainer_module, "StepGraph", broken)
    assert t.capture(0, batch()) == "no CUDA graph (no capture)"
    t.config = replace(t.config, cuda_graph=True)
    with pytest.raises(UserError, match="--cuda_graph=True: no capture; leave the flag out"):
        t.capture(0, batch())
    error = torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        t.capture(0, batch())
    monkeypatch.setattr(cuda_graph, "wanted", lambda *_: (False, "why"))
    assert t.capture(0, batch()) == "no CUDA graph (why)"
