"""The implementation that each op gets, and the self-check's coverage of the model's calls."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re

import pytest
import torch
from torch import Tensor

from fastgpt.config.presets import laptop
from fastgpt.config.settings import replace as replace_settings
from fastgpt.errors import UserError
from fastgpt.model import build, kernels
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.model.kernels import KernelOptions, Kernels, Selected, describe, select
from fastgpt_kernels import OPS, launch, self_check, versions
from fastgpt_kernels.registry import Sizes, differentiate, model_specs, spec
from fastgpt_kernels.self_check import Check
from tests.fakes import interpreted

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run for real here")
CATEGORIES = {"attention", "head", "linear", "memory", "optimizer"}


def selected(options=None, sizes=None, device=CPU, dtype=torch.float32):
    return {s.op: s for s in select(device, dtype, sizes, options).selected}


@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU: call it with an architecture, failures of checks by op, and tuned results."""
    monkeypatch.setattr(launch, "HAS_TRITON", True)

    def fake(arch="sm_90", failing=(), tuned=()):
        def failures(checks):
            return {c: "is off by 0.1 here" for c in checks if c.op in failing}

        monkeypatch.setattr(kernels, "arch_on", lambda device: arch)
        monkeypatch.setattr(self_check, "failures", failures)
        module = importlib.import_module("fastgpt_kernels.tune")  # the function has the same name
        monkeypatch.setattr(module, "tuned", lambda *question: dict(tuned))

    return fake


def test_every_op_has_its_spec_and_the_implementations_that_flags_name():
    for name, entry in OPS.items():
        op = spec(name)
        assert op.name == name and op.category in CATEGORIES and op.kernels
        assert set(op.implementations) == set(entry.choices)


def test_every_op_has_a_reason():
    found = select(CPU)
    assert [s.op for s in found.selected] == [op.name for op in model_specs()]
    assert all(s.implementation == "eager" and s.reason for s in found.selected)
    assert all(callable(getattr(found, s.op)) for s in found.selected)
    assert describe(found.selected).startswith("eager (no GPU): attention, ")
    with pytest.raises(AttributeError, match="no op 'softmax'"):
        found.softmax  # noqa: B018


def test_a_flag_is_the_reason_or_an_error():
    found = selected(KernelOptions("eager", {"attention": "eager"}))
    assert found["attention"].reason == "--op.attention=eager"
    assert found["layer_norm"].reason == "--kernels=eager"
    with pytest.raises(UserError, match="--kernels=triton: no GPU"):
        selected(KernelOptions("triton"))
    why = {"cudnn": "no GPU", "hopper": "no GPU", "flash": "on a CPU it has no dropout"}
    for name, reason in why.items():
        with pytest.raises(UserError, match=f"--op.attention={name}: {reason}"):
            selected(KernelOptions(ops={"attention": name}), Sizes(dropout=0.1))


@NO_GPU
def test_shapes_decide(monkeypatch):
    interpreted(monkeypatch)
    found = selected(sizes=Sizes(n_head=188, n_embd=48 * 188))
    assert found["attention"].implementation == "eager"
    assert "head dim 48 is none of 32, 64" in found["attention"].reason
    with pytest.raises(UserError, match="--op.attention=hopper: hopper is for sm_90, not cpu"):
        selected(KernelOptions(ops={"attention": "hopper"}))
    assert "width 9024 is more than 8192" in found["add_layer_norm"].reason
    assert found["bias_gelu"] == Selected("bias_gelu", "triton", "fused kernels")


# --- On a GPU ------------------------------------------------------------------------------------


def test_only_the_op_that_fails_its_check_falls_back(gpu):
    gpu(failing=["bias_gelu"])
    found = selected(device=GPU)
    assert found["bias_gelu"].reason == "triton: is off by 0.1 here"
    eager = {op for op, s in found.items() if s.implementation == "eager"}
    assert "bias_gelu" in eager and not eager & {"attention", "layer_norm", "add_layer_norm"}
    kernels_ = select(GPU)
    assert kernels_.uses_triton("layer_norm") and not kernels_.uses_triton("bias_gelu")
    assert kernels_.bias_gelu is spec("bias_gelu").reference
    assert kernels_.layer_norm is spec("layer_norm").triton
    with pytest.raises(UserError, match="--kernels=triton: is off by 0.1 here"):
        selected(KernelOptions("triton"), device=GPU)
    with pytest.raises(UserError, match="--op.bias_gelu=triton: is off by 0.1 here"):
        selected(KernelOptions(ops={"bias_gelu": "triton"}), device=GPU)


def test_attention_on_hopper_and_what_it_falls_back_to(gpu, monkeypatch):
    """By default hopper where it applies, then triton, then eager; a flag has no fallback."""
    gpu()
    auto = KernelOptions()
    take = lambda options=auto, **more: selected(options, device=GPU, **more)["attention"]  # noqa: E731
    bf16, half = torch.bfloat16, torch.float16
    assert take(dtype=bf16) == Selected("attention", "hopper", "fused kernels for sm_90")
    assert select(GPU, half).uses_triton("attention"), "it sums the bias's gradient"
    assert take(KernelOptions("triton"), dtype=bf16).implementation == "triton"
    fused = Selected("attention", "triton", "fused kernels")
    assert take() == take(sizes=Sizes(dropout=0.1), dtype=bf16) == fused
    off = "is off by 0.1 here"
    wrong = {"hopper"}
    monkeypatch.setattr(
        self_check, "failures", lambda checks: {c: off for c in checks if c.implementation in wrong}
    )
    assert take(dtype=bf16) == Selected("attention", "triton", f"hopper: {off}")
    with pytest.raises(UserError, match=f"--op.attention=hopper: {off}"):
        take(KernelOptions(ops={"attention": "hopper"}), dtype=bf16)
    wrong.add("triton")
    assert take(dtype=bf16) == Selected("attention", "eager", f"hopper: {off}; triton: {off}")
    gpu("sm_80")
    assert take(dtype=bf16) == fused


@pytest.mark.parametrize("arch", ["sm_75", "gfx942", "sm_87", "sm_103"])
def test_a_gpu_without_compiled_kernels_runs_eager(arch, gpu):
    """A new one unless the user asks otherwise, an old one or AMD's always."""
    gpu(arch)
    never = f"the kernels are for NVIDIA GPUs from sm_80 on, not {arch}"
    reason = never if arch in ("sm_75", "gfx942") else f"{arch}.*--kernels=triton"
    found = selected(device=GPU, dtype=torch.float16)
    assert {s.implementation for s in found.values()} == {"eager"}
    assert all(re.search(reason, s.reason) for s in found.values()), found
    refused = pytest.raises(UserError, match=f"--op.bias_gelu=triton: {never}")
    with refused if reason == never else contextlib.nullcontext():
        asked = KernelOptions(ops={"bias_gelu": "triton"})
        found = selected(asked, device=GPU, dtype=torch.float16)
        assert found["bias_gelu"].implementation == "triton"


def test_a_tuned_result_counts_where_no_flag_overrides_it(gpu):
    reason = "measured 1.30 times as fast as triton"
    gpu(tuned={"attention": ("cudnn", reason), "layer_norm": ("eager", reason)})
    found = selected(device=GPU)
    assert found["attention"] == Selected("attention", "cudnn", reason)
    assert found["layer_norm"].implementation == "eager"
    assert "cudnn (measured 1.30 times as fast as triton): attention" in describe(found.values())
    for options in (KernelOptions("triton"), KernelOptions(ops={"attention": "triton"})):
        assert selected(options, device=GPU)["attention"].implementation == "triton"
    gpu(tuned={"attention": ("hopper", reason)}, arch="sm_80")
    assert selected(device=GPU)["attention"].implementation == "triton", "it cannot run there"
    gpu(tuned={"attention": ("cudnn", reason)}, failing=["attention"])
    off = "is off by 0.1 here"
    assert selected(device=GPU)["attention"].reason == f"cudnn: {off}; triton: {off}"


def test_tuning_without_a_gpu_is_said_in_one_line(capsys):
    config = replace_settings(laptop(), device="cpu")
    assert build.tune(config) == 0
    assert capsys.readouterr().out == "tune: nothing to tune on cpu: every op runs eager there\n"


def test_supported_versions():
    torch_, triton = "torch {} is not among 2.11 to 2.15", "triton {} is not among 3.6 to 3.9"
    for package, wanted, supported, others in (
        ("torch", torch_, ("2.11.0+cu130", "2.15.1"), ("2.9.1", "2.16.0", "3.0")),
        ("triton", triton, ("3.6.0", "3.9.0"), ("3.5.1", "3.10.0", "4.0.0")),
    ):
        for version in supported:
            assert not versions.outside({"torch": "2.13.0", package: version})
        for version in others:
            found = versions.outside({"torch": "2.13.0", package: version})
            assert found == f"{wanted.format(version)}, which are supported"


def test_untested_versions_run_eager_unless_asked_and_warn_once(gpu, monkeypatch, capsys):
    gpu()
    monkeypatch.setattr(versions, "untested", lambda: "torch 9.9 is not among 2.11 to 2.15")
    kernels._warn_of_versions.cache_clear()
    for _ in range(2):
        found = selected(device=GPU)
        assert {s.implementation for s in found.values()} == {"eager"}
        assert found["bias_gelu"].reason == "torch 9.9 is not among 2.11 to 2.15"
    assert capsys.readouterr().out.count("warning: torch 9.9 is not among") == 1
    asked = selected(KernelOptions("triton"), device=GPU)
    assert asked["bias_gelu"].implementation == "triton"


# --- Checks are of the model's calls -------------------------------------------------------------


def watched(op, seen):
    """Returns eager, noting what a call compiles to: dtypes, widths and options."""
    eager = spec(op).reference

    def of(name, x):
        if not isinstance(x, Tensor):
            return x
        return x.dtype, x.shape if name.endswith(("weight", "bias")) else x.shape[-1]

    def function(*arguments, **options):
        options.pop("chunk_tokens", None)
        given = inspect.signature(eager).bind(*arguments, **options)
        given.apply_defaults()
        ignored = ("seed", "targets", "bias_gelu")
        found = {(k, of(k, x)) for k, x in given.arguments.items() if k not in ignored}
        seen.setdefault(op, set()).add(frozenset(found))
        return eager(*arguments, **options)

    return function


@pytest.mark.parametrize(
    "shape",
    [ModelShape(2, 2, 64, 40, 300, True), ModelShape(2, 2, 64, 40, 300, False, "erf")],
    ids=["bias", "erf"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_is_checked_is_what_the_model_calls(shape, dropout, dtype):
    """In training and evaluation, with fused norms or not: each call is checked, and no other."""
    called: dict[str, set] = {}
    checked: dict[str, set] = {}
    names = [op.name for op in model_specs()]
    functions = {name: watched(name, called) for name in names}
    ids = torch.randint(300, (3, 41))
    triton = Selected("attention", "triton", ""), Selected("add_layer_norm", "triton", "")
    for fused in (triton, triton[:1]):
        model = GPT(shape, dropout, Kernels(functions, fused), dtype).init_weights(0)
        model(ids[:, :-1], ids[:, 1:]).backward()
        with torch.no_grad():
            model.eval()(ids[:, :-1], ids[:, 1:])
    for name in names:
        dtype_name = str(dtype).removeprefix("torch.")
        check = Check(name, spec(name).standard, "cpu", dtype_name, shape.sizes(3, dropout))
        for example in check.examples():
            differentiate(watched(name, checked), example)
    assert called == checked
