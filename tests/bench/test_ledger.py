"""The ledger's arithmetic on made-up launches; real steps are counted in tests/step_counts.py."""

from __future__ import annotations

import pytest

from bench import ledger, report, results
from bench.fake_cuda import Launch
from bench.fake_step import Step
from fastgpt.config.presets import PRESETS
from fastgpt.config.settings import replace
from fastgpt.errors import UserError

CONFIG = replace(
    PRESETS["gpt2"](), n_layer=2, batch_size=4, gradient_accumulation_steps=3, dtype="bfloat16"
)
SIZES = ledger.sizes_of(CONFIG, 50257)
M, C, V = 4 * 1024, 768, 50304
RATES = ledger.Rates(ledger.find("h100"), 0.5, 0.5, 0.5)


def product(m: int, n: int, k: int) -> Launch:
    return Launch("extern_kernels.mm", 2 * k * (m + n), 2 * m * n, 2 * m * n * k, (m, n, k))


def test_what_a_launch_is_for() -> None:
    cast = ("prims.convert_element_type.default",)
    cases = {
        ("linear", "forward"): ("forward", product(M, 3 * C, C)),
        ("linear", "dX"): ("backward", product(M, C, 3 * C)),
        ("linear", "dW"): ("backward", product(C, C, M)),
        ("head", "products"): ("backward", product(V, C, M)),
        ("optimizer", "casts of weights"): ("forward", Launch("triton", 4 * C * C, 1, ops=cast)),
        ("optimizer", "casts of gradients"): ("backward", Launch("triton", 9, 9, ops=cast)),
        ("optimizer", "AdamW"): ("rest", Launch("_fused_adamw_", 9, 9)),
        ("optimizer", "gradient accumulation"): ("rest", Launch("add_", 9000, 4500)),
        ("muon", "Newton-Schulz"): (
            "rest", Launch("bmm", 9, 9, 9, (C, C, V), lines=("muon.py:52",)),
        ),
        ("muon", "momentum and update"): ("rest", Launch("stack", 9, 9, lines=("muon.py:9",))),
        ("memory", "bias sums"): (
            "backward", Launch("triton", M * C * 2, C * 4, ops=("sum.dim_IntList",)),
        ),
        ("memory", "dropout"): (
            "forward", Launch("triton", M * C * 2, M * C * 2, ops=("inductor_random.default",)),
        ),
        ("memory", "norms"): (
            "forward", Launch("layer_norm_forward", 9, 9, ops=("fastgpt.layer_norm",), roof=0.5),
        ),
        ("attention", "backward"): (
            "backward", Launch("attention_key_value", 9, 9, ops=("fastgpt.attention_backward",)),
        ),
        ("memory", "embedding"): (
            "backward", Launch("index_add_", 9, 9, ops=("fastgpt.add_rows",)),
        ),
        ("head", "cross entropy"): (
            "forward", Launch("cross_entropy", 9, 9, ops=("fastgpt.linear_cross_entropy",)),
        ),
    }  # fmt: skip
    for want, (phase, launch) in cases.items():
        assert ledger.sort(launch, phase, SIZES) == want


def test_time_of_a_launch() -> None:
    """The slower of products and bytes; our kernels by their bound; never less than a launch."""
    flops, tbs = 0.5 * 989.4e12, 0.5 * 3.35e12
    assert RATES.us(Launch("mm", 0, 0, int(flops))) == pytest.approx(1e6)
    assert RATES.us(Launch("triton", int(tbs), int(tbs))) == pytest.approx(2e6)
    assert RATES.us(Launch("ours", int(3.35e12), 0, roof=0.25)) == pytest.approx(1e6 / 0.25 / 0.5)
    assert RATES.us(Launch("triton", 4, 4)) == ledger.LEAST_US


def test_prediction() -> None:
    """Graphs count once a micro-batch, the rest once a step; equal launches share a line."""
    forward = [product(M, C, C)] * 4 + [product(M, V, C)]
    backward, rest = [product(C, C, M)] * 2, [Launch("_fused_adamw_", 10**9, 10**9)]
    p = ledger.predict(Step(forward, backward, rest, []), CONFIG, SIZES, RATES)
    assert [line.times for line in p.lines] == [12, 3, 6, 1]
    assert p.launches() == 22 and p.launches("rest") == 1
    assert p.a_layer("forward") == 2 and p.a_layer("backward") == 1
    assert p.ms == pytest.approx(sum(line.times * line.us for line in p.lines) / 1e3)
    assert p.tokens == 3 * M and p.bytes_a_token("rest") == pytest.approx(2e9 / p.tokens)
    found = ledger.as_ladder(p, CONFIG, 50257, RATES)
    assert sum(r.ms for r in found.rungs) == pytest.approx(p.ms) and found.residual_share == 0
    mfu = ledger.mfu_of(CONFIG, 50257, p.ms, RATES.sheet)
    assert found.mfu == pytest.approx(mfu["mfu"]) and mfu["mfu_6n"] < mfu["mfu_causal"]


def test_a_result_with_its_picture(tmp_path, monkeypatch, capsys) -> None:
    """And the report has it; the recording itself is tested in tests/step_counts.py."""
    step = Step([product(M, C, C)] * 4, [product(C, C, M)] * 2, [], ["attention: triton"])
    monkeypatch.setattr(ledger.fake_step, "record", lambda *requests: [step for _ in requests])
    argv = ["gpt2", "--gpu=h200", "--n_layer=2", "--out", str(tmp_path)]
    assert ledger.main(argv) == 0
    assert "host: " in capsys.readouterr().out
    (path,) = tmp_path.rglob("*.json")
    (row,) = results.load(path)["rows"]
    assert row["gpu"] == "H200" and row["predicted_ms"] > 0 and row["host_ms"] > 0
    assert path.with_suffix(".png").exists() and path.with_suffix(".svg").exists()
    report.main([str(tmp_path), f"--out={tmp_path / 'report.md'}"])
    assert f"{row['predicted_ms']:.1f}" in (tmp_path / "report.md").read_text()


def test_every_gpu_of_the_table_gets_a_line() -> None:
    rows = list(ledger.each_gpu(Step([product(M, C, C)], [], [], []), CONFIG, 50257, {}))
    assert len(rows) == len(ledger.SHEETS) and len({row[0] for row in rows}) == len(rows)


@pytest.mark.parametrize("name", ["h100", "H200", "a100", "4090", "b200", "rtx-a6000", "mi300x"])
def test_gpus_by_name(name: str) -> None:
    assert name.lower().removeprefix("rtx-") in ledger.find(name).name.lower()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpu=voodoo2"], "--gpu=voodoo2: no data sheet of it here; there are gb200, "),
        (["--copy_share=2"], "--copy_share=2: wanted a share above 0, at most 1"),
        (["gpt2", "laptop"], "gpt2 laptop: one preset is wanted"),
        (["--gpu=mi300x"], "--gpu=MI300X: steps can be looked at for NVIDIA's GPUs only"),
        (["--n_layerz=3"], "--n_layerz"),
        (["--all-gpus", "--copy_share=no"], "--copy_share=no: wanted a share"),
        (["--peer-path=gone", "--gpu=voodoo2"], "--gpu=voodoo2"),
    ],
)  # fmt: skip
def test_mistakes(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ledger.main(argv) == 2
    assert message in capsys.readouterr().err


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from bench import fake_cuda

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("pathlib.Path.exists", lambda self: False)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler: install g\+\+"):
        fake_cuda._guard()
