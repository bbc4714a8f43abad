"""Attribution of traces: made-up ones with known kernels, gaps and names."""

from typing import Any

import pytest

from bench import trace
from bench.trace import GAPS, HEAD, LINEAR, MEMORY, MUON, OPTIMIZER, OTHER, Context, Row, part_of
from fastgpt_kernels.registry import Sizes, spec, specs

C, V = 768, 50304
SIZES = Sizes(32, 1024, 12, C, 50257, V, bias=False)
M = SIZES.tokens
CONTEXT = Context(SIZES, 12, 1, 2, matmul_flops=700e12, copy_bytes=4e12)


class Maker:
    """Events as torch.profiler exports them; times in µs."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def add(self, cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> None:
        args = {key.replace("_", " "): value for key, value in args.items()}
        event = {"cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}
        self.events.append(event)

    def op(self, name: str, ts: float, dur: float, dims: Any = None, tid: int = 1) -> None:
        kinds = ["c10::BFloat16"] * len(dims or ())
        shapes = {"Input_Dims": dims, "Input_type": kinds} if dims else {}
        self.add("cpu_op", name, ts, dur, tid, **shapes)

    def kernel(self, name: str, start: float, dur: float, launched: float, tid: int = 1) -> None:
        number = len(self.events)
        self.add("cuda_runtime", "cudaLaunchKernel", launched, 1, tid, correlation=number)
        self.add("kernel", name, start, dur, 7, correlation=number)


def cuda_trace(n_steps: int = 3) -> list[dict[str, Any]]:
    """Steps of linear layers 300 µs, attention 150, head 130, memory 55, optimizer 60, other 40."""
    t = Maker()
    for i in range(n_steps):
        host, gpu = i * 1000.0, i * 1000.0 + 200
        t.add("user_annotation", trace.STEP, host, 950)
        t.op("aten::linear", host + 10, 20, [[32, 1024, C], [3 * C, C]])
        t.op("aten::mm", host + 12, 10, [[M, C], [C, 3 * C]])
        t.kernel("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT", gpu, 100, host + 15)
        t.op("fastgpt::attention", host + 40, 20, [[32, 1024, 3 * C]])
        t.kernel(spec("attention").kernels[0], gpu + 100, 50, host + 45)
        t.op("triton_poi_fused_add_2", host + 60, 20, [[M, C], [M, C], [M, C]])
        t.kernel("triton_poi_fused_add_2", gpu + 155, 55, host + 65)
        t.op("fastgpt::linear_cross_entropy", host + 80, 40, [[M, C], [V, C]])
        t.op("aten::mm", host + 85, 10, [[M, C], [C, V], [M, V]])  # out=
        t.kernel("sm90_xmma_gemm_bf16bf16_bf16f32", gpu + 240, 100, host + 86)
        t.kernel("cross_entropy_kernel", gpu + 340, 30, host + 100)
        engine = "autograd::engine::evaluate_function: "
        t.op(engine + "MmBackward0", host + 200, 100, tid=2)
        t.op("aten::mm", host + 210, 20, [[M, 3 * C], [3 * C, C]], tid=2)
        t.kernel("void cutlass::Kernel2<cutlass_80_tensorop>", gpu + 400, 120, host + 215, tid=2)
        t.op("aten::addmm", host + 240, 20, [[3 * C, C], [3 * C, M], [M, C]], tid=2)
        t.kernel("void cutlass::Kernel2<cutlass_80_tensorop>", gpu + 520, 50, host + 245, tid=2)
        t.kernel("splitKreduce_kernel", gpu + 570, 30, host + 250, tid=2)
        t.op(engine + "CompiledFunctionBackward", host + 300, 50, tid=2)
        t.kernel(spec("attention").kernels[2], gpu + 600, 100, host + 310, tid=2)
        t.kernel("something_new", gpu + 700, 40, host + 320, tid=2)
        t.add("user_annotation", "Optimizer.step#AdamW.step", host + 400, 50)
        t.kernel("void at::native::multi_tensor_apply_kernel<FusedAdam>", gpu + 740, 60, host + 410)
        t.kernel("Memcpy HtoD (Pinned -> Device)", gpu + 720, 100, host + 500, tid=9)
    return t.events


def of_part(rows: list[Row], part: str) -> float:
    return sum(row.ms for row in rows if row.part == part)


def test_cuda_trace() -> None:
    rows, traced_ms = trace.rows_of(cuda_trace(), CONTEXT)
    assert traced_ms == pytest.approx(0.95)
    parts = {part: of_part(rows, part) for part in trace.PARTS}
    assert parts == pytest.approx(
        {LINEAR: 0.3, "attention": 0.15, HEAD: 0.13, MEMORY: 0.055, OPTIMIZER: 0.06, MUON: 0}
        | {OTHER: 0.04}
    )
    found = {(row.kernel, row.kind): row for row in rows}
    forward = found["nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "forward"]
    assert (forward.shape, forward.launches) == (f"{M} x {3 * C} x {C}", 1)
    assert forward.bound_ms == pytest.approx(2e3 * M * 3 * C * C / 700e12)
    assert forward.bound == "matmul peak"
    dw = found["cutlass::Kernel2", "dW"]
    assert dw.shape == f"{3 * C} x {C} x {M}" and dw.bound_ms > 0
    reduce = found["splitKreduce_kernel", "dW"]  # of the same op, whose bound is counted once
    assert reduce.bound_ms == 0 and reduce.part == LINEAR
    add = found["triton_poi_fused_add_2", "forward"]
    assert add.bound_ms == pytest.approx(3 * M * C * 2 / 4e9) and add.bound == "memory"
    backward = found[spec("attention").kernels[2], "backward"]
    cost = spec("attention").cost(SIZES, 2)["backward"]
    assert backward.bound_ms == pytest.approx(12 * cost.flops / 700e9)
    loss = found["cross_entropy_kernel", "forward"]
    assert loss.bound_ms == pytest.approx(2 * M * V * 2 / 4e9)
    assert found["multi_tensor_apply_kernel", "update"].bound_ms == 0


def test_kernels_that_the_trace_links_to_no_op_are_known_by_name() -> None:
    rows, _ = trace.rows_of([e for e in cuda_trace() if e["cat"] != "cpu_op"], CONTEXT)
    assert of_part(rows, LINEAR) == pytest.approx(0.4)  # the head's matmul is no longer told apart
    assert of_part(rows, "attention") == pytest.approx(0.15)
    assert of_part(rows, HEAD) == pytest.approx(0.03)


def test_cpu_trace() -> None:
    """Own times, without those of ops inside; what only describes memory is the host's."""
    t = Maker()
    for at in (0.0, 1000.0):
        t.add("user_annotation", trace.STEP, at, 990)
        t.op("aten::mm", at + 100, 200, [[768, 128], [128, 384]])
        t.op("aten::gelu", at + 300, 100, [[768, 512]])
        t.op("aten::mul", at + 320, 50, [[768, 512]])  # inside
        t.op("aten::transpose", at + 420, 10, [[768, 512]])
        t.op("autograd::engine::evaluate_function: GeluBackward0", at + 440, 300, tid=2)
        t.op("aten::gelu_backward", at + 450, 200, [[768, 512], [768, 512]], tid=2)
        t.add("user_annotation", "Optimizer.step#AdamW.step", at + 800, 100)
        t.op("aten::_fused_adamw_", at + 810, 80, [[[100, 10]] * 4])
    sizes = Sizes(12, 64, 4, 128, 97, 128, bias=False)
    rows, _ = trace.rows_of(t.events, Context(sizes, 4, 1, 4, 1e12, 1e10))
    own = {row.kernel: (row.part, row.kind, row.ms) for row in rows}
    assert own["aten::mm"] == (LINEAR, "forward", pytest.approx(0.2))
    assert own["aten::gelu"][2] == own["aten::mul"][2] == pytest.approx(0.05)
    assert own["aten::gelu_backward"][:2] == (MEMORY, "backward")
    assert own["aten::_fused_adamw_"] == (OPTIMIZER, "update", pytest.approx(0.08))
    assert len(own) == 5


@pytest.mark.parametrize(
    ("names", "shape", "part"),
    [
        (["ampere_bf16_s16816gemm_bf16_128x64"], (), LINEAR),
        (["void flash_fwd_kernel<bf16>"], (), "attention"),
        (["cudnn_generated_fort_native_sdpa_sm90_flash_fprop"], (), "attention"),
        (["triton_red_fused__log_softmax_nll_loss_forward_5"], (), HEAD),
        (["fastgpt::linear_cross_entropy", "elementwise"], (), HEAD),
        (["triton_poi_fused__to_copy_7"], (), OPTIMIZER),
        (["triton_poi_fused_addmm_gelu_8"], (), MEMORY),
        (["triton_tem_fused_mm_4"], (), LINEAR),
        (["aten::mm", "nvjet"], (M, V, C), HEAD),
        (["aten::mm", "nvjet"], (M, C, C), LINEAR),
        (["Memset (Device)"], (), MEMORY),
        (["Memcpy HtoD (Pinned -> Device)"], (), GAPS),
        (["aten::_to_copy", "elementwise"], (V, C), OPTIMIZER),
        (["aten::_to_copy", "elementwise"], (M, C), MEMORY),
        (["ncclDevKernel_AllReduce"], (), OTHER),
    ],
)
def test_names(names: list[str], shape: tuple[int, ...], part: str) -> None:
    assert part_of(names, [shape], False, CONTEXT, host=False) == part


def test_after_the_backward_pass_all_is_the_optimizers() -> None:
    scope = "Optimizer.step#Muon.step"
    for names, part in (([scope, "aten::mm"], MUON), (["aten::mul_"], OPTIMIZER)):
        assert part_of(names, [()], True, CONTEXT, host=True) == part
    assert part_of([scope, "adamw", "x"], [()], True, CONTEXT, host=False) == OPTIMIZER


def test_every_kernel_of_ours_is_known_by_its_name() -> None:
    """A new one needs no rule: its op names its part."""
    for op in specs():
        parts = {part_of([n], [()], False, CONTEXT, host=False) for n in op.kernels}
        assert parts == {trace.CATEGORIES[op.category]}
