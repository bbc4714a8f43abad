"""The kernel comparison: it runs on a CPU, and a wrong or failing provider gets no time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import kernels, results
from bench.cases import CASES, Case
from bench.rivals import Provider, late


def test_runs_on_a_cpu_and_writes_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.main(["--rounds", "6", "--out", str(tmp_path)]) == 0
    (path,) = results.files(tmp_path)
    written = results.load(path)
    assert path.name.endswith("-kernels.json")
    assert written["environment"]["torch"] == torch.__version__
    ops = {row["op"] for row in written["rows"]}
    assert ops == set(CASES)
    for row in written["rows"]:
        if row["provider"] in ("fastgpt", "eager"):
            assert len(row["samples_ms"]) == 6 and row["median_ms"] > 0 and not row["problem"]
        elif row["provider"] in ("torch.compile", "SDPA flash", "liger-kernel"):
            assert row["problem"] and "median_ms" not in row


class Doubled(Case):
    def truth(self) -> list[torch.Tensor]:
        return [self.inputs[0].double() * 2, self.dys[0].double() * 2]


def doubled() -> Case:
    """y = 2 x, by four providers of which two are at fault."""
    x, dy = torch.randn(2, 50)

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such engine\nand more")

    providers = [
        Provider("fastgpt", lambda x: x + x),
        Provider("eager", lambda x: x * 2),
        Provider("nearly", lambda x: x * 2.001),
        Provider("broken", broken),
    ]
    return Doubled("doubled", "50", [x], [dy], {"forward": 400.0}, "GB/s", providers=providers)


def test_no_time_for_a_wrong_provider(capsys: pytest.CaptureFixture[str]) -> None:
    rows = kernels.measure(doubled(), rounds=6)
    by_name = {row["provider"]: row for row in rows}
    assert by_name["nearly"]["problem"].startswith("wrong: relative errors 5.0e-04")
    assert by_name["broken"]["problem"] == "RuntimeError: no such engine"
    assert "median_ms" not in by_name["nearly"] and "median_ms" not in by_name["broken"]
    fast = by_name["fastgpt"]
    assert fast["rate"] == pytest.approx(400 / (fast["median_ms"] * 1e-3) / 1e9)
    assert by_name["eager"]["ours_is"] in ("faster", "slower", "no difference")
    kernels.show(rows)
    assert capsys.readouterr().out.count("\n") == 6


def test_a_wrong_kernel_of_ours_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(device: torch.device, size: int = 0) -> Case:
        case = doubled()
        case.providers[0] = Provider("fastgpt", lambda x: x * 3)
        return case

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(CASES, "doubled", wrong)
    monkeypatch.setattr(kernels, "complete", lambda case, without: case)
    assert kernels.main(["doubled", "--rounds", "6"]) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["atention"], "no op 'atention'"),
        (["--rounds=5"], "--rounds: must be at least 6, got 5"),
        (["--rounds=many"], "--rounds: wanted a whole number, got many"),
    ],
)
def test_bad_arguments(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        kernels.main(args)
    assert e.value.code == 2 and message in capsys.readouterr().err


def test_another_librarys_failures_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import that fails, and a pass that fails only when it is run by itself."""

    def no_import() -> Callable[..., Any]:
        raise ImportError("libnothing.so: cannot open shared object file")

    class OnlyOnce(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            OnlyOnce.calls += 1
            if OnlyOnce.calls > 1:
                raise RuntimeError("out of something")
            return x * 2

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            return dy * 2

    case = doubled()
    case.providers += [Provider("absent", late(no_import)), Provider("once", OnlyOnce.apply)]
    rows = {row["provider"]: row for row in kernels.measure(case, rounds=6)}
    assert rows["absent"]["problem"].startswith("ImportError: libnothing.so")
    assert rows["once"]["problem"] == "RuntimeError: out of something"
    assert "median_ms" not in rows["absent"] and "median_ms" not in rows["once"]
    assert rows["fastgpt"]["median_ms"] > 0 and rows["eager"]["ours_is"]


def test_eager_itself_may_fail() -> None:
    """Then the others are held against rounding alone."""
    case = doubled()
    (eager,) = [p for p in case.providers if p.name == "eager"]

    def no_memory(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    eager.forward = no_memory
    rows = {row["provider"]: row for row in kernels.measure(case, rounds=6)}
    assert rows["eager"]["problem"] == "OutOfMemoryError: no memory"
    assert rows["fastgpt"]["median_ms"] > 0 and rows["nearly"]["problem"].startswith("wrong")
