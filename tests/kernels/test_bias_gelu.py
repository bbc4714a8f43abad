"""bias_gelu against the fp64 oracle, in the interpreter or on a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import bias_gelu, reference
from tests.kernels.helpers import (
    LAYOUTS,
    assert_accurate,
    broadcast,
    check_op,
    forward_backward,
    module_of,
    strided,
)

module = module_of("bias_gelu")
# Sizes one, odd, prime, powers of two and one off; more rows than one step of the backward's loop.
SHAPES = [(1, 1), (700, 3), (2, 3, 31), (65, 64), (9, 127), (33, 257), (7, 768), (1, 1023)]
BOTH = pytest.mark.parametrize("approximate", ["tanh", "none"])


def tensors(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Returns x, bias, dy."""
    x, bias, dy = (torch.randn(s, device=device).to(dtype) for s in (shape, shape[-1:], shape))
    return [x * 3, bias, dy]


def check(x: Tensor, bias: Tensor | None, dy: Tensor, approximate: str = "tanh") -> None:
    check_op(bias_gelu, reference.bias_gelu, (x, bias, approximate), (dy,))


@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_oracle(
    shape: tuple[int, ...], approximate: str, dtype: torch.dtype, device: torch.device
) -> None:
    x, bias, dy = tensors(shape, dtype, device)
    check(x, bias, dy, approximate)
    if len(shape) > 2:
        check(x, None, dy, approximate)


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_bias_in_another_dtype(
    dtypes: tuple[torch.dtype, torch.dtype], device: torch.device
) -> None:
    x, bias, dy = tensors((11, 96), dtypes[0], device)
    check(x, bias.to(dtypes[1]), dy)


@BOTH
@pytest.mark.parametrize("value", [0.0, 1e-6, 8.0, 1e4, 6e4])
def test_extreme_values(
    value: float, approximate: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Far from zero GELU is 0 or the identity, its slope 0 or 1: exactly, and never NaN."""
    x = torch.tensor([[value, -value]], device=device).to(dtype).repeat(3, 9)
    dy = torch.ones_like(x)
    check(x, None, dy, approximate)
    if value >= 1e4:
        (y,), (dx,) = forward_backward(bias_gelu, (x, None, approximate), (dy,))
        assert torch.equal(y, x.clamp(min=0))
        assert torch.equal(dx, (x > 0).to(dtype))


def wrong_tanh(error: float) -> Callable:
    """Returns tanh times 1 + error, for the interpreter."""

    def tanh(u: Any) -> Any:
        e = tl.exp(-2.0 * tl.abs(u))
        size = (1.0 - e) / (1.0 + e) * (1.0 + error)
        return tl.where(u >= 0, size, -size)

    return tanh


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has the instruction itself")
@pytest.mark.parametrize("error", [2**-10.987, -(2**-10.987)])  # at most: PTX ISA, tanh
@pytest.mark.parametrize("scale", [0.02, 1.0, 3.0, 10.0, 1e3])
def test_bf16_hides_the_error_of_the_approximate_tanh(
    scale: float, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16's form, in fp32 on values of bf16, obeys the rule of bf16 if tanh errs as it may."""
    monkeypatch.setattr(module, "form_of", lambda tanh, x: "tanh.approx")
    monkeypatch.setattr(module, "tanh_approx", wrong_tanh(error))
    x, _, dy = (t.float() for t in tensors((64, 256), torch.bfloat16, torch.device("cpu")))
    x = (x * scale / 3).bfloat16().float()
    kernel = forward_backward(bias_gelu, (x,), (dy,))
    same = forward_backward(reference.bias_gelu, (x.bfloat16(),), (dy.bfloat16(),))
    oracle = forward_backward(reference.bias_gelu, (x.double(),), (dy.double(),))
    for part, name in enumerate(("y", "dx")):
        (y,), (bf16,), (exact,) = kernel[part], same[part], oracle[part]
        seen = ((y - exact).abs() / exact.abs().max()).max().item()
        assert seen > 2e-6, f"{name}: {seen} is fp32's error: the form under test did not run"
        assert_accurate(y.bfloat16(), bf16, exact, name=name)


def test_the_instruction_is_for_bf16_on_nvidias_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16, half = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.float16)
    for arch, approximate in (("sm_80", "tanh.approx"), ("cpu", "tanh")):
        monkeypatch.setattr("fastgpt_kernels.launch.arch_of", lambda x, arch=arch: arch)
        assert module.form_of(True, bf16) == approximate
        assert module.form_of(True, half) == "tanh"
        assert module.form_of(False, bf16) == module.form_of(False, half) == "erf"


@BOTH
def test_small_negative_tail_keeps_its_digits(approximate: str, device: torch.device) -> None:
    """At z = -4 half of the digits of 1 + tanh(u) cancel; a sigmoid has none to lose."""
    x = torch.linspace(-4.5, -2, 500, device=device).view(1, -1)
    want = reference.bias_gelu(x.double(), None, approximate)
    error = ((bias_gelu(x, None, approximate) - want) / want).abs().max().item()
    assert error < (2e-5 if approximate == "tanh" else 2e-2), error


@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_contiguous(layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    x, bias, dy = tensors((4, 5, 48), torch.float32, device)
    check(layout(x), strided(bias), layout(dy))
    check(layout(x), bias, broadcast(dy))


def test_no_rows(device: torch.device) -> None:
    x, bias, dy = tensors((0, 3, 16), torch.float32, device)
    (y,), (dx, dbias) = forward_backward(bias_gelu, (x, bias), (dy,))
    assert y.shape == dx.shape == (0, 3, 16)
    assert torch.equal(dbias, torch.zeros(16, device=device))


X, B = torch.zeros(2, 8), torch.zeros(8)
BAD = [
    ((3,), TypeError, "x must be a tensor, got int"),
    ((X.long(),), TypeError, "x must be of dtype bfloat16, float16, float32, got int64"),
    ((torch.zeros(()),), ValueError, r"x must have shape \(\.\.\., C\) with C >= 1, got \(\)"),
    ((torch.zeros(2, 0),), ValueError, r"x must have shape .*, got \(2, 0\)"),
    ((X, 1.0), TypeError, "bias must be a tensor, got float"),
    ((X, X), ValueError, r"bias must have shape \(8\), got \(2, 8\)"),
    ((X, B.double()), TypeError, "bias must be of dtype .*, got float64"),
    ((X, B.to("meta")), ValueError, "bias must be on cpu, got meta"),
    ((X, B, "x"), ValueError, "approximate must be 'tanh' or 'none', got 'x'"),
]


@pytest.mark.parametrize(("args", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_arguments(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^bias_gelu: {message}"):
        bias_gelu(*args)


@pytest.mark.cuda
@BOTH
@pytest.mark.parametrize("C", [1, 100, 256, 3072, 6400, 6401])
def test_widths_on_a_gpu(
    C: int, approximate: str, dtype: torch.dtype, device: torch.device
) -> None:
    """More rows than all programs of the backward take in one step of their loops."""
    x, bias, dy = tensors((5003, C), dtype, device)
    check(x, bias, dy, approximate)
    check(x, None, dy, approximate)
