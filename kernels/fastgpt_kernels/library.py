"""Registration of launchers as PyTorch ops with torch.library.

`define_op` does what `torch.library.custom_op` and its `register_` methods do, with less Python per
call: an eager call with its backward pass takes 23 µs less. An op can be differentiated once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fastgpt_kernels import launch, versions

_TAG = f"{torch.compiler.config.cache_key_tag} {versions.sources()}".strip()


def tag_compile_caches(*words: str) -> None:
    """Adds a hash of this package's sources, and words, to the keys of torch.compile's caches.

    The caches know an op by its name alone. They must not return a graph of another version of this
    package, whose results may have other shapes.
    """
    torch.compiler.config.cache_key_tag = " ".join([_TAG, *words])


tag_compile_caches()

_LIBRARY = torch.library.Library("fastgpt", "DEF")
# Before 2.13 Inductor writes out, for a log, all that an op's arguments were computed from when it
# first meets the op. For a model's last op that text doubles with each layer.
_WRITES_OUT = torch.__version__ < "2.13"


def define_op(
    name: str,
    launcher: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
    mutates: Sequence[str] = (),
) -> OpOverload:
    """Registers a launcher as the op `fastgpt::name` and returns that op.

    launcher       an annotated function that returns tensors
    fake           the same function on tensors without data
    setup_context  (ctx, inputs, output), as in torch.autograd.Function
    backward       (ctx, *gradients) -> gradients of the first inputs; an unused result has None
    flops          FLOPs of a call, from the arguments with shapes in place of tensors
    mutates        names of the arguments that the launcher changes
    """

    def on_meta(*inputs: Any) -> Any:
        if _WRITES_OUT:
            _introduce_to_inductor(packet.default)
        return launcher(*inputs) if launch.pretending() else fake(*inputs)

    schema = name + torch.library.infer_schema(launcher, mutates_args=mutates)
    _LIBRARY.define(schema, tags=torch.Tag.needs_exact_strides)
    _LIBRARY.impl(name, launcher, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastgpt::{name}", on_meta, lib=_LIBRARY)
    packet = getattr(torch.ops.fastgpt, name)
    if flops is not None and launch.KERNELS:  # the counter takes a tenth of a second to load
        from torch.utils.flop_counter import register_flop_formula

        register_flop_formula(packet)(flops)
    if setup_context is not None and backward is not None:
        function = _autograd_function(name, packet.default, setup_context, backward)
        _LIBRARY.impl(name, function, "Autograd")
    return packet.default


def _introduce_to_inductor(op: OpOverload) -> None:
    """Registers an op with Inductor as one that it calls as it is."""
    from torch._inductor.lowering import lowerings, make_fallback

    if op not in lowerings:
        make_fallback(op, warn=False)


def tensors_only(*results: Tensor | None) -> Any:
    """Returns the results of a registered op, with an empty tensor in place of None."""
    like = next(x for x in results if x is not None)
    return tuple(like.new_empty(0) if x is None else x for x in results)


def matmul_flops(x: torch.Size, weight: torch.Size, count: int) -> int:
    """Returns the FLOPs of `count` matmuls among x (M, K), weight (N, K) and x W^T (M, N)."""
    return count * 2 * x[0] * weight[0] * weight[1]


def refuse_second_derivative(name: str) -> None:
    """Raises RuntimeError in a backward pass that is itself differentiated.

    Otherwise, if the upstream gradient is constant, the gradient would have no graph.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{name}: has no second derivative; leave out create_graph=True")


def _autograd_function(
    name: str,
    op: OpOverload,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """Returns the op as a function that autograd differentiates once."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*inputs)
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)
        return output

    def backward_once(ctx: Any, *gradients: Any) -> Any:
        refuse_second_derivative(name)
        needs = ctx.needs_input_grad
        if all(gradient is None for gradient in gradients):
            return (None,) * len(needs)
        found = backward(ctx, *gradients)
        found = found if isinstance(found, tuple) else (found,)
        return tuple(x if need else None for x, need in zip_longest(found, needs))

    body = {"forward": staticmethod(forward), "backward": staticmethod(backward_once)}
    function = type(f"fastgpt::{name}", (torch.autograd.Function,), body)

    def apply(*inputs: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(f"{name}: torch.func does not work here; use torch.autograd.grad")
        return function.apply(*inputs)  # type: ignore[attr-defined]

    return apply
