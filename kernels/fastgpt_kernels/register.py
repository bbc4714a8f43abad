"""One declaration makes a launcher a PyTorch op: custom op, fake, autograd, FLOPs, eager path.

    gelu = Op("bias_gelu", forward, shapes, saves=..., backward=gelu_backward, gradients=(0, 1))
    y = gelu(x, bias, True)

What is declared is what the op computes; what PyTorch wants to know of it is derived here.

- Whatever looks at ops instead of running them (torch.compile, fake tensors, dispatch modes such as
  the FLOP counter, functorch, tensor subclasses) gets a registered op, `torch.ops.fastgpt.NAME`.
  Such an op returns tensors only: a result that is None becomes an empty tensor there.
- Plain eager mode calls the launcher inside an autograd.Function, which costs about 60 us less.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

Saved = tuple[Sequence[Tensor | None], Sequence[Any]]

# What an argument is in plain eager mode. Fake tensors and other subclasses are not among these.
_PLAIN = {Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list, torch.dtype}

_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch = torch._C._functorch.peek_interpreter_stack


def call_directly(*inputs: Any) -> bool:
    """True in plain eager mode: nobody looks at ops, and every tensor is a plain one."""
    return (
        not _compiling()
        and not _dispatch_modes()
        and _functorch() is None
        and _PLAIN.issuperset(map(type, inputs))
    )


def product_flops(x: torch.Size, weight: torch.Size, products: int) -> int:
    """FLOPs of matrix products among x (M, K), weight (N, K) and their (M, N), from shapes."""
    return products * 2 * x[0] * weight[0] * weight[1]


registered: dict[str, Op] = {}  # all of them, by name


class Op:
    """A launcher as a PyTorch op; call it like the launcher.

    name       the registered op is `fastgpt::name`
    forward    the launcher, annotated; returns a tensor or a tuple of tensors, some of which may be
               None, or nothing. Its arguments with a default (launch configs) are not the op's
    shapes     the same on tensors without data: new tensors of the results' shapes and dtypes
    public     how many of the results callers get; the others are for the backward pass
    mutates    names of the arguments that the launcher changes in place
    flops      FLOPs of a call, from the arguments with shapes in place of tensors
    saves      (arguments, results) -> (tensors, other values) that the backward pass needs; in the
               registered op a result that is None is an empty tensor
    backward   (gradients of the public results, saved tensors, saved values) -> gradients: another
               Op, or a plain function of differentiable PyTorch ops. A gradient of a result that
               nobody used is None
    gradients  for each of the first arguments the number of its gradient among these
    needs      backward is also given which of these arguments need a gradient, as a list of bools
    direct     an autograd.Function that eager mode takes instead, if it can do better
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        shapes: Callable[..., Any],
        *,
        public: int = 1,
        mutates: Sequence[str] = (),
        flops: Callable[..., int] | None = None,
        saves: Callable[[tuple[Any, ...], Any], Saved] | None = None,
        backward: Callable[..., Any] | None = None,
        gradients: Sequence[int] = (),
        needs: bool = False,
        direct: type[torch.autograd.Function] | None = None,
    ):
        self.name, self.forward, self.public = name, forward, public
        self.saves, self.backward, self.needs = saves, backward, needs
        self.gradients = tuple(gradients)
        op = torch.library.custom_op(
            f"fastgpt::{name}", _tensors_only(forward), mutates_args=mutates
        )
        op.register_fake(_tensors_only(_curbed(shapes)))
        if backward is not None:
            op.register_autograd(self._gradients, setup_context=self._remember)
        self.registered = getattr(torch.ops.fastgpt, name).default
        registered[name] = self
        if flops is not None:
            register_flop_formula(getattr(torch.ops.fastgpt, name))(flops)
        # Arguments past those with a gradient have none.
        self._rest = (None,) * (len(self.registered._schema.arguments) - len(self.gradients))
        self.direct = direct or (self._direct() if backward else None)
        self._apply = self.direct and self.direct.apply

    def __call__(self, *inputs: Any) -> Any:
        if (  # call_directly(*inputs), without another call
            not _compiling()
            and not _dispatch_modes()
            and _functorch() is None
            and _PLAIN.issuperset(map(type, inputs))
        ):
            return self.forward(*inputs) if self._apply is None else self._apply(*inputs)
        results = self.registered(*inputs)
        if self.backward is None or not isinstance(results, tuple):
            return results
        return results[0] if self.public == 1 else results[: self.public]

    def _remember(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, ctx.values = self.saves(inputs, output)  # type: ignore[misc]
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    def _gradients(self, ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        return self._differentiate(ctx, dys, self.backward)

    def _differentiate(self, ctx: Any, dys: Any, backward: Any) -> tuple[Tensor | None, ...]:
        given = dys[: self.public]
        if self.public > 1:  # results but the first may stand for None
            others = (None if dy is None or dy.shape == (0,) else dy for dy in given[1:])
            given = (given[0], *others)
        needs = ctx.needs_input_grad[: len(self.gradients)]
        if given[0] is None and all(dy is None for dy in given):
            return (None,) * len(needs) + self._rest
        extra = (list(needs),) if self.needs else ()
        found = backward(*given, *ctx.saved_tensors, *ctx.values, *extra)
        if not isinstance(found, tuple):
            found = (found,)
        wanted = [found[k] if need else None for k, need in zip(self.gradients, needs)]  # noqa: B905
        return *wanted, *self._rest

    def _direct(self) -> type[torch.autograd.Function]:
        """The same without the dispatcher; named so that a profile tells which op it is."""

        public, saves, rest, op = self.public, self.saves, self._rest, self.backward
        one = isinstance(op, Op) and public == 1 and self.gradients == (0,) and not self.needs

        def forward(ctx: Any, *inputs: Any) -> Any:
            results = self.forward(*inputs)
            tensors, ctx.values = saves(inputs, results)  # type: ignore[misc]
            ctx.save_for_backward(*tensors)
            if public > 1:
                ctx.set_materialize_grads(False)
                return results[:public]
            return results[0] if isinstance(results, tuple) else results

        def gradients(ctx: Any, *dys: Any) -> tuple[Tensor | None, ...]:
            if torch.is_grad_enabled():  # create_graph=True
                return once(ctx, *dys)
            # What was saved is plain, or `forward` would not have run: only dys can be otherwise.
            launch = op.forward if isinstance(op, Op) and call_directly(*dys) else op
            if one:
                return launch(*dys, *ctx.saved_tensors, *ctx.values), *rest  # type: ignore[misc]
            return self._differentiate(ctx, dys, launch)

        # Refuses second derivatives. It costs 7 us, which the usual backward pass need not pay.
        once = once_differentiable(gradients)

        body = {
            "forward": staticmethod(forward),
            "backward": staticmethod(gradients),
        }
        return type(f"fastgpt::{self.name}", (torch.autograd.Function,), body)


def _curbed(shapes: Callable[..., Any]) -> Callable[..., Any]:
    """`shapes`, which torch.compile asks for before Inductor sees an op for the first time.

    Until 2.13 Inductor then writes down all that its arguments were computed from, for a log that
    nobody reads: of a model's last op that is twice as long with each layer.
    """
    if torch.__version__ >= "2.13":
        return shapes

    def asked(*inputs: Any) -> Any:
        from torch._inductor.exc import OperatorIssue  # takes a second

        OperatorIssue.operator_str = staticmethod(_target_only)  # type: ignore[method-assign]
        return shapes(*inputs)

    return functools.wraps(shapes)(asked)


def _target_only(target: Any, args: Any, kwargs: Any) -> str:
    return f"target: {target}"


def _tensors_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as a registered op wants it: annotated with tensors alone, and returning those."""

    def tensors_only(*inputs: Any) -> Any:
        results = function(*inputs)
        if not isinstance(results, tuple):
            return results
        like = next(t for t in results if t is not None)
        return tuple(like.new_empty(0) if t is None else t for t in results)

    hints = typing.get_type_hints(function)
    if "return" in hints:  # a launcher; shapes need no annotations
        signature = inspect.signature(function)
        parameters = [
            p.replace(annotation=hints[name])
            for name, p in signature.parameters.items()
            if p.default is inspect.Parameter.empty
        ]
        returned = None if hints["return"] is type(None) else hints["return"]
        if typing.get_origin(returned) is tuple:
            returned = tuple[(Tensor,) * len(typing.get_args(returned))]  # type: ignore[misc]
        tensors_only.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=parameters, return_annotation=returned
        )
    return tensors_only
