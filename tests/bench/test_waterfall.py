"""The waterfall: its arithmetic, the command on a CPU, and stored results drawn again."""

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench import results, waterfall
from bench.trace import ATTENTION, GAPS, HEAD, LINEAR, MEMORY, OPTIMIZER, OTHER, Context, Row
from fastgpt.errors import UserError
from fastgpt_kernels.registry import Sizes
from tests.bench.test_results import load_only

CONTEXT = Context(Sizes(64, 1024, 12, 768, 50257, 50304), 12, 1, 2, 790e12, 4.3e12)
N_PARAMS = 123_653_376  # 12 x 12 x 768^2, embedding 50304 x 768, 25 norms: no position embeddings
FLOPS = 65536 * (6.0 * N_PARAMS + 12 * 12 * 768 * 1024)
IDEAL_MS = FLOPS / 989.4e9


def rows() -> list[Row]:
    parts = {LINEAR: 47.5, ATTENTION: 14.5, HEAD: 23.7, MEMORY: 10.5, OPTIMIZER: 1.0}
    bounds = {LINEAR: 42.0, ATTENTION: 6.0, HEAD: 20.0, MEMORY: 8.0, OPTIMIZER: 0.5}
    return [Row(p, f"{p} kernel", "forward", "", 12, ms, bounds[p]) for p, ms in parts.items()]


def rungs(step_ms: float, idle_ms: float, *more: Row) -> dict[str, Any]:
    made = waterfall.rungs_of([*rows(), *more], idle_ms, step_ms, IDEAL_MS, FLOPS, CONTEXT)
    assert sum(r["ms"] for r in made) == pytest.approx(step_ms)
    assert made[-1]["mfu_after"] == pytest.approx(100 * IDEAL_MS / step_ms)
    assert 100 - sum(r["mfu_points"] for r in made) == pytest.approx(made[-1]["mfu_after"])
    return {r["name"]: r for r in made}


def test_rungs_add_up_to_the_measured_step() -> None:
    found, linear = rungs(100.0, 2.8), 65536 * 6.0 * 12 * 12 * 768 * 768
    assert found["residual"]["ms"] == pytest.approx(0, abs=1e-9)
    assert found["matmul peak"]["mfu_after"] == pytest.approx(100 * 790 / 989.4)
    assert found[LINEAR]["ms"] == pytest.approx(47.5 - linear / 790e9)
    assert found[LINEAR]["takes_ms"] == 47.5 and found[LINEAR]["bound_ms"] == 42.0
    attention = 65536 * 12.0 * 12 * 768 * 1024 / 790e9  # MFU counts all scores
    assert found[ATTENTION]["credit_ms"] == pytest.approx(attention)
    assert found[GAPS]["ms"] == 2.8 and OTHER not in found
    assert rungs(100.0, 0.0)["residual"]["ms"] == pytest.approx(2.8)
    assert rungs(100.0, 1.3, Row(OTHER, "new", "forward", "", 1, 1.5))[OTHER]["ms"] == 1.5


def test_the_budget_adds_up_and_wrong_bounds_are_reported() -> None:
    lines = waterfall.budget(rows(), 2.8, 100.0)
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


def test_command_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = "laptop --n_layer=2 --block_size=32 --batch_size=4 --device=cpu --seconds=0.5 --markdown"
    assert waterfall.main([*argv.split(), "--traced-steps=4", f"--out={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "all kernels" in out and "| kernel" in out and "time ratio" in out
    drawn = load_only(tmp_path, "waterfall")["rows"][0]["waterfall"]
    kernels = sum(r["ms"] for r in drawn["budget"])
    assert kernels + drawn["idle_ms"] == pytest.approx(drawn["step_ms"], rel=0.01)
    named = {r["name"] for r in drawn["rungs"] if r.get("takes_ms")}
    assert {LINEAR, ATTENTION, HEAD, MEMORY, OPTIMIZER, GAPS} <= named
    # c_attn, c_proj, c_fc, c_proj: forward, dX and dW of each of two layers; and the head's three
    gemms = [r for r in drawn["budget"] if r["kernel"] == "aten::mm"]
    assert sum(r["launches"] for r in gemms if r["part"] == LINEAR) == pytest.approx(24)
    assert sum(r["launches"] for r in gemms if r["part"] == HEAD) == pytest.approx(3)
    assert {r["kind"] for r in gemms} == {"forward", "dX", "dW"}
    (picture,) = tmp_path.glob("**/*.svg")
    texts = {e.text for e in ElementTree.parse(picture).iter()}
    assert {"measured step", *(r["name"] for r in drawn["rungs"][:3])} <= texts
    assert f"{drawn['step_ms']:.4g} ms" in texts and "a CPU picture" in str(texts)
    assert picture.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_a_stored_result_is_drawn_again(tmp_path: Path, capsys: Any) -> None:
    """Draws README's picture. No bound is above its time, and one would be an error."""
    (stored,) = (results.FOLDER / "nvidia-h200").glob("*-waterfall.json")
    path = Path(shutil.copy(stored, tmp_path))
    assert waterfall.main([f"--redraw={path}"]) == 0
    texts = path.with_suffix(".svg").read_text()
    assert ">42%<" in texts and ">852.6 ms<" in texts and "474%" not in texts
    assert "the optimizer's bound was 11.27 ms" in capsys.readouterr().out
    data = json.loads(path.read_text())
    data["rows"][0]["waterfall"]["rungs"][6]["bound_ms"] = 11.27
    waterfall.draw(data, path)
    assert ">error<" in path.with_suffix(".svg").read_text()
    with pytest.raises(UserError, match="a result of step, not of waterfall"):
        waterfall.draw(data | {"name": "step"}, path)
