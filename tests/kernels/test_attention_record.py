"""The attentions that a run can take: FlashAttention 3 and 4 in the place of PyTorch's flash."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastgpt_kernels import host
from fastgpt_kernels.ops.attention import record as module
from fastgpt_kernels.record import Sizes, record

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


def obstacle(name: str, monkeypatch: pytest.MonkeyPatch, arch: str, **sizes: float) -> str:
    monkeypatch.setattr(host, "arch", lambda index: arch)
    return module._others(name, Sizes(**sizes), CUDA)  # type: ignore[arg-type]


def test_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert obstacle("fa3", monkeypatch, "sm_100") == "FA3 is for sm_90, not sm_100"
    assert obstacle("fa4", monkeypatch, "sm_80") == "FA4 is for sm_90 and sm_100, not sm_80"
    assert obstacle("fa4", monkeypatch, "sm_90", dropout=0.1) == "FA4 has no dropout"
    missing = "FA4 is not installed: no module flash_attn.cute.interface"
    assert obstacle("fa4", monkeypatch, "sm_100") == missing
    assert obstacle("flash", monkeypatch, "sm_80") == obstacle("cudnn", monkeypatch, "sm_80") == ""
    monkeypatch.setattr(attention, "list_flash_attention_impls", lambda: ["FA3"])
    assert obstacle("fa4", monkeypatch, "sm_90").endswith("knows no FA4")
    assert module._others("fa4", Sizes(), torch.device("cpu")) == "no GPU"


def test_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SimpleNamespace()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda package: spec)
    assert obstacle("fa3", monkeypatch, "sm_90") == obstacle("fa4", monkeypatch, "sm_90") == ""


@pytest.mark.parametrize("compiled", [False, True])
def test_is_taken_once_and_given_back(compiled: bool, activated: list[str]) -> None:
    """In one graph too; PyTorch's own flash is its own again."""
    functions = record("attention").implementations
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
