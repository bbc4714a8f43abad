"""The kernel comparison: it runs on a CPU, and a wrong or failing implementation gets no time."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import baselines, kernels, results
from bench.kernels import ALONE, Case
from fastgpt_kernels.launch import Config, lookup
from fastgpt_kernels.registry import Cost, ExampleInputs, Implementation, OpSpec, Sizes, spec, specs

CPU, ROOFS = torch.device("cpu"), {"TFLOP/s": 1.0, "GB/s": 10.0}
SMALL = Sizes(2, 16, 2, 16, 90, 128, bias=False)


def test_runs_on_a_cpu_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--rounds=6", f"--out={tmp_path}", "--device=cpu"]) == 0
    (path,) = results.files(tmp_path)
    rows = results.load(path)["rows"]
    assert path.name.endswith("-kernels.json")
    assert {row["op"] for row in rows} == {op.name for op in specs()}
    for row in rows:
        if row["provider"] == "eager":
            assert len(row["samples_ms"]) == 6 and 0 <= max(row["errors"]) < 1e-6
            assert row["share_of_roof"] > 0 and not row["problem"]
        elif row["provider"] in ("hopper", "Liger") or row["provider"].startswith("torch.compile"):
            assert row["problem"] and "median_ms" not in row
    said = capsys.readouterr().out
    assert "of the roof" in said and "Liger: not installed" in said


def doubled(**functions: Any) -> Case:
    """y = 2 x, by eager and others, which may be at fault."""
    known = {n: Implementation(f) for n, f in ({"eager": lambda x: x * 2} | functions).items()}
    examples, costs = [ExampleInputs([torch.randn(50)])], {"forward": Cost(0, 400)}
    op = OpSpec(
        "doubled", known, lambda *_: examples, lambda *_: costs, kernels=(), category="memory"
    )  # fmt: skip
    return Case.of(op, Sizes(), CPU, torch.float32)


def broken(x: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("no memory\nand more")


RIGHT_AND_WRONG: dict[str, Any] = {"triton": lambda x: x + x, "nearly": lambda x: x * 2.001}


def test_no_time_for_a_wrong_implementation(capsys: pytest.CaptureFixture[str]) -> None:
    case = doubled(**RIGHT_AND_WRONG, broken=broken, nan=lambda x: x * float("nan"))
    rows = {row["provider"]: row for row in kernels.measure(case, 6, ROOFS)}
    assert rows["nearly"]["problem"].startswith("wrong: relative errors 5.0e-04")
    assert rows["broken"]["problem"] == "OutOfMemoryError: no memory"
    assert rows["nan"]["problem"].startswith("wrong: relative errors nan")
    assert {name for name, row in rows.items() if "median_ms" in row} == {"eager", "triton"}
    fast = rows["triton"]
    assert fast["rate"] == pytest.approx(400 / (fast["median_ms"] * 1e-3) / 1e9)
    assert rows["eager"]["ratio"]["to"] == "triton"
    kernels.show([*rows.values()])
    said = capsys.readouterr().out
    assert "time / triton's" in said and said.count("no memory") == 1


def test_without_eager_others_are_held_against_rounding() -> None:
    judged = doubled().judge({"eager": broken} | RIGHT_AND_WRONG)
    assert judged["eager"]["problem"] == "OutOfMemoryError: no memory"
    assert not judged["triton"]["problem"] and judged["nearly"]["problem"].startswith("wrong")


def test_copies_are_shown_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel alone has q, k and v as it likes them; beside it is the time with the copies."""
    case = Case.of(spec("attention"), SMALL, CPU, torch.float32)
    monkeypatch.setattr(baselines, "of", lambda op, gpu: ({}, {}))
    rows = {(r["provider"], r["pass"]): r for r in kernels.measure(case, 6, ROOFS)}
    whole, alone = rows["flash", "backward"], rows["flash" + ALONE, "backward"]
    assert whole["copies_ms"] == pytest.approx(whole["median_ms"] - alone["median_ms"])
    function, (q, k, v) = baselines.alone("flash", case.x, 2)
    y = function(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(y, case.op.reference(case.x, 2))


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, None]:
    """Computes attention in FlashAttention's layout."""
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2), None


class Liger:
    def __init__(self, ignore_index: int):
        self.options: Any = {"ignore_index": ignore_index}

    def __call__(self, weight: Tensor, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(x @ weight.T, targets, **self.options)


def test_other_libraries() -> None:
    """Stood in for: flash attention's layout, Liger's order, a wrong loss, a bad import."""
    case = Case.of(spec("attention"), SMALL, CPU, torch.float32)
    flash = baselines.flash_attention(attend)
    torch.testing.assert_close(flash(case.x, 2), case.op.reference(case.x, 2))
    loss = Case.of(spec("linear_cross_entropy"), SMALL, CPU, torch.float32)
    functions = {"eager": loss.op.reference, "Liger": baselines.liger_linear_loss(Liger)}
    functions["wrong"] = baselines.of_weights(lambda x, w, t, **_: F.cross_entropy(x @ w.T, t))
    functions["absent"] = baselines.late("no_such_module.function", lambda f: f)
    if hasattr(F, "linear_cross_entropy"):
        functions["torch"] = baselines.torch_chunks(F.linear_cross_entropy)
    judged = {name: row["problem"] for name, row in loss.judge(functions).items()}
    assert judged.pop("wrong") and judged.pop("absent").startswith("ModuleNotFoundError: ")
    assert not any(judged.values())


def test_launch_configs_are_searched(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Of a made-up kernel: right with tiles up to 32, and the fastest with the smallest."""
    start, seen = Config({"BLOCK": 32, "SWITCH": 1}, 2, 1), list[int]()
    table = {"default": {64: start, 128: Config({"BLOCK": 8}, 1)}}
    module = ModuleType("fastgpt_kernels.made_up")
    monkeypatch.setattr(module, "TABLE", table, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def own(x: Tensor) -> Tensor:
        seen.append(lookup(table, "cpu", 50).blocks["BLOCK"])
        return x * (2 if seen[-1] <= 32 else 3)

    def tile(make: Any) -> float:
        make()()
        return float(seen[-1])

    monkeypatch.setattr(kernels, "interleave", lambda makes, *_: [[tile(m)] * 10 for m in makes])
    rows = [*kernels.sweep(doubled(triton=own), 10)]
    assert len({row["key"] for row in rows}) == len(rows) == 1 + 2 + 2 + 1
    (wrong,) = [row["key"] for row in rows if row["problem"]]
    assert "'BLOCK': 64" in wrong
    said = capsys.readouterr().out
    assert "fastgpt_kernels.made_up.TABLE['cpu'], 5 configs" in said and "0.500" in said
    assert "    64: Config(blocks={'BLOCK': 16, 'SWITCH': 1}, num_warps=2" in said
    assert table["default"][64] is start and "cpu" not in table
