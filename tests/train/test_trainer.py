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

from fastgpt.config.presets import laptop
from fastgpt.config.settings import replace
from fastgpt.errors import UserError
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.model.kernels import KernelOptions, select
from fastgpt.train import cuda_graph, optim
from fastgpt.train import trainer as trainer_module
from fastgpt.train.trainer import NonFinite, Trainer, dropout_seed

CPU = torch.device("cpu")


def trainer(
    accumulation: int = 1,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    **optim_changes,
) -> Trainer:
    changes = {"batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    config = replace(laptop(), kernels="eager", dropout=dropout, **changes, **optim_changes)
    table = select(CPU, options=KernelOptions("eager"))
    model = GPT(ModelShape(2, 2, 32, 16, 50, bias=True), dropout, table, dtype).init_weights(0)
    return Trainer(model, config, Machine(CPU))


def tokens(step: int = 0) -> torch.Tensor:
    return torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(step))


def weights(t: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in t.model.parameters()]


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_is_the_batch_in_pieces(accumulation):
    a, b = trainer(), trainer(accumulation)
    for step in range(3):
        (loss_a, norm_a), (loss_b, norm_b) = (t.step(step, tokens(step)) for t in (a, b))
        torch.testing.assert_close(loss_a, loss_b)
        torch.testing.assert_close(norm_a, norm_b, rtol=1e-4, atol=1e-6)
    for p, q in zip(weights(a), weights(b), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("grad_clip", [0.0, 0.3, 1e6])
def test_is_adamw_with_clipping_and_schedule(grad_clip):
    """Against the same update written with PyTorch's unfused AdamW."""
    t = trainer(grad_clip=grad_clip)
    model = copy.deepcopy(t.model)
    c = t.config.optim
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": c.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    oracle = torch.optim.AdamW(groups, lr=0.0, betas=(c.beta1, c.beta2), foreach=False)
    for step in range(4):
        _, norm = t.step(step, tokens(step))
        for group in oracle.param_groups:
            group["lr"] = optim.learning_rate(step, c)
        oracle.zero_grad()
        batch = tokens(step)
        model(batch[:, :-1], batch[:, 1:]).backward()
        limit = grad_clip or math.inf
        want = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        assert norm.item() == pytest.approx(want.item(), rel=1e-5) and want > 0.3
        oracle.step()
    for p, q in zip(weights(t), model.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-5, atol=1e-7)


def test_dropout_depends_on_the_step_alone():
    a, b = trainer(dropout=0.2), trainer(dropout=0.2)
    torch.rand(7)  # whatever else draws from the generator
    first = a.step(5, tokens())[0]
    torch.rand(3)
    assert torch.equal(first, b.step(5, tokens())[0])
    c = trainer(dropout=0.2)
    assert not torch.equal(first, c.step(6, tokens())[0])
    assert len({dropout_seed(seed, step) for seed in range(40) for step in range(40)}) == 1600


def test_dropouts_seeds_are_those_of_splitmix64():
    """Its published first outputs from 0, without the sign bit: a resumed run's masks."""
    known = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    assert [dropout_seed(0, step) for step in range(3)] == [x % 2**63 for x in known]


def test_evaluation_changes_nothing_and_repeats():
    t = trainer(dropout=0.2)
    t.step(0, tokens())
    before = weights(t)
    assert torch.equal(t.losses(tokens(1)), t.losses(tokens(1)))
    assert t.model.training
    assert all(torch.equal(p, q) for p, q in zip(before, weights(t), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_numbers_never_reach_the_weights(value):
    t = trainer()
    t.step(0, tokens())
    with torch.no_grad():
        t.model.transformer.h[1].mlp.c_fc.weight[0, 0] = value
    before = weights(t)
    state = {k: v.clone() for k, v in optim.state_tensors(t.optimizer, t.model).items()}
    with pytest.raises(NonFinite) as e:
        t.step(1, tokens(1))
    assert e.value.step == 1
    for p, q in zip(before, weights(t), strict=True):
        assert torch.equal(p.nan_to_num(), q.nan_to_num())
    for k, v in optim.state_tensors(t.optimizer, t.model).items():
        assert torch.equal(v, state[k])
    report = t.diagnose(1, tokens(1))
    assert "transformer.h.1.mlp.c_fc.weight" in report["not_finite"]


def test_the_guard_on_the_device_holds_until_someone_looks():
    """As on a GPU, where nothing waits: updates after the bad step are called off as well."""
    t = trainer()
    t._guard_on_device = True
    t.step(0, tokens())
    state = optim.state_tensors(t.optimizer, t.model)
    state = {k: v.clone() for k, v in state.items()}
    good = t.model.transformer.wpe.weight[0, 0].item()
    with torch.no_grad():
        t.model.transformer.wpe.weight[0, 0] = float("nan")
    before = weights(t)
    t.step(1, tokens(1))
    with torch.no_grad():
        t.model.transformer.wpe.weight[0, 0] = good
        before[1][0, 0] = good
    t.step(2, tokens(2))
    names = [n for n, _ in t.model.named_parameters()]
    assert names[1] == "transformer.wpe.weight"
    assert all(torch.equal(p, q) for p, q in zip(before, weights(t), strict=True))
    for k, v in optim.state_tensors(t.optimizer, t.model).items():
        assert torch.equal(v, state[k]), k
    with pytest.raises(NonFinite) as e:
        t.check()
    assert e.value.step == 1


@pytest.mark.parametrize("scaled", [False, True])
def test_a_gradient_that_is_not_finite_is_a_fault_unless_a_scale_is_sought(scaled):
    """The loss itself is finite, at the very first step."""
    t = trainer()
    t.scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    t.model.transformer.wpe.weight.register_hook(lambda g: g * math.inf)
    before = weights(t)
    if scaled:
        loss, norm = t.step(0, tokens())
        assert loss.isfinite() and not norm.isfinite()
    else:
        with pytest.raises(NonFinite) as e:
            t.step(0, tokens())
        assert e.value.step == 0
    assert all(torch.equal(p, q) for p, q in zip(before, weights(t), strict=True))


def test_a_checkpoint_is_gone_on_from_to_the_bit():
    a, b = trainer(dropout=0.2), trainer(dropout=0.2)
    for step in range(3):
        a.step(step, tokens(step))
    model = {k: v.clone() for k, v in a.model.state_dict().items()}
    b.load(model, optim.state_tensors(a.optimizer, a.model), a.state_dict())
    for t in (a, b):
        t.step(3, tokens(3))
    assert all(torch.equal(p, q) for p, q in zip(weights(a), weights(b), strict=True))
    with pytest.raises(UserError, match="checkpoint does not fit the model: .*wte"):
        b.load({**model, "transformer.wte.weight": torch.zeros(3, 3)}, {}, a.state_dict())


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_threads_train_to_the_same_bit(compiled):
    """A run that is resumed equals one that is not, and several threads add up one gradient."""
    idx = torch.randint(50, (12, 65), generator=torch.Generator().manual_seed(0))
    shape = ModelShape(1, 2, 128, 64, 50, bias=False)  # enough rows that each thread has some

    def grow() -> list[torch.Tensor]:
        model = GPT(shape, 0.0, select(CPU, options=KernelOptions("eager"))).init_weights(0)
        t = Trainer(model, replace(laptop(), kernels="eager"), Machine(CPU, compile=compiled))
        for step in range(3):
            t.step(step, idx)
        return weights(t)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = (grow() for _ in range(6))
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("fails", [1, 2])
def test_a_compilation_that_fails_is_tried_once_more(fails, monkeypatch, capsys):
    t = trainer()
    forward, calls = t.forward, 0

    def broken(*args):
        nonlocal calls
        calls += 1
        if calls <= fails:
            raise OSError("a library that was cut off")
        return forward(*args)

    t.forward = broken
    monkeypatch.setattr(trainer_module, "use_private_compile_cache", lambda: "FOLDER")
    if fails == 1:
        t.warm_up(0, tokens())
    else:
        with pytest.raises(UserError, match=r"torch.compile failed \(.*cut off\); --compile=False"):
            t.warm_up(0, tokens())
    assert calls == 2 and "cut off): compiling anew in FOLDER" in capsys.readouterr().out
    assert all(p.grad is None for p in t.model.parameters())


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
    assert {OSError, ImportError} <= {*trainer_module.compile_errors()}


class Graph:
    """Stands for a CUDA graph of a micro-step: its loss and gradients, times a factor."""

    factor = 1.0

    def __init__(self, micro_step, micro_batch):
        self.micro_step = micro_step

    def __call__(self, micro_batch):
        return self.micro_step(micro_batch) * self.factor


@pytest.mark.parametrize("factor", [1.0, 1.019, 1.021, 0.979, math.nan])
def test_a_graph_is_held_against_a_plain_step(factor, monkeypatch):
    monkeypatch.setattr(trainer_module, "StepGraph", Graph)
    monkeypatch.setattr(Graph, "factor", factor)
    t, plain = trainer(2, dropout=0.1), trainer(2, dropout=0.1)
    if abs(factor - 1) < 0.02:
        t.capture(0, tokens()[:4])
        assert isinstance(t._graph, Graph)
        assert all(p.grad is None or not p.grad.any() for p in t.model.parameters())
    else:
        with pytest.raises(RuntimeError, match="the graph gives .*, the plain step"):
            t.capture(0, tokens()[:4])
        assert t._graph is None and all(p.grad is None for p in t.model.parameters())
        assert torch.equal(t.step(0, tokens())[0], plain.step(0, tokens())[0])


def test_steps_go_on_without_a_graph_unless_it_was_asked_for(monkeypatch):
    t = trainer()
    monkeypatch.setattr(t, "capture", lambda step, micro_batch: None)
    for wanted in (True, False):
        monkeypatch.setattr(cuda_graph, "wanted", lambda *_, w=wanted: (w, "why"))
        assert t.capture_if_it_pays(0, tokens) == (wanted, wanted, "why")

    def fail(step, micro_batch):
        raise error

    monkeypatch.setattr(cuda_graph, "wanted", lambda *_: (True, "why"))
    monkeypatch.setattr(t, "capture", fail)
    error: Exception = RuntimeError("no capture\nmore")
    assert t.capture_if_it_pays(0, tokens) == (True, False, "no capture")
    t.config = replace(t.config, cuda_graph=True)
    with pytest.raises(UserError, match="--cuda_graph=True: no capture; leave the flag out"):
        t.capture_if_it_pays(0, tokens)
    error = torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        t.capture_if_it_pays(0, tokens)


def test_a_graph_may_give_exactly_nothing(monkeypatch):
    monkeypatch.setattr(trainer_module, "StepGraph", Graph)
    t = trainer()
    t.micro_step = lambda tokens, n: torch.zeros(())  # type: ignore[method-assign]
    t.capture(0, tokens())
    assert isinstance(t._graph, Graph)


@pytest.mark.quick("*bfloat16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_step_is_the_eager_one(dtype):
    """aot_eager traces forward and backward as on a GPU, without needing a C++ compiler."""
    eager, compiled = trainer(dtype=dtype), trainer(dtype=dtype)
    compiled.forward = torch.compile(compiled.model, backend="aot_eager", fullgraph=True)
    for step in range(2):
        a, b = (t.step(step, tokens(step))[0] for t in (eager, compiled))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_warm_up_changes_nothing():
    t = trainer(dropout=0.2)
    before = weights(t)
    t.warm_up(0, tokens())
    assert all(p.grad is None for p in t.model.parameters()) and not t.optimizer.state
    assert all(torch.equal(p, q) for p, q in zip(before, weights(t), strict=True))


@pytest.mark.slow
def test_a_machine_that_cannot_compile_is_told_so():
    t = trainer()
    t.forward = torch.compile(t.model)
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent"), "fx_graph_cache": False}),
        pytest.raises(UserError, match=r"torch.compile failed \(.*C.. compiler.*--compile=False"),
    ):
        t.warm_up(0, tokens())


@pytest.mark.slow
def test_float16_finds_its_scale_and_learns():
    """Infinite gradients call the update off and halve the scale; then the loss falls."""
    t = trainer(dtype=torch.float16)
    t.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    before = weights(t)
    t.step(0, tokens())
    assert all(map(torch.equal, before, weights(t))), "an infinite gradient reached the weights"
    losses = [t.step(step, tokens())[0].item() for step in range(1, 60)]
    assert t.scaler.get_scale() < 2.0**40
    assert losses[-1] < losses[0] - 0.5
    oracle = trainer()
    exact = [oracle.step(step, tokens())[0].item() for step in range(60)]
    assert min(losses) == pytest.approx(min(exact), rel=0.15)
