"""Attention for Hopper: proved in the emulator, refused where it is not known to work, counted."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgpt_kernels import attention, attention_hopper, launch, reference
from fastgpt_kernels.attention_hopper import batches_together
from fastgpt_kernels.hopper import addressable, blocks, names_of
from fastgpt_kernels.registry import Sizes, spec
from fastgpt_kernels.self_check import few_rows
from tests.kernels.gluon import cases, machine, values
from tests.kernels.gluon.cases import Problem, by_head, run_backward, run_by_head, run_forward
from tests.kernels.gluon.emulator import emulated
from tests.kernels.helpers import module_of, registered
from tests.kernels.test_attention import BOTH, check_attention, random_qkv

SEEDS = 10
CPU = torch.device("cpu")


def name(p: Problem) -> str:
    return f"T{p.T}-D{p.head_dim}-{'causal' if p.causal else 'full'}-{p.dtype}"


@pytest.mark.parametrize("problem", cases.FORWARD, ids=name)
def test_forward_holds(problem: Problem) -> None:
    for seed in range(SEEDS):
        assert run_forward(problem, seed) == "", f"seed {seed}"


@pytest.mark.quick("T512*", "T193*", "T1-*")
@pytest.mark.parametrize("problem", cases.BACKWARD, ids=name)
def test_backward_holds(problem: Problem) -> None:
    for seed in range(SEEDS):
        assert run_backward(problem, seed) == "", f"seed {seed}"


@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 104), marks=pytest.mark.slow)])
@pytest.mark.parametrize("problem", cases.BY_HEAD, ids=name)
def test_backward_by_head_holds(problem: Problem, seeds: range) -> None:
    for seed in seeds:
        assert run_by_head(problem, seed) == "", f"seed {seed}"


@pytest.mark.parametrize("seeds", [3, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("contract", [True, False], ids=["FMA", "no FMA"])
def test_backward_by_head_is_the_same_to_the_bit(
    contract: bool, seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under every schedule and with any number of programs, given the compiler's FMAs."""
    drawn = type("Tensor", (values.Tensor,), {})  # what the emulator draws has no effect
    monkeypatch.setattr(machine, "Tensor", drawn)
    monkeypatch.setattr(values.Tensor, "contract", contract)
    wanted = by_head(Problem(300, n_head=3), 0)
    for seed in range(1, seeds):
        problem = Problem(300, n_head=3, programs=1 + seed % 3)
        assert torch.equal(by_head(problem, seed), wanted), f"seed {seed}"


def test_which_backward_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """By head: heads for all SMs, dq's sums in the L2, causal, head dim 64, not switched off."""
    heads = MODULE.heads_per_program
    assert heads(Sizes(11, 1024)) == 1 and heads(Sizes(32, 1117)) == 2
    assert heads(Sizes(18, 1024)) == 2 and heads(Sizes(16, 1024, 16, 1024)) == 2  # GPT-2 medium
    others = Sizes(10, 1024), Sizes(17, 1024), Sizes(32, 1118), Sizes(32, 512, n_head=6)
    assert not any(map(heads, others)) and not heads(Sizes(32, 512), causal=False)
    monkeypatch.setattr(MODULE, "HOPPER_BY_HEAD", False)
    assert heads(Sizes(32, 1024)) == 0


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [(Sizes(32, 1024), [2, 11, 18]), (Sizes(10, 1024), [2, 11, 18]), (Sizes(32, 2048), [2])],
)
def test_the_self_check_launches_what_any_micro_batch_does(sizes: Sizes, rows: list[int]) -> None:
    """GPT-2 has no, one or two heads to a program, by the micro-batch that is chosen later."""
    few = few_rows(sizes, spec("attention").few_tokens, spec("attention").variant)
    assert [s.batch_size for s in few] == rows


def test_batches_in_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """dq's sum is used again for the next batch entries, of which the last step has fewer."""
    monkeypatch.setattr(attention_hopper, "batches_together", lambda *sizes: 2)
    assert run_backward(Problem(70, batch=3, n_head=1), 0) == ""
    assert batches_together(12, 1024, 64, 132) == 11  # 132 heads of 256 KB: 34 MB
    assert batches_together(12, 1024, 128, 132) == 6
    assert batches_together(64, 8192, 128, 132) == 1


# --- As an implementation of the op -----------------------------------------------------------

MODULE = module_of("attention")
hopper_attention = MODULE.hopper_attention


@pytest.fixture
def as_on_hopper(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """CPU tensors go to the emulated kernels, as those of a Hopper GPU would to the real ones."""
    unsupported = MODULE.hopper_unsupported
    monkeypatch.setattr(
        MODULE, "hopper_unsupported", lambda sizes, dtype, _: unsupported(sizes, dtype, "sm_90")
    )
    with emulated(seed=3):
        yield


@BOTH
def test_the_op_is_as_accurate_as_pytorch(causal: bool, as_on_hopper: None) -> None:
    qkv = random_qkv(2, 77, 2, 64, torch.bfloat16, CPU)
    check_attention(qkv, 2, function=hopper_attention, causal=causal, scale=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_op_by_head(
    dtype: torch.dtype, as_on_hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With enough heads for all SMs, of which there are two here, also if deterministic."""
    monkeypatch.setattr(launch, "SMS", {"sm_90": 2})
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    launched, run = [], attention_hopper.backward
    monkeypatch.setattr(attention_hopper, "backward", lambda *a: launched.append(a[-1]) or run(*a))
    check_attention(random_qkv(1, 140, 4, 64, dtype, CPU), 4, function=hopper_attention)
    assert launched == [True]


def test_the_registered_op(as_on_hopper: None) -> None:
    qkv = random_qkv(1, 3, 1, 64, torch.float16, CPU).requires_grad_()
    checks = ("test_schema", "test_faketensor")
    arguments = (qkv, torch.zeros(192), 1, True, 0.0, None, 0.125, True)
    torch.library.opcheck(registered("attention"), arguments, test_utils=checks)
    y, lse = registered("attention")(*arguments)
    rest = (qkv.detach(), y.detach(), lse.detach(), None, 1, True, 0.0, 0.125, True, True)
    gradient = registered("attention_backward")
    torch.library.opcheck(gradient, (torch.ones_like(y), *rest), test_utils=checks)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "more"),
    [
        (64, torch.float16, {"dropout_p": 0.2, "seed": 5}),
        (32, torch.float16, {}),
        (64, torch.float32, {}),
        (128, torch.float16, {"causal": False}),
    ],
    ids=["dropout", "head dim 32", "fp32", "spills with Triton 3.9"],
)
def test_what_is_left_to_triton(
    head_dim: int, dtype: torch.dtype, more: dict[str, Any], as_on_hopper: None
) -> None:
    """Where the emulated kernels cannot be meant, Triton's interpreted ones run, to the bit."""
    qkv = random_qkv(1, 40, 1, head_dim, dtype, CPU)
    assert torch.equal(hopper_attention(qkv, 1, **more), attention(qkv, 1, **more))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there Triton's kernels are not interpreted")
def test_deterministic_gradients_are_those_of_triton(
    as_on_hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From this forward pass's y and lse: they are the same numbers up to rounding."""
    monkeypatch.setattr(attention_hopper, "backward", None)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    qkv = random_qkv(1, 70, 1, 64, torch.float16, CPU).requires_grad_()
    (dqkv,) = torch.autograd.grad(hopper_attention(qkv, 1).sum(), qkv)
    exact = qkv.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(reference.attention(exact, 1).sum(), exact)
    assert (dqkv.double() - want).norm() < 2e-3 * want.norm()


def test_errors_are_those_of_the_op() -> None:
    with pytest.raises(ValueError, match="attention: n_head must divide"):
        hopper_attention(torch.zeros(1, 4, 192), 5)


def why(
    sizes: Sizes | None = None, dtype: torch.dtype = torch.bfloat16, arch: str = "sm_90"
) -> str | None:
    return spec("attention").unsupported_reason("hopper", arch, dtype, sizes or Sizes())


def test_reasons_why_not() -> None:
    assert why() == why(Sizes(n_embd=1536)) == why(dtype=torch.float16) is None
    assert why(arch="sm_100") == "hopper is for sm_90, not sm_100"
    assert why(dtype=torch.float32) == "hopper is for bfloat16 and float16, not float32"
    assert why(Sizes(n_head=24)) == "hopper has head dims 64 and 128, not 32"
    assert (why(Sizes(dropout=0.1)) or "").startswith("hopper has no dropout: ")


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0.0+git"])
def test_an_unknown_triton_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", version)
    assert why() == f"hopper: triton {version} is not among 3.6 to 3.9, which are supported"


# --- Triton 3.6 to 3.9, and tensors as TMA addresses them --------------------------------------


def test_names_of_both_ends_of_the_range() -> None:
    """3.6 has thread_barrier and async_copy_*; 3.9 barrier, async_load and async_store."""
    tma = SimpleNamespace(async_copy_global_to_shared="in", async_copy_shared_to_global="out")
    core = SimpleNamespace(thread_barrier="barrier")
    assert names_of(SimpleNamespace(), core, tma) == ("barrier", "in", "out")
    tma = SimpleNamespace(**vars(tma), async_load="new in", async_store="new out")
    gl = SimpleNamespace(barrier="new barrier")
    assert names_of(gl, SimpleNamespace(), tma) == ("new barrier", "new in", "new out")


def test_tensors_are_read_in_place_where_tma_can() -> None:
    x = torch.zeros(2, 5, 200, dtype=torch.bfloat16)
    assert addressable(x[:, :, 8:136]).data_ptr() == x.data_ptr() + 16
    for bad in (x[:, :, 4:132], x.mT, x[:, :, ::2], torch.zeros(1, 1, 64).expand(2, 5, 64)):
        copy = addressable(bad)
        assert copy.is_contiguous() and torch.equal(copy, bad)
    alone = torch.zeros(1000, dtype=torch.bfloat16).as_strided((1, 5, 64), (7, 64, 1))
    assert addressable(alone) is alone and blocks(alone, [1, 64, 64]).strides == [320, 64, 1]


def test_strided_inputs_and_gradients(as_on_hopper: None) -> None:
    wide = random_qkv(2, 20, 1, 64, torch.float16, CPU).repeat(1, 1, 2)
    qkv = wide[:, :, 192:].requires_grad_()
    dense = qkv.detach().clone().requires_grad_()
    found = []
    for x in (qkv, dense):
        y = hopper_attention(x, 1)
        found.append((y, *torch.autograd.grad(y.sum(), x)))  # a gradient with strides of zero
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
