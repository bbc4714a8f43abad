"""The waterfall: its arithmetic on known numbers, and the command on real steps of a CPU."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from bench import ladder, ladder_table, picture, results, waterfall
from bench.categories import CATEGORIES, Sizes
from bench.trace import Breakdown, Gemm
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.train import metrics

GPT2 = Sizes(64, 1024, 12, 12, 768, 50257, 50304)
N_PARAMS = 123_653_376  # 12 x 12 x 768^2, embedding 50304 x 768, 25 norms: no position embeddings
WORK = ladder.count_work(GPT2, N_PARAMS, element=2)
MEASURED = ladder.Measured(
    step_ms=100.0,
    traced_ms=101.0,
    matmul_flops=790e12,
    matmul_source="measured: 8192 x 8192 bfloat16 matmul",
    copy_bytes=4.3e12,
    datasheet_flops=989.4e12,
    datasheet_source="NVIDIA H200 data sheet",
)
PARTS = {
    ("linear", "forward"): 15.0,
    ("linear", "dX"): 15.5,
    ("linear", "dW"): 17.0,
    ("attention", "forward"): 4.0,
    ("attention", "backward"): 10.5,
    ("head", "GEMMs"): 20.5,
    ("head", "cross entropy"): 3.2,
    ("memory", "norms"): 5.0,
    ("memory", "GELU"): 5.5,
    ("optimizer", "AdamW"): 1.0,
    ("gaps", "idle"): 3.8,
}


def h200(**changes: float) -> Breakdown:
    parts = PARTS | {("gaps", "idle"): changes.pop("gaps", 3.8)}
    if "other" in changes:
        parts["other", "not recognised"] = changes["other"]
    gemms = [
        Gemm("forward", 65536, 2304, 768, 12, 4.0, 12 * 2.0 * 65536 * 2304 * 768),
        Gemm("dW", 3072, 768, 65536, 12, 9.0, 12 * 2.0 * 65536 * 3072 * 768),
    ]
    others = {"a_kernel_of_tomorrow": changes["other"]} if "other" in changes else {}
    return Breakdown("cuda", 3, sum(parts.values()), parts, gemms, others)


def rung(found: ladder.Ladder, name: str) -> ladder.Rung:
    (one,) = [r for r in found.rungs if r.name == name]
    return one


def adds_up(found: ladder.Ladder) -> bool:
    points = 100 - sum(r.mfu_points for r in found.rungs)
    return (
        sum(r.ms for r in found.rungs) == pytest.approx(found.step_ms)
        and points == pytest.approx(found.mfu)
        and found.rungs[-1].mfu_after == pytest.approx(found.mfu)
    )


def test_work_of_gpt2_is_what_the_shapes_say():
    # DESIGN's table: 33.4 and 15.2 TFLOP, 56.6 ms at 989.4 TFLOP/s for 65,536 tokens.
    assert WORK.linear_flops == pytest.approx(33.4e12, rel=2e-3)
    assert WORK.head_flops == pytest.approx(15.2e12, rel=2e-3)
    assert WORK.total_flops / 989.4e12 == pytest.approx(56.6e-3, rel=1e-3)
    assert 0 < WORK.rest_flops < 1e-3 * WORK.total_flops
    # 12 layers of two norms and a GELU, one norm more, and the embedding with its fp32 gradient.
    stream = 65536 * 768 * 2
    assert WORK.memory_bytes == stream * (12 * (8 + 8 + 20) + 5 + 1 + 1 + 4)
    assert WORK.loss_bytes == 2 * 65536 * 50304 * 2
    # AdamW and the norm a parameter; 16-bit copies of all matrices, written once a step.
    matrices = 12 * 12 * 768 * 768 + 50304 * 768
    assert WORK.optimizer_bytes == N_PARAMS * (28 + 4) + 2 * matrices
    muon = ladder.count_work(GPT2, N_PARAMS, 2, optimizer="muon")
    assert muon.optimizer_bytes == WORK.optimizer_bytes - 28 * 12 * 12 * 768 * 768
    assert muon.muon_flops == 12 * 300 * 768**3 and WORK.muon_flops == 0
    more = ladder.count_work(replace(GPT2, micro_batches=3), N_PARAMS, 4)
    assert more.optimizer_bytes == N_PARAMS * (28 + 4), "fp32 has no copies"
    biased = ladder.count_work(replace(GPT2, bias=True, dropout=True), N_PARAMS, 2)
    dropout = (1 + 2 * 12) * 2 * (2 * 768 * 2 + 768)
    assert biased.memory_bytes - WORK.memory_bytes == 65536 * (5 * 768 * 2 * 12 + dropout)


def test_flops_are_those_that_mfu_counts():
    model = GPT(ModelShape(2, 2, 32, 16, 61, bias=True))
    sizes = Sizes(3, 16, 2, 2, 32, 61, 128, bias=True, micro_batches=5)
    work = ladder.count_work(sizes, model.n_params(), 4)
    assert work.total_flops == pytest.approx(metrics.flops_per_token(model).mfu * 3 * 16 * 5)
    assert work.rest_flops == pytest.approx(
        6 * 240 * sum(p.numel() for p in model.parameters() if p.ndim == 1)
    )


def test_rungs_add_up_to_the_measured_step():
    found = ladder.build(h200(), WORK, MEASURED)
    assert adds_up(found)
    assert found.residual_share == pytest.approx(0, abs=1e-9)
    assert rung(found, "ideal").mfu_after == 100
    assert rung(found, "matmul peak").mfu_after == pytest.approx(100 * 790 / 989.4)
    assert rung(found, "linear layers").ms == pytest.approx(47.5 - WORK.linear_flops / 790e9)
    assert rung(found, "gaps: launch, data, host").ms == pytest.approx(100 - 97.2)
    # 12 x 2 x 3072 x 768 x 65536 FLOPs are 4.70 ms at 790 TFLOP/s, and took 9.
    slowest = "most to win: dW 3072 x 768 x 65536 at 52% of the matmul peak, 4.3 ms"
    assert rung(found, "linear layers").help == slowest
    assert found.peak == "989.4 TFLOP/s (NVIDIA H200 data sheet)"


def test_bounds_are_bytes_at_the_copy_bandwidth_and_flops_at_the_peak():
    found = ladder.build(h200(), WORK, MEASURED)
    assert rung(found, "memory-bound ops").bound_ms == pytest.approx(WORK.memory_bytes / 4.3e9)
    assert rung(found, "optimizer and casts").bound_ms == pytest.approx(
        WORK.optimizer_bytes / 4.3e9
    )
    assert rung(found, "head and loss").bound_ms == pytest.approx(
        WORK.head_flops / 790e9 + WORK.loss_bytes / 4.3e9
    )


def test_a_share_is_rounded_to_whole_percents():
    gemm = Gemm("dX", 1, 1, 1, 1, 1.0, 0.9946 * 790e9)  # 1001 ms a second would make it 100 %
    found = ladder.build(replace(h200(), gemms=[gemm]), WORK, MEASURED)
    assert "at 99% of the matmul peak" in rung(found, "linear layers").help


def test_attention_says_what_masked_scores_are_worth():
    found = ladder.build(h200(), WORK, MEASURED)
    attention = rung(found, "attention")
    assert attention.credit_ms == pytest.approx(2 * found.causal_credit_ms)
    assert attention.bound_ms == pytest.approx(7 / 12 * attention.credit_ms)
    assert f"{found.causal_credit_ms:.3g} ms" in attention.help


@pytest.mark.parametrize(
    ("step_ms", "gaps", "residual"),
    [(100, 3.8, 0.0), (102, 3.8, 1.0), (95, 3.8, -2.2), (130, 60, 0.0)],
)
def test_gaps_never_hide_a_residual(step_ms: float, gaps: float, residual: float):
    """Kernels take 97.2 ms: what is left are gaps, as far as the trace has any."""
    found = ladder.build(h200(gaps=gaps), WORK, replace(MEASURED, step_ms=step_ms))
    assert found.rungs[-1].ms == pytest.approx(residual, abs=1e-9)
    assert found.residual_share == pytest.approx(residual / step_ms, abs=1e-9)
    assert adds_up(found)


def test_unknown_kernels_have_a_rung():
    found = ladder.build(h200(other=1.5), WORK, MEASURED)
    assert rung(found, "other").ms == 1.5
    assert "a_kernel_of_tomorrow" in rung(found, "other").help
    assert adds_up(found)
    assert "other" not in [r.name for r in ladder.build(h200(), WORK, MEASURED).rungs]
    three = replace(h200(other=1.5), others={"one": 0.7, "two": 0.5, "three": 0.3})
    named = rung(ladder.build(three, WORK, MEASURED), "other").help
    assert named == "not recognised: one, two", "the first two, which are the longest"


def test_json_has_it_all():
    found = ladder.build(h200(other=1.5), WORK, MEASURED)
    data = json.loads(json.dumps(found.to_json()))
    assert (data.pop("format"), data.pop("version")) == ("fastgpt-waterfall", 1)
    rungs, gemms = data.pop("rungs"), data.pop("gemms")
    assert [ladder.Rung(**r) for r in rungs] == found.rungs
    assert [Gemm(**g) for g in gemms] == found.gemms
    assert ladder.Measured(**data.pop("measured")) == MEASURED
    assert ladder.Work(**data.pop("work")) == WORK
    assert data == {key: getattr(found, key) for key in data} and data["others"] == found.others


def test_on_a_cpu_all_parts_shrink_with_the_profilers_cost():
    parts = replace(h200(), device="cpu")
    found = ladder.build(parts, WORK, replace(MEASURED, step_ms=50.5, datasheet_flops=None))
    assert found.scale == 0.5
    assert rung(found, "linear layers").takes_ms == pytest.approx(47.5 / 2)
    assert "matmul peak" not in [r.name for r in found.rungs]
    unnamed = replace(MEASURED, datasheet_flops=None, datasheet_source="")
    assert ladder.build(parts, WORK, unnamed).peak == f"790 TFLOP/s ({MEASURED.matmul_source})"
    assert rung(found, "ideal").ms == pytest.approx(WORK.total_flops / 790e9)
    assert adds_up(found)


def test_table(capsys: pytest.CaptureFixture[str]):
    ladder_table.show(ladder.build(h200(other=0.4), WORK, replace(MEASURED, step_ms=101.8)))
    out = capsys.readouterr().out
    line = next(line.split() for line in out.splitlines() if "linear layers" in line)
    assert line[2:] == ["5.224", "-5.5", "74.4%", "47.500", "42.276", "89%"]
    assert "101.8" in out
    assert "residual +0.39%" in out and "a_kernel_of_tomorrow" in out


def svg_texts(path: Path) -> list[str]:
    root = ElementTree.parse(path).getroot()
    return ["".join(e.itertext()).strip() for e in root.iter("{http://www.w3.org/2000/svg}text")]


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_picture(tmp_path: Path):
    found = ladder.build(h200(other=0.4), WORK, replace(MEASURED, step_ms=101.8))
    paths = [tmp_path / "w.png", tmp_path / "w.svg"]
    assert picture.draw(found, "gpt2 on a GPU", "commit abc", paths, "a note") == paths
    width, height = png_size(paths[0])
    assert width > 1500 and height > 800
    texts = svg_texts(paths[1])
    for r in found.rungs[1:]:
        assert r.name in texts
        assert f"{r.ms:+.3g} ms   {-r.mfu_points:+.1f} pt" in texts
    assert {"measured step", "gpt2 on a GPU", "commit abc", "a note", "101.8 ms"} <= set(texts)
    assert any(text.startswith("100 % is ") for text in texts)
    assert f"101.8 ms a step, {found.mfu:.1f} % MFU" in " ".join(texts)


def test_no_text_leaves_the_picture(tmp_path: Path, monkeypatch):
    """A CPU's measured peak takes many words to say."""
    from matplotlib.figure import Figure

    source = "measured: 768 x 768 float32 matmul, 16 threads, the best on this machine so far"
    busy = replace(MEASURED, step_ms=101.8, datasheet_flops=None, matmul_source=source)
    found = ladder.build(h200(other=0.4), WORK, busy)
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: drawn.append(figure))
    title = "gpt2_medium, 354M parameters, on NVIDIA GeForce RTX 4090 Laptop GPU"
    picture.draw(found, title, "commit abc", [tmp_path / "w.png"], "CPU picture")
    (figure,) = drawn
    for text in figure.texts:
        assert text.get_window_extent().x1 <= figure.bbox.x1, text.get_text()


@pytest.fixture
def one_thread():
    """Small ops on a busy machine wait for each other's threads longer than they run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


ARGS = ["laptop", "--n_layer=2", "--block_size=32", "--batch_size=4", "--device=cpu"]


@pytest.mark.usefixtures("one_thread")
def test_command_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = [*ARGS, "--seconds=0.5", "--traced_steps=4", "--out", str(tmp_path)]
    assert waterfall.main(argv) == 0
    out = capsys.readouterr().out
    assert "CPU picture" in out and "measured step" in out
    (path,) = tmp_path.glob("**/*.json")
    assert results.load(path)["command"].endswith("--seconds=0.5 --traced_steps=4")
    (row,) = results.load(path)["rows"]
    drawn = row["waterfall"]
    assert (drawn["format"], drawn["version"]) == ("fastgpt-waterfall", 1)
    assert abs(drawn["residual_share"]) < 0.02
    assert sum(r["ms"] for r in drawn["rungs"]) == pytest.approx(drawn["step_ms"])
    assert json.dumps(drawn["others"]) == "{}"
    parts = {r["name"]: r["takes_ms"] for r in drawn["rungs"]}
    named = ("linear layers", "attention", "head and loss", "memory-bound ops")
    for name in (*named, "optimizer and casts", "gaps: launch, data, host"):
        assert parts[name] > 0, name
    # c_attn, c_proj, c_fc, c_proj: forward, dX and dW of each of two layers; and the head's three.
    products = {(g["part"], g["m"], g["n"], g["k"]): g["count"] for g in drawn["gemms"]}
    assert sum(n for (part, *_), n in products.items() if part != "head") == 2 * 4 * 3
    assert sum(n for (part, *_), n in products.items() if part == "head") == 3
    flops = sum(g["flops"] for g in drawn["gemms"] if g["part"] != "head")
    assert flops == pytest.approx(drawn["work"]["linear_flops"])
    png_size(path.with_suffix(".png"))
    assert "CPU picture" in svg_texts(path.with_suffix(".svg"))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_real_traces_are_attributed_whole():
    """Dropout, biases, several micro-batches, bf16 and an eager-mode cast of every weight; Muon."""
    flags = [
        "--optimizer=muon",
        "--dropout=0.1",
        "--bias=True",
        "--gradient_accumulation_steps=3",
        "--dtype=bfloat16",
    ]
    config, _, _ = waterfall.parse([*ARGS, *flags, "--n_embd=64"])
    with waterfall.Steps(config) as steps:
        steps.run(1)
        parts, traced_ms = waterfall.traced(steps, 3)
    total = sum(parts.parts.values())
    assert total == pytest.approx(parts.step_ms) == pytest.approx(traced_ms, rel=0.02)
    assert {c for c, _ in parts.parts} <= set(CATEGORIES)
    assert parts.others == {}
    for key in (
        ("memory", "dropout"),
        ("optimizer", "casts of weights"),
        ("optimizer", "gradient accumulation"),
        ("optimizer", "clipping"),
        ("optimizer", "AdamW"),
        ("muon", "Newton-Schulz"),
        ("muon", "momentum and update"),
        ("head", "cross entropy"),
        ("attention", "backward"),
    ):
        assert parts.parts[key] > 0, key


@pytest.mark.cuda
@pytest.mark.parametrize("compiled", ["True", "False"])
def test_real_traces_of_a_gpu_are_attributed(compiled: str):
    flags = ["--n_layer=2", "--n_embd=256", "--block_size=256", f"--compile={compiled}"]
    config, _, _ = waterfall.parse(["laptop", "--device=cuda", *flags])
    with waterfall.Steps(config) as steps:
        found, _ = waterfall.measure(steps, 1.0, 3)
        parts, traced_ms = waterfall.traced(steps, 3)
    assert adds_up(found)
    assert sum(parts.parts.values()) == pytest.approx(parts.step_ms)
    assert parts.step_ms == pytest.approx(traced_ms, rel=0.02)
    assert parts.ms("other") < 0.01 * parts.step_ms, parts.others
    for category in ("linear", "attention", "head", "memory", "optimizer"):
        assert parts.ms(category) > 0, category


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["lapptop"], "did you mean laptop?"),
        (["laptop", "gpt2"], "one preset is wanted"),
        (["laptop", "--n_lyer=3"], "did you mean --n_layer?"),
        (["laptop", "--seconds=soon"], "--seconds=soon: wanted a number above 0"),
        (["laptop", "--traced_steps=0"], "--traced_steps=0: wanted a number above 0"),
        (["laptop", "--n_head=3"], "must divide n_embd"),
        (["laptop", "--out"], "--out: no value given"),
        pytest.param(
            ["laptop", "--device=cuda"],
            "no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_bad_arguments_in_one_line(argv: list[str], words: str, capsys):
    assert waterfall.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1


def test_help(capsys: pytest.CaptureFixture[str]):
    assert waterfall.main(["--help"]) == 0
    assert "--traced_steps" in capsys.readouterr().out
