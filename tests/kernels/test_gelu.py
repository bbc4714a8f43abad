"""bias_gelu against the fp64 oracle, in the interpreter or on a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgpt_kernels import bias_gelu, launch, reference
from fastgpt_kernels.ops.gelu import kernels
from tests.kernels.helpers import assert_accurate, check_op, forward_backward, registered

# Sizes one, odd, prime, powers of two and one off; more rows than one step of the backward's loop.
SHAPES = [(1, 1), (700, 3), (2, 3, 31), (65, 64), (9, 127), (33, 257), (7, 768), (1, 1023)]
BOTH = pytest.mark.parametrize("approximate", ["tanh", "none"])


def tensors(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x, bias, dy."""
    x, bias, dy = (torch.randn(s, device=device).to(dtype) for s in (shape, shape[-1:], shape))
    return [x * 3, bias, dy]


def check(x: Tensor, bias: Tensor | None, dy: Tensor, approximate: str) -> None:
    check_op(bias_gelu, reference.bias_gelu, (x, bias, approximate), (dy,))


@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_oracle(
    shape: tuple[int, ...], approximate: str, dtype: torch.dtype, device: torch.device
) -> None:
    x, bias, dy = tensors(shape, dtype, device)
    check(x, bias, dy, approximate)


@BOTH
def test_without_bias(approximate: str, dtype: torch.dtype, device: torch.device) -> None:
    x, _, dy = tensors((37, 300), dtype, device)
    check(x, None, dy, approximate)


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_bias_in_another_dtype(
    dtypes: tuple[torch.dtype, torch.dtype], device: torch.device
) -> None:
    x, bias, dy = tensors((11, 96), dtypes[0], device)
    check(x, bias.to(dtypes[1]), dy, "tanh")


@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(1, 40), C=st.integers(1, 300), approximate=st.sampled_from(["tanh", "none"])
)
def test_any_shape(rows: int, C: int, approximate: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check(*tensors((rows, C), torch.float32, device), approximate)


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
    """tanh times 1 + error, for the interpreter."""

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
    monkeypatch.setattr(kernels, "form_of", lambda tanh, x: "tanh.approx")
    monkeypatch.setattr(kernels, "tanh_approx", wrong_tanh(error))
    x, _, dy = (t.float() for t in tensors((64, 256), torch.bfloat16, torch.device("cpu")))
    x = (x * scale / 3).bfloat16().float()
    ours = forward_backward(bias_gelu, (x,), (dy,))
    same = forward_backward(reference.bias_gelu, (x.bfloat16(),), (dy.bfloat16(),))
    oracle = forward_backward(reference.bias_gelu, (x.double(),), (dy.double(),))
    for part, name in enumerate(("y", "dx")):
        (y,), (bf16,), (exact,) = ours[part], same[part], oracle[part]
        seen = ((y - exact).abs() / exact.abs().max()).max().item()
        assert seen > 2e-6, f"{name}: {seen} is fp32's error: the form under test did not run"
        assert_accurate(y.bfloat16(), bf16, exact, name=name)


@BOTH
def test_small_negative_tail_keeps_its_digits(approximate: str, device: torch.device) -> None:
    """At z = -4 half of the digits of 1 + tanh(u) cancel; a sigmoid has none to lose."""
    x = torch.linspace(-4.5, -2, 500, device=device).view(1, -1)
    want = reference.bias_gelu(x.double(), None, approximate)
    error = ((bias_gelu(x, None, approximate) - want) / want).abs().max().item()
    assert error < (2e-5 if approximate == "tanh" else 2e-2), error


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def sliced(x: Tensor) -> Tensor:
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


@pytest.mark.parametrize("layout", [transposed, sliced, strided, expanded])
def test_non_contiguous(layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    x, bias, dy = tensors((4, 5, 48), torch.float32, device)
    assert not layout(x).is_contiguous()
    check(layout(x), strided(bias), layout(dy), "tanh")


def test_sum_backward(device: torch.device) -> None:
    """The gradient of a sum has stride zero everywhere."""
    x, bias, _ = tensors((6, 40), torch.float32, device)
    check(x, bias, torch.ones((), device=device).expand(6, 40), "tanh")


def test_no_rows(device: torch.device) -> None:
    x, bias, dy = tensors((0, 3, 16), torch.float32, device)
    (y,), (dx, dbias) = forward_backward(bias_gelu, (x, bias), (dy,))
    assert y.shape == dx.shape == (0, 3, 16)
    assert torch.equal(dbias, torch.zeros(16, device=device))


@BOTH
@pytest.mark.parametrize("has_bias", [True, False])
def test_opcheck(has_bias: bool, approximate: str, device: torch.device) -> None:
    x, bias, dy = tensors((3, 5, 24), torch.float32, device)
    args = (x, bias if has_bias else None, approximate == "tanh")
    torch.library.opcheck(registered("bias_gelu_backward"), (dy, *args))
    torch.library.opcheck(
        registered("bias_gelu"),
        tuple(a.requires_grad_() if isinstance(a, Tensor) else a for a in args),
    )


def test_compiled_equals_eager(device: torch.device) -> None:
    """Same kernels either way: equal to the bit, without a graph break, with a dynamic batch."""
    compiled = torch.compile(bias_gelu, fullgraph=True, dynamic=True)
    for rows in (6, 9):
        x, bias, dy = tensors((rows, 3, 40), torch.float32, device)
        ours = forward_backward(compiled, (x, bias), (dy,))
        eager = forward_backward(bias_gelu, (x, bias), (dy,))
        assert all(map(torch.equal, ours[0] + ours[1], eager[0] + eager[1]))


def test_runs_the_reference_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    x, bias, dy = tensors((4, 20), torch.bfloat16, torch.device("cpu"))
    ours = forward_backward(bias_gelu, (x, bias), (dy,))
    wanted = forward_backward(reference.bias_gelu, (x, bias), (dy,))
    assert all(map(torch.equal, ours[0] + ours[1], wanted[0] + wanted[1]))
    torch.compile(bias_gelu, fullgraph=True, backend="eager")(x, bias)


def test_bf16_in_the_interpreter_is_refused(device: torch.device) -> None:
    if device.type == "cpu":
        with pytest.raises(TypeError, match="^bias_gelu: .*interpreter .* cannot do bfloat16"):
            bias_gelu(torch.zeros(2, 8, dtype=torch.bfloat16))


X, B = torch.zeros(2, 8), torch.zeros(8)
BAD = [
    ((3,), TypeError, "x must be a tensor, got int"),
    ((X.double(),), TypeError, "x must be of dtype bfloat16, float16, float32, got float64"),
    ((X.long(),), TypeError, "x must be of dtype bfloat16, float16, float32, got int64"),
    ((torch.zeros(()),), ValueError, r"x must have shape \(\.\.\., C\) with C >= 1, got \(\)"),
    ((torch.zeros(2, 0),), ValueError, r"x must have shape .*, got \(2, 0\)"),
    ((X, 1.0), TypeError, "bias must be a tensor, got float"),
    ((X, B[:7]), ValueError, r"bias must have shape \(8\), got \(7,\)"),
    ((X, X), ValueError, r"bias must have shape \(8\), got \(2, 8\)"),
    ((X, B.double()), TypeError, "bias must be of dtype .*, got float64"),
    ((X, B.to("meta")), ValueError, "bias must be on cpu, got meta"),
    ((X, B, "x"), ValueError, r"approximate must be 'tanh', 'none' or 'erf' \(the same\), got 'x'"),
]


@pytest.mark.parametrize(("args", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_arguments(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^bias_gelu: {message}"):
        bias_gelu(*args)


def test_erf_is_another_name_of_none(device: torch.device) -> None:
    x, bias, _ = tensors((3, 16), torch.float32, device)
    for function in (bias_gelu, reference.bias_gelu):
        assert torch.equal(function(x, bias, "erf"), function(x, bias, "none"))


def test_the_instruction_is_for_bf16_on_nvidias_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16, half = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.float16)
    for arch, approximate in (("sm_75", "tanh.approx"), ("gfx942", "tanh"), ("cpu", "tanh")):
        monkeypatch.setattr(kernels, "arch_of", lambda x, arch=arch: arch)
        assert kernels.form_of(True, bf16) == approximate
        assert kernels.form_of(True, half) == "tanh"
        assert kernels.form_of(False, bf16) == kernels.form_of(False, half) == "erf"
