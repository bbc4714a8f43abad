"""The waterfall: its arithmetic on known numbers, and the command on real steps of a CPU."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench import results, waterfall
from bench.trace import ATTENTION, GAPS, HEAD, LINEAR, MEMORY, MUON, OPTIMIZER, OTHER, Context, Row
from fastgpt_kernels.registry import Sizes

CONTEXT = Context(Sizes(64, 1024, 12, 768, 50257, 50304), 12, 1, 2, 790e12, 4.3e12)
N_PARAMS = 123_653_376  # 12 x 12 x 768^2, embedding 50304 x 768, 25 norms: no position embeddings
FLOPS = 65536 * (6.0 * N_PARAMS + 12 * 12 * 768 * 1024)
IDEAL_MS = FLOPS / 989.4e9


def rows() -> list[Row]:
    """97.2 ms of kernels."""
    parts = {LINEAR: 47.5, ATTENTION: 14.5, HEAD: 23.7, MEMORY: 10.5, OPTIMIZER: 1.0}
    bounds = {LINEAR: 42.0, ATTENTION: 6.0, HEAD: 20.0, MEMORY: 8.0, OPTIMIZER: 0.5}
    return [Row(p, f"{p} kernel", "forward", "", 12, ms, bounds[p]) for p, ms in parts.items()]


def rungs(step_ms: float, idle_ms: float, found: list[Row] | None = None) -> dict[str, Any]:
    made = waterfall.rungs_of(found or rows(), idle_ms, step_ms, IDEAL_MS, FLOPS, CONTEXT)
    assert sum(r["ms"] for r in made) == pytest.approx(step_ms)
    assert made[-1]["mfu_after"] == pytest.approx(100 * IDEAL_MS / step_ms)
    assert 100 - sum(r["mfu_points"] for r in made) == pytest.approx(made[-1]["mfu_after"])
    return {r["name"]: r for r in made}


def test_rungs_add_up_to_the_measured_step() -> None:
    found = rungs(100.0, 2.8)
    assert found["residual"]["ms"] == pytest.approx(0, abs=1e-9)
    assert found["matmul peak"]["mfu_after"] == pytest.approx(100 * 790 / 989.4)
    linear = 65536 * 6.0 * 12 * 12 * 768 * 768
    assert found[LINEAR]["ms"] == pytest.approx(47.5 - linear / 790e9)
    assert found[LINEAR]["takes_ms"] == 47.5 and found[LINEAR]["bound_ms"] == 42.0
    attention = 65536 * 12.0 * 12 * 768 * 1024 / 790e9  # what MFU counts: all scores
    assert found[ATTENTION]["credit_ms"] == pytest.approx(attention)
    assert found[GAPS]["ms"] == 2.8 and OTHER not in found
    assert rungs(100.0, 0.0)["residual"]["ms"] == pytest.approx(2.8)
    assert (
        rungs(100.0, 1.3, [*rows(), Row(OTHER, "new", "forward", "", 1, 1.5)])[OTHER]["ms"] == 1.5
    )


def test_the_budget_adds_up_and_wrong_bounds_are_said() -> None:
    lines = waterfall.budget(rows(), 2.8, 100.0)
    assert all(len(line) == len(waterfall.HEADER) for line in lines)
    ms, gap = (waterfall.HEADER.index(name) for name in ("ms", "gap ms"))
    named = {line[0]: line for line in lines}
    kernels = sum(float(line[ms]) for line in lines[:5])
    assert kernels == float(named["all kernels"][ms]) == 97.2
    assert kernels + float(named["idle"][ms]) == float(named["step"][ms]) == 100.0
    assert named["not explained"][ms] == "0.000" and named["0 more"][ms] == "0.000"
    assert named[f"{LINEAR} kernel"][gap] == "5.500" and named[f"{LINEAR} kernel"][5] == "3958.3"
    assert not waterfall.problems_of(rows(), 0.5, 100.0)
    wrong = [*rows(), Row(HEAD, "k", "forward", "8 x 8", 1, 1.0, 4.74)]
    bound, missed = waterfall.problems_of(wrong, 1.5, 100.0)
    assert bound == "error in the bound of k 8 x 8: 4.740 ms, it took 1.000"
    assert missed == "kernels and gaps miss the measured step by +1.5%"


ARGS = ["laptop", "--n_layer=2", "--block_size=32", "--batch_size=4", "--device=cpu"]


def test_command_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*ARGS, "--seconds=0.5", "--traced-steps=4", "--markdown", f"--out={tmp_path}"]
    assert waterfall.main(argv) == 0
    out = capsys.readouterr().out
    assert "all kernels" in out and "| kernel" in out and "time ratio" in out
    (path,) = tmp_path.glob("**/*.json")
    (row,) = results.load(path)["rows"]
    drawn = row["waterfall"]
    assert (drawn["format"], drawn["version"]) == ("fastgpt-waterfall", 2)
    kernels = sum(r["ms"] for r in drawn["budget"])
    assert kernels + drawn["idle_ms"] == pytest.approx(drawn["step_ms"], rel=0.01)
    takes = {r["name"]: r.get("takes_ms") for r in drawn["rungs"]}
    assert all(takes[p] > 0 for p in (LINEAR, ATTENTION, HEAD, MEMORY, OPTIMIZER, GAPS))
    # c_attn, c_proj, c_fc, c_proj: forward, dX and dW of each of two layers; and the head's three.
    gemms = [r for r in drawn["budget"] if r["kernel"] == "aten::mm"]
    assert sum(r["launches"] for r in gemms if r["part"] == LINEAR) == pytest.approx(24)
    assert sum(r["launches"] for r in gemms if r["part"] == HEAD) == pytest.approx(3)
    assert {r["kind"] for r in gemms} == {"forward", "dX", "dW"}
    bounds = sum(r["bound_ms"] for r in gemms if r["part"] == LINEAR)
    work = 4 * 32 * 6 * 12 * 2 * 128 * 128
    assert bounds == pytest.approx(work / drawn["matmul_flops"] * 1e3, rel=0.05)
    texts = [e.text for e in ElementTree.parse(path.with_suffix(".svg")).iter() if e.text]
    assert {"measured step", "CPU picture", *(r["name"] for r in drawn["rungs"][:3])} <= {*texts}
    assert f"{drawn['step_ms']:.4g} ms" in texts
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


# Dropout, biases, several micro-batches, bf16 and an eager-mode cast of every weight; Muon.
MANY = ["--device=cpu", "--optimizer=muon", "--dropout=0.1", "--bias=True", "--dtype=bfloat16"]
MANY += ["--gradient_accumulation_steps=3", "--n_embd=64"]
CUDA = ["--device=cuda", "--n_embd=256", "--block_size=256"]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(MANY, marks=pytest.mark.slow),
        pytest.param([*CUDA, "--compile=True"], marks=pytest.mark.cuda),
        pytest.param([*CUDA, "--compile=False"], marks=pytest.mark.cuda),
    ],
)
def test_real_traces_are_attributed_whole(flags: list[str], tmp_path: Path) -> None:
    assert waterfall.main([*ARGS, *flags, "--seconds=0.3", f"--out={tmp_path}"]) == 0
    (path,) = tmp_path.glob("**/*.json")
    drawn = results.load(path)["rows"][0]["waterfall"]
    wanted = {OPTIMIZER, MEMORY, ATTENTION, HEAD} | {MUON for flag in flags if "muon" in flag}
    assert {r["name"] for r in drawn["rungs"]} >= wanted
    other = sum(r["ms"] for r in drawn["budget"] if r["part"] == OTHER)
    assert other < 0.01 * drawn["step_ms"], json.dumps(drawn["budget"])
