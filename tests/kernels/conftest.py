"""Fixtures of the kernel tests: the device at hand, its dtypes, and poisoned outputs.

With a GPU the kernels run on it, in bf16 too. Without one they run in Triton's interpreter on CPU
tensors, in fp32 and fp16 (bf16 is silently wrong there): keep those shapes small.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from triton.runtime.interpreter import InterpreterBuilder

from fastgpt_kernels import launch
from tests.kernels import helpers

# The same examples in every run.
settings.register_profile("kernels", derandomize=True, deadline=None)
settings.load_profile("kernels")

HAS_CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * HAS_CUDA


@pytest.fixture(autouse=True)
def run_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs interpreted kernels instead of the reference on CPU tensors."""
    if not HAS_CUDA:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(launch, "INTERPRETED", True)
        # As a GPU does it: the interpreter rounds the product, too.
        monkeypatch.setattr(InterpreterBuilder, "create_fma", helpers.fused_multiply_add)
        monkeypatch.setattr(InterpreterBuilder, "create_splat", helpers.splat_masks)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills allocated tensors with NaN, so that an unwritten output fails the test."""
    helpers.poison_empty(monkeypatch)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Seeds each test, so that its random inputs do not depend on the order of tests."""
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        yield


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets cross_entropy's tiles for small rows: one tile, four in registers, walked twice."""
    table = {
        64: launch.Config({"BLOCK": 64, "TILES": 1}, num_warps=1),
        256: launch.Config({"BLOCK": 64, "TILES": 4}, num_warps=1),
        1 << 31: launch.Config({"BLOCK": 64, "TILES": 2}, num_warps=1),
    }
    monkeypatch.setattr(helpers.module_of("cross_entropy"), "CROSS_ENTROPY", {"default": table})


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0) if HAS_CUDA else torch.device("cpu")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
