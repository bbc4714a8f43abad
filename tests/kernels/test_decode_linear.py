"""decode_linear against the fp64 oracle: rows, sizes that fit no tile, and all that rides along."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgpt_kernels import decode_linear, reference
from tests.kernels.helpers import NUDGED_RUNS, assert_accurate, nudged, poison_empty, registered

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FULL = {"bias", "norm_weight", "norm_bias", "residual"}


def case(B: int, K: int, N: int, dtype: torch.dtype, extras: set[str]) -> dict[str, Tensor]:
    sizes = {"bias": (N,), "norm_weight": (K,), "norm_bias": (K,), "residual": (B, N)}
    tensors = {n: torch.randn(*sizes[n], device=DEVICE).to(dtype) for n in sorted(extras)}
    x = torch.randn(B, K, device=DEVICE) + 0.5
    weight = torch.randn(N, K, device=DEVICE) * K**-0.5
    return {"x": x.to(dtype), "weight": weight.to(dtype), **tensors}


def check(tensors: dict[str, Tensor], activation: str = "none") -> None:
    def run(values: list[Tensor]) -> Tensor:
        return reference.decode_linear(
            **dict(zip(tensors, values, strict=True)), activation=activation
        )

    values = list(tensors.values())
    oracle = run([x.double() for x in values])
    runs = [run(nudged(values, seed)) for seed in range(NUDGED_RUNS)]
    y = decode_linear(**tensors, activation=activation)
    assert y.is_contiguous()
    assert_accurate(y, run(values), oracle, name="y", nudged_runs=runs)


@pytest.mark.quick("*-1-*", "*-2-*", "float32-5-*", "float16-3-tanh", "float16-8-erf")
@pytest.mark.parametrize("activation", ["none", "tanh", "erf"])
@pytest.mark.parametrize("B", [1, 2, 3, 5, 8])
def test_rows(B: int, activation: str, dtype: torch.dtype) -> None:
    check(case(B, 96, 37, dtype, FULL), activation)


@pytest.mark.parametrize(
    "extras",
    [set(), {"bias"}, {"norm_weight"}, {"norm_weight", "norm_bias"}, {"residual"}],
    ids=lambda e: "+".join(sorted(e)) or "plain",
)
def test_each_part_is_optional(extras: set[str], dtype: torch.dtype) -> None:
    check(case(2, 130, 19, dtype, extras))


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(B=st.integers(1, 8), K=st.integers(1, 1100), N=st.integers(1, 40))
def test_any_shape(B: int, K: int, N: int) -> None:
    check(case(B, K, N, torch.float32, {"bias", "residual"}))


def test_nothing_is_left_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_empty(monkeypatch)
    assert decode_linear(**case(3, 64, 33, torch.float32, FULL)).isfinite().all()


def test_rows_apart_and_transposed() -> None:
    tensors = case(2, 64, 24, torch.float32, FULL)
    plain = decode_linear(**tensors)
    apart = torch.randn(2, 100, device=DEVICE)
    apart[:, :64] = tensors["x"]
    weight = tensors["weight"].t().contiguous().t()
    residual = tensors["residual"].t().contiguous().t()
    moved = {**tensors, "x": apart[:, :64], "weight": weight, "residual": residual}
    torch.testing.assert_close(decode_linear(**moved), plain, rtol=0, atol=0)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    tensors = case(4, 96, 20, torch.float32, FULL)
    other = {**tensors, "x": tensors["x"].clone()}
    other["x"][1:] = float("nan")
    assert torch.equal(decode_linear(**other)[0], decode_linear(**tensors)[0])


def test_registered_op() -> None:
    """What torch.compile and fake tensors see, and that both ways in give the same."""
    t = case(2, 48, 20, torch.float32, FULL)
    arguments = (
        *(t[n] for n in ("x", "weight", "bias", "norm_weight", "norm_bias", "residual")),
        "tanh",
        1e-5,
        False,
    )
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(registered("decode_linear"), arguments, test_utils=tests)
    plain = decode_linear(**t, activation="tanh")
    compiled = torch.compile(decode_linear, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**t, activation="tanh"), plain)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(9, 8)}, ValueError, "x must have 1 to 8 rows, got 9"),
        ({"x": torch.zeros(2, 7)}, ValueError, "weight"),
        ({"weight": torch.zeros(5, 8, dtype=torch.float16)}, TypeError, "weight"),
        ({"bias": torch.zeros(4)}, ValueError, "bias"),
        ({"norm_bias": torch.zeros(8)}, ValueError, "norm_bias needs norm_weight"),
        ({"residual": torch.zeros(2, 4)}, ValueError, "residual"),
        ({"activation": "relu"}, ValueError, "'relu'"),
    ],
)
def test_bad_arguments(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": torch.zeros(2, 8), "weight": torch.zeros(5, 8)}
    with pytest.raises(error, match=message):
        decode_linear(**{**arguments, **changes})
