"""The products of a step: their FLOPs are the model's, and the command runs on a CPU."""

from pathlib import Path

import pytest
import torch

from bench import gemms, results
from fastgpt.config.presets import PRESETS


def test_layers_are_the_models_products() -> None:
    """6 FLOPs a weight and token: N of 124M without the vectors."""
    config = PRESETS["gpt2"]()
    weights = sum(K * N * n for _, K, N, n in gemms.layers(config).values())
    assert weights == 12 * 12 * 768**2 + 50304 * 768


@pytest.mark.slow
def test_runs_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gemms.main(["gpt2", "--rounds", "6", "--out", str(tmp_path)]) == 0
    (path,) = results.files(tmp_path)
    rows = results.load(path)["rows"]
    assert {(r["op"], r["pass"]) for r in rows if r["provider"] == "eager" and r["median_ms"]} == {
        (layer, kind)
        for layer in ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "lm_head", "mlp")
        for kind in ("forward", "backward")
    }
    assert all(r["problem"] for r in rows if r["provider"] != "eager")
    assert {r["provider"] for r in rows} >= {"cuBLASLt", "max-autotune", "fastgpt"}
    assert "all layers of a micro-batch" in capsys.readouterr().out


def test_totals_take_the_best_of_each() -> None:
    rows = [
        {"op": op, "pass": "forward", "provider": provider, "median_ms": ms}
        for op, provider, ms in (("a", "p", 1.0), ("b", "p", 4.0), ("a", "q", 2.0), ("b", "q", 3.0))
    ]
    rows.append({"op": "a", "pass": "forward", "provider": "r", "problem": "wrong"})
    found = dict(gemms.totals(rows, {"a": 10, "b": 1}))
    assert found == {"p": 14.0, "q": 23.0, "the best of each": 13.0}


@pytest.mark.parametrize("argv", [["gpt3"], ["--rounds", "2"]])
def test_bad_arguments(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as e:
        gemms.main(argv)
    assert e.value.code == 2
