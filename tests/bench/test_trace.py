"""Attribution of made-up traces with known kernels, gaps and names."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest

from bench import trace
from bench.trace import HEAD, LINEAR, MEMORY, MUON, OPTIMIZER, OTHER, Context, part_of
from fastgpt_kernels.registry import Sizes, spec, specs

C, V = 768, 50304
SIZES = Sizes(32, 1024, 12, C, 50257, V, bias=False)
M = SIZES.tokens
CONTEXT = Context(SIZES, 12, 1, 2, matmul_flops=700e12, copy_bytes=4e12)

ENGINE, CUTLASS = "autograd::engine::evaluate_function: ", "void cutlass::Kernel2<cutlass_80>"
ADDMM, REDUCE = f"{ENGINE}AddmmBackward0", "splitKreduce_kernel"
NVJET, XMMA = "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "sm90_xmma_gemm_bf16bf16_bf16f32"
FORWARD, BACKWARD = spec("attention").kernels[0], spec("attention").kernels[2]
WORK: list[tuple[Sequence[str], Any, dict[str, float]]] = [  # ops, the inner one's shapes, µs
    (["aten::linear", "aten::mm"], [[M, C], [C, 3 * C]], {NVJET: 100}),
    (["fastgpt::attention"], [[32, 1024, 3 * C]], {FORWARD: 50}),
    (["triton_poi_fused_add_2"], [[M, C]] * 3, {"triton_poi_fused_add_2": 55}),
    (["fastgpt::linear_cross_entropy", "aten::mm"], [[M, C], [C, V], [M, V]], {XMMA: 100}),
    (["fastgpt::linear_cross_entropy"], [[M, C], [V, C]], {"cross_entropy_kernel": 30}),
    ([f"{ENGINE}MmBackward0", "aten::mm"], [[M, 3 * C], [3 * C, C]], {CUTLASS: 120}),
    ([ADDMM, "aten::addmm"], [[3 * C, C], [3 * C, M], [M, C]], {CUTLASS: 50, REDUCE: 30}),
    ([f"{ENGINE}CompiledFunctionBackward"], (), {BACKWARD: 100, "something_new": 40}),
    (["Optimizer.step#AdamW.step"], (), {"void at::native::multi_tensor_apply_kernel<Adam>": 60}),
    ([], (), {"Memcpy HtoD (Pinned -> Device)": 100}),
]


def cuda_trace() -> list[dict[str, Any]]:
    """Returns the events of three steps of WORK, as torch.profiler exports them."""
    events = list[dict[str, Any]]()

    def add(cat: str, name: str, ts: float, dur: float, tid: int, **args: Any) -> None:
        args = {key.replace("_", " "): value for key, value in args.items()}
        events.append({"cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args})

    for start in (0.0, 1000.0, 2000.0):
        add("user_annotation", trace.STEP, start, 950, 1)
        for at, (ops, dims, kernels) in enumerate(WORK):
            ts, tid = start + 10 + 50 * at, 2 if ENGINE in str(ops) else 1
            for i, name in enumerate(ops):
                dims_ = dims if name == ops[-1] else []
                kinds = ["c10::BFloat16"] * len(dims_)
                add("cpu_op", name, ts + i, 40 - 2 * i, tid, Input_Dims=dims_, Input_type=kinds)
            for name, us in kernels.items():
                add("cuda_runtime", "cudaLaunchKernel", ts + 20, 1, tid, correlation=len(events))
                add("kernel", name, start + 600, us, 7, correlation=len(events) - 1)
    return events


def parts(events: list[dict[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for row in trace.rows_of(events, CONTEXT)[0]:
        found[row.part] += row.ms
    return found


def test_cuda_trace() -> None:
    rows, traced_ms = trace.rows_of(cuda_trace(), CONTEXT)
    ms = {LINEAR: 0.3, "attention": 0.15, HEAD: 0.13, MEMORY: 0.055, OPTIMIZER: 0.06, OTHER: 0.04}
    assert traced_ms == pytest.approx(0.95) and parts(cuda_trace()) == pytest.approx(ms)
    found = {(row.kernel, row.kind): row for row in rows}
    forward, dw = found[NVJET, "forward"], found["cutlass::Kernel2", "dW"]
    assert (forward.shape, forward.launches) == (f"{M} x {3 * C} x {C}", 1)
    assert dw.shape == f"{3 * C} x {C} x {M}" and dw.bound_ms > 0
    attention = 12e3 * spec("attention").cost(SIZES, 2)["backward"].flops
    for row, bound_ms, bound in (
        (forward, 2e3 * M * 3 * C * C / 700e12, "matmul peak"),
        (found[BACKWARD, "backward"], attention / 700e12, "matmul peak"),
        (found["triton_poi_fused_add_2", "forward"], 3 * M * C * 2 / 4e9, "memory"),
        (found["cross_entropy_kernel", "forward"], 2 * M * V * 2 / 4e9, "memory"),
        (found["multi_tensor_apply_kernel", "update"], 0, ""),
        (found[REDUCE, "dW"], 0, ""),  # of an op whose bound is counted once
    ):
        assert row.bound_ms == pytest.approx(bound_ms) and row.bound == bound
    unlinked = parts([e for e in cuda_trace() if e["cat"] != "cpu_op"])  # known by name
    assert unlinked[LINEAR] == pytest.approx(0.4)  # with the head's matmul
    assert unlinked["attention"] == pytest.approx(0.15) and unlinked[HEAD] == pytest.approx(0.03)


NAMES = {  # of a kernel, without the ops around it
    LINEAR: "ampere_bf16_s16816gemm_bf16_128x64 triton_tem_fused_mm_4",
    "attention": "flash_fwd_kernel cudnn_generated_fort_native_sdpa_flash_fprop",
    HEAD: "triton_red_fused__log_softmax_nll_loss_5",
    MEMORY: "triton_poi_fused_addmm_gelu_8 Memset",
    OPTIMIZER: "triton_poi_fused__to_copy_7",
    OTHER: "ncclDevKernel_AllReduce",
}


def test_parts_by_names_and_shapes() -> None:
    for part, names in NAMES.items():
        found = {part_of([name], [()], False, CONTEXT, host=False) for name in names.split()}
        assert found == {part}
    for names, shape, part in (
        (["aten::mm"], (M, C, C), LINEAR), (["aten::mm"], (M, V, C), HEAD),
        (["aten::_to_copy", "elementwise"], (M, C), MEMORY),
        (["aten::_to_copy", "elementwise"], (V, C), OPTIMIZER),
    ):  # fmt: skip
        assert part_of(names, [shape], False, CONTEXT, host=False) == part
    scope = "Optimizer.step#Muon.step"  # after the last gradient
    for names, part in (([scope, "aten::mm"], MUON), ([scope, "adamw", "x"], OPTIMIZER)):
        assert part_of(names, [()], True, CONTEXT, host=False) == part
    assert part_of(["aten::mul_"], [()], True, CONTEXT, host=True) == OPTIMIZER
    for own in specs():
        parts = {part_of([n], [()], False, CONTEXT, host=False) for n in own.kernels}
        assert parts == {trace.CATEGORIES[own.category]} or not own.kernels
