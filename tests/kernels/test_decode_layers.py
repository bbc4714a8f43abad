"""decode_attention_layer and decode_mlp_layer against the fp64 oracle, and what they leave."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt_kernels import decode_attention_layer, decode_counters, decode_mlp_layer
from fastgpt_kernels.configs import lookup
from fastgpt_kernels.ops.decode import configs
from fastgpt_kernels.ops.decode.kernels import repeat_and_ahead
from fastgpt_kernels.ops.decode.layers import plain_attention_layer, plain_mlp_layer
from fastgpt_kernels.record import Sizes, normal, record
from tests.kernels.helpers import NUDGED_RUNS, assert_accurate, nudged, registered

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Case = dict[str, Any]


def products(C: int, sizes: Mapping[str, tuple[int, int]], dtype: torch.dtype, bias: bool) -> Case:
    """The norm's parameters in fp32, and weights and biases by name."""
    case: Case = {"norm_weight": torch.randn(C, device=DEVICE)}
    case["norm_bias"] = torch.randn(C, device=DEVICE) if bias else None
    for name, (N, K) in sizes.items():
        case[f"{name}_weight"] = (torch.randn(N, K, device=DEVICE) * K**-0.5).to(dtype)
        case[f"{name}_bias"] = torch.randn(N, device=DEVICE).to(dtype) if bias else None
    return case


def attention_case(
    positions: list[int], H: int, D: int, S: int, dtype: torch.dtype, bias: bool = True
) -> Case:
    """The caches hold NaN where nothing was written yet."""
    B, C = len(positions), H * D
    cache = torch.randn(2, B, H, S, D, device=DEVICE).to(dtype)
    for row, position in enumerate(positions):
        cache[:, row, :, position:] = float("nan")
    return {
        "x": (torch.randn(B, C, device=DEVICE) + 0.5).to(dtype),
        **products(C, {"qkv": (3 * C, C), "proj": (C, C)}, dtype, bias),
        "k_cache": cache[0],
        "v_cache": cache[1],
        "positions": torch.tensor(positions, device=DEVICE),
        "counters": decode_counters(B, H, 1, DEVICE)[0],
    }


def mlp_case(B: int, C: int, hidden: int, dtype: torch.dtype, bias: bool = True) -> Case:
    return {
        "x": (torch.randn(B, C, device=DEVICE) + 0.5).to(dtype),
        **products(C, {"fc": (hidden, C), "proj": (C, hidden)}, dtype, bias),
        "counters": decode_counters(B, 0, 1, DEVICE)[0],
    }


def check(
    op: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    case: Case,
    again: bool = False,
    **more: Any,
) -> None:
    """Accurate, `again` too, the caches as well, with the counters at 0 behind it."""

    def run(function: Callable[..., Tensor], values: list[Any]) -> list[Tensor]:
        copies = [x.clone() if isinstance(x, Tensor) else x for x in values]
        arguments = dict(zip(case, copies, strict=True))
        y = function(**arguments, **more)
        return [y, *(arguments[n] for n in ("k_cache", "v_cache") if n in arguments)]

    values = list(case.values())
    same = run(plain, values)
    runs = [run(plain, nudged(values, seed)) for seed in range(NUDGED_RUNS)]
    is_real = [isinstance(x, Tensor) and x.is_floating_point() for x in values]
    doubles = [x.double() if real else x for x, real in zip(values, is_real, strict=True)]
    oracle = run(plain, doubles)
    for _ in range(1 + again):
        y = op(**case, **more)
        assert y.is_contiguous() and not case["counters"].any()
        ours = [y, *(case[n] for n in ("k_cache", "v_cache") if n in case)]
        for i, name in enumerate(("y", "k_cache", "v_cache")[: len(ours)]):
            # What no position has reached is NaN in all of them.
            assert_accurate(
                *(x[i].nan_to_num() for x in (ours, same, oracle)),
                name=name,
                nudged_runs=[x[i].nan_to_num() for x in runs],
            )
            assert torch.equal(ours[i].isnan(), oracle[i].isnan())


@pytest.mark.quick("*positions0*", "float16-positions1*", "float32-positions2*")
@pytest.mark.parametrize(
    ("positions", "bias"), [([0], True), ([149], False), ([64, 63], True), ([127, 0, 128], True)]
)
def test_attention_layer(positions: list[int], bias: bool, dtype: torch.dtype) -> None:
    check(
        decode_attention_layer,
        plain_attention_layer,
        attention_case(positions, 2, 16, 150, dtype, bias),
        again=len(positions) == 2,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("H", "D"), [(1, 5), (1, 80), (5, 54)])
def test_attention_layer_widths(H: int, D: int) -> None:
    """Widths of less than a step, of several, and of no whole number of them."""
    check(
        decode_attention_layer, plain_attention_layer, attention_case([30], H, D, 40, torch.float32)
    )


@pytest.mark.quick("*-1-*", "float32-3-*", "float16-2-*")
@pytest.mark.parametrize(("B", "activation"), [(1, "tanh"), (2, "none"), (3, "erf"), (8, "tanh")])
def test_mlp_layer(B: int, activation: str, dtype: torch.dtype) -> None:
    check(
        decode_mlp_layer, plain_mlp_layer, mlp_case(B, 48, 96, dtype), B == 2, activation=activation
    )


@pytest.mark.quick("33-*", "1-*")
@pytest.mark.parametrize(("C", "hidden"), [(1, 4), (33, 70), (256, 300)])
def test_mlp_layer_widths(C: int, hidden: int) -> None:
    check(decode_mlp_layer, plain_mlp_layer, mlp_case(1, C, hidden, torch.float32, bias=C == 33))


@pytest.mark.slow
def test_steps_that_do_not_fit_in_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of weights of which only the first step is loaded ahead."""
    config = lookup(configs.LINEAR, "cpu", 1)
    few = {**config.blocks, "BYTES": 16, "MOST": 32}
    table = {"default": {8: type(config)(few, config.num_warps)}}
    monkeypatch.setattr(configs, "LINEAR", table)
    check(decode_mlp_layer, plain_mlp_layer, mlp_case(3, 300, 20, torch.float32))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    case = attention_case([80, 20, 3], 1, 32, 100, torch.float32)
    want = decode_attention_layer(**case)
    case["x"][1:] = float("nan")
    assert torch.equal(decode_attention_layer(**case)[0], want[0])


@pytest.mark.quick("decode_attention_layer")
@pytest.mark.parametrize("op", ["decode_attention_layer", "decode_mlp_layer"])
def test_registered_op(op: str) -> None:
    """What torch.compile and fake tensors see, and that both ways in give the same."""
    attention = op == "decode_attention_layer"
    case = (
        attention_case([20, 39], 1, 32, 40, torch.float32)
        if attention
        else mlp_case(2, 48, 32, torch.float32)
    )
    for name in ("k_cache", "v_cache"):
        if name in case:
            case[name].nan_to_num_()
    rest = (0.2,) if attention else ("tanh",)
    tests = ("test_schema", "test_faketensor")
    arguments = (*case.values(), *rest, 1e-5, False)
    torch.library.opcheck(registered(op), arguments, test_utils=tests)
    function = decode_attention_layer if attention else decode_mlp_layer
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**case), function(**case)) and not case["counters"].any()


@pytest.mark.quick("1-*")
@pytest.mark.parametrize("op", ["decode_attention_layer", "decode_mlp_layer"])
@pytest.mark.parametrize("B", [1, 3])
def test_the_record_s_case_agrees(op: str, B: int) -> None:
    """The self-check's comparison; a single row has a full cache there."""
    entry = record(op)
    case = entry.case(Sizes(B, 40, 1, 32), normal(DEVICE))
    if "positions" in case.arguments:
        assert case.arguments["positions"][0] == 39
    for got, want in zip(entry.run(entry.ours, case), entry.run(entry.eager, case), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_limits() -> None:
    attention, mlp = (record(f"decode_{half}_layer").limits for half in ("attention", "mlp"))
    for limits in (attention, mlp):
        assert limits(Sizes(8), torch.bfloat16, "sm_90") == ""
        assert limits(Sizes(9), torch.bfloat16, "sm_90") == "9 rows are more than 8"
        wide = Sizes(1, n_head=64, n_embd=5120)
        assert limits(wide, torch.bfloat16, "sm_90") == "width 5120 is more than 4096"
    assert attention(Sizes(1, n_head=2), torch.bfloat16, "sm_90") == "head dim 384 is over 256"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(9, 32)}, ValueError, r"x must have shape \(1 to 8, C >= 1\)"),
        ({"norm_weight": None}, TypeError, "norm_weight must be a tensor"),
        ({"qkv_weight": torch.zeros(95, 32)}, ValueError, "qkv_weight must have shape"),
        ({"qkv_weight": torch.zeros(32, 96).t()}, ValueError, "qkv_weight must be contiguous"),
        ({"proj_bias": torch.zeros(31)}, ValueError, "proj_bias must have shape"),
        ({"k_cache": torch.zeros(2, 1, 8, 16)}, ValueError, "with H . D = 32"),
        ({"positions": torch.zeros(2).int()}, TypeError, "positions must be of dtype int64"),
        ({"counters": torch.zeros(5).int()}, ValueError, "at least 6 of them, got 5"),
        ({"counters": torch.zeros(9)}, TypeError, "counters must be of dtype int32"),
        ({"scale": -1.0}, ValueError, "scale must be finite and > 0"),
    ],
)
def test_bad_arguments(change: Case, error: type[Exception], message: str) -> None:
    case = attention_case([3, 4], 1, 32, 8, torch.float32)
    moved = {k: x.to(DEVICE) if isinstance(x, Tensor) else x for k, x in change.items()}
    with pytest.raises(error, match=message):
        decode_attention_layer(**{**case, **moved})


def test_bad_arguments_of_the_mlp() -> None:
    case = mlp_case(1, 16, 64, torch.float32)
    with pytest.raises(ValueError, match="'relu'"):
        decode_mlp_layer(**case, activation="relu")
    with pytest.raises(ValueError, match="fc_bias must have shape"):
        decode_mlp_layer(**{**case, "fc_bias": torch.zeros(63, device=DEVICE)})


def test_weights_in_flight() -> None:
    """All of a row's weights at once for all of GPT-2's sizes but the widest, in two bytes."""
    config = lookup(configs.LINEAR, "sm_90", 1)
    plans = [repeat_and_ahead(N, K, 2, config, 132) for N, K in (
        (2304, 768), (768, 768), (3072, 768), (768, 3072), (50257, 768), (1600, 6400),
    )]  # fmt: skip
    assert plans == [(2, 3), (1, 3), (2, 3), (1, 12), (2, 3), (1, 16)]
    assert repeat_and_ahead(768, 3072, 4, config, 132) == (1, 8)


@pytest.mark.slow
def test_the_weights_are_asked_for_before_anything_is_waited_for(tmp_path: Path) -> None:
    """In the machine code of sm_90: at least 29 KB an SM before the first wait, and no spills."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.kernels.decode_sass"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, kernel in found.items():
        assert kernel["spills"] == 0, (name, kernel)
        # Of its first product, in the order of the code.
        assert kernel["bytes_ahead"] * kernel["programs"] >= 29 * 1024, (name, kernel)


@pytest.mark.cuda
@pytest.mark.parametrize("B", [1, 8])
def test_a_graph_of_overlapping_launches_follows_the_positions(B: int) -> None:
    """Eight layers in bf16 that begin early, replayed 300 times: the same to the bit as alone."""
    layers, S = 8, 256
    cases = [
        (attention_case([0] * B, 12, 64, S, torch.bfloat16),
         mlp_case(B, 768, 3072, torch.bfloat16))
        for _ in range(layers)
    ]  # fmt: skip
    counters = decode_counters(B, 12, 2 * layers, DEVICE)
    x = torch.randn(B, 768, device=DEVICE, dtype=torch.bfloat16)
    positions = torch.zeros(B, dtype=torch.int64, device=DEVICE)

    def step(early: bool) -> Tensor:
        y = x
        for i, (attention, mlp) in enumerate(cases):
            own = {"positions": positions, "early": early}
            y = decode_attention_layer(**attention | {"x": y, "counters": counters[2 * i]} | own)
            more = {"x": y, "counters": counters[2 * i + 1], "early": early}
            y = decode_mlp_layer(**mlp | more)
        return y

    step(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(True)
    for t in range(S):  # all: each reads the keys and values that those before it have left
        positions.fill_(t)
        x.normal_()
        graph.replay()
        ours = got.clone()
        assert torch.equal(step(False), ours) and ours.isfinite().all(), f"position {t}"
        assert not counters.any()
