"""Registration of ops. test_every_op.py tests what each registered op promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastgpt_kernels import launch, library
from fastgpt_kernels.library import define_op


def _double(x: Tensor) -> Tensor:
    return 2 * x


def _add(total: Tensor, x: Tensor) -> None:
    total.add_(x)


add = define_op("test_add", _add, lambda total, x: None, mutates=("total",))


def test_compile_caches_are_told_this_package_and_more() -> None:
    before = torch.compiler.config.cache_key_tag
    library.tag_compile_caches("attention=cudnn")
    assert torch.compiler.config.cache_key_tag == f"{library._TAG} attention=cudnn"
    library.tag_compile_caches()
    assert torch.compiler.config.cache_key_tag == library._TAG
    torch.compiler.config.cache_key_tag = before


def test_a_changed_argument_is_changed_when_compiled() -> None:
    torch._dynamo.reset()
    total, x = torch.ones(3), torch.ones(3)
    torch.compile(lambda t, x: add(t, x), backend="aot_eager", fullgraph=True)(total, x)
    assert torch.equal(total, torch.full((3,), 2.0))


def test_meta_tensors_reach_the_launcher_only_where_they_pretend() -> None:
    seen = []

    def fill(x: Tensor) -> Tensor:
        seen.append(x.device.type)
        return torch.empty_like(x)

    op = define_op("test_meta", fill, torch.empty_like)
    op(torch.empty(2, device="meta"))
    assert not seen
    with launch.pretend("sm_90"):
        op(torch.empty(2, device="meta"))
    assert seen == ["meta"]


def test_old_inductors_do_not_write_out_an_ops_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import exc, lowering

    def written_out(*_: object) -> str:
        raise AssertionError("written out")

    monkeypatch.setattr(exc.OperatorIssue, "operator_str", staticmethod(written_out))
    monkeypatch.setattr(library, "_WRITES_OUT", True)
    op = define_op("test_fallback", _double, torch.empty_like)
    torch._dynamo.reset()
    x = torch.ones(3)
    assert torch.equal(torch.compile(lambda x: op(x) + 1, fullgraph=True)(x), 3 * x)
    assert op in lowering.lowerings
