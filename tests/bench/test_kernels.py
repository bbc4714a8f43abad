"""Kernel benchmarks on a CPU, with other libraries replaced by fake modules."""

import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import baselines, kernels, power
from bench.baselines import AUTOTUNED, BASELINES
from bench.kernels import ALONE, Case
from fastgpt_kernels.launch import Config, lookup
from fastgpt_kernels.registry import Cost, ExampleInputs, Implementation, OpSpec, Sizes, spec, specs
from tests.bench.test_results import load_only

CPU, ROOFS = torch.device("cpu"), {"TFLOP/s": 1.0, "GB/s": 10.0}
SMALL = Sizes(2, 16, 2, 16, 90, 128, bias=False)


def test_runs_on_a_cpu_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--rounds=6", f"--out={tmp_path}", "--device=cpu", "--repeats=2"]) == 0
    rows = load_only(tmp_path, "kernels")["rows"]
    assert {row["op"] for row in rows} == {op.name for op in specs()}
    for row in rows:
        if row["provider"] == "eager":
            assert len(row["samples_ms"]) == 6 and 0 <= max(row["errors"]) < 1e-6
            assert row["share_of_roof"] > 0 and not row["problem"] and row["same_bits"]
        elif row["provider"] not in ("triton", "flash") and ALONE not in row["provider"]:
            assert row["problem"] and "median_ms" not in row
    said = capsys.readouterr().out
    assert "of the roof" in said and "Liger: liger-kernel is not installed" in said


def doubled(**functions: Any) -> Case:
    """Returns the case of y = 2 x, by eager and other functions."""
    known = {n: Implementation(f) for n, f in ({"eager": lambda x: x * 2} | functions).items()}
    op = OpSpec(
        "doubled", known, lambda *_: [ExampleInputs([torch.randn(50)])],
        lambda *_: {"forward": Cost(0, 400)}, kernels=(), category="memory",
    )  # fmt: skip
    return Case.of(op, Sizes(), CPU, torch.float32)


broken = Mock(side_effect=torch.OutOfMemoryError("no memory\nand more"))
RIGHT_AND_WRONG: dict[str, Any] = {"triton": lambda x: x + x, "nearly": lambda x: x * 2.001}


def test_no_time_for_a_wrong_implementation(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(kernels, "load", lambda *_: {"watts": 650.0, "clock_mhz": 1605.0})
    case = doubled(**RIGHT_AND_WRONG, broken=broken, nan=lambda x: x * float("nan"))
    rows = {row["provider"]: row for row in kernels.measure(case, 6, ROOFS)}
    assert rows["nearly"]["problem"].startswith("wrong: relative errors 5.0e-04")
    assert rows["broken"]["problem"] == "OutOfMemoryError: no memory"
    assert rows["nan"]["problem"].startswith("wrong: relative errors nan")
    assert {name for name, row in rows.items() if "median_ms" in row} == {"eager", "triton"}
    fast = rows["triton"]
    assert fast["rate"] == pytest.approx(400 / (fast["median_ms"] * 1e-3) / 1e9)
    assert rows["eager"]["ratio"]["to"] == "triton" and "watts" not in rows["eager"]
    kernels.show([*rows.values()])
    said = capsys.readouterr().out
    assert "time / triton's" in said and said.count("no memory") == 1 and "650  1605" in said
    judged = doubled().judge({"eager": broken} | RIGHT_AND_WRONG)  # held against rounding
    assert not judged["triton"]["problem"] and judged["nearly"]["problem"].startswith("wrong")
    calls = iter(range(99))
    functions = {"eager": case.op.reference, "race": lambda x: x * 2 + 1e-7 * (next(calls) == 3)}
    judged = case.judge(functions, repeats=4)
    assert judged["eager"]["same_bits"] and not judged["race"]["same_bits"]


# --- Fake modules of other libraries -------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def fake_cudnn(fault: float = 1.0) -> MagicMock:
    """Returns a frontend whose graphs compute on strided tensors; `fault` makes gradients wrong."""

    def execute(tensors: dict[Any, Tensor], space: Tensor, handle: Any) -> None:
        q, k, v, *more = tensors.values()
        found: Any = attend(q, k, v), q.float().sum(-1, keepdim=True)
        if len(more) > 2:  # o, stats, dO, dQ, dK, dV
            found = torch.func.vjp(attend, q, k, v)[1](more[2] * fault)
        for target, value in zip(more[-len(found) :], found, strict=True):
            target.copy_(value)

    cudnn = MagicMock()
    cudnn.pygraph.return_value = graph = MagicMock()
    graph.tensor_like.side_effect = lambda tensor: MagicMock()
    graph.get_workspace_size.return_value = 1
    graph.sdpa.return_value, graph.sdpa_backward.return_value = (
        [MagicMock() for _ in range(n)] for n in (2, 3)
    )
    graph.execute.side_effect = execute
    return cudnn


def flash_forward(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Tensor, None]:
    y = attend(*(x.transpose(1, 2) for x in (q, k, v)))
    return y.transpose(1, 2), q.float().sum(-1), None


def flash_backward(q, k, v, out, dout, lse, *, causal, dq, dk, dv) -> None:
    backward = torch.func.vjp(lambda *parts: flash_forward(*parts)[0], q, k, v)[1]
    for target, value in zip((dq, dk, dv), backward(dout), strict=True):
        target.copy_(value)


def norm(x: Tensor, w: Tensor, b: Tensor | None = None, eps: float = 1e-5, *_: Any) -> Tensor:
    return F.layer_norm(x.float(), (16,), w, b, eps).to(x.dtype)


def loss(*inputs: Tensor, ignore_index: int) -> Tensor:
    *factors, targets = inputs  # (logits,) or (x, weight)
    logits = factors[0] if len(factors) == 1 else factors[0] @ factors[1].T
    return F.cross_entropy(logits[:, :90].float(), targets, ignore_index=ignore_index)


def liger(ignore_index: int) -> Any:  # which takes the weight before x
    return lambda *inputs: loss(*inputs[-2::-1], inputs[-1], ignore_index=ignore_index)


FAKES: dict[str, dict[str, Any]] = {
    "flash_attn_interface": {
        "flash_attn_qkvpacked_func": lambda qkv, causal: flash_forward(*qkv.unbind(2))[0]
    },
    "flash_attn.cute.interface": {
        "_flash_attn_fwd": flash_forward, "_flash_attn_bwd": flash_backward
    },
    "quack.rmsnorm": {
        "layernorm_fwd": lambda x, *args: (norm(x, *args), x[:, 0].float(), x[:, 0].float()),
        "layernorm_bwd": lambda x, w, dout, *_: (*torch.func.vjp(norm, x, w)[1](dout), None),
    },
    "quack.mlp": {
        "mlp_func": lambda x, fc, proj, activation, bias1, bias2:
        F.linear(F.gelu(F.linear(x, fc, bias1), approximate="tanh"), proj, bias2)
    },
    "quack.cross_entropy": {"cross_entropy": loss},
    "quack.linear_cross_entropy": {"chunked_linear_cross_entropy": loss},
    "liger_kernel.ops.layer_norm": {"LigerLayerNormFunction": SimpleNamespace(apply=norm)},
    "liger_kernel.transformers": dict.fromkeys(
        ("LigerCrossEntropyLoss", "LigerFusedLinearCrossEntropyLoss"), liger
    ),
}  # fmt: skip
ALL = [(op, name) for op, known in BASELINES.items() for name in known if name != "max-autotune"]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, values in FAKES.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**values))
    monkeypatch.setitem(sys.modules, "cudnn", fake_cudnn())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    for op, name in ALL:
        BASELINES[op][name].__dict__.pop("kernel", None)


@pytest.mark.parametrize(("op", "name"), ALL)
def test_baselines_are_right_and_copies_are_separated(
    op: str, name: str, fakes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    baseline = BASELINES[op][name]
    case = Case.of(spec(op), SMALL, CPU, torch.bfloat16)
    monkeypatch.setattr(baselines, "of", lambda *_: ({"it": baseline}, {}))
    rows = {r["provider"]: r for r in kernels.measure(case, 6, ROOFS)}
    assert not rows["it"]["problem"] and rows["it"]["median_ms"] > 0
    assert (f"it{ALONE}" in rows) == (baseline.layout is not None)
    if baseline.layout:
        both, alone = (rows[n]["median_ms"] for n in ("it", f"it{ALONE}"))
        assert rows["it"]["copies_ms"] == pytest.approx(both - alone)


def test_a_wrong_baseline_gets_no_time(fakes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cudnn", fake_cudnn(1.1))
    case = Case.of(spec("attention"), SMALL, CPU, torch.bfloat16)
    del sys.modules["flash_attn_interface"]
    found = {name: BASELINES["attention"][f"{name}, packed"] for name in ("cuDNN", "FA3", "FA4")}
    monkeypatch.setattr(baselines, "of", lambda *_: (found, {}))
    rows = {r["provider"]: r for r in kernels.measure(case, 6, ROOFS) if r["pass"] == "backward"}
    assert rows["cuDNN"]["problem"].startswith("wrong: ") and "median_ms" not in rows["cuDNN"]
    assert rows["FA3"]["problem"].startswith("ModuleNotFoundError: ") and "ratio" in rows["FA4"]
    assert rows["flash" + ALONE]["median_ms"] > 0, "the kernel of an implementation alone"


def test_versions_and_power(monkeypatch: pytest.MonkeyPatch) -> None:
    error = metadata.PackageNotFoundError
    monkeypatch.setattr(metadata, "version", Mock(side_effect=["1.2", error, "1.2", "1.2", "1.3"]))
    found, skipped = baselines.of(spec("layer_norm"), gpu=True, autotune=False)
    assert [*found] == [f"torch.compile {torch.__version__}", "QuACK 1.2"]
    assert skipped == {"Liger": "liger-kernel is not installed"}
    found, skipped = baselines.of(spec("mlp"), gpu=True, autotune=False)
    assert "max-autotune 1.3" not in found and "--autotune" in skipped["max-autotune"]
    assert "max-autotune 1.3" in baselines.of(spec("mlp"), gpu=True, autotune=True)[0]
    assert AUTOTUNED.keys() <= {*torch._inductor.list_options()}
    gpu = SimpleNamespace(joules=Mock(side_effect=[5.0, 11.0]), clock=lambda: (1605, 0))
    monkeypatch.setattr(power, "open_gpu", lambda: (gpu, None))
    monkeypatch.setattr(kernels, "ms_between", lambda a, b: 10.0)
    found = kernels.load(lambda: lambda: None, CPU, seconds=0.01)
    assert found == {"watts": 600.0, "clock_mhz": 1605.0}


def test_launch_configs_are_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches those of a made-up kernel: right up to tiles of 32, fastest with the smallest."""
    start, seen = Config({"BLOCK": 32, "SWITCH": 1}, 2, 1), list[int]()
    table = {"default": {64: start, 128: Config({"BLOCK": 8}, 1)}}
    module: Any = SimpleNamespace(__name__="made_up", TABLE=table)
    monkeypatch.setitem(sys.modules, "made_up", module)

    def own(x: Tensor) -> Tensor:
        seen.append(lookup(table, "cpu", 50).blocks["BLOCK"])
        return x * (2 if seen[-1] <= 32 else 3)

    own.__module__ = "made_up"

    tile = lambda make: (make()(), float(seen[-1]))[1]  # noqa: E731
    monkeypatch.setattr(kernels, "interleave", lambda makes, *_: [[tile(m)] * 10 for m in makes])
    rows = [*kernels.sweep(doubled(triton=own), 10)]
    assert len({row["key"] for row in rows}) == len(rows) == 1 + 2 + 2 + 1
    (wrong,), (better,) = ([r for r in rows if r.get(key)] for key in ("problem", "entry"))
    assert "'BLOCK': 64" in wrong["key"] and "'BLOCK': 16" in better["entry"]
    assert table["default"][64] is start and "cpu" not in table
