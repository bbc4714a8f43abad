"""Promises that every op keeps, on the example inputs of its spec."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastgpt_kernels
from fastgpt_kernels import launch
from fastgpt_kernels.registry import ExampleInputs, Sizes, normal, spec
from tests.kernels.helpers import captured

SMALL = Sizes(2, 20, 2, 64, 61, 128)
KINDS = [SMALL, replace(SMALL, bias=False), replace(SMALL, dropout=0.2)]
SIZES = pytest.mark.parametrize("sizes", KINDS, ids=["bias", "no bias", "dropout"])
OPS = pytest.mark.parametrize(
    "op", [name for name, op in fastgpt_kernels.OPS.items() if "triton" in op.choices]
)


def example(op: str, device: torch.device, sizes: Sizes = SMALL) -> ExampleInputs:
    return spec(op).example_inputs(sizes, normal(device))[0]


def shared(op: str) -> str:
    """Returns the name of the registered op: both norms have the same."""
    return op.removeprefix("add_")


def run(function: Callable[..., Any], inputs: ExampleInputs, dtype: torch.dtype) -> list[Tensor]:
    """Returns results and gradients of the sum of squares, with the inputs in `dtype`."""
    inputs = inputs.rounded(dtype)
    leaves = inputs.leaves()
    outs = inputs.outputs(function, leaves)
    wanted = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad(sum(y.float().square().sum() for y in outs), wanted)
    return [t.detach() for t in (*outs, *gradients)]


@OPS
@SIZES
def test_compiled_equals_eager(op: str, sizes: Sizes, device: torch.device) -> None:
    """Same kernels either way: equal to the bit, without a graph break, with a dynamic batch."""
    torch._dynamo.reset()
    function = getattr(fastgpt_kernels, op)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 3):
        inputs = example(op, device, replace(sizes, batch_size=rows))
        eager = run(function, inputs, torch.float32)
        assert all(map(torch.equal, run(compiled, inputs, torch.float32), eager))


class Recorded(TorchDispatchMode):
    """The registered ops of this package that were called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastgpt":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@OPS
@SIZES
def test_opcheck(op: str, sizes: Sizes, device: torch.device) -> None:
    inputs = example(op, device, sizes)
    with Recorded() as recorded:
        run(getattr(fastgpt_kernels, op), inputs, torch.float32)
    forward, *_ = recorded.calls
    for called, args in recorded.calls:
        differentiable = called is forward[0]
        args = tuple(
            x.detach().clone().requires_grad_(differentiable and x.is_floating_point())
            if isinstance(x, Tensor) else x
            for x in args
        )  # fmt: skip
        torch.library.opcheck(called, args)


@OPS
def test_runs_the_reference_on_a_cpu(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    inputs = example(op, torch.device("cpu"))
    function = getattr(fastgpt_kernels, op)
    found = run(function, inputs, torch.bfloat16)
    assert all(map(torch.equal, found, run(spec(op).reference, inputs, torch.bfloat16)))
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert all(map(torch.equal, found, run(compiled, inputs, torch.bfloat16)))


@OPS
def test_dtypes(op: str, device: torch.device) -> None:
    """One rule for all: 16 and 32 bits; the interpreter has no bf16; autocast changes nothing."""
    inputs, function = example(op, device), getattr(fastgpt_kernels, op)
    with pytest.raises(TypeError, match=rf"^{op}: \w+ must be of dtype bfloat16, float16, float32"):
        run(function, inputs, torch.float64)
    if device.type == "cpu":
        with pytest.raises(TypeError, match=f"^{shared(op)}: .*interpreter .* cannot do bfloat16"):
            run(function, inputs, torch.bfloat16)
    for dtype in (torch.float16, torch.float32):
        plain = run(function, inputs, dtype)
        with torch.autocast(device.type, torch.bfloat16):
            assert all(map(torch.equal, run(function, inputs, dtype), plain))


@OPS
@pytest.mark.parametrize("constant", [True, False])
def test_second_derivatives_raise(op: str, constant: bool, device: torch.device) -> None:
    inputs = example(op, device)
    leaves = inputs.leaves()
    y, *_ = inputs.outputs(getattr(fastgpt_kernels, op), leaves)
    with pytest.raises(RuntimeError, match=rf"^{shared(op)}: has no second derivative"):
        torch.autograd.grad(y.sum() if constant else y.square().sum(), leaves[0], create_graph=True)


@OPS
def test_transforms_of_functions(op: str, device: torch.device) -> None:
    """torch.func.grad raises one line, vmap works."""
    inputs, function = example(op, device), getattr(fastgpt_kernels, op)
    first, *rest = inputs.inputs

    def call(x: Tensor) -> Tensor:
        return inputs.outputs(function, [x, *rest])[0]

    with pytest.raises(RuntimeError, match=f"^{shared(op)}: torch.func does not work here"):
        torch.func.grad(lambda x: call(x).sum())(first)
    batch = torch.stack([first, 2 * first])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batched = torch.vmap(call)(batch)
    assert torch.equal(batched, torch.stack([call(x) for x in batch]))


@OPS
def test_fake_tensors_get_fake_results(op: str) -> None:
    with FakeTensorMode():
        found = run(getattr(fastgpt_kernels, op), example(op, torch.device("cpu")), torch.float32)
    want = run(spec(op).reference, example(op, torch.device("cpu")), torch.float32)
    assert [x.shape for x in found] == [x.shape for x in want]


# --- On a GPU ---------------------------------------------------------------------------------

GPT2 = Sizes(16, 1024, bias=True)


@pytest.fixture
def step(op: str, device: torch.device) -> Callable[[], list[Tensor]]:
    """A forward and backward pass at GPT-2's sizes, which has run once."""
    inputs, function = example(op, device, GPT2), getattr(fastgpt_kernels, op)

    def run_step() -> list[Tensor]:
        return run(function, inputs, torch.bfloat16)

    run_step()
    torch.cuda.synchronize()
    return run_step


@OPS
@pytest.mark.cuda
def test_repetitions_are_the_same_to_the_bit(op: str, step: Callable[[], list[Tensor]]) -> None:
    first = step()
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(200):
        for a, b in zip(step(), first, strict=True):
            differing += (a != b).sum()
    assert differing.item() == 0


@OPS
@pytest.mark.cuda
def test_no_host_synchronisation(op: str, step: Callable[[], list[Tensor]]) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@OPS
@pytest.mark.cuda
def test_cuda_graph(op: str, step: Callable[[], list[Tensor]]) -> None:
    wanted = step()
    graph, found = captured(step)
    for t in found:
        t.fill_(float("nan"))
    graph.replay()
    assert all(map(torch.equal, found, wanted))


MEMORY_BOUND = pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm", "bias_gelu"])


@MEMORY_BOUND
@pytest.mark.cuda
def test_allocates_its_results_and_little_else(op: str, step: Callable[[], list[Tensor]]) -> None:
    """Beyond results and gradients: statistics and partial sums, under 5 % of them."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = step()
    torch.cuda.synchronize()
    unique = {t.data_ptr(): t.numel() * t.element_size() for t in results}
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 1.05 * sum(unique.values()) + 2**20, (peak, sum(unique.values()))


@MEMORY_BOUND
@pytest.mark.cuda
def test_past_two_to_the_31_elements(op: str, device: torch.device) -> None:
    """Offsets are 64 bits wide; the last rows are compared with a small tensor of their own."""
    x = torch.empty(2**31 // 3072 + 500, 3072, device=device, dtype=torch.bfloat16).normal_()
    vector = torch.randn(3072, device=device)
    streams = [x] * (1 + (op == "add_layer_norm"))

    def last(*streams: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in streams]
        out = getattr(fastgpt_kernels, op)(*leaves, vector)
        y = out[0] if isinstance(out, tuple) else out
        (dx,) = torch.autograd.grad(y, leaves[:1], y.detach())
        return [y[-300:].detach(), dx[-300:]]

    assert all(map(torch.equal, last(*streams), last(*(t[-300:] for t in streams))))


@OPS
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_input(op: str) -> None:
    device = torch.device("cuda", 1)
    found = run(getattr(fastgpt_kernels, op), example(op, device), torch.float32)
    assert all(x.device == device for x in found)
