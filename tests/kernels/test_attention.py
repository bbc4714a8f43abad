"""attention against the fp64 oracle, in the interpreter or on a GPU, and its contract."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastgpt_kernels import attention, launch, reference
from fastgpt_kernels.launch import Config
from fastgpt_kernels.ops.attention import backward, configs, forward
from fastgpt_kernels.registry import spec
from tests.kernels.attention_cases import check_attention, random_qkv, torch_attention
from tests.kernels.helpers import assert_accurate, forward_backward, registered

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FULL, CAUSAL = False, True


@pytest.mark.quick("float32-31-*", "float16-131-*", "*-1-causal-*")
@pytest.mark.parametrize("deterministic", [False, True], ids=["one_pass", "deterministic"])
@pytest.mark.parametrize("causal", [CAUSAL, FULL], ids=["causal", "full"])
@pytest.mark.parametrize("T", [1, 31, 64, 131])
def test_against_oracle(T: int, causal: bool, deterministic: bool, dtype: torch.dtype) -> None:
    qkv = random_qkv(1 if T > 64 else 2, T, 1 if T > 64 else 2, 32, dtype, DEVICE)
    check_attention(qkv, qkv.shape[2] // 96, causal=causal, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True], ids=["one_pass", "deterministic"])
@pytest.mark.parametrize("causal", [CAUSAL, FULL], ids=["causal", "full"])
def test_whole_tiles(causal: bool, deterministic: bool, dtype: torch.dtype) -> None:
    """T a multiple of 128: no row is masked when tiles are loaded and stored."""
    qkv = random_qkv(1, 256 if dtype != torch.float32 else 128, 1, 64, dtype, DEVICE)
    check_attention(qkv, 1, causal=causal, deterministic=deterministic)


@pytest.mark.quick("*-32", "*-80", "float16-*-64")
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("deterministic", [False, True], ids=["one_pass", "deterministic"])
def test_head_dims(head_dim: int, deterministic: bool, dtype: torch.dtype) -> None:
    qkv = random_qkv(1, 37, 3, head_dim, dtype, DEVICE)
    check_attention(qkv, 3, causal=CAUSAL, deterministic=deterministic)


@pytest.mark.quick("*-5-*", "float32-70-causal-one_pass", "float16-70-full-*")
@pytest.mark.parametrize("deterministic", [False, True], ids=["one_pass", "deterministic"])
@pytest.mark.parametrize("causal", [CAUSAL, FULL], ids=["causal", "full"])
@pytest.mark.parametrize("T", [5, 70])
def test_dropout(T: int, causal: bool, deterministic: bool, dtype: torch.dtype) -> None:
    qkv = random_qkv(1, T, 2, 32, dtype, DEVICE)
    check_attention(
        qkv, 2, causal=causal, dropout_p=0.3, seed=-(2**40) + 12345, deterministic=deterministic
    )


@pytest.mark.parametrize("deterministic", [False, True], ids=["one_pass", "deterministic"])
@pytest.mark.parametrize("T, head_dim", [(5, 32), (70, 80)])
def test_the_bias_gets_the_sum_over_all_rows(
    T: int, head_dim: int, deterministic: bool, dtype: torch.dtype
) -> None:
    """Of what is in qkv with its bias; the public function, its reference and its eager twin."""
    n_head, options = 2, {"causal": T > 5}
    qkv = random_qkv(3, T, n_head, head_dim, dtype, DEVICE)
    bias = torch.randn(qkv.shape[2], device=DEVICE)
    dy = torch.randn(*qkv.shape[:2], n_head * head_dim, device=DEVICE).to(dtype)

    def gradients(function, *inputs, **options):
        (y,), found = forward_backward(
            lambda x, b: function(x, n_head, bias=b, **options), [*inputs], [dy.to(inputs[0].dtype)]
        )
        return y, *found

    ours = gradients(attention, qkv, bias, deterministic=deterministic, **options)
    plain = attention(qkv, n_head, deterministic=deterministic, **options)
    assert torch.equal(ours[0], plain) and ours[2].dtype == torch.float32
    exact = gradients(reference.attention, qkv.double(), bias.double(), **options)
    torch.testing.assert_close(exact[2], exact[1].sum((0, 1)))
    eager = gradients(spec("attention").eager, qkv, bias, **options)
    assert_accurate(ours[2], eager[2], exact[2], name="bias")
    summed = gradients(attention, qkv, bias.to(dtype), deterministic=deterministic, **options)
    assert summed[2].dtype == dtype


def test_a_bias_of_the_wrong_shape() -> None:
    qkv = random_qkv(1, 4, 1, 32, torch.float32, DEVICE)
    with pytest.raises(ValueError, match=r"attention: bias must have shape \(96\), got \(32,\)"):
        attention(qkv, 1, bias=torch.zeros(32, device=DEVICE))


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(
    batch=st.integers(1, 2),
    T=st.integers(1, 80),
    n_head=st.integers(1, 2),
    causal=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.5]),
    scale=st.sampled_from([None, 0.01, 1.0]),
)
def test_any_shape(batch: int, T: int, n_head: int, causal: bool, dropout_p: float, scale) -> None:
    qkv = random_qkv(batch, T, n_head, 32, torch.float32, DEVICE)
    check_attention(qkv, n_head, causal=causal, dropout_p=dropout_p, seed=T, scale=scale)


TILES = [(16, 64), (64, 32), (32, 128), (128, 32)]


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n"), TILES, ids=str)
def test_any_tile_gives_the_same(m: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles wider than high, higher than wide, larger than T: dropout's mask is the same too."""
    for name in ("FORWARD", "BACKWARD", "KEY_VALUE", "QUERY"):
        blocks = {"BLOCK_M": m, "BLOCK_N": n}
        if name in ("BACKWARD", "KEY_VALUE"):
            blocks["TMA_REDUCE"] = 0
        table = {"default": {128: Config(blocks, num_warps=4, num_stages=1)}}
        monkeypatch.setattr(configs, f"{name}_FP32", table)
    qkv = random_qkv(1, 75, 1, 32, torch.float32, DEVICE)
    check_attention(qkv, 1, causal=CAUSAL, dropout_p=0.2, seed=3)
    check_attention(qkv, 1, causal=CAUSAL, dropout_p=0.2, seed=3, deterministic=True)
    check_attention(qkv, 1, causal=FULL, dropout_p=0.2, seed=3)
    check_attention(qkv, 1, causal=FULL, dropout_p=0.2, seed=3, deterministic=True)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [CAUSAL, FULL], ids=["causal", "full"])
def test_slots_of_the_ring_are_used_again(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """9 heads of three key tiles on a ring of three: each slot is summed in, read and cleared."""
    monkeypatch.setattr(forward, "L2_BUDGET", 1)
    rings: list[int] = []

    def ring_size(*args: int) -> int:
        rings.append(backward_ring_size(*args))
        return rings[-1]

    backward_ring_size = backward.ring_size
    monkeypatch.setattr(backward, "ring_size", ring_size)
    monkeypatch.setattr(backward, "multiprocessors", lambda x: 2)
    check_attention(random_qkv(3, 70, 3, 32, torch.float32, DEVICE), 3, causal=causal)
    assert rings == [3]


# What the smallest L2 cache of a data centre's GPU holds (A100).
L2_BYTES = 40 << 20


def backward_bytes(
    monkeypatch: pytest.MonkeyPatch, batch: int, T: int, n_head: int, D: int, deterministic: bool
) -> dict[str, int]:
    """HBM bytes of each kernel of the backward pass on 132 SMs, from what its launcher hands over.

    A tensor counts once for each kernel that reads or writes it: a head's programs run together and
    share what they read in the L2 cache. The ring stays there if what passes at the ring's own
    priority (q and dO) until a slot's next use fits beside it; otherwise each use of a slot fetches
    and writes it back. Once, it is written back when all is over.
    """
    launches: dict[str, tuple] = {}

    class Recorder:
        def __init__(self, name: str):
            self.name = name

        def __getitem__(self, grid: tuple):
            return lambda *args, **_: launches.update({self.name: args})

    names = ("prepare", "key_value", "query")
    for name in names:
        monkeypatch.setattr(backward, f"attention_{name}_kernel", Recorder(name))
    monkeypatch.setattr(backward, "multiprocessors", lambda x: 132)
    with torch.device("meta"):
        qkv = torch.empty(batch, T, 3 * n_head * D, dtype=torch.bfloat16)
        y, lse = torch.empty_like(qkv[..., : n_head * D]), torch.empty(batch * n_head, T)
    backward.launch_backward(y, qkv, y, lse, None, n_head, True, 0.0, 1.0, deterministic, False)

    _, _, _, pairs, ring, *_ = launches["prepare"]
    found = {
        "prepare": 2 * y.nbytes + lse.nbytes + pairs.nbytes,
        "key_value": qkv.nbytes + y.nbytes + pairs.nbytes + qkv.nbytes * 2 // 3,
    }
    if "query" in launches:
        found["query"] = qkv.nbytes + y.nbytes + pairs.nbytes + qkv.nbytes // 3
    else:
        found["dq"] = qkv.nbytes // 3
        slots = ring.shape[0]
        passing = slots * T * D * (4 + 2 * qkv.element_size())
        uses = 1 if passing <= L2_BYTES else 2 * batch * n_head / slots
        found["ring"] = int(uses * ring.nbytes)
    return found


def test_bytes_of_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """124M, 65,536 tokens: dq costs a third of an fp32 tensor of its own, and two passes cost more.

    With such a tensor: zeros, fetched and written back by the additions, read again to be rounded,
    four times 201 MB; with y and dO read for delta and dq written, 1.1 GB a layer.
    """
    one = backward_bytes(monkeypatch, 64, 1024, 12, 64, False)
    two = backward_bytes(monkeypatch, 64, 1024, 12, 64, True)
    dq = 64 * 1024 * 768 * 4
    before = 4 * dq + one["dq"] + 2 * dq // 2
    assert one["prepare"] + one["dq"] + one["ring"] <= before / 3, one
    assert one["ring"] < dq / 8
    assert sum(one.values()) < sum(two.values()), (one, two)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # under the mask, then zeroed
@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits(sign: int, dtype: torch.dtype) -> None:
    """Logits of +-1e4 and beyond: softmax is all but one-hot, or all rows far below zero."""
    qkv = random_qkv(1, 70, 1, 32, torch.float32, DEVICE)
    qkv[..., :64] = qkv[..., :64].abs() * 20
    qkv[..., :32] *= sign
    check_attention(qkv.to(dtype), 1, causal=FULL, scale=1.0)
    check_attention(qkv.to(dtype), 1, causal=CAUSAL, scale=1.0, deterministic=True)


def test_identical_logits_average_the_values(dtype: torch.dtype) -> None:
    qkv = random_qkv(1, 50, 1, 32, dtype, DEVICE)
    qkv[..., :32] = 0
    check_attention(qkv, 1, causal=CAUSAL)
    y = attention(qkv, 1, causal=FULL)
    mean = qkv[..., 64:].double().mean(1, keepdim=True).expand(1, 50, 32)
    torch.testing.assert_close(y.double(), mean, atol=2e-3, rtol=2e-3)


def test_the_future_has_no_influence(dtype: torch.dtype) -> None:
    qkv = random_qkv(1, 60, 2, 32, dtype, DEVICE)
    changed = qkv.clone()
    changed[:, 41:] = 1e3
    before, after = attention(qkv, 2), attention(changed, 2)
    assert torch.equal(before[:, :41], after[:, :41])
    assert not torch.equal(before[:, 41:], after[:, 41:])


def strided(kind: str, dtype: torch.dtype) -> Tensor:
    if kind == "sliced":  # columns of a wider tensor, rows further apart
        return random_qkv(2, 80, 2, 64, dtype, DEVICE)[:, ::2, 96 : 96 + 192]
    if kind == "odd offset":  # no 16-byte alignment anywhere
        return random_qkv(2, 40, 1, 128, dtype, DEVICE)[..., 3 : 3 + 192]
    if kind == "sequence first":
        return random_qkv(40, 2, 2, 32, dtype, DEVICE).transpose(0, 1)
    if kind == "expanded":
        return random_qkv(1, 40, 2, 32, dtype, DEVICE).expand(2, 40, 192)
    if kind == "expanded positions":
        return random_qkv(2, 1, 2, 32, dtype, DEVICE).expand(2, 40, 192)
    return torch.randn(2, 192, 40, device=DEVICE).to(dtype).transpose(1, 2)


KINDS = [
    "sliced",
    "odd offset",
    "sequence first",
    "expanded",
    "expanded positions",
    "columns first",
]


@pytest.mark.quick("*-odd*", "one_pass-sliced", "deterministic-columns*")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("deterministic", [False, True], ids=["one_pass", "deterministic"])
def test_strides(kind: str, deterministic: bool) -> None:
    """Any strides of qkv, and of the gradient, give what contiguous ones give."""
    qkv = strided(kind, torch.float32)
    assert qkv.shape == (2, 40, 192)
    results = []
    grad_y = strided(kind, torch.float32)[..., 64:128]
    for x, dy in ((qkv, grad_y), (qkv.contiguous(), grad_y.contiguous())):
        x = x.detach().requires_grad_()
        y = attention(x, 2, deterministic=deterministic)
        results.append((y, *torch.autograd.grad(y, x, dy)))
    for ours, contiguous in zip(*results, strict=True):
        torch.testing.assert_close(ours, contiguous, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("deterministic", [False, True], ids=["one_pass", "deterministic"])
def test_what_lies_around_has_no_influence(head_dim: int, deterministic: bool) -> None:
    """NaN before, between and after the rows of qkv and of the gradient; tiles reach past both."""
    width, T = 3 * head_dim, 37
    qkv = torch.full((3, T + 100, width + 300), float("nan"), device=DEVICE)[1:2, 50 : 50 + T, 150:]
    qkv = qkv[..., :width].normal_()
    grad_y = torch.full((3, T + 100, 400), float("nan"), device=DEVICE)[1:2, 50 : 50 + T, 150:]
    grad_y = grad_y[..., :head_dim].normal_()
    for causal in (CAUSAL, FULL):
        x = qkv.detach().requires_grad_()
        y = attention(x, 1, causal=causal, deterministic=deterministic)
        (dqkv,) = torch.autograd.grad(y, x, grad_y)
        assert y.isfinite().all() and dqkv.isfinite().all()


def test_zero_stride_gradient(dtype: torch.dtype) -> None:
    """`.sum().backward()` hands over one number expanded to y's shape."""
    qkv = random_qkv(1, 40, 2, 32, dtype, DEVICE)
    check_attention(
        qkv, 2, torch.ones((), dtype=dtype, device=DEVICE).expand(1, 40, 64), causal=True
    )
    leaf = qkv.requires_grad_()
    attention(leaf, 2).sum().backward()
    ones = torch.ones(1, 40, 64, dtype=dtype, device=DEVICE)
    (gradient,) = torch.autograd.grad(attention(leaf, 2), leaf, ones)
    torch.testing.assert_close(leaf.grad, gradient)


def test_no_gradient_wanted() -> None:
    qkv = random_qkv(1, 20, 1, 32, torch.float32, DEVICE)
    with torch.no_grad():
        y = attention(qkv.requires_grad_(), 1)
    assert not y.requires_grad
    torch.testing.assert_close(y, torch_attention(qkv, 1, causal=True))


def test_empty_batch() -> None:
    qkv = torch.zeros(0, 7, 192, device=DEVICE, requires_grad=True)
    y = attention(qkv, 2)
    assert y.shape == (0, 7, 64)
    y.sum().backward()
    assert qkv.grad is not None and qkv.grad.shape == qkv.shape


def test_double_backward_is_refused() -> None:
    qkv = random_qkv(1, 8, 1, 32, torch.float32, DEVICE).requires_grad_()
    (gradient,) = torch.autograd.grad(attention(qkv, 1).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_deterministic_follows_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []

    def record(*args):
        chosen.append(args[-2])
        return torch.zeros_like(args[1]), None

    module = importlib.import_module("fastgpt_kernels.ops.attention.op")
    monkeypatch.setattr(module._op.backward, "forward", record)
    qkv = random_qkv(1, 4, 1, 32, torch.float32, DEVICE).requires_grad_()
    attention(qkv, 1).sum().backward()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    attention(qkv, 1).sum().backward()
    attention(qkv, 1, deterministic=False).sum().backward()
    assert chosen == [False, True, False]


@pytest.mark.parametrize("biased", [False, True], ids=["dropout", "bias"])
def test_opcheck(biased: bool) -> None:
    qkv = random_qkv(1, 20, 2, 32, torch.float32, DEVICE).requires_grad_()
    bias = torch.zeros(192, device=DEVICE, requires_grad=True) if biased else None
    seed = None if biased else torch.tensor([5], device=DEVICE)
    sizes = 2, True, 0.0 if biased else 0.5
    args = qkv, bias, *sizes, seed, 0.2, False
    torch.library.opcheck(registered("attention"), args)
    with torch.no_grad():
        y, lse = registered("attention")(*args)
        gradients = torch.randn_like(y), qkv.detach(), y, lse, seed, *sizes, 0.2, False, biased
        torch.library.opcheck(registered("attention_backward"), gradients)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compiled_equals_eager(dropout_p: float) -> None:
    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"

    def f(x: Tensor, seed: Tensor) -> Tensor:
        return attention(x * 2, 2, dropout_p=dropout_p, seed=seed, deterministic=True).sin()

    seed = torch.tensor([11], device=DEVICE)
    qkv = random_qkv(1, 33, 2, 32, torch.float32, DEVICE).requires_grad_()
    y = f(qkv, seed)
    compiled_y = torch.compile(f, fullgraph=True, backend=backend)(qkv, seed)
    dy = torch.randn_like(y)
    torch.testing.assert_close(compiled_y, y)
    (gradient,) = torch.autograd.grad(y, qkv, dy)
    (compiled_gradient,) = torch.autograd.grad(compiled_y, qkv, dy)
    torch.testing.assert_close(compiled_gradient, gradient)


def test_compiled_with_dynamic_shapes() -> None:
    """One graph serves every batch size and length."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    f = torch.compile(lambda x: attention(x, 1), fullgraph=True, dynamic=True, backend=count)
    for batch, T in ((2, 20), (3, 33)):
        qkv = random_qkv(batch, T, 1, 32, torch.float32, DEVICE)
        torch.testing.assert_close(f(qkv), attention(qkv, 1))
    assert len(graphs) == 1


@pytest.mark.parametrize("seed", [None, 7])
def test_compiled_with_an_int_seed_or_none(seed: int | None) -> None:
    """Everything by default, `deterministic` read from torch: still one graph."""
    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
    qkv = random_qkv(1, 40, 1, 32, torch.float32, DEVICE).requires_grad_()
    f = torch.compile(
        lambda x: attention(x, 1, dropout_p=0.5, seed=seed), fullgraph=True, backend=backend
    )
    first, second = f(qkv), f(qkv)
    assert torch.equal(first, second) == (seed is not None)
    first.sum().backward()
    assert qkv.grad is not None and qkv.grad.isfinite().all()


@pytest.mark.parametrize("causal", [CAUSAL, FULL], ids=["causal", "full"])
def test_flops_are_counted_as_for_sdpa(causal: bool) -> None:
    """Causal attention counts in full, as torch counts its own; seen without running anything."""
    with torch.device("meta"):
        qkv = torch.randn(2, 48, 3 * 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y, lse = registered("attention")(qkv, None, 2, causal, 0.0, None, 1.0, False)
        registered("attention_backward")(y, qkv, y, lse, None, 2, causal, 0.0, 1.0, False, False)
    product = 2 * (2 * 2) * 48 * 48 * 32  # multiply-adds of one T x T x D product, every head
    assert counter.get_total_flops() == (2 + 5) * product


def test_flop_counter_sees_the_public_function() -> None:
    qkv = random_qkv(1, 16, 2, 32, torch.float32, DEVICE).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        attention(qkv, 2).sum().backward()
    assert counter.get_total_flops() == 7 * 2 * 2 * 16 * 16 * 32


def test_cpu_tensors_run_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU and without the interpreter, in bf16 too."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    qkv = random_qkv(1, 12, 2, 32, torch.bfloat16, torch.device("cpu")).requires_grad_()
    y = attention(qkv, 2, dropout_p=0.5, seed=1)
    assert torch.equal(y, reference.attention(qkv, 2, dropout_p=0.5, seed=1))
    y.sum().backward()
    assert qkv.grad is not None
