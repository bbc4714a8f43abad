"""The kernel comparison: it runs on a CPU, and a wrong or failing implementation gets no time."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import baselines, kernels, results
from bench.kernels import ALONE, Case
from fastgpt_kernels.launch import Config, lookup
from fastgpt_kernels.registry import Cost, ExampleInputs, Implementation, OpSpec, Sizes, spec, specs

CPU, ROOFS = torch.device("cpu"), {"TFLOP/s": 1.0, "GB/s": 10.0}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_runs_on_a_cpu_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--rounds=6", f"--out={tmp_path}", "--device=cpu"]) == 0
    (path,) = results.files(tmp_path)
    written = results.load(path)
    assert path.name.endswith("-kernels.json") and written["complete"]
    assert {row["op"] for row in written["rows"]} == {op.name for op in specs()}
    for row in written["rows"]:
        if row["provider"] == "eager":
            assert len(row["samples_ms"]) == 6 and 0 < max(row["errors"]) < 1e-6
            assert row["share_of_roof"] > 0 and not row["problem"]
        elif row["provider"] in ("hopper", "Liger") or row["provider"].startswith("torch.compile"):
            assert row["problem"] and "median_ms" not in row
    said = capsys.readouterr().out
    assert "of the roof" in said and "Liger: not installed" in said


def doubled(**functions: Any) -> Case:
    """y = 2 x, by eager and others, which may be at fault."""
    known = {"eager": Implementation(lambda x: x * 2)}
    known |= {name: Implementation(function) for name, function in functions.items()}
    examples = [ExampleInputs([torch.randn(50)])]
    op = OpSpec(
        "doubled", known, lambda s, random: examples, lambda s, size: {"forward": Cost(0, 400)},
        kernels=(), category="memory",
    )  # fmt: skip
    return Case.of(op, Sizes(), CPU, torch.float32)


def test_no_time_for_a_wrong_implementation(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such engine\nand more")

    def not_a_number(x: torch.Tensor) -> torch.Tensor:
        return x * float("nan")

    case = doubled(triton=lambda x: x + x, nearly=lambda x: x * 2.001, b=broken, nan=not_a_number)
    rows = {row["provider"]: row for row in kernels.measure(case, 6, ROOFS)}
    assert rows["nearly"]["problem"].startswith("wrong: relative errors 5.0e-04")
    assert rows["b"]["problem"] == "RuntimeError: no such engine"
    assert rows["nan"]["problem"].startswith("wrong: relative errors nan")
    assert not any("median_ms" in rows[name] for name in ("nearly", "b", "nan"))
    fast = rows["triton"]
    assert fast["rate"] == pytest.approx(400 / (fast["median_ms"] * 1e-3) / 1e9)
    assert rows["eager"]["ratio"]["to"] == "triton"
    kernels.show([*rows.values()])
    said = capsys.readouterr().out
    assert "time / triton's" in said and said.count("no such engine") == 1


def test_eager_itself_may_fail() -> None:
    """Then the others are held against rounding alone."""

    def no_memory(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    case = doubled(triton=lambda x: x + x, nearly=lambda x: x * 2.001)
    judged = case.judge(case.functions()[0] | {"eager": no_memory})
    assert judged["eager"]["problem"] == "OutOfMemoryError: no memory"
    assert not judged["triton"]["problem"] and judged["nearly"]["problem"].startswith("wrong")


def attention_case() -> Case:
    return Case.of(spec("attention"), Sizes(2, 16, 2, 16, bias=False), CPU, torch.float32)


def test_copies_are_shown_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel alone has q, k and v as it likes them; beside it is the time with the copies."""
    case = attention_case()
    monkeypatch.setattr(baselines, "of", lambda op, gpu: ({}, {}))
    rows = {(r["provider"], r["pass"]): r for r in kernels.measure(case, 6, ROOFS)}
    whole, alone = rows["flash", "backward"], rows["flash" + ALONE, "backward"]
    assert whole["copies_ms"] == pytest.approx(whole["median_ms"] - alone["median_ms"])
    function, (q, k, v) = baselines.alone("flash", case.x, 2)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(function(q, k, v), y)
    whole_op = case.op.reference(case.x, 2)
    torch.testing.assert_close(y.transpose(1, 2).flatten(2), whole_op)


def test_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stood in for: flash attention's layout, Liger's order, a wrong loss, a bad import."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2), None

    case = attention_case()
    torch.testing.assert_close(
        baselines.flash_attention(attend)(case.x, 2), case.op.reference(case.x, 2)
    )

    class Liger:
        def __init__(self, ignore_index: int):
            self.options = {"ignore_index": ignore_index}

        def __call__(self, weight: torch.Tensor, x: torch.Tensor, targets: torch.Tensor) -> Any:
            return F.cross_entropy(x @ weight.T, targets, **self.options)

    loss = Case.of(spec("linear_cross_entropy"), Sizes(2, 16, 2, 16, 90, 128), CPU, torch.float32)
    functions = {"eager": loss.op.reference, "Liger": baselines.liger_linear_loss(Liger)}
    functions["wrong"] = baselines.of_weights(lambda x, w, t, **_: F.cross_entropy(x @ w.T, t))
    functions["absent"] = baselines.late("no_such_module.function", lambda f: f)
    if hasattr(F, "linear_cross_entropy"):
        functions["torch"] = baselines.torch_chunks(F.linear_cross_entropy)
    judged = {name: row["problem"] for name, row in loss.judge(functions).items()}
    assert judged.pop("wrong") and judged.pop("absent").startswith("ModuleNotFoundError: ")
    assert not any(judged.values())
    found, skipped = baselines.of(spec("cross_entropy"), gpu=False)
    assert not found and skipped["QuACK"] == "not installed"


def test_launch_configs_are_searched(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Of a made-up kernel: right with tiles up to 32, and the fastest with the smallest."""
    start = Config({"BLOCK": 32, "SWITCH": 1}, 2, 1)
    table = {"default": {64: start, 128: Config({"BLOCK": 8}, 1)}}
    module = ModuleType("fastgpt_kernels.made_up")
    module.TABLE = table  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    seen: list[int] = []

    def own(x: torch.Tensor) -> torch.Tensor:
        seen.append(lookup(table, "cpu", 50).blocks["BLOCK"])
        return x * (2 if seen[-1] <= 32 else 3)

    def fake(makes: list[Any], device: torch.device, rounds: int) -> list[list[float]]:
        """Times that are the tile's size."""
        times = []
        for make in makes:
            make()()
            times.append([float(seen[-1])] * rounds)
        return times

    monkeypatch.setattr(kernels, "interleave", fake)
    rows = [*kernels.sweep(doubled(triton=own), 10)]
    assert len({row["key"] for row in rows}) == len(rows) == 1 + 2 + 2 + 1
    (wrong,) = [row["key"] for row in rows if row["problem"]]
    assert "'BLOCK': 64" in wrong
    said = capsys.readouterr().out
    assert "fastgpt_kernels.made_up.TABLE['cpu'], 5 configs" in said and "0.500" in said
    assert "    64: Config(blocks={'BLOCK': 16, 'SWITCH': 1}, num_warps=2" in said
    assert table["default"][64] is start and "cpu" not in table
