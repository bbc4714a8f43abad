"""Accuracy rule of the kernel tests, and tools that they share.

The rule: against the float64 oracle, an op's error is at most twice that of PyTorch at the same
dtype on the same input, by largest absolute error and by relative Frobenius norm.

PyTorch's error on one small input is luck, since another CPU sums in another order. So PyTorch also
runs in fp32 on inputs moved by one rounding, and the worst of its runs counts.
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
    """Makes `torch.empty` and `torch.empty_like` return NaN, or an integer's lowest value."""

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
    """Returns x * y + z of interpreted fp32 values, rounded once; x * y is exact in fp64."""
    exact = x.data.astype(np.float64) * y.data + z.data
    return TensorHandle(exact.astype(x.data.dtype), x.dtype)


_splat = InterpreterBuilder.create_splat


def splat_masks(builder: Any, wanted: Any, x: Any) -> Any:
    """Returns a scalar in every place, as bool if it is a mask.

    The interpreter's own keeps the type of compared scalars, which Triton 3.9 refuses as a mask.
    """
    splat = _splat(builder, wanted, x)
    if wanted.scalar != tl.int1:
        return splat
    return TensorHandle(splat.data.astype(bool), tl.int1)


def errors(x: Tensor, oracle: Tensor) -> tuple[float, float]:
    """Returns the largest absolute error and the relative Frobenius error."""
    if oracle.numel() == 0:
        return 0.0, 0.0
    difference = x.double() - oracle
    norm = oracle.norm().item()
    return difference.abs().max().item(), difference.norm().item() / (norm or 1.0)


def nudged(inputs: Sequence[Any], seed: int) -> list[Any]:
    """Returns floating-point tensors in fp32, each value times 1 +- eps, and others unchanged."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            return x
        sign = torch.randint(0, 2, x.shape, generator=generator).to(x.device) * 2 - 1
        return x.float() * (1 + sign * torch.finfo(torch.float32).eps)

    return [nudge(x) for x in inputs]


def assert_accurate(
    found: Tensor,
    torch_same_dtype: Tensor,
    oracle: Tensor,
    name: str = "",
    nudged_runs: Sequence[Tensor] = (),
    inherent: float = 0.0,
    floor: float = 0.0,
) -> None:
    """Asserts that `found` errs at most twice as much as PyTorch, or by two roundings.

    nudged_runs  PyTorch's results on `nudged` inputs
    inherent     a relative error of the formula itself, where PyTorch may be lucky
    floor        an absolute error, where the result is 0
    """
    assert found.shape == oracle.shape, f"{name}: shape {found.shape}, wanted {oracle.shape}"
    assert found.dtype == torch_same_dtype.dtype, f"{name}: {found.dtype}"
    oracle = oracle.double()
    found, same, *others = (x.to(oracle.device) for x in (found, torch_same_dtype, *nudged_runs))
    finite = oracle.isfinite() & same.isfinite()  # fp16 may overflow where fp64 cannot
    strange = ~finite & (found != same) & ~(found.isnan() & same.isnan())
    strange |= ~found.isfinite() & finite
    assert not strange.any(), f"{name}: {strange.sum().item()} values are not finite as PyTorch's"
    exact, dtype_eps = oracle[finite], torch.finfo(same.dtype).eps
    allowed_max, allowed_norm = (
        2 * max(e) for e in zip(*(errors(x[finite], exact) for x in (same, *others)), strict=True)
    )
    allowed_max += (dtype_eps + inherent) * (exact.abs().max().item() if len(exact) else 0) + floor
    allowed_norm += dtype_eps + inherent
    allowed_norm += floor * len(exact) ** 0.5 / (exact.norm().item() or 1.0)
    found_max, found_norm = errors(found[finite], exact)
    assert found_max <= allowed_max, f"{name}: error {found_max:.3e}, allowed {allowed_max:.3e}"
    assert found_norm <= allowed_norm, f"{name}: norm {found_norm:.3e}, allowed {allowed_norm:.3e}"


def forward_backward(
    fn: Callable[..., Any], inputs: Sequence[Any], dys: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns outputs of `fn(*inputs)` and gradients of its floating-point inputs."""
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
    floor: float = 0.0,
) -> None:
    """Asserts that outputs and gradients of `op` obey the accuracy rule against `reference`.

    `inputs` are positional arguments, `dys` one upstream gradient per output.
    """

    def double(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    found = forward_backward(op, inputs, dys)
    same = forward_backward(reference, inputs, dys)
    oracle = forward_backward(reference, [double(x) for x in inputs], [double(dy) for dy in dys])
    runs = [
        forward_backward(reference, nudged(inputs, seed), nudged(dys, -1 - seed))
        for seed in range(NUDGED_RUNS)
    ]
    for part, kind in enumerate(("output", "gradient")):
        for i, (x, y, z) in enumerate(zip(found[part], same[part], oracle[part], strict=True)):
            label = f"{kind} {i} {tuple(z.shape)}"
            others = [run[part][i] for run in runs]
            assert_accurate(x, y, z, label, others, floor=floor)


def registered(name: str) -> Any:
    """Returns an op as PyTorch has it, for `torch.library.opcheck`."""
    return getattr(torch.ops.fastgpt, name).default


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Returns a CUDA graph of a step, which has run once before, and its captured results."""
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
