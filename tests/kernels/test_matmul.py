"""The matrix product: layouts, odd sizes, split K, epilogues; interpreted or on a GPU with TMA."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import host
from fastgpt_kernels.configs import Config
from fastgpt_kernels.ops.matmul import configs
from fastgpt_kernels.ops.matmul.configs import runs_on
from fastgpt_kernels.ops.matmul.kernels import aligned, launch_matmul, n_splits
from tests.kernels.helpers import assert_accurate

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16 if DEVICE.type == "cuda" else torch.float32]
pytestmark = pytest.mark.skipif(
    not runs_on(host.arch_of(torch.empty(0, device=DEVICE))), reason="TMA"
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


@pytest.mark.parametrize("splits", [1, 2, 3, 5])
def test_split_k(splits: int, dtype: torch.dtype) -> None:
    """dW and the bias's gradient, fp32 from 16 bits; shares of K that are not all alike."""
    dy, x = random(335, 72, dtype=dtype), random(335, 48, dtype=dtype)
    dw, db = launch_matmul(
        dy, x, a_transposed=True, b_transposed=True, dtype=torch.float32, column_sums=True,
        splits=splits,
    )  # fmt: skip
    assert db is not None and dw.dtype == db.dtype == torch.float32
    check(dw, dy.float().t() @ x.float(), dy.double().t() @ x.double())
    check(db, dy.float().sum(0), dy.double().sum(0))
    again, _ = launch_matmul(
        dy, x, a_transposed=True, b_transposed=True, dtype=torch.float32, splits=splits
    )
    assert torch.equal(dw, again)


def test_fewer_steps_than_splits(dtype: torch.dtype) -> None:
    dy, x = random(5, 8, dtype=dtype), random(5, 16, dtype=dtype)
    dw, db = launch_matmul(
        dy, x, a_transposed=True, b_transposed=True, dtype=torch.float32, column_sums=True, splits=4
    )
    assert db is not None
    check(dw, dy.float().t() @ x.float(), dy.double().t() @ x.double())
    check(db, dy.float().sum(0), dy.double().sum(0))


@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_gelu_epilogue(has_bias: bool, tanh: bool, dtype: torch.dtype) -> None:
    x, weight = random(70, 40, dtype=dtype), random(136, 40, dtype=dtype)
    bias = random(136, dtype=torch.float32) if has_bias else None
    z = torch.empty(70, 136, dtype=dtype, device=DEVICE)
    a, _ = launch_matmul(x, weight, bias=bias, z=z, gelu=True, tanh=tanh)

    def exact(kind: torch.dtype) -> Tensor:
        y = x.to(kind) @ weight.to(kind).t()
        return y if bias is None else y + bias.to(kind)

    approximate = "tanh" if tanh else "none"
    check(z, exact(torch.float32).to(dtype), exact(torch.float64), "z")
    gelu = F.gelu(z.float(), approximate=approximate).to(dtype)  # of z as it was rounded
    check(a, gelu, F.gelu(z.double(), approximate=approximate), "gelu(z)")


@pytest.mark.parametrize("tanh", [True, False])
def test_slope_epilogue(tanh: bool, dtype: torch.dtype) -> None:
    dy, weight, z = (random(*s, dtype=dtype) for s in ((70, 40), (40, 136), (70, 136)))
    approximate = "tanh" if tanh else "none"
    dz, sums = launch_matmul(
        dy, weight, b_transposed=True, z=z, slope=True, tanh=tanh, row_sums=True
    )
    assert sums is not None

    def exact(kind: torch.dtype) -> Tensor:
        leaf = z.detach().to(kind).clone().requires_grad_()
        F.gelu(leaf, approximate=approximate).backward(dy.to(kind) @ weight.to(kind))
        assert leaf.grad is not None
        return leaf.grad

    check(dz, exact(torch.float32).to(dtype), exact(torch.float64), "dz")
    check(sums, exact(torch.float32).sum(0), exact(torch.float64).sum(0), "sums")


def test_rows_that_tma_cannot_read_are_copied(dtype: torch.dtype) -> None:
    wide = random(33, 49, dtype=dtype)
    a, b = wide[:, 1:41], random(16, 40, dtype=dtype)
    assert not aligned(a) and aligned(b)
    out, _ = launch_matmul(a, b)
    check(out, a @ b.t(), a.double() @ b.double().t())


@pytest.mark.parametrize(
    ("M", "N", "K", "wanted"),
    [
        (768, 768, 65536, 7),  # 18 tiles of 132: 126 units are one wave
        (2304, 768, 65536, 7),  # 54 tiles: 378 units are 2.86 of 3 waves
        (3072, 768, 65536, 9),  # 72 tiles: 648 units of 660
        (50304, 768, 65536, 1),  # enough tiles already
        (768, 768, 512, 1),  # too short to share
    ],
)
def test_splits_fill_the_device(
    M: int, N: int, K: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgpt_kernels.ops.matmul.kernels.multiprocessors", lambda x: 132)
    config: Config = configs.matmul(128, 256, 64, 8, 3, 1, 2)
    assert n_splits(M, N, K, config, torch.empty(0)) == wanted


def test_is_for_gpus_with_tma() -> None:
    assert [a for a in ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942") if runs_on(a)] == [
        "sm_90",
        "sm_100",
    ]
