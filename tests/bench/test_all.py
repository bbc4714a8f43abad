"""All parts inside a budget, on a fake clock: order, failures, rules, and kept results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import all as everything
from bench import results
from bench.all import Part
from bench.results import Row


def row(variant: str, *ms: float | None) -> Row:
    named = {"key": f"gpt2 {variant}", "variant": variant, "median_ms": 50.0, "mfu": 0.5}
    return named | {"samples_ms": [50.0], "problem": "", **({"difference_ms": ms} if ms else {})}


def kernel(op: str, provider: str, kind: str, us: float, ratio: float) -> Row:
    found = {"to": "triton", "ratio": ratio, "low": ratio - 0.1, "high": ratio + 0.1}
    found["verdict"] = "faster" if found["high"] < 1 else "no difference"
    named = {"op": op, "provider": provider, "pass": kind, "key": f"{op} {kind} {provider}"}
    return row("") | named | {"median_ms": us / 1e3, "ratio": found}


GAP = {"kernel": "k", "kind": "dW", "shape": "8 x 8", "ms": 2.0, "bound_ms": 0.5}
ROWS = {
    "step": [row("kernels+compile"), row("op.attention=hopper", -2.4, -2.9, -1.9)],
    "waterfall": [row("gpt2") | {"waterfall": {"budget": [GAP] * 5}}],
    "kernels": [kernel("layer_norm", "QuACK 1.2", "forward", 40, 0.8)],
}
ORDER = ["mlp", "attention", "step", "micro-batch 64", "waterfall", "sustained", "configs"]
ORDER += ["kernels", "ncu"]


@pytest.fixture
def rehearse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, float]]:
    """Runs `all` as on a GPU. Parts take a share of their time. Returns their seconds."""
    now, parts = [1000.0], everything.parts
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(everything, "parts", lambda gpu, peer: parts(True, peer))
    monkeypatch.setattr(everything, "clock", lambda: now[0])

    def rehearsed(budget: float, share: float = 0.5, fails: str = "") -> dict[str, float]:
        end, given = now[0] + budget, dict[str, float]()

        def run(part: Part, out: Path, seconds: float, log: Any) -> int | None:
            given[part.name] = seconds
            now[0] += share * seconds
            result = results.Result(part.name, [], {})
            result.rows += ROWS.get(part.command.split()[0], [])
            result.save(out)
            return int(part.name == fails) if share < 1 else None

        monkeypatch.setattr(everything, "run", run)
        code = everything.main([f"--budget={budget}", f"--out={tmp_path}", "--peer-path=a b"])
        assert code == bool(fails), "a part that is cut is no error"
        assert now[0] <= end
        return given

    return rehearsed


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_parts_of_a_budget(share: float, rehearse: Any, capsys: Any) -> None:
    four = ["mlp", "attention", "step", "waterfall"]
    for budget, names in ((520, ORDER), (240, four), (100, ["step"]), (30, ["attention"])):
        given, said = rehearse(budget, share), capsys.readouterr().out
        assert [*given] == names
        for part in everything.parts(True, ""):
            assert part.name in given or f"{part.name}: not run within {budget} s" in said
            assert given.get(part.name, part.least) >= part.least


def test_decisions_and_failures(rehearse: Any, tmp_path: Path, capsys: Any) -> None:
    rehearse(520, fails="waterfall")
    said, decided = capsys.readouterr().out.split("decisions:")
    saves = "op.attention=hopper: 50.00 ms, 50.0 % MFU; take it: it saves 2.40 ms [1.90, 2.90]"
    assert saves in said and saves in decided and "k dW" not in decided
    assert "waterfall: exit code 1: see all.log" in said and "kernels: done" in said
    assert said.count("k dW 8 x 8: 2.000 ms, of which 0.500 are its bound") == 6
    assert "layer_norm forward QuACK 1.2: 0.800 [0.700, 0.900] faster than triton" in said
    (path,) = tmp_path.glob("**/*-all.json")
    assert [r["key"] for r in results.load(path)["rows"]] == ORDER


def test_no_default_without_proof() -> None:
    for ms in ((-0.2, -0.25, -0.15), (-2.0, -4.1, 0.1), (-2.0, None, None)):
        assert "take it" not in everything.keep_what_pays([row("op.attention=hopper", *ms)])[0]
    for us, ratio, same, said in (
        (450.0, 0.75, True, "saves 150 of the 100 µs needed: take it"),
        (550.0, 0.9, True, "saves 61 of the 100 µs needed: leave it off"),
        (450.0, 0.95, True, "than triton; saves 24 of the 100 µs needed: leave it off"),
        (450.0, 0.75, False, "other bits in a repeat, a race: leave it off"),
    ):
        found = kernel("attention", "hopper", "backward", us, ratio) | {"same_bits": same}
        assert everything.proven_faster([found])[0].endswith(said)


def test_parts_name_what_exists(tmp_path: Path) -> None:
    known = {f"{op.name} {n}" for op in everything.specs() for n in op.implementations}
    assert {" ".join(key.split()[:2]) for key in everything.NEEDED_US} <= known
    new = {"--swap=op.mlp=hopper", "--swap=op.attention=triton"}
    assert new <= {*everything.levers("sm_90").split()} and not everything.levers("cpu")
    with (tmp_path / "log").open("w") as log:
        part = Part("", 1, 0, 0, everything.largest_gaps, "nothing")
        assert everything.run(part, tmp_path, 60, log) == 2
        assert everything.run(part._replace(command="step laptop"), tmp_path, 0.2, log) is None
