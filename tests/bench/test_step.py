"""The training step: variants that get a time, and the figures in their rows."""

import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import processes, results, setup, step
from bench.__main__ import main
from bench.processes import Measured, settled
from bench.variants import EAGER, FAST, Variant, swaps
from tests.bench.test_results import load_only

ROOT = Path(__file__).parents[2]
TINY = ["--n_layer=1", "--n_embd=32", "--block_size=16", "--device=cpu", "--peak_tflops=1"]
FLAGS = dict(f[2:].split("=") for f in TINY)
BUILT = {"losses": [6.0, 5.5], "grad_norms": [2.0, 1.0], "ops": [], "warm_up_s": 1.0}

# Stands in for nanoGPT's model.py: fastgpt's own model, right or 20 % off
FAKE_PEER = """
import torch
from types import SimpleNamespace as GPTConfig
from fastgpt.model.gpt import GPT as Own, ModelShape

class GPT(Own):
    def __init__(self, c):
        sizes = c.n_layer, c.n_head, c.n_embd, c.block_size, c.vocab_size, c.bias
        super().__init__(ModelShape(*sizes))

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=0.0)

    def forward(self, idx, targets):
        return None, super().forward(idx, targets) * FACTOR
"""


def turn(ms: float, joules: float | None = None) -> dict[str, Any]:
    """Returns the answer of a variant's process."""
    clock = {"clock_mhz": joules and 1600.0, "throttled": ["power limit"] * bool(joules)}
    return {"ms": ms, "peak_bytes": 2**30, "joules": joules, **clock}


def fake_measure(ms: dict[str, float], joules: float | None = None) -> Any:
    """Returns a `processes.measure` with times by the variant's name, else 10 ms."""

    def measure(variants: list[Variant], *args: Any) -> Iterator[list[Measured]]:
        noise = [0.99, 1.0, 1.0, 1.01, 1.0, 0.995]
        mean = [ms.get(v.name, 10.0) for v in variants]
        turns = [[turn(m * n, joules) for n in noise] for m in mean]
        yield [Measured(v, BUILT, t) for v, t in zip(variants, turns, strict=True)]

    return measure


@pytest.mark.slow
def test_real_steps_are_interleaved(tmp_path: Path) -> None:
    other = tmp_path / "other"
    for name in ("fastgpt", "kernels"):
        shutil.copytree(ROOT / name, other / name)
    wanted = [Variant("eager", EAGER), Variant("other checkout", EAGER, root=str(other))]
    for name, factor in (("peer", "1"), ("wrong", "1.2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.py").write_text(FAKE_PEER.replace("FACTOR", factor))
        wanted.append(Variant(name, EAGER, str(tmp_path / name)))
    wanted.append(Variant("no GPU", {"kernels": "triton"}))
    seen = list[list[int]]()
    for found in processes.measure(wanted, *setup.configure("gpt2", FLAGS), 2, 0.01):
        seen.append([len(m.turns) for m in found])
    eager, elsewhere, peer, wrong, absent = found
    assert not eager.problem and not elsewhere.problem and not peer.problem
    assert eager.built["source"] == str(ROOT / "fastgpt/__init__.py")
    assert elsewhere.built["source"] == str(other / "fastgpt/__init__.py")
    losses = eager.built["losses"]
    assert losses == elsewhere.built["losses"] and losses[-1] < losses[0] - 0.05  # it does learn
    assert peer.built["losses"] == pytest.approx(losses, rel=1e-4)
    assert seen == [[0] * 5, [0] * 5, [1, 1, 1, 0, 0], [2, 2, 2, 0, 0]]
    assert all(t["ms"] > 0 and t["peak_bytes"] > 1e7 and t["joules"] is None for t in eager.turns)
    assert wrong.problem.startswith("wrong: losses differ from eager's by 20.0%")
    assert absent.problem.startswith("UserError: ") and "no GPU" in absent.problem


def test_judge() -> None:
    cases = (5.52, 2.05, True), (5.6, 2.0, False), (5.5, 2.2, False), (math.nan, 2.0, False)
    for loss, norm, right in cases:
        other = {"losses": [6.0, loss], "grad_norms": [norm, 9.0]}
        found = [Measured(Variant("", EAGER), BUILT | more) for more in ({}, other)]
        processes.judge(found, dropout=0.0)
        assert not found[0].problem and bool(found[1].problem) != right
    assert settled([10.0, 10.02, 10.01]) and not settled([10.0, 10.1, 10.0])


def test_a_step_cut_short_keeps_its_rounds(tmp_path: Path, monkeypatch: Any) -> None:
    def measure(variants: list[Variant], *args: Any) -> Iterator[list[Measured]]:
        yield [Measured(v) for v in variants]
        rows = load_only(tmp_path, "step")["rows"]
        assert {r["problem"] for r in rows} == {results.NOT_YET}
        yield [Measured(v, BUILT, [*map(turn, (9.0, 10.0, 11.0))]) for v in variants]
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        step.main(["gpt2", "--variants=eager,compile", f"--out={tmp_path}", *TINY])
    data = load_only(tmp_path, "step")
    assert not data["complete"] and data["rows"][1]["median_ms"] == 10.0
    assert data["rows"][1]["ratio"]["low"] is None


def test_numbers_of_a_row(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    variant_ms = {"eager": 20.0, "compile": 10.5}
    monkeypatch.setattr(processes, "measure", fake_measure(variant_ms, joules=6.4))
    args = ["gpt2", "--variants=eager,compile", f"--out={tmp_path}", "--sustained", *TINY]
    assert step.main(args) == 0
    eager, compiled = load_only(tmp_path, "step")["rows"]
    assert compiled["ratio"]["verdict"] == "faster" and eager["throttled"] == ["power limit"]
    assert compiled["ratio"]["ratio"] == pytest.approx(10.5 / 20)
    assert compiled["difference_ms"][0] == pytest.approx(-9.5)
    rate, flops = 4 * 16 / 20e-3, setup.flops_per_token(*setup.configure("gpt2", FLAGS))
    assert eager["tokens_per_second"] == pytest.approx(rate)
    assert eager["mfu"] == pytest.approx(flops["mfu"] * rate / 1e12)
    assert eager["millijoules_per_token"] == pytest.approx(6.4e3 / 64)
    said = capsys.readouterr().out
    assert "sustained, with a settled clock" in said and "mJ/token" in said and "1600" in said
    monkeypatch.setattr(processes, "measure", fake_measure(variant_ms))
    assert step.main([*args[:3], *TINY]) == 0
    said = capsys.readouterr().out
    assert "short;" in said and "J/step" not in said and "no energy and clock: " in said


def test_swapped_settings() -> None:
    flash, more = {"op.attention": "flash"}, {"compile": False, "tf32": True}
    found = [v.settings for v in swaps(["op.attention=flash", "compile=False,tf32=True"], True)]
    assert found == [FAST, FAST | flash, FAST | more]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("stepp", "bench stepp: unknown benchmark; there are step, kernels, "),
        ("step --n_layr=2", "did you mean --n_layer"),
        ("step --variants=fast", "no 'fast'"),
        ("step --variants=peer", "needs --peer-path"),
        ("step --variants=kernels", "kernels needs a GPU"),
        ("step --peer-path=/nowhere", "--peer-path=/nowhere: there is no model.py in it"),
        ("step --rounds=3", "at least 6, got 3"),
        ("kernels atention", "no op 'atention'"),
        ("waterfall --redraw=/nowhere.json", "/nowhere.json: "),
        ("curves --variants=muon,muun", "no 'muun'; there are "),
        ("curves --variants=muon:lr_schedule=wst", "wanted one of cosine, wsd"),
        ("curves --rates=1e-3,x", "--rates and --target: "),
    ],
)
def test_bad_arguments(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: Any = main([*line.split(), *TINY])
    except SystemExit as e:
        code = e.code
    said = capsys.readouterr().err.splitlines()
    assert code == 2 and message in said[-1] and (len(said) == 1 or "usage: " in said[0])


def test_two_commits(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    commit = "git -c user.name=a -c user.email=a@b.c commit -am"
    script = f"git init; echo 1 >f; git add f; {commit} one; echo 2 >f; {commit} two"
    subprocess.run(script, shell=True, cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setattr(results, "ROOT", tmp_path)

    def compared(ms: float, *refs: str) -> int:
        def measure(pair: list[Variant], *args: Any) -> Any:
            assert [Path(v.root, "f").read_text() for v in pair] == ["1\n", "2\n"]
            return fake_measure({"HEAD": ms})(pair)

        monkeypatch.setattr(processes, "measure", measure)
        return main(["compare", *refs, "gpt2", f"--out={tmp_path}/out", *TINY])

    assert [compared(ms, "HEAD~1", "HEAD") for ms in (10.0, 10.8, 9.0)] == [0, 1, 0]
    assert compared(10.0, "HEAD", "nowhere") == 2 and "nowhere" in capsys.readouterr().err
