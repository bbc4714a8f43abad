"""The matrix product: layouts, odd sizes, split K, epilogues; interpreted or on a GPU with TMA."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgpt_kernels import launch
from fastgpt_kernels.launch import Config
from fastgpt_kernels.ops.matmul import configs, kernels
from fastgpt_kernels.ops.matmul.configs import runs_on
from fastgpt_kernels.ops.matmul.kernels import aligned, launch_matmul, segments
from tests.kernels.helpers import assert_accurate

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16 if DEVICE.type == "cuda" else torch.float32]
pytestmark = pytest.mark.skipif(
    not runs_on(launch.arch_of(torch.empty(0, device=DEVICE))), reason="TMA"
)

# Less than a tile, whole tiles, a little more; several bands of GROUP_M; K less than a step.
SIZES = [(1, 8, 8), (64, 64, 64), (70, 136, 40), (300, 72, 24), (33, 264, 104)]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def check(ours: Tensor, same: Tensor, exact: Tensor, name: str = "") -> None:
    assert_accurate(ours, same, exact, name=name)


@pytest.mark.parametrize("layout", ["a b^T", "a b", "a^T b"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_layouts(size: tuple[int, int, int], layout: str, dtype: torch.dtype) -> None:
    M, N, K = size
    M = -(-M // 8) * 8 if layout == "a^T b" else M  # rows of a lie along M: TMA wants 16 bytes
    a, b = random(M, K, dtype=dtype), random(N, K, dtype=dtype)
    out, sums = launch_matmul(
        a.t().contiguous() if layout == "a^T b" else a,
        b if layout == "a b^T" else b.t().contiguous(),
        a_transposed=layout == "a^T b",
        b_transposed=layout != "a b^T",
    )
    assert sums is None
    check(out, a @ b.t(), a.double() @ b.double().t())


def exact_dw(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return dy.double().t() @ x.double(), dy.double().sum(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("programs", "cost"), [(1, 0), (4, 0), (8, 0), (8, 8), (14, 0), (40, 8)], ids=str
)
def test_shares_of_k(
    programs: int, cost: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dW and the bias's gradient, fp32 from 16 bits: 3 x 2 tiles in segments that are not alike."""
    monkeypatch.setattr(kernels, "COST", cost)
    dy, x = random(335, 72, dtype=dtype), random(335, 48, dtype=dtype)
    dw, db = launch_matmul(
        dy, x, a_transposed=True, b_transposed=True, dtype=torch.float32, column_sums=True,
        programs=programs,
    )  # fmt: skip
    assert db is not None and dw.dtype == db.dtype == torch.float32
    exact, exact_sums = exact_dw(dy, x)
    check(dw, dy.float().t() @ x.float(), exact)
    check(db, dy.float().sum(0), exact_sums)
    again, _ = launch_matmul(
        dy, x, a_transposed=True, b_transposed=True, dtype=torch.float32, programs=programs
    )
    assert torch.equal(dw, again)


def test_fewer_steps_than_programs(dtype: torch.dtype) -> None:
    dy, x = random(5, 8, dtype=dtype), random(5, 16, dtype=dtype)
    dw, db = launch_matmul(
        dy, x, a_transposed=True, b_transposed=True, dtype=torch.float32, column_sums=True,
        programs=4,
    )  # fmt: skip
    assert db is not None
    exact, exact_sums = exact_dw(dy, x)
    check(dw, dy.float().t() @ x.float(), exact)
    check(db, dy.float().sum(0), exact_sums)


def test_dw_is_added_to_a_gradient(dtype: torch.dtype) -> None:
    dy, x = random(335, 72, dtype=dtype), random(335, 48, dtype=dtype)
    for programs in (1, 9):
        gradient = random(72, 48, dtype=torch.float32) * 10
        exact = gradient.double() + exact_dw(dy, x)[0]
        same = gradient + dy.float().t() @ x.float()
        out, _ = launch_matmul(
            dy, x, a_transposed=True, b_transposed=True, out=gradient, accumulate=True,
            programs=programs,
        )  # fmt: skip
        assert out is gradient
        check(out, same, exact)
        launch_matmul(dy, x, a_transposed=True, b_transposed=True, out=gradient, programs=programs)
        check(gradient, dy.float().t() @ x.float(), exact_dw(dy, x)[0])


def test_a_gradient_that_does_not_fit_is_refused() -> None:
    dy, x = random(16, 8, dtype=torch.float16), random(16, 16, dtype=torch.float16)
    fp32 = torch.zeros(8, 16, device=DEVICE)
    for out in (fp32.half(), fp32.t(), torch.zeros(16, 8, device=DEVICE).t(), fp32[:4]):
        with pytest.raises(ValueError, match="matmul: out must be a contiguous, aligned float32"):
            launch_matmul(dy, x, a_transposed=True, b_transposed=True, out=out)


@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_gelu_epilogue(has_bias: bool, tanh: bool, dtype: torch.dtype) -> None:
    x, weight = random(70, 40, dtype=dtype), random(136, 40, dtype=dtype)
    bias = random(136, dtype=torch.float32) if has_bias else None
    slope = torch.empty(70, 136, dtype=dtype, device=DEVICE)
    a, _ = launch_matmul(x, weight, bias=bias, slope=slope, tanh=tanh)

    def exact(kind: torch.dtype, rounded: torch.dtype) -> tuple[Tensor, Tensor]:
        z = x.to(kind) @ weight.to(kind).t()
        z = (z if bias is None else z + bias.to(kind)).to(rounded).to(kind).requires_grad_()
        y = F.gelu(z, approximate="tanh" if tanh else "none")
        return y.detach(), torch.autograd.grad(y.sum(), z)[0]

    same, oracle = exact(torch.float32, dtype), exact(torch.float64, torch.float64)
    check(a, same[0].to(dtype), oracle[0], "gelu(z)")
    check(slope, same[1].to(dtype), oracle[1], "gelu'(z)")


def test_factor_epilogue(dtype: torch.dtype) -> None:
    dy, weight, factor = (random(*s, dtype=dtype) for s in ((70, 40), (40, 136), (70, 136)))
    dz, _ = launch_matmul(dy, weight, b_transposed=True, factor=factor)
    same = (dy.float() @ weight.float()).to(dtype) * factor
    check(dz, same, dy.double() @ weight.double() * factor.double())


def test_rows_that_tma_cannot_read_are_copied(dtype: torch.dtype) -> None:
    wide = random(33, 49, dtype=dtype)
    a, b = wide[:, 1:41], random(16, 40, dtype=dtype)
    assert not aligned(a) and aligned(b)
    out, _ = launch_matmul(a, b)
    check(out, a @ b.t(), a.double() @ b.double().t())


@settings(max_examples=200)
@given(
    tiles=st.integers(1, 300), steps=st.integers(1, 200), team=st.integers(1, 132),
    cost=st.integers(0, 9),
)  # fmt: skip
def test_segments_are_all_steps_of_all_tiles(tiles: int, steps: int, team: int, cost: int) -> None:
    found = segments(tiles, steps, team, cost)
    assert sorted(s.tile for s in found[:tiles]) == list(range(tiles))
    assert all(s.first == 0 for s in found[:tiles])
    steps_of: dict[int, list[int]] = {tile: [] for tile in range(tiles)}
    for s in found:  # in the order in which they are added
        steps_of[s.tile] += range(s.first, s.last)
    assert all(steps_of[tile] == list(range(steps)) for tile in range(tiles))
    assert {s.program for s in found} <= set(range(team))


# GPT-2's four layers of a block, (features out, features in), at 65,536 tokens.
@pytest.mark.parametrize("C", [768, 1024, 1280, 1600])
@pytest.mark.parametrize("layer", [(3, 1), (1, 1), (4, 1), (1, 4)], ids=str)
def test_dw_is_fair_and_its_partials_are_few(
    layer: tuple[int, int], C: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 132 SMs: at most a partial tile an SM, 20 MB; the busiest works a tenth longer than fair.

    Counted from what the launcher allocates and launches; nothing is computed.
    """
    launches: dict[str, tuple[Any, ...]] = {}

    class Recorder:
        def __init__(self, name: str):
            self.name = name

        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda *args, **_: launches.update({self.name: (*grid, *args)})

    for name in ("matmul_kernel", "matmul_sum_kernel"):
        monkeypatch.setattr(kernels, name, Recorder(name))
    monkeypatch.setattr(kernels, "multiprocessors", lambda x: 132)
    M, N = layer[0] * C, layer[1] * C
    dy, x = (torch.empty(65536, n, dtype=torch.float16, device="meta") for n in (M, N))
    config: Config = configs.matmul(128, 256, 64, 8, 3, 1, 2)
    dw, _ = launch_matmul(
        dy, x, a_transposed=True, b_transposed=True, dtype=torch.float32, config=config
    )
    team, _, _, out, _, _, _, partials, *_ = launches["matmul_kernel"]
    assert out.base is dw and dw.dtype == torch.float32
    if partials is None:
        bytes_written, n_partials = 0, 0
        assert "matmul_sum_kernel" not in launches
    else:
        bytes_written, n_partials = partials.base.nbytes, partials.base.numel() // (128 * 256)
        assert launches["matmul_sum_kernel"][1:3] == (dw, partials.base)
    assert n_partials <= 132 and bytes_written <= 20e6

    tiles, steps = -(-M // 128) * -(-N // 256), 65536 // 64
    found = segments(tiles, steps, team, kernels.COST)
    assert len(found) == tiles + n_partials
    busy = Counter[int]()
    for segment in found:
        busy[segment.program] += segment.last - segment.first + kernels.COST
    assert max(busy.values()) < 1.1 * (tiles * steps / 132 + kernels.COST)


def test_is_for_gpus_with_tma() -> None:
    assert [a for a in ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942") if runs_on(a)] == [
        "sm_90",
        "sm_100",
    ]
