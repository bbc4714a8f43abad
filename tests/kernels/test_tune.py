"""Tuning takes the fastest right implementation, keeps it, and never loses to the default."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

from fastgpt_kernels import cache, tune
from fastgpt_kernels.registry import Sizes, model_specs, spec
from fastgpt_kernels.self_check import Check
from fastgpt_kernels.worker import TaskFailed

GPU, CPU, BF16 = torch.device("cuda", 1), torch.device("cpu"), torch.bfloat16
SIZES = Sizes(2, 64, 2, 64, 300, 384)
SMALL = replace(SIZES, batch_size=1, block_size=16)
MODEL = [op.name for op in model_specs()]


@pytest.fixture(autouse=True)
def fake_gpu(monkeypatch, tmp_path):
    """An H100 on which all implementations of PyTorch and of this package can run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache, "environment", lambda device: "an H100")
    monkeypatch.setattr(tune, "arch_on", lambda device: "sm_90")
    monkeypatch.setattr(tune, "failures", lambda checks: {})


def timer(**ms):
    """Times of attention's implementations, or why there are none; of all others equal ones."""

    def times(checks, compile):
        own = ms if checks[0].op == "attention" else {}
        found = {c.implementation: own.get(c.implementation, 10.0) for c in checks}
        return {n: t if isinstance(t, str) else [t] * tune.ROUNDS for n, t in found.items()}

    return times


@pytest.fixture
def run(monkeypatch, capsys):
    """Tunes a model with a fake timer; returns the printed lines."""

    def run(times):
        monkeypatch.setattr(tune, "in_child", times)
        tune.tune_model(GPU, BF16, SIZES, compile=True)
        return capsys.readouterr().out.splitlines()

    return run


def tuned(device=GPU, dtype=BF16, sizes=SIZES, compile=True):
    return tune.tuned(device, dtype, sizes, compile)


@pytest.mark.parametrize(
    ("others", "name"),
    [
        ({"b": [9.0] * 20}, "b"),
        ({"b": [9.85] * 20}, "a"),
        ({"b": [5.0] * 10 + [9.9] * 10}, "a"),
        ({"b": [9.0] * 20, "c": [8.0] * 20}, "c"),
        ({"b": [5.0, 20.0] * 10}, "a"),
        ({}, "a"),
    ],
    ids=["faster", "within 2 %", "in one half", "the fastest", "noise", "alone"],
)
def test_who_wins(others, name):
    """By ratios within a round, which a drift that all share does not change."""
    drifting = {n: [t + i * t for i, t in enumerate(ts)] for n, ts in others.items()}
    assert tune.winner({"a": [10.0] * 20, **others}, "a")[0] == name
    assert tune.winner({"a": [10.0 + 10.0 * i for i in range(20)], **drifting}, "a")[0] == name


def test_a_model_is_tuned_and_the_result_is_read(run):
    lines = run(timer(cudnn=5.0, flash="CUDA out of memory."))
    assert [line.partition(":")[0] for line in lines[:-1]] == MODEL
    attention = lines[MODEL.index("attention")]
    assert attention.startswith("attention: cudnn, measured 2.00 times as fast as triton: ")
    assert "cudnn 5 ms" in attention and "flash CUDA out of memory." in attention
    assert lines[-1] == f"stored in {cache.path('tune')}, for an H100"
    found = tuned()
    assert found["attention"] == ("cudnn", "measured 2.00 times as fast as triton")
    assert found["layer_norm"] == ("triton", "nothing measured more than 2% faster")
    assert tuned(torch.device("cuda", 0)) == found, "another GPU of the same kind"
    run(timer(triton=5.0))
    assert tuned()["attention"][0] == "triton", "the last measurement counts"


def test_a_result_is_for_its_own_question(run):
    run(timer(cudnn=5.0))
    for change in ({"dtype": torch.float16}, {"sizes": SMALL}, {"compile": False}, {"device": CPU}):
        assert tuned() and tuned(**change) == {}


def test_a_wrong_implementation_cannot_win(run, monkeypatch):
    def failures(checks):
        return {c: "is off" for c in checks if c.implementation in ("cudnn", "triton")}

    monkeypatch.setattr(tune, "failures", failures)
    line = run(timer(cudnn=1.0, triton=1.0, flash=5.0))[MODEL.index("attention")]
    assert line.startswith("attention: flash, measured 2.00 times as fast as eager: ")
    assert line.endswith("triton is off, cudnn is off")


@pytest.mark.parametrize(
    ("wrong", "left"), [("hopper", "triton"), ("hopper triton cudnn flash eager", "eager")]
)
def test_a_wrong_default_gives_way_to_triton(wrong, left, monkeypatch):
    off = lambda checks: {c: "is off" for c in checks if c.implementation in wrong}  # noqa: E731
    monkeypatch.setattr(tune, "failures", off)
    monkeypatch.setattr(tune, "in_child", timer(cudnn=9.9))
    check = Check.of("attention", "", GPU, BF16, replace(SIZES, n_head=1))
    assert spec("attention").default("sm_90", BF16, check.sizes)[0] == "hopper"
    assert tune._fastest(spec("attention"), check, compile=False)[0] == left


def test_a_child_that_dies_leaves_the_default(run):
    def dies(checks, compile):
        raise TaskFailed("ended its process (SIGSEGV)")

    assert run(dies)[0] == "attention: triton, not measured: ended its process (SIGSEGV)"
    assert tune.winner({"b": [1.0] * 20}, "a") == ("a", "could not be timed")


WRONG = (7, None, [], {"implementation": "cudnn"}, {"implementation": "cudnn", "reason": {}})
WRONG += ({"implementation": 3, "reason": "x"}, {"implementation": "of tomorrow", "reason": "x"})


@pytest.mark.parametrize("entry", WRONG, ids=str)
def test_an_entry_of_another_form_counts_as_missing(run, entry):
    run(timer(cudnn=5.0))
    document = json.loads(cache.path("tune").read_text())
    document["an H100"] = dict.fromkeys(document["an H100"], entry)
    cache.path("tune").write_text(json.dumps(document))
    assert tuned() == {}


def test_a_folder_that_cannot_be_written_is_named(run, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert run(timer(cudnn=5.0))[-1].startswith("not stored: [Errno 20] Not a directory")


# --- Measuring -----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", MODEL)
def test_what_is_timed_is_the_training_calls(op, monkeypatch):
    """Forward and backward, in alternating order; an implementation without memory is left out."""
    monkeypatch.setattr(tune, "ROUNDS", 3)
    ticks, order = itertools.count(), []

    def clock(step):
        step()
        order.append(step)
        return float(next(ticks))

    monkeypatch.setattr(tune, "gpu_ms", clock)
    eager, fused, *_ = spec(op).implementations
    checks = [Check(op, name, "cpu", "float32", SMALL) for name in (eager, fused)]
    times = tune.measure(checks, False)
    assert times == {eager: [1.0, 2.0, 5.0], fused: [0.0, 3.0, 4.0]}
    assert order[0] is order[3] is order[4]

    def no_memory(self, timed=False):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(Check, "examples", no_memory)
    assert tune.measure(checks, False)["eager"] == "CUDA out of memory."


def test_an_implementation_without_a_deterministic_form_is_left_out(monkeypatch):
    def step(check, compile):
        return lambda: torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)

    monkeypatch.setattr(tune, "_step", step)
    monkeypatch.setattr(tune, "gpu_ms", lambda step: 1.0)
    try:
        check = Check("bias_gelu", "eager", "cpu", "float32", SMALL, deterministic=True)
        assert "deterministic" in tune.measure([check], False)["eager"]
    finally:
        torch.use_deterministic_algorithms(False)


def test_dropout_is_timed_where_it_is_left_out_of_the_check():
    check = Check("attention", "flash", "cpu", "float32", replace(SMALL, dropout=0.2))
    assert "dropout_p" not in check.examples()[0].arguments
    assert check.examples(timed=True)[0].arguments["dropout_p"] == 0.2


@pytest.mark.slow
def test_measuring_in_a_child():
    checks = [Check("layer_norm", "eager", "cpu", "float32", SMALL)]
    with pytest.raises(TaskFailed, match="(?i)cuda|nvidia"):
        tune.in_child(checks, False)
