"""Registered ops: eager, compiled and on fake tensors the same, and differentiable once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastgpt_kernels import launch, library
from fastgpt_kernels.library import define_op


def _scale(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return x * factor, x.new_full((1,), factor)


def _scale_backward(dy: Tensor, factor: float) -> Tensor:
    return dy * factor


def _setup(ctx, inputs, output):
    ctx.factor = inputs[1]
    ctx.mark_non_differentiable(output[1])


def _add(total: Tensor, x: Tensor) -> None:
    total.add_(x)


backward = define_op(
    "test_scale_backward", _scale_backward, lambda dy, factor: dy.new_empty(dy.shape)
)
scale = define_op(
    "test_scale", _scale, lambda x, factor: (x.new_empty(x.shape), x.new_empty(1)),
    setup_context=_setup, backward=lambda ctx, dy, _: (backward(dy, ctx.factor), None),
    flops=lambda x, factor, **_: x.numel(),
)  # fmt: skip
add = define_op("test_add", _add, lambda total, x: None, mutates=("total",))


def leaf() -> Tensor:
    return torch.randn(3, 4, requires_grad=True)


@pytest.mark.parametrize("compile", [False, True])
def test_gradients(compile: bool) -> None:
    def loss(x: Tensor) -> Tensor:
        return (scale(x.sin(), 3.0)[0] * 2).sum()

    torch._dynamo.reset()
    x = leaf()
    run = torch.compile(loss, backend="aot_eager", fullgraph=True) if compile else loss
    (dx,) = torch.autograd.grad(run(x), x)
    torch.testing.assert_close(dx, 6 * x.cos())


def test_compile_caches_are_told_this_package_and_more() -> None:
    before = torch.compiler.config.cache_key_tag
    library.tag_compile_caches("attention=cudnn")
    assert torch.compiler.config.cache_key_tag == f"{library._TAG} attention=cudnn"
    library.tag_compile_caches()
    assert torch.compiler.config.cache_key_tag == library._TAG
    torch.compiler.config.cache_key_tag = before


def test_opcheck() -> None:
    torch.library.opcheck(scale, (leaf(), 2.0))
    torch.library.opcheck(add, (torch.randn(3), torch.randn(3)))


def test_a_changed_argument_is_changed_when_compiled() -> None:
    torch._dynamo.reset()
    total, x = torch.ones(3), torch.ones(3)
    torch.compile(lambda t, x: add(t, x), backend="aot_eager", fullgraph=True)(total, x)
    assert torch.equal(total, torch.full((3,), 2.0))


def test_fake_tensors_and_flops() -> None:
    with FakeTensorMode(), FlopCounterMode(display=False) as flops:
        x = leaf()
        y, _ = scale(x, 2.0)
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.shape == x.shape and flops.get_total_flops() == 12


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
    op = define_op("test_fallback", _scale_backward, lambda dy, f: dy.new_empty(dy.shape))
    torch._dynamo.reset()
    x = torch.ones(3)
    assert torch.equal(torch.compile(lambda x: op(x, 2.0) + 1, fullgraph=True)(x), 3 * x)
    assert op in lowering.lowerings


@pytest.mark.parametrize("constant", [True, False])
def test_second_derivatives_are_refused(constant: bool) -> None:
    """Also where the upstream gradient is constant: no gradient comes without its graph."""
    x = leaf()
    y, _ = scale(x, 2.0)
    with pytest.raises(RuntimeError, match="^test_scale: has no second derivative"):
        torch.autograd.grad(y.sum() if constant else y.square().sum(), x, create_graph=True)


def test_transforms_of_functions() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="^test_scale: torch.func does not work here"):
        torch.func.grad(lambda x: scale(x, 2.0)[0].sum())(x)
    assert torch.equal(torch.vmap(lambda x: scale(x, 2.0)[0])(x), 2 * x)
