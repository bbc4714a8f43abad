"""The self-check passes what is right, names what is wrong, and outlives any fault of a kernel."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from fastgpt_kernels import cache, self_check, versions
from fastgpt_kernels.registry import Sizes, spec, specs
from fastgpt_kernels.self_check import Check, disagreement, failures, few_rows
from tests.kernels import faulty

SMALL = Sizes(3, 40, 2, 64, 300, 384)
DROPPING = replace(SMALL, dropout=0.3, bias=False, gelu="erf")
SIZES = pytest.mark.parametrize("sizes", [SMALL, DROPPING], ids=["bias", "dropout"])
OPS = pytest.mark.parametrize("op", [op.name for op in specs()])


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch, tmp_path):
    monkeypatch.setattr(self_check, "_FOUND", {})
    monkeypatch.setattr(cache, "environment", lambda device: "this GPU")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def problem(op, name="eager", function=None, dtype="float32", sizes=SMALL, device="cpu"):
    check = Check(op, name, str(device), dtype, sizes)
    function = function or spec(op).implementations[name].function
    return disagreement(spec(op), function, check.examples())


@pytest.mark.quick("*norm-*", "attention-dropout", "bias_gelu-*")
@SIZES
@OPS
def test_the_kernels_pass(op, sizes, device):
    _, name, *_ = spec(op).implementations  # after eager: triton, of the MLP hopper
    assert problem(op, name, sizes=sizes, device=device) is None


@OPS
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@SIZES
def test_eager_passes_in_low_precision(op, dtype, sizes):
    assert problem(op, dtype=dtype, sizes=sizes) is None


@OPS
def test_gradients_that_are_one_per_cent_off_are_seen(op):
    def broken(*args, **kwargs):
        kwargs.pop("chunk_tokens", None)
        out = spec(op).reference(*args, **kwargs)
        outs = out if isinstance(out, tuple) else (out,)
        wrong = tuple(o * 1.01 - o.detach() * 0.01 for o in outs)
        return wrong if isinstance(out, tuple) else wrong[0]

    assert "is off by 0.0" in problem(op, function=broken)


def test_bits_that_differ_from_run_to_run_are_seen_if_they_must_not(monkeypatch):
    factors = itertools.cycle([1.0, 1.0 + 2**-20])

    def unsteady(*args, **kwargs):
        return spec("bias_gelu").reference(*args, **kwargs) * next(factors)

    assert problem("bias_gelu", function=unsteady) is None
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert problem("bias_gelu", function=unsteady) == "differs from run to run here"
    assert problem("bias_gelu") is None


def test_a_wrong_dropout_mask_is_seen():
    """Triton follows the specified mask; PyTorch's, which draw their own, are held without."""

    def own_mask(*args, **kwargs):
        return spec("attention").reference(*args, **kwargs | {"seed": None})

    assert "is off by" in problem("attention", "triton", own_mask, sizes=DROPPING)
    assert problem("attention", "flash", own_mask, sizes=DROPPING) is None


def test_an_exception_is_one_line():
    def raises(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

    assert problem("bias_gelu", function=raises) == "does not run here (CUDA out of memory.)"


def test_not_a_number_and_missing_results_are_seen():
    eager = spec("bias_gelu").reference
    found = problem("bias_gelu", function=lambda *a, **k: eager(*a, **k) / 0.0 * 0.0)
    assert found == "is off by nan here"
    found = problem("bias_gelu", function=lambda *a, **k: eager(*a, **k)[:-1])
    assert found.startswith("does not run here (The size of tensor")


def test_few_rows_compile_to_the_same_kernels():
    """Triton compiles anew for multiples of 16 and for 1, attention for whole tiles of 128."""
    lengths = (1, 40, 128, 200, 256, 300, 384, 520, 1000, 1024, 8192)
    for B, T, tokens in itertools.product((1, 2, 3, 7, 12, 64, 480), lengths, (512, 4096)):
        sizes = Sizes(B, T, 25, 1600)
        [few] = few_rows(sizes, tokens)
        assert replace(few, batch_size=B, block_size=T) == sizes
        assert few.block_size % 128 == T % 128
        assert (few.tokens % 16 == 0) == (sizes.tokens % 16 == 0)
        assert (few.tokens == 1) == (sizes.tokens == 1)
        assert few.tokens <= min(sizes.tokens, 2 * tokens + 16 * 384)


def test_chunks_evaluation_and_vocabulary_of_the_loss():
    training, evaluation = Check(
        "linear_cross_entropy", "triton", "cpu", "bfloat16", SMALL
    ).examples()
    assert training.gradients and not evaluation.gradients
    chunk = training.arguments["chunk_tokens"]
    assert 2 * chunk < SMALL.tokens < 3 * chunk, "three chunks, and the last is shorter"
    for example in (training, evaluation):
        assert example.inputs[1].shape == (384, 64) and example.arguments["vocab_size"] == 300
        assert example.arguments["targets"].max() < 300


# --- Many checks, in children --------------------------------------------------------------------


def check(name, **changes):
    return replace(Check("bias_gelu", name, "cpu", "float32", SMALL), **changes)


@pytest.fixture
def found(monkeypatch):
    """Returns the failures of checks by `faulty.run` in child processes."""

    def found(*names, limit_s=120.0):
        monkeypatch.setattr(self_check, "run", faulty.run)
        monkeypatch.setattr(self_check, "LIMIT_S", limit_s)
        wrong = failures([check(name) for name in names])
        return {c.implementation: reason for c, reason in wrong.items()}

    return found


@pytest.mark.slow
def test_a_process_that_hangs_or_dies_costs_one_check(found):
    names = ("good", "off", "killed", "aborts", "loses the GPU", "prints", "also good")
    assert found(*names) == {
        "off": "is off by 0.01 here",
        "killed": "ended its process (SIGKILL)",
        "aborts": "ended its process (SIGABRT)",
        "loses the GPU": "RuntimeError: CUDA error: an illegal memory access was encountered",
    }
    found("warms up")
    assert found("hangs", "good too", limit_s=10) == {"hangs": "took over 10 s"}
    own, until = ["pgrep", "-f", f"^sleep 987654.{os.getpid()}"], time.monotonic() + 10
    while subprocess.run(own, capture_output=True).stdout:
        assert time.monotonic() < until, "the child's own child was left behind"


@pytest.mark.slow
def test_the_kernels_pass_in_a_child():
    names = ("layer_norm", "bias_gelu")
    assert failures([Check(op, "triton", "cpu", "float32", SMALL) for op in names]) == {}


def test_a_process_that_cannot_start(found, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert found("good") == {"good": "its process cannot start (No such file or directory)"}
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert found("fine") == {"fine": "ended its process (exit code 1)"}


@pytest.fixture
def start(monkeypatch):
    """Starts anew and checks; returns the failures, and what a child was asked."""

    def start(*checks):
        asked = []

        def ask_all(run, checks, limit_s, jobs):
            asked.extend(c.implementation for c in checks)
            return ["is off" if c.implementation == "off" else None for c in checks]

        monkeypatch.setattr(self_check, "_FOUND", {})
        monkeypatch.setattr(self_check, "ask_all", ask_all)
        return [*failures(checks).values()], asked

    return start


def test_a_pass_is_kept_and_a_failure_is_not(start):
    good, off = check("good"), check("off")
    assert start(good, off) == (["is off"], ["good", "off"])
    assert start(good, off) == (["is off"], ["off"])
    assert start(replace(good, device="cpu:3")) == ([], []), "another GPU of the same kind"
    assert start(good, check("next")) == ([], ["next"])
    assert start(good, check("next")) == ([], []), "the first was lost"
    failures([off])
    assert failures([off]) == {off: "is off"}, "known in this process"


def test_another_check_is_made(start, monkeypatch):
    start(check("good"))
    for change in ({"op": "mlp"}, {"dtype": "float16"}, {"sizes": DROPPING}, {"precision": "high"}):
        assert start(check("good", **change))[1] == ["good"], change
    monkeypatch.setattr(cache, "environment", lambda device: "another GPU or version")
    assert start(check("good"))[1] == ["good"]


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("text", ["", "[]", "null", '{"this GPU": [7]}', DEEP, "cut", "\xff"])
def test_a_damaged_file_counts_as_missing(start, text):
    start(check("good"))
    whole = cache.path("self_check").read_text()
    cache.path("self_check").write_text(whole[:-20] if text == "cut" else text, encoding="latin-1")
    assert start(check("good")) == ([], ["good"])
    assert json.loads(cache.path("self_check").read_text())["this GPU"], "it was written anew"


def test_a_folder_that_cannot_be_made(start, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert start(check("good")) == ([], ["good"])
    assert "Not a directory" in (cache.keep("self_check", "this GPU", {"a": 1}) or "")


def test_old_sections_go(tmp_path):
    for i in range(20):
        assert cache.keep("any", f"GPU {i}", {"a": i}) is None
    cache.keep("any", "GPU 7", {"c": 2})
    assert cache.load("any", "GPU 7") == {"a": 7, "c": 2} and cache.load("any", "GPU 2") == {}
    assert not [*tmp_path.rglob("*.tmp")]


def test_an_environment_is_the_device_versions_and_sources(monkeypatch):
    monkeypatch.undo()
    before = cache.environment(torch.device("cpu"))
    wanted = ("cpu, driver ", f", torch {torch.__version__}, triton 3.", ", kernels ")
    assert all(part in before for part in wanted), before
    cache.environment.cache_clear()
    monkeypatch.setattr(versions, "sources", lambda: "others")
    assert cache.environment(torch.device("cpu")).endswith("kernels others")
    cache.environment.cache_clear()
