"""Attribution of traces: made-up ones with known gaps, overlaps and names, and real CPU ones."""

import gzip
import json
import re
from pathlib import Path

import pytest

from bench import trace
from bench.categories import Named, Sizes, categorize
from bench.trace import STEP_SCOPE, Breakdown, TraceError, breakdown, exclusive

GPT2 = Sizes(32, 1024, 12, 12, 768, 50257, 50304)
M, C, V = GPT2.tokens, 768, 50304


class Maker:
    """Events as torch.profiler exports them; times in us."""

    def __init__(self):
        self.events = []

    def add(self, cat, name, ts, dur, tid=1, **args):
        args = {key.replace("_", " "): value for key, value in args.items()}
        self.events.append(
            {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 7, "tid": tid}
            | {"args": args}
        )

    def step(self, ts, dur):
        self.add("user_annotation", STEP_SCOPE, ts, dur)

    def op(self, name, ts, dur, dims=None, tid=1):
        self.add("cpu_op", name, ts, dur, tid, **({"Input_Dims": dims} if dims else {}))

    def kernel(self, name, start, dur, launched, tid=1, stream=7, cat="kernel"):
        number = len(self.events)
        self.add("cuda_runtime", "cudaLaunchKernel", launched, 1, tid, correlation=number)
        self.add(cat, name, start, dur, stream, correlation=number)


def cuda_trace(n_steps=5, period=1000.0):
    """Steps of 1 ms on the GPU, launched 200 us ahead: 785 us of kernels, the rest idle.

    linear 300 (forward 100, dX 120, dW 80), attention 150, head 130 (one GEMM 100, loss 30), memory
    85, optimizer 60, unknown 40, a copy of 100 of which 20 are beside no kernel.
    """
    t = Maker()
    for i in range(n_steps):
        host, gpu = i * period, i * period + 200
        t.step(host, period - 50)
        t.op("aten::linear", host + 10, 20, [[32, 1024, C], [3 * C, C]])
        t.op("aten::mm", host + 12, 10, [[M, C], [C, 3 * C]])
        t.kernel("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT", gpu, 100, host + 15)
        t.op("fastgpt::attention", host + 40, 20, [[32, 1024, 3 * C]])
        t.kernel("attention_fwd_kernel", gpu + 100, 50, host + 45)
        t.op("CompiledFunction", host + 60, 20, [[V, C], [M, C]])
        t.kernel("triton_poi_fused_add_2", gpu + 155, 5, host + 65)
        t.kernel("triton_per_fused_add_native_layer_norm_3", gpu + 160, 50, host + 70)
        t.op("fastgpt::bias_gelu", host + 72, 6, [[M, 4 * C]])
        t.kernel("bias_gelu_fwd_kernel", gpu + 210, 30, host + 73)
        t.op("fastgpt::linear_cross_entropy", host + 80, 40, [[M, C], [V, C]])
        t.op("aten::mm", host + 85, 10, [[M, C], [C, V], [M, V]])  # out=
        t.kernel("sm90_xmma_gemm_bf16bf16_bf16f32", gpu + 240, 100, host + 86)
        t.kernel("cross_entropy_kernel", gpu + 340, 30, host + 100)
        engine = "autograd::engine::evaluate_function: "
        t.op(engine + "MmBackward0", host + 200, 100, tid=2)
        t.op("aten::mm", host + 210, 20, [[M, 3 * C], [3 * C, C]], tid=2)
        t.kernel("cutlass_80_tensorop_bf16_s16816gemm", gpu + 400, 120, host + 215, tid=2)
        dims = [[3 * C, C], [3 * C, M], [M, C], [], [], [3 * C, C]]
        t.op("aten::addmm", host + 240, 20, dims, tid=2)
        t.kernel("cutlass_80_tensorop_bf16_s16816gemm", gpu + 520, 50, host + 245, tid=2)
        t.kernel("splitKreduce_kernel", gpu + 570, 30, host + 250, tid=2)
        t.op(engine + "CompiledFunctionBackward", host + 300, 50, tid=2)
        t.kernel("attention_bwd_dkv_kernel", gpu + 600, 100, host + 310, tid=2)
        t.kernel("something_new", gpu + 700, 40, host + 320, tid=2)
        t.add("user_annotation", "Optimizer.step#AdamW.step", host + 400, 50)
        t.kernel("void at::native::multi_tensor_apply_kernel<FusedAdam>", gpu + 740, 60, host + 410)
        t.kernel("Memcpy HtoD (Pinned -> Device)", gpu + 720, 100, host + 500, tid=9, stream=13,
                 cat="gpu_memcpy")  # fmt: skip
    return t.events


def test_exclusive_counts_every_instant_once():
    spans = [(0, 10), (5, 15), (5, 8), (20, 30), (28, 40)]
    assert exclusive(spans, [1, 0, 2, 0, 0], 0, 35) == [5, 10, 0, 10, 5]
    assert exclusive(spans, [0, 0, 0, 0, 0], 2, 25) == [8, 5, 0, 5, 0]
    assert exclusive([], [], 0, 5) == []


def test_cuda_trace():
    b = breakdown(cuda_trace(), GPT2)
    assert (b.device, b.steps, b.step_ms) == ("cuda", 3, pytest.approx(1.0))
    expected = {
        ("linear", "forward"): 0.1,
        ("linear", "dX"): 0.12,
        ("linear", "dW"): 0.08,
        ("attention", "forward"): 0.05,
        ("attention", "backward"): 0.1,
        ("head", "GEMMs"): 0.1,
        ("head", "cross entropy"): 0.03,
        ("memory", "norms"): 0.05,
        ("memory", "residual, bias, rest"): 0.005,
        ("memory", "GELU"): 0.03,
        ("optimizer", "AdamW"): 0.06,
        ("other", "not recognised"): 0.04,
        ("data", "data"): 0.02,
        ("gaps", "idle"): 0.215,
    }
    assert b.parts == pytest.approx(expected)
    assert b.others == pytest.approx({"something_new": 0.04})
    gemms = {(g.part, g.m, g.n, g.k): (g.count, g.ms, g.flops) for g in b.gemms}
    assert gemms["dW", 3 * C, C, M] == pytest.approx((1, 0.08, 2 * 3 * C * C * M))
    assert gemms["head", M, V, C] == pytest.approx((1, 0.1, 2 * M * V * C))


def test_kernels_that_the_trace_links_to_no_op_are_known_by_name():
    events = [e for e in cuda_trace() if e["cat"] != "cpu_op"]
    b = breakdown(events, GPT2)
    assert b.ms("linear") == pytest.approx(0.4)  # the head's product is no longer told apart
    assert b.ms("attention") == pytest.approx(0.15)
    assert b.ms("head") == pytest.approx(0.03)
    assert b.ms("memory") == pytest.approx(0.085)
    assert sum(b.parts.values()) == pytest.approx(b.step_ms)


def test_cpu_trace_with_known_gaps_and_two_threads():
    t = Maker()
    for i in range(4):
        at = i * 1000
        t.step(at, 990)
        t.op("aten::mm", at + 100, 200, [[768, 128], [128, 384]])
        t.op("aten::gelu", at + 300, 100)
        t.op("aten::mul", at + 320, 50)  # inside
        engine = "autograd::engine::evaluate_function: GeluBackward0"
        t.op(engine, at + 400, 300, tid=2)
        t.op("aten::gelu_backward", at + 450, 200, tid=2)
        t.op("aten::mm", at + 680, 70, [[384, 768], [768, 128]])  # 20 us beside the other thread
        t.add("user_annotation", "Optimizer.step#AdamW.step", at + 800, 100)
        t.op("aten::_fused_adamw_", at + 810, 80)
    b = breakdown(t.events, Sizes(12, 64, 4, 4, 128, 97, 128))
    assert b.step_ms == pytest.approx(1.0)
    assert b.ms("linear") == pytest.approx(0.27)
    assert b.ms("memory") == pytest.approx(0.1 + 0.3 - 0.02)
    assert b.ms("optimizer") == pytest.approx(0.1)
    assert sum(b.parts.values()) == pytest.approx(1.0)
    assert b.parts["gaps", "idle"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    "names, dims, expected",
    [
        (("ampere_bf16_s16816gemm_bf16_128x64",), (), ("linear", "forward")),
        (("void flash_fwd_kernel<bf16>",), (), ("attention", "forward")),
        (("cudnn_generated_fort_native_sdpa_sm90_flash_fprop",), (), ("attention", "forward")),
        (("attention_bwd_preprocess_kernel",), (), ("attention", "forward")),
        (("attention_bwd_dq_kernel",), (), ("attention", "forward")),
        (("triton_red_fused__log_softmax_nll_loss_forward_5",), (), ("head", "cross entropy")),
        (("fastgpt::linear_cross_entropy", "cross_entropy_kernel"), (), ("head", "cross entropy")),
        (("triton_poi_fused_gelu_2",), (), ("memory", "GELU")),
        (("triton_poi_fused__to_copy_7",), (), ("optimizer", "casts of weights")),
        (("triton_poi_fused__to_copy_t_7",), (), ("optimizer", "casts of weights")),
        (("triton_poi_fused_addmm_gelu_8",), (), ("memory", "GELU")),
        (("triton_poi_fused_add_9",), (), ("memory", "residual, bias, rest")),
        (("triton_tem_fused_mm_4",), (), ("linear", "forward")),
        (("bias_gelu_bwd_kernel",), (), ("memory", "GELU")),
        (("Memcpy DtoD (Device -> Device)",), (), ("memory", "copies")),
        (("Memset (Device)",), (), ("memory", "copies")),
        (("lpnorm_cleanup",), (), ("optimizer", "AdamW")),
        (("aten::_to_copy", "elementwise"), ((50304, 768),), ("optimizer", "casts of weights")),
        (("aten::_to_copy", "elementwise"), ((M, 768),), ("memory", "casts")),
        (("aten::add", "elementwise"), ((50304, 768),), ("head", "copies and sums")),
        (("ncclDevKernel_AllReduce",), (), ("other", "ncclDevKernel_AllReduce")),
    ],
)
def test_names(names, dims, expected):
    assert categorize(Named(names, dims=dims), GPT2, host=False) == expected


def test_vocabulary_that_looks_like_the_width_is_not_taken_for_it():
    sizes = Sizes(12, 64, 4, 4, 128, 128, 128)
    gemm = ((768, 128), (128, 128))
    assert sizes.head_sizes == frozenset()
    assert categorize(Named(("aten::mm",), gemm=gemm), sizes, host=True)[0] == "linear"
    inside = Named(("fastgpt::linear_cross_entropy", "aten::mm"), gemm=gemm)
    assert categorize(inside, sizes, host=True) == ("head", "GEMMs")


def test_too_few_steps():
    with pytest.raises(TraceError, match="2 steps marked"):
        breakdown(cuda_trace(2), GPT2)


def test_load_reads_plain_and_packed(tmp_path):
    text = json.dumps({"traceEvents": [*cuda_trace(), {"ph": "i", "name": "x"}]})
    (tmp_path / "a.json").write_text(text)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(text.encode()))
    plain, packed = (trace.load(tmp_path / n) for n in ("a.json", "a.json.gz"))
    assert plain == packed == cuda_trace()
    assert isinstance(breakdown(plain, GPT2), Breakdown)


def test_every_kernel_of_ours_that_training_launches_is_known() -> None:
    """By its name alone, as in a trace without stacks; a new one needs a rule."""
    folder = Path(__file__).parents[2] / "kernels/fastgpt_kernels"
    definition = re.compile(r"^@triton\.jit.*\ndef (\w+_kernel)\(", re.M)
    names = {name for p in folder.rglob("*.py") for name in definition.findall(p.read_text())}
    assert {"attention_fwd_kernel", "cross_entropy_kernel"} <= names
    unknown = {n for n in names if categorize(Named((n,)), GPT2, host=False)[0] == "other"}
    assert not unknown
