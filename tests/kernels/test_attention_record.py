"""The attentions that a run can take: FlashAttention 3 and 4 in the place of PyTorch's flash."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastgpt_kernels.ops.attention import record as module
from fastgpt_kernels.registry import Sizes, spec

CUDA = torch.device("cuda", 0)
attention = nn.attention
pytestmark = pytest.mark.skipif(
    not hasattr(attention, "register_flash_attention_impl"), reason="this PyTorch has one flash"
)


@pytest.fixture
def activated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What PyTorch was told to take, by packages that are not here."""
    from torch.nn.attention import _registry

    told: list[str] = []
    for impl in ("FA3", "FA4"):

        def register(impl: str = impl) -> SimpleNamespace:
            told.append(impl)
            return SimpleNamespace(remove=lambda: told.append(f"not {impl}"))

        monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, impl, register)
    yield told
    if attention.current_flash_attention_impl():
        attention.restore_flash_attention_impl()


def reason(name: str, arch: str, **sizes: float) -> str | None:
    known = spec("attention")
    return known.unsupported_reason(name, arch, torch.bfloat16, Sizes(**sizes))  # type: ignore[arg-type]


def test_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason("fa3", "sm_100") == "FA3 is for sm_90, not sm_100"
    assert reason("fa4", "sm_80") == "FA4 is for sm_90 and sm_100, not sm_80"
    assert reason("fa4", "sm_90", dropout=0.1) == "FA4 has no dropout"
    missing = "FA4 is not installed: no module flash_attn.cute.interface"
    assert reason("fa4", "sm_100") == missing
    assert reason("flash", "sm_80") is reason("cudnn", "sm_80") is None
    monkeypatch.setattr(attention, "list_flash_attention_impls", lambda: ["FA3"])
    assert reason("fa4", "sm_90").endswith("knows no FA4")
    assert reason("fa4", "cpu") == reason("cudnn", "mps") == "no GPU"


def test_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda package: SimpleNamespace())
    assert reason("fa3", "sm_90") is reason("fa4", "sm_90") is None


@pytest.mark.parametrize("compiled", [False, True])
def test_is_taken_once_and_given_back(compiled: bool, activated: list[str]) -> None:
    """In one graph too; PyTorch's own flash is its own again."""
    functions = {name: i.function for name, i in spec("attention").implementations.items()}
    if compiled:
        torch._dynamo.reset()
        functions = {
            name: torch.compile(function, backend="aot_eager", fullgraph=True)
            for name, function in functions.items()
        }
    qkv = torch.randn(2, 8, 3 * 32)
    wanted = functions["eager"](qkv, 2)
    for _ in range(2):
        torch.testing.assert_close(functions["fa4"](qkv, 2), wanted)
    assert activated == ["FA4"] and attention.current_flash_attention_impl() == "FA4"
    torch.testing.assert_close(functions["flash"](qkv, 2), wanted)
    assert activated == ["FA4", "not FA4"]
    assert attention.current_flash_attention_impl() is None
    functions["fa3"](qkv, 2)
    assert activated == ["FA4", "not FA4", "FA3"]
