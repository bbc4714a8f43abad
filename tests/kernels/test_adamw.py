"""adamw_step against torch.optim.AdamW over many steps, in the interpreter or on a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt_kernels import AdamWTensors, adamw_step, host, reference
from fastgpt_kernels.configs import Config
from tests.kernels.helpers import assert_accurate

# Of one element, less than a block, a whole one, one more; a scalar, and nothing at all.
SHAPES = [(1,), (7, 11), (256,), (257,), (3, 4, 50), (), (0, 5)]
CONFIG = Config({"BLOCK": 256}, num_warps=4)
DECAYS = [0.1, 0.1, 0.0, 0.0, 0.3, 0.1, 0.1]


class Problem:
    """Parameters and their gradients; state for us and, from the same start, for PyTorch."""

    def __init__(
        self,
        device: torch.device,
        grad_dtype: torch.dtype = torch.float32,
        copy_dtype: torch.dtype | None = torch.float16,
        betas: tuple[float, float] = (0.9, 0.95),
        lr: float = 3e-2,
    ) -> None:
        self.betas, self.device, self.grad_dtype = betas, device, grad_dtype
        start = [torch.randn(shape, device=device) for shape in SHAPES]
        self.params = [p.clone() for p in start]
        self.grads = [torch.zeros_like(p, dtype=grad_dtype) for p in start]
        self.averages = [[torch.zeros_like(p) for p in start] for _ in range(2)]
        self.copies = None
        if copy_dtype is not None:
            self.copies = [torch.empty_like(p, dtype=copy_dtype) for p in start]
            self.copies[2] = None  # type: ignore[call-overload]
        self.tensors = AdamWTensors(
            self.params, self.grads, *self.averages, self.copies, DECAYS, CONFIG
        )
        self.step, self.lr = torch.zeros((), device=device), torch.tensor(lr, device=device)
        self.theirs = {}
        for dtype in (torch.float32, torch.float64):
            leaves = [p.to(dtype, copy=True).requires_grad_() for p in start]
            groups = [
                {"params": [p], "weight_decay": decay}
                for p, decay in zip(leaves, DECAYS, strict=True)
            ]
            optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, foreach=False)
            self.theirs[dtype] = leaves, optimizer

    def steps(self, count: int, factor: float | None = None) -> None:
        """Random gradients of sizes from 1e-4 to 1e4; `factor` is a clip factor."""
        scale = None if factor is None else torch.tensor(factor, device=self.device)
        for _ in range(count):
            for i, g in enumerate(self.grads):
                g.copy_(torch.randn(g.shape) * 10.0 ** torch.randint(-4, 5, ()).item())
                for dtype, (leaves, _) in self.theirs.items():
                    leaves[i].grad = g.to(dtype) * (1.0 if factor is None else factor)
            adamw_step(self.tensors, self.step, self.lr, self.betas, 1e-8, scale)
            for _, optimizer in self.theirs.values():
                optimizer.step()

    def check(self) -> None:
        (same, same_state), (oracle, oracle_state) = (
            (leaves, [optimizer.state[p] for p in leaves])
            for leaves, optimizer in self.theirs.values()
        )
        # All tensors together: the errors of so many steps on one number are a matter of luck.
        self._compare(
            "param", self.params, [p.detach() for p in same], [p.detach() for p in oracle]
        )
        for name, average in zip(("exp_avg", "exp_avg_sq"), self.averages, strict=True):
            theirs = [[s[name] for s in state] for state in (same_state, oracle_state)]
            self._compare(name, average, *theirs)
        for p, copy in zip(self.params, self.copies or [], strict=False):
            assert copy is None or torch.equal(copy, p.to(copy.dtype))

    def _compare(self, name: str, *lists: list[Tensor]) -> None:
        for tensors in zip(*lists, strict=True):
            assert len({t.shape for t in tensors}) == 1
        assert_accurate(*(torch.cat([t.flatten() for t in ts]) for ts in lists), name=name)


@pytest.mark.quick("*(0.9, 0.95)*")
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.5)], ids=str)
def test_many_steps(betas: tuple[float, float], device: torch.device) -> None:
    problem = Problem(device, betas=betas)
    for _ in range(4):
        problem.steps(5)
        problem.check()
    assert problem.step.item() == 20


@pytest.mark.parametrize("start", [1, 30, 10_000, 10_000_000])
def test_bias_correction_of_late_steps(start: int, device: torch.device) -> None:
    problem = Problem(device, betas=(0.9, 0.999))
    problem.step.fill_(start)
    for leaves, optimizer in problem.theirs.values():
        for p in leaves:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for p, fresh in zip(leaves, problem.params, strict=True):
            p.data.copy_(fresh)
            optimizer.state[p]["step"].fill_(start)
    problem.steps(1)
    problem.check()


def test_clip_factor_and_half_precision_gradients(dtype: torch.dtype, device: torch.device) -> None:
    problem = Problem(device, grad_dtype=dtype)
    problem.steps(5, factor=0.37)
    problem.check()
    problem.steps(2, factor=0.0)
    problem.check()


def test_without_copies(device: torch.device) -> None:
    problem = Problem(device, copy_dtype=None)
    problem.steps(3)
    problem.check()


def test_learning_rate_follows_its_tensor(device: torch.device) -> None:
    problem = Problem(device)
    for lr in (1e-3, 0.0, 0.2):
        problem.lr.fill_(lr)
        for _, optimizer in problem.theirs.values():
            for group in optimizer.param_groups:
                group["lr"] = lr
        problem.steps(2)
        problem.check()


def test_found_inf_calls_the_step_off(device: torch.device) -> None:
    problem = Problem(device)
    problem.steps(2)
    found = torch.ones((), device=device)
    problem.grads[0].fill_(float("inf"))
    adamw_step(problem.tensors, problem.step, problem.lr, found_inf=found)
    problem.check()
    assert problem.step.item() == 2
    problem.grads[0].fill_(1.0)
    adamw_step(problem.tensors, problem.step, problem.lr, found_inf=found.zero_())
    assert problem.step.item() == 3
    assert not torch.equal(problem.params[0], problem.theirs[torch.float32][0][0])


def test_new_gradients(device: torch.device) -> None:
    """After `zero_grad` a parameter's gradient lies elsewhere, here not even aligned."""
    problem = Problem(device)
    problem.steps(1)
    flat = torch.zeros(1 + sum(g.numel() for g in problem.grads), device=device)
    pieces = flat[1:].split([g.numel() for g in problem.grads])
    problem.grads = [piece.view(shape) for piece, shape in zip(pieces, SHAPES, strict=True)]
    problem.tensors.set_gradients(problem.grads)
    assert not problem.tensors.aligned
    problem.steps(2)
    problem.check()


def test_autograd_is_told(device: torch.device) -> None:
    """A backward through a weight that the step has changed since is an error, as in PyTorch."""
    problem = Problem(device)
    x = torch.ones(7, 11, device=device, requires_grad=True)
    y = (x * problem.params[1]).sum()
    problem.steps(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_reference_is_pytorch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no kernel runs: exactly torch.optim.AdamW, bf16 copies included."""
    if device.type != "cpu":
        pytest.skip("on a GPU the kernel runs")
    monkeypatch.setattr(host, "INTERPRETED", False)
    problem = Problem(device, copy_dtype=torch.bfloat16)
    problem.steps(3)
    problem.check()
    for p, theirs in zip(problem.params, problem.theirs[torch.float32][0], strict=True):
        torch.testing.assert_close(p, theirs.detach(), rtol=1e-6, atol=1e-7)
    before = problem.params[1].clone()
    found = torch.ones(())
    reference.adamw_update(
        problem.tensors, problem.step, problem.lr, (0.9, 0.95), 1e-8, None, found
    )
    assert torch.equal(problem.params[1], before)


def tensors(**changes: Any) -> AdamWTensors:
    lists: dict[str, Any] = {
        name: [torch.zeros(3, 4), torch.zeros(5)]
        for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")
    }
    return AdamWTensors(**(lists | changes))


ONE = torch.ones(())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"params": []}, ValueError, "params must not be empty"),
        ({"grads": [torch.zeros(3, 4)]}, ValueError, "grads must be 2 tensors, got 1"),
        (
            {"grads": [torch.zeros(4, 3), torch.zeros(5)]},
            ValueError,
            "grads[0] must have shape (3, 4), got (4, 3)",
        ),
        (
            {"grads": [torch.zeros(3, 4), None]},
            TypeError,
            "grads[1] must be a tensor, got NoneType",
        ),
        (
            {"grads": [torch.zeros(3, 4), torch.zeros(5).half()]},
            TypeError,
            "grads[1] must be of dtype float32, got float16",
        ),
        (
            {"exp_avgs": [torch.zeros(3, 4).half(), torch.zeros(5)]},
            TypeError,
            "exp_avgs[0] must be of dtype float32, got float16",
        ),
        (
            {"exp_avg_sqs": [torch.zeros(4, 3).t(), torch.zeros(5)]},
            ValueError,
            "exp_avg_sqs[0] must be contiguous",
        ),
        (
            {"copies": [None, torch.zeros(5)]},
            TypeError,
            "copies[1] must be of dtype bfloat16, float16, got float32",
        ),
        (
            {"copies": [None, torch.zeros(5, device="meta").half()]},
            ValueError,
            "copies[1] must be on cpu, got meta",
        ),
        ({"weight_decay": [0.1]}, ValueError, "weight_decay must be a number or one for each of 2"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_bad_tensors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        tensors(**changes)
    assert str(raised.value).startswith("adamw: ")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, ONE), TypeError, "step must be a tensor, got int"),
        ((ONE.long(), ONE), TypeError, "step must be of dtype float32, got int64"),
        ((ONE, 1e-3), TypeError, "lr must be a tensor, got float"),
        ((ONE, ONE.to("meta")), ValueError, "lr must be on cpu, got meta"),
        ((ONE, ONE.expand(2)), ValueError, "lr must have one element, got shape (2,)"),
        ((ONE, ONE, (1.0, 0.9)), ValueError, "betas must be in [0, 1), got (1.0, 0.9)"),
        ((ONE, ONE, (0.9, 0.9), 1e-8, 0.5), TypeError, "grad_scale must be a tensor, got float"),
        ((ONE, ONE, (0.9, 0.9), 1e-8, ONE, True), TypeError, "found_inf must be a tensor"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        adamw_step(tensors(), *arguments)
    assert str(raised.value).startswith("adamw: ")
    assert message in str(raised.value)


@pytest.mark.cuda
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)], ids=str)
def test_against_fused_at_real_size(betas: tuple[float, float]) -> None:
    """GPT-2's shapes, bf16 copies: torch's fused kernel is as far from ours as fp32 rounding."""
    shapes = [(50304, 768), (1024, 768), (768, 3072), (3072,), (768,)]
    start = [torch.randn(shape, device="cuda") * 0.02 for shape in shapes]
    theirs = [p.clone().requires_grad_() for p in start]
    fused = torch.optim.AdamW(theirs, lr=6e-4, betas=betas, weight_decay=0.1, fused=True)
    grads, m, v = ([torch.zeros_like(p) for p in start] for _ in range(3))
    copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in start]
    ours = AdamWTensors(start, grads, m, v, copies, weight_decay=0.1)
    assert ours.aligned
    step, lr = torch.zeros((), device="cuda"), torch.tensor(6e-4, device="cuda")
    for _ in range(50):
        for g, p in zip(grads, theirs, strict=True):
            g.normal_()
            p.grad = g
        adamw_step(ours, step, lr, betas)
        fused.step()
    for p, q, copy in zip(start, theirs, copies, strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-5, atol=1e-7)
        assert torch.equal(copy, p.bfloat16())


@pytest.mark.cuda
def test_past_two_to_the_31_elements() -> None:
    size = 2**31 + 4099
    p, g, m, v = (torch.zeros(size, device="cuda") for _ in range(4))
    g[-1] = g[2**31] = 1.0
    one = torch.ones((), device="cuda")
    adamw_step(AdamWTensors([p], [g], [m], [v]), torch.zeros_like(one), one)
    torch.testing.assert_close(p[[-1, 2**31, 0]], torch.tensor([-1.0, -1.0, 0.0], device="cuda"))
    assert p.count_nonzero() == 2


@pytest.mark.cuda
def test_cuda_graph_without_synchronisation() -> None:
    """Two equal problems, one stepped and one replayed, agree to the bit."""
    problems = []
    for _ in range(2):
        torch.manual_seed(0)
        problems.append(Problem(torch.device("cuda"), copy_dtype=torch.bfloat16))
    eager, captured = problems
    half = torch.tensor(0.5, device="cuda")
    for problem in problems:
        adamw_step(problem.tensors, problem.step, problem.lr, grad_scale=half)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw_step(captured.tensors, captured.step, captured.lr, grad_scale=half)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lr in (1e-3, 5e-2):
            for g, h in zip(eager.grads, captured.grads, strict=True):
                g.normal_()
                h.copy_(g)
            for problem in problems:
                problem.lr.fill_(lr)
            eager.grads = [g.clone() for g in eager.grads]
            eager.tensors.set_gradients(eager.grads)
            adamw_step(eager.tensors, eager.step, eager.lr, grad_scale=half)
            graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert captured.step.item() == eager.step.item() == 3
    for p, q in zip(eager.params, captured.params, strict=True):
        assert torch.equal(p, q)
