"""The accuracy rule of the kernel tests and the small tools that all of them share.

The rule: against the float64 oracle, our error is at most twice that of PyTorch at the same dtype
on the same input, by largest absolute error and by relative Frobenius norm.

How well PyTorch does on one small input is luck: another CPU sums in another order and errs by a
third or by three times as much. So it is run several times more, in fp32, on inputs moved by one
rounding, and the worst of its runs is what counts. All of them are held against the one oracle.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

NUDGED_RUNS = 6


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `torch.empty` and `torch.empty_like` return NaN (integers: the lowest value)."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            out = allocate(*args, **kwargs)
            if torch.compiler.is_compiling() or out.is_meta:
                return out
            with torch.no_grad():
                if out.is_floating_point():
                    out.fill_(float("nan"))
                elif out.dtype is not torch.bool:
                    out.fill_(torch.iinfo(out.dtype).min)
            return out

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


def fused_multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z of interpreted fp32 values, rounded once: a product of two is exact in fp64."""
    exact = x.data.astype(np.float64) * y.data + z.data
    return TensorHandle(exact.astype(x.data.dtype), x.dtype)


_splat = InterpreterBuilder.create_splat


def splat_masks(builder: Any, wanted: Any, x: Any) -> Any:
    """A scalar in every place. The interpreter's own gives a comparison of scalars the type of what
    was compared, which from Triton 3.9 on it refuses as a mask.
    """
    splat = _splat(builder, wanted, x)
    if wanted.scalar != tl.int1:
        return splat
    return TensorHandle(splat.data.astype(bool), tl.int1)


def errors(x: Tensor, oracle: Tensor) -> tuple[float, float]:
    """(largest absolute error, relative Frobenius error) of `x`, both 0 for an empty tensor."""
    if oracle.numel() == 0:
        return 0.0, 0.0
    difference = x.double() - oracle
    norm = oracle.norm().item()
    return difference.abs().max().item(), difference.norm().item() / (norm or 1.0)


def nudged(inputs: Sequence[Any], seed: int) -> list[Any]:
    """Floating-point tensors in fp32, each value times 1 +- eps; other arguments as they are."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            return x
        sign = torch.randint(0, 2, x.shape, generator=generator).to(x.device) * 2 - 1
        return x.float() * (1 + sign * torch.finfo(torch.float32).eps)

    return [nudge(x) for x in inputs]


def assert_accurate(
    ours: Tensor,
    torch_same_dtype: Tensor,
    oracle: Tensor,
    factor: float = 2.0,
    name: str = "",
    nudged_runs: Sequence[Tensor] = (),
    inherent: float = 0.0,
    floor: float = 0.0,
) -> None:
    """`ours` errs at most `factor` times as much as PyTorch does, or within an ulp or so.

    `nudged_runs` are PyTorch's results on `nudged` inputs; `inherent` is a relative error that the
    op's formula has whoever computes it, where PyTorch may be lucky; `floor` an absolute one, where
    the result is 0. Eps of the dtype times the largest value, which is two roundings of that value,
    is always allowed.
    """
    assert ours.shape == oracle.shape, f"{name}: shape {ours.shape}, wanted {oracle.shape}"
    assert ours.dtype == torch_same_dtype.dtype, f"{name}: {ours.dtype}, {torch_same_dtype.dtype}"
    oracle = oracle.double()
    ours, torch_same_dtype = ours.to(oracle.device), torch_same_dtype.to(oracle.device)
    finite = oracle.isfinite() & torch_same_dtype.isfinite()  # fp16 may overflow where fp64 cannot
    strange = ~finite & (ours != torch_same_dtype) & ~(ours.isnan() & torch_same_dtype.isnan())
    assert not strange.any(), (
        f"{name}: {strange.sum().item()} values differ where PyTorch's are infinite or NaN"
    )
    bad = ~ours.isfinite() & finite
    assert not bad.any(), f"{name}: {bad.sum().item()} of {ours.numel()} values are not finite"
    runs = [torch_same_dtype, *(x.to(oracle.device) for x in nudged_runs)]
    ours, torch_same_dtype, oracle = ours[finite], torch_same_dtype[finite], oracle[finite]
    our_max, our_norm = errors(ours, oracle)
    torch_max, torch_norm = map(max, zip(*(errors(x[finite], oracle) for x in runs), strict=True))
    eps = torch.finfo(torch_same_dtype.dtype).eps
    scale = oracle.abs().max().item() if oracle.numel() else 0.0
    assert our_max <= factor * torch_max + (eps + inherent) * scale + floor, (
        f"{name}: largest error {our_max:.3e}, PyTorch's {torch_max:.3e}, largest value {scale:.3e}"
    )
    allowed = floor * ours.numel() ** 0.5 / (oracle.norm().item() or 1.0)
    assert our_norm <= factor * torch_norm + eps + inherent + allowed, (
        f"{name}: relative error {our_norm:.3e}, PyTorch's {torch_norm:.3e}"
    )


def forward_backward(
    fn: Callable[..., Any], inputs: Sequence[Any], dys: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients of the floating-point inputs) of `fn(*inputs)`; strides are kept."""
    leaves = [
        x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in inputs
    ]
    y = fn(*leaves)
    outputs = list(y) if isinstance(y, tuple) else [y]
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, list(dys))
    return [y.detach() for y in outputs], list(gradients)


def check_op(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    dys: Sequence[Tensor],
    factor: float = 2.0,
    floor: float = 0.0,
) -> None:
    """Outputs and gradients of `op` obey the accuracy rule; `reference` is run in fp64 and as is.

    `inputs` are positional arguments, `dys` one gradient an output.
    """

    def double(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    ours = forward_backward(op, inputs, dys)
    same = forward_backward(reference, inputs, dys)
    oracle = forward_backward(reference, [double(x) for x in inputs], [double(dy) for dy in dys])
    runs = [
        forward_backward(reference, nudged(inputs, seed), nudged(dys, -1 - seed))
        for seed in range(NUDGED_RUNS)
    ]
    for part, kind in enumerate(("output", "gradient")):
        for i, (x, y, z) in enumerate(zip(ours[part], same[part], oracle[part], strict=True)):
            label = f"{kind} {i} {tuple(z.shape)}"
            others = [run[part][i] for run in runs]
            assert_accurate(x, y, z, factor, label, others, floor=floor)


def registered(name: str) -> Any:
    """The op as PyTorch has it, for `torch.library.opcheck`."""
    return getattr(torch.ops.fastgpt, name).default


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of a step, which has run once before, and what it returned while captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, outputs


def module_of(op: str) -> Any:
    """Returns the module of an op, whose name in the package is its function."""
    return importlib.import_module(f"fastgpt_kernels.{op}")


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def sliced(x: Tensor) -> Tensor:
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


# Each makes a tensor of the same shape, which has other strides.
LAYOUTS = [transposed, sliced, strided, expanded]


def broadcast(x: Tensor) -> Tensor:
    """Returns a tensor with stride zero everywhere, as the gradient of a sum is."""
    return x.flatten()[0].expand(x.shape)
