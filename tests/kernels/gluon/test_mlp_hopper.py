"""The MLP for Hopper: its kernels in the emulator, and the op around them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt_kernels import mlp_hopper, reference
from fastgpt_kernels.registry import Sizes, spec
from tests.kernels.gluon import planted
from tests.kernels.gluon.emulator import emulated
from tests.kernels.gluon.mlp_cases import BUGS, PROBLEMS, Problem, results, run
from tests.kernels.helpers import assert_accurate, forward_backward, module_of, registered

MODULE = module_of("mlp")
hopper_mlp, mlp = MODULE.hopper_mlp, MODULE.mlp


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 103), marks=pytest.mark.slow)])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.M}x{p.N}x{p.K}-{p.dtype}")
def test_values_and_order_hold(problem: Problem, seeds: range) -> None:
    for seed in seeds:
        assert run(problem, seed) == "", f"seed {seed}"


def test_results_are_the_same_to_the_bit() -> None:
    """Whatever the schedule is, and however many programs there are."""
    problem = Problem(384, 520, 72)
    wanted = results(problem, 0)
    for seed in range(1, 6):
        found = results(replace(problem, programs=1 + seed % 3), seed)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


SOME = [
    pytest.param(bug, id=bug.name.strip(), marks=[pytest.mark.slow] * (i % 4 > 0))
    for i, bug in enumerate(BUGS)
]


@pytest.mark.parametrize("bug", SOME)
def test_planted_bugs_are_noticed(bug: planted.Bug) -> None:
    problem = Problem(384, 512, 192)
    with planted.planted(mlp_hopper, bug) as buggy:
        for seed in range(2):
            said = planted.found(run, problem, buggy, seed)
            assert said and bug.found_as in said, said


def test_planted_bugs_are_in_the_kernels() -> None:
    for bug in BUGS:
        planted.edited(mlp_hopper, bug)


# --- As an implementation of the op -----------------------------------------------------------


@pytest.fixture
def as_on_hopper(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """CPU tensors go to the emulated kernels, as those of a Hopper GPU would to the real ones."""
    unsupported = MODULE.gluon_unsupported
    monkeypatch.setattr(
        MODULE, "gluon_unsupported", lambda sizes, dtype, _: unsupported(sizes, dtype, "sm_90")
    )
    with emulated(seed=3):
        yield


def inputs(tokens: int, dtype: torch.dtype, C: int = 72) -> list[Tensor]:
    """Returns x (2, tokens / 2, C), W1, b1, W2 and b2; weights and biases are fp32."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = (2, tokens // 2, C), (4 * C, C), (4 * C,), (C, 4 * C), (C,)
    x, *rest = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.to(dtype), *(w * w.shape[-1] ** -0.5 for w in rest)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_as_accurate_as_pytorch(dtype: torch.dtype, as_on_hopper: None) -> None:
    """y, and the gradients of x, the weights and the biases."""
    given = inputs(140, dtype)
    dy = torch.randn(2, 70, 72).to(dtype)
    found, same, oracle = (
        forward_backward(f, args, [dy.to(args[0].dtype)])
        for f, args in (
            (hopper_mlp, given),
            (reference.mlp, given),
            (reference.mlp, [t.double() for t in given]),
        )
    )
    for part in (0, 1):
        for x, y, z in zip(found[part], same[part], oracle[part], strict=True):
            assert_accurate(x, y, z, name=str(tuple(z.shape)))


def test_main_grads_and_copies(as_on_hopper: None) -> None:
    """The copies are what is multiplied; fp32 gradients are added to what is there."""
    given = inputs(128, torch.bfloat16)
    copies = given[1].to(torch.bfloat16), given[3].to(torch.bfloat16)
    _, wanted = forward_backward(hopper_mlp, given, [torch.ones(2, 64, 72).bfloat16()])
    wrong = [torch.full_like(w, torch.nan) for w in given[1:4:2]]
    leaves = [given[0], wrong[0], given[2], wrong[1], given[4]]
    leaves = [x.detach().requires_grad_() for x in leaves]
    main_grads = tuple(torch.ones_like(x) for x in leaves[1:4:2])
    y = hopper_mlp(*leaves, weights_bf16=copies, main_grads=main_grads)
    y.backward(torch.ones(2, 64, 72).bfloat16())
    assert leaves[1].grad is None and leaves[3].grad is None
    for total, x in zip(main_grads, wanted[1:4:2], strict=True):
        assert (total - 1 - x).norm() < 4e-3 * x.norm()  # alone it was rounded to bf16
    assert torch.equal(leaves[0].grad, wanted[0]) and torch.equal(leaves[2].grad, wanted[2])


def test_without_biases_and_no_contiguous_gradient(as_on_hopper: None) -> None:
    x, fc, _, proj, _ = inputs(130, torch.float16)
    leaves = [t.detach().requires_grad_() for t in (x, fc, proj)]
    hopper_mlp(leaves[0], leaves[1], None, leaves[2]).sum().backward()  # strides of zero
    exact = [t.detach().double().requires_grad_() for t in (x, fc, proj)]
    reference.mlp(exact[0], exact[1], None, exact[2]).sum().backward()
    for a, b in zip(leaves, exact, strict=True):
        assert (a.grad.double() - b.grad).norm() < 2e-3 * b.grad.norm()


@pytest.mark.parametrize(
    ("tokens", "C", "dtype", "approximate"),
    [
        (126, 72, torch.float16, "tanh"),
        (128, 76, torch.float16, "tanh"),
        (128, 72, torch.float16, "erf"),
        (128, 72, torch.float32, "tanh"),
    ],
    ids=["fewer rows than a tile", "not aligned", "erf", "fp32"],
)
def test_what_is_left_to_cublas(
    tokens: int, C: int, dtype: torch.dtype, approximate: str, as_on_hopper: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Where the emulated kernels cannot be meant, the results are those of `mlp`."""
    monkeypatch.setattr(mlp_hopper, "forward", None)
    given, dy = inputs(tokens, dtype, C), torch.randn(2, tokens // 2, C).to(dtype)
    found, wanted = (
        forward_backward(lambda *a, f=f: f(*a, approximate), given, [dy]) for f in (hopper_mlp, mlp)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_registered_ops(as_on_hopper: None) -> None:
    x, fc, bias, proj, _ = (t.to(torch.float16) for t in inputs(128, torch.float16))
    x, checks = x.view(128, 72), ("test_schema", "test_faketensor")
    for b in (bias, None):
        forward = (x, fc.t(), b, True)
        torch.library.opcheck(registered("mlp_hopper"), forward, test_utils=checks)
        z, _ = registered("mlp_hopper")(*forward)
        arguments = (torch.ones_like(x), proj, z, b, True)
        torch.library.opcheck(registered("mlp_hopper_backward"), arguments, test_utils=checks)


def test_errors() -> None:
    x, fc, bias, proj, _ = inputs(4, torch.float32)
    for function in (mlp, hopper_mlp):
        with pytest.raises(ValueError, match=r"^mlp: proj_weight must have shape \(\*, 288\)"):
            function(x, fc, bias, fc)
        with pytest.raises(TypeError, match="^mlp: fc_bias must be a tensor, got str"):
            function(x, fc, "bias", proj)


def test_second_derivatives_raise(as_on_hopper: None) -> None:
    x, fc, bias, proj, _ = inputs(128, torch.float16)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="^mlp: has no second derivative"):
        torch.autograd.grad(hopper_mlp(x, fc, bias, proj).sum(), x, create_graph=True)


def test_reasons_why_not() -> None:
    def why(arch: str = "sm_90", dtype: Any = torch.bfloat16, **sizes: Any) -> str | None:
        return spec("mlp").unsupported_reason("hopper", arch, dtype, Sizes(**sizes))

    assert why() == why(n_embd=1608) == why(dtype=torch.float16) is None
    assert why(arch="sm_100") == "hopper is for sm_90, not sm_100"
    assert why(dtype=torch.float32) == "hopper is for bfloat16 and float16, not float32"
    assert why(gelu="erf") == "hopper has GELU by tanh only: by erf it spills registers"
    assert why(n_embd=772) == "hopper has widths divisible by 8, not 772"
