"""linear and mlp against the fp64 oracle, in the interpreter or on a GPU with TMA."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastgpt_kernels import launch, linear, mlp, reference
from fastgpt_kernels.ops.matmul.configs import runs_on
from tests.kernels.helpers import check_op, forward_backward, registered

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
needs_tma = pytest.mark.skipif(
    not runs_on(launch.arch_of(torch.empty(0, device=DEVICE))), reason="a GPU without TMA"
)
BOTH = pytest.mark.parametrize("approximate", ["tanh", "none"])
MASTERS = pytest.mark.parametrize("masters", [True, False], ids=["fp32 weights", "same dtype"])


def layer(
    rows: tuple[int, ...], K: int, N: int, dtype: torch.dtype, masters: bool = False
) -> tuple[list[Any], Tensor]:
    """([x, weight, bias], dy); sums near 1, as in a trained layer."""
    x, weight, bias, dy = (
        torch.randn(s, device=DEVICE) for s in ((*rows, K), (N, K), (N,), (*rows, N))
    )
    parameters = torch.float32 if masters else dtype
    return [
        x.to(dtype), (weight / K**0.5).to(dtype).to(parameters), bias.to(parameters)
    ], dy.to(dtype)  # fmt: skip


def block(
    rows: tuple[int, ...], C: int, H: int, dtype: torch.dtype, masters: bool = False
) -> tuple[list[Any], Tensor]:
    """([x, fc_weight, fc_bias, proj_weight, proj_bias], dy)."""
    (x, fc, fc_bias), _ = layer(rows, C, H, dtype, masters)
    (_, proj, proj_bias), dy = layer(rows, H, C, dtype, masters)
    return [x, fc, fc_bias, proj, proj_bias], dy


@pytest.mark.quick("float32-*", "*(1,)*")
@needs_tma
@MASTERS
@pytest.mark.parametrize("shape", [((1,), 8, 8), ((2, 35), 40, 136), ((130,), 72, 24)], ids=str)
def test_linear(shape: tuple[tuple[int, ...], int, int], masters: bool, dtype: torch.dtype) -> None:
    inputs, dy = layer(*shape, dtype, masters)
    check_op(linear, reference.linear, inputs, (dy,))
    check_op(linear, reference.linear, inputs[:2], (dy,))


@pytest.mark.quick("float32-same*-tanh", "float16-fp32*-none")
@needs_tma
@BOTH
@MASTERS
def test_mlp(masters: bool, approximate: str, dtype: torch.dtype) -> None:
    (x, fc, fc_bias, proj, proj_bias), dy = block((3, 25), 40, 136, dtype, masters)
    check_op(mlp, reference.mlp, (x, fc, fc_bias, proj, proj_bias, approximate), (dy,))
    check_op(mlp, reference.mlp, (x, fc, None, proj, None, approximate), (dy,))
    check_op(mlp, reference.mlp, (x, fc, fc_bias, proj, None, approximate), (dy,))


@needs_tma
def test_gradients_of_masters_are_not_rounded_to_16_bits() -> None:
    """As many of their values would be multiples of fp16's spacing by chance as 1 in 2**13."""
    for op, (inputs, dy) in (
        (linear, layer((64,), 32, 40, torch.float16, masters=True)),
        (mlp, block((64,), 32, 40, torch.float16, masters=True)),
    ):
        _, (_, *gradients) = forward_backward(op, inputs, (dy,))
        for gradient in gradients:
            assert gradient.dtype == torch.float32
        weights = [g for g in gradients if g.ndim == 2]
        assert all((g != g.half().float()).float().mean() > 0.9 for g in weights)


@needs_tma
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_non_contiguous(layout: str, dtype: torch.dtype) -> None:
    (x, weight, bias), dy = layer((4, 5), 40, 24, dtype)

    def laid_out(t: Tensor) -> Tensor:
        if layout == "transposed":
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "sliced":
            return torch.cat([t, t], -1)[..., : t.shape[-1]]
        return t[:1].expand(t.shape)

    weight = weight.t().contiguous().t()
    check_op(linear, reference.linear, (laid_out(x), weight, bias), (laid_out(dy),))


@needs_tma
def test_gradients_that_nobody_wants_are_not_computed() -> None:
    (x, weight, bias), dy = layer((64,), 32, 40, torch.float16)
    x.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        linear(x, weight, bias).backward(dy)
    assert counter.get_total_flops() == 2 * (2 * 64 * 32 * 40)
    assert x.grad is not None and weight.grad is None


@needs_tma
@pytest.mark.parametrize(
    ("op", "case", "products"),
    [
        (linear, layer((4, 16), 32, 40, torch.float16), 3),
        (mlp, block((4, 16), 32, 40, torch.float16), 6),
    ],
    ids=["linear", "mlp"],
)
def test_flops_are_counted(op: Callable, case: tuple[list[Any], Tensor], products: int) -> None:
    inputs, dy = case
    with FlopCounterMode(display=False) as counter:
        forward_backward(op, inputs, (dy,))
    assert counter.get_total_flops() == products * 2 * 64 * 32 * 40


@pytest.mark.slow
@needs_tma
@MASTERS
@pytest.mark.parametrize("has_bias", [True, False])
def test_opcheck(has_bias: bool, masters: bool) -> None:
    dtype, parameters = torch.float16, torch.float32 if masters else torch.float16
    (x, weight, bias), dy = layer((24,), 16, 32, dtype, masters)
    bias_dtype = parameters if has_bias else None
    torch.library.opcheck(
        registered("linear_backward"),
        (dy, x, weight.to(dtype), parameters, bias_dtype, [True] * 3),
    )
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(registered("linear"), (*leaves[:2], leaves[2] if has_bias else None))

    (x, fc, fc_bias, proj, proj_bias), dy = block((24,), 16, 32, dtype, masters)
    slope, a = (torch.randn(24, 32, device=DEVICE).to(dtype) for _ in range(2))
    saved = (dy, x, slope, a, fc.to(dtype), proj.to(dtype))
    torch.library.opcheck(
        registered("mlp_backward"),
        (*saved, parameters, bias_dtype, parameters, bias_dtype),
    )
    x, fc, fc_bias, proj, proj_bias = (
        t.requires_grad_() for t in (x, fc, fc_bias, proj, proj_bias)
    )
    biases = (fc_bias, proj_bias) if has_bias else (None, None)
    torch.library.opcheck(registered("mlp"), (x, fc, biases[0], proj, biases[1], True))


@needs_tma
@pytest.mark.parametrize("op", [linear, mlp])
def test_compiled_equals_eager(op: Callable) -> None:
    """Same kernels either way: equal to the bit, without a graph break, with a dynamic batch."""
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (6, 9):
        make = layer if op is linear else block
        inputs, dy = make((rows, 3), 24, 40, torch.float16, masters=True)
        ours = forward_backward(compiled, inputs, (dy,))
        eager = forward_backward(op, inputs, (dy,))
        assert all(map(torch.equal, ours[0] + ours[1], eager[0] + eager[1]))


def test_runs_the_reference_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    for op, wanted_op, make in ((linear, reference.linear, layer), (mlp, reference.mlp, block)):
        inputs, dy = make((4,), 20, 12, torch.bfloat16)
        inputs, dy = [t.cpu() for t in inputs], dy.cpu()
        ours = forward_backward(op, inputs, (dy,))
        wanted = forward_backward(wanted_op, inputs, (dy,))
        assert all(map(torch.equal, ours[0] + ours[1], wanted[0] + wanted[1]))


def test_no_rows() -> None:
    inputs, dy = layer((0, 3), 16, 24, torch.float32)
    (y,), (dx, dw, db) = forward_backward(linear, inputs, (dy,))
    assert y.shape == (0, 3, 24) and dx.shape == (0, 3, 16)
    assert not dw.any() and not db.any()


def test_bf16_in_the_interpreter_is_refused() -> None:
    if DEVICE.type == "cpu":
        x = torch.zeros(2, 8, dtype=torch.bfloat16)
        with pytest.raises(TypeError, match="interpreter .* cannot do bfloat16"):
            linear(x, torch.zeros(8, 8, dtype=torch.bfloat16))


X, W, B = torch.zeros(4, 8), torch.zeros(16, 8), torch.zeros(16)
BAD = [
    (linear, (3, W), TypeError, "linear: x must be a tensor, got int"),
    (linear, (X.double(), W), TypeError, "linear: x must be of dtype .*, got float64"),
    (linear, (torch.zeros(()), W), ValueError, r"linear: x must have shape \(\.\.\., K\)"),
    (linear, (X, W[:, :7]), ValueError, r"linear: weight must have shape \(\*, 8\), got \(16, 7\)"),
    (linear, (X, W.half()), TypeError, "linear: weight must be of dtype float32.*, got float16"),
    (linear, (X, W, B[:8]), ValueError, r"linear: bias must have shape \(16\), got \(8,\)"),
    (linear, (X, W, B.to("meta")), ValueError, "linear: bias must be on cpu, got meta"),
    (linear, (X, W[:15]), ValueError, "linear: features must be a multiple of 4, got 15"),
    (mlp, (X, W, B, W, None), ValueError, r"mlp: proj_weight must have shape \(\*, 16\), got"),
    (mlp, (X, W, X, W.t(), None), ValueError, r"mlp: fc_bias must have shape \(16\), got \(4, 8\)"),
    (mlp, (X, W, B, W.t(), None, "relu"), ValueError, "mlp: approximate must be 'tanh', 'none'"),
]


@pytest.mark.parametrize(("op", "args", "error", "message"), BAD, ids=[m for *_, m in BAD])
def test_bad_arguments(
    op: Callable, args: tuple[Any, ...], error: type[Exception], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(launch, "INTERPRETED", True)
    with pytest.raises(error, match=f"^{message}"):
        op(*args)


def test_a_gpu_without_tma_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["fastgpt_kernels.ops.matmul.linear"]  # by its name it is the op
    monkeypatch.setattr(module, "arch_of", lambda x: "sm_80")
    monkeypatch.setattr(module, "use_kernel", lambda x: True)
    with pytest.raises(ValueError, match=r"linear: needs a GPU with TMA .*, this is sm_80"):
        linear(X.half(), W.half())
