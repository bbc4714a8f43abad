"""attention against the fp64 oracle, in the interpreter or on a GPU, and its contract."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastgpt_kernels import attention, reference
from fastgpt_kernels.dropout import (
    attention_dropout_bits,
    attention_dropout_mask,
    dropout_threshold,
    seed_tensor,
)
from fastgpt_kernels.launch import Config
from fastgpt_kernels.registry import Sizes, spec
from tests.kernels.helpers import (
    NUDGED_RUNS,
    assert_accurate,
    forward_backward,
    module_of,
    nudged,
    registered,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODULE = module_of("attention")
FULL, CAUSAL = False, True
BOTH = pytest.mark.parametrize("causal", [CAUSAL, FULL], ids=["causal", "full"])


def random_qkv(
    batch: int, T: int, n_head: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.randn(batch, T, 3 * n_head * head_dim, device=device).to(dtype)


def check_attention(
    qkv: Tensor, n_head: int, grad_y: Tensor | None = None, function: Any = attention, **kwargs: Any
) -> None:
    """Output and packed gradient err at most twice as much as PyTorch's own at the same dtype.

    A probability is exp2(logit - log_sum_exp) of fp32 numbers: the logit's matmul, its scaling and
    the stored log-sum-exp are each rounded, by up to eps / 2 of the largest logit. That is nothing
    next to other errors, except where logits are in the thousands.
    """
    q, k, _ = qkv.double().view(*qkv.shape[:2], 3, n_head, -1).permute(2, 0, 3, 1, 4)
    scale = kwargs.get("scale") or q.shape[-1] ** -0.5
    largest = (q @ k.transpose(-2, -1)).abs().max().item() * scale
    inherent = 3 * torch.finfo(torch.float32).eps / 2 * largest
    if grad_y is None:
        grad_y = torch.randn(*qkv.shape[:2], qkv.shape[2] // 3, device=qkv.device).to(qkv.dtype)

    def run(function: Any, inputs: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        (y,), (dqkv,) = forward_backward(lambda x: function(x, n_head, **kwargs), inputs, grads)
        return y, dqkv

    y, dqkv = run(function, [qkv], [grad_y])
    same_y, same_dqkv = run(reference.attention, [qkv], [grad_y])
    oracle_y, oracle_dqkv = run(reference.attention, [qkv.double()], [grad_y.double()])
    runs = [
        run(reference.attention, nudged([qkv], seed), nudged([grad_y], -1 - seed))
        for seed in range(NUDGED_RUNS)
    ]
    assert y.is_contiguous() and dqkv.is_contiguous()
    others = [other for other, _ in runs]
    assert_accurate(y, same_y, oracle_y, name="y", nudged_runs=others, inherent=inherent)
    for i, name in enumerate(("dq", "dk", "dv")):
        ours, same, oracle, *others = (
            x.chunk(3, -1)[i] for x in (dqkv, same_dqkv, oracle_dqkv, *(dx for _, dx in runs))
        )
        if oracle.abs().max() > 1e-12:
            assert_accurate(ours, same, oracle, name=name, nudged_runs=others, inherent=inherent)
        else:  # one visible key: dq = dk = 0 in theory, here dP - delta is off by fp32 roundings
            bound = 16 * torch.finfo(torch.float32).eps * dqkv.abs().max()
            assert ours.abs().max() <= bound, f"{name}: {ours.abs().max()} where 0 is right"


# --- Values -----------------------------------------------------------------------------------


@pytest.mark.quick("float32-31-*", "float16-131-*", "*-1-causal")
@BOTH
@pytest.mark.parametrize("T", [1, 31, 64, 131])
def test_against_oracle(T: int, causal: bool, dtype: torch.dtype) -> None:
    n = 1 if T > 64 else 2
    check_attention(random_qkv(n, T, n, 32, dtype, DEVICE), n, causal=causal)


@BOTH
def test_whole_tiles(causal: bool, dtype: torch.dtype) -> None:
    """T a multiple of 128: no row is masked when tiles are loaded and stored."""
    qkv = random_qkv(1, 256 if dtype != torch.float32 else 128, 1, 64, dtype, DEVICE)
    check_attention(qkv, 1, causal=causal)


@pytest.mark.quick("*-32", "*-80", "float16-64")
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    check_attention(random_qkv(1, 37, 3, head_dim, dtype, DEVICE), 3, causal=CAUSAL)


@BOTH
@pytest.mark.parametrize("T", [5, 70])
def test_dropout(T: int, causal: bool, dtype: torch.dtype) -> None:
    qkv = random_qkv(1, T, 2, 32, dtype, DEVICE)
    check_attention(qkv, 2, causal=causal, dropout_p=0.3, seed=-(2**40) + 12345)


@pytest.mark.parametrize(("T", "head_dim"), [(5, 32), (70, 80)])
def test_the_bias_gets_the_sum_over_all_rows(T: int, head_dim: int, dtype: torch.dtype) -> None:
    """The bias that is in qkv already; it changes no result."""
    n_head, causal = 2, T > 5
    qkv = random_qkv(3, T, n_head, head_dim, dtype, DEVICE)
    bias = torch.randn(qkv.shape[2], device=DEVICE)
    dy = torch.randn(*qkv.shape[:2], n_head * head_dim, device=DEVICE).to(dtype)

    def gradients(function: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        (y,), found = forward_backward(
            lambda x, b: function(x, n_head, bias=b, causal=causal), inputs, [dy.to(inputs[0])]
        )
        return y, *found

    ours = gradients(attention, qkv, bias)
    assert torch.equal(ours[0], attention(qkv, n_head, causal=causal))
    exact = gradients(reference.attention, qkv.double(), bias.double())
    torch.testing.assert_close(exact[2], exact[1].sum((0, 1)))
    assert_accurate(ours[2], gradients(reference.attention, qkv, bias)[2], exact[2], name="bias")
    assert gradients(attention, qkv, bias.to(dtype))[2].dtype == dtype


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


@pytest.mark.slow
@pytest.mark.parametrize("tile", [(16, 64), (64, 32), (32, 128), (128, 32)], ids=str)
def test_any_tile_gives_the_same(tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles wider than high, higher than wide, larger than T: dropout's mask is the same too."""
    config = Config({"BLOCK_M": tile[0], "BLOCK_N": tile[1]}, num_warps=4)
    monkeypatch.setattr(MODULE, "FP32", {"default": {128: config}})
    qkv = random_qkv(1, 75, 1, 32, torch.float32, DEVICE)
    for causal in (CAUSAL, FULL):
        check_attention(qkv, 1, causal=causal, dropout_p=0.2, seed=3)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # under the mask, then zeroed
@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits(sign: int, dtype: torch.dtype) -> None:
    """Logits of +-1e4 and beyond: softmax is all but one-hot, or all rows far below zero."""
    qkv = random_qkv(1, 70, 1, 32, torch.float32, DEVICE)
    qkv[..., :64] = qkv[..., :64].abs() * 20
    qkv[..., :32] *= sign
    for causal in (FULL, CAUSAL):
        check_attention(qkv.to(dtype), 1, causal=causal, scale=1.0)


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


# --- Layouts ----------------------------------------------------------------------------------

STRIDED = {
    "columns of a wider tensor": lambda x: torch.cat([x, x], -1)[..., 96 : 96 + 192],
    "every second position": lambda x: torch.stack([x, x], 2).flatten(1, 2)[:, ::2],
    "not aligned to 16 bytes": lambda x: torch.cat([x, x], -1)[..., 3 : 3 + 192],
    "sequence first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:1].expand(x.shape),
    "expanded positions": lambda x: x[:, :1].expand(x.shape),
    "columns first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("kind", STRIDED)
def test_strides(kind: str) -> None:
    """Any strides of qkv, and of the gradient, give what contiguous ones give."""
    qkv, wide = (STRIDED[kind](random_qkv(2, 40, 2, 32, torch.float32, DEVICE)) for _ in range(2))
    results = []
    for x, dy in ((qkv, wide[..., 64:128]), (qkv.contiguous(), wide[..., 64:128].contiguous())):
        x = x.detach().requires_grad_()
        y = attention(x, 2)
        results.append((y, *torch.autograd.grad(y, x, dy)))
    for ours, contiguous in zip(*results, strict=True):
        torch.testing.assert_close(ours, contiguous, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_what_lies_around_has_no_influence(head_dim: int) -> None:
    """NaN before, between and after the rows of qkv and of the gradient; tiles reach past both."""
    T = 37

    def within_nan(width: int) -> Tensor:
        around = torch.full((3, T + 100, width + 300), float("nan"), device=DEVICE)
        return around[1:2, 50 : 50 + T, 150 : 150 + width].normal_()

    qkv, grad_y = within_nan(3 * head_dim), within_nan(head_dim)
    for causal in (CAUSAL, FULL):
        x = qkv.detach().requires_grad_()
        y = attention(x, 1, causal=causal)
        (dqkv,) = torch.autograd.grad(y, x, grad_y)
        assert y.isfinite().all() and dqkv.isfinite().all()


def test_zero_stride_gradient(dtype: torch.dtype) -> None:
    """`.sum().backward()` hands over one number expanded to y's shape."""
    one = torch.ones((), dtype=dtype, device=DEVICE)
    check_attention(random_qkv(1, 40, 2, 32, dtype, DEVICE), 2, one.expand(1, 40, 64), causal=True)


def test_empty_batch() -> None:
    qkv = torch.zeros(0, 7, 192, device=DEVICE, requires_grad=True)
    y = attention(qkv, 2, bias=torch.zeros(192, device=DEVICE))
    assert y.shape == (0, 7, 64)
    y.sum().backward()
    assert qkv.grad is not None and qkv.grad.shape == qkv.shape


# --- Dropout's mask: specified to the bit, the same in every kernel, of the right rate ---------


def mask(seed: int, heads: int, T: int, p: float) -> Tensor:
    return attention_dropout_mask(torch.tensor([seed], device=DEVICE), heads, T, p)


def test_philox_known_answers() -> None:
    """Random123's published vectors for philox4x32 with 7 rounds, of zeros."""
    bits = attention_dropout_bits(torch.tensor([0]), 1, 32)[0]
    words = [int(bits[8, 8 * i]) << 16 | int(bits[0, 8 * i]) for i in range(4)]
    assert words == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.slow
@BOTH
def test_mask_is_the_specified_one(causal: bool) -> None:
    """With v = I the output is the dropped softmax itself, with dO = I so is dv's transpose."""
    T, D, n_head, batch, p, seed = 75, 96, 2, 2, 0.4, 2**62 + 9
    eye = torch.eye(T, D, device=DEVICE).repeat(batch, 1, n_head)
    qk = torch.randn(batch, T, 2 * n_head * D, device=DEVICE)
    qkv = torch.cat([qk, eye], -1).requires_grad_()
    y = attention(qkv, n_head, causal=causal, dropout_p=p, seed=seed)
    (dqkv,) = torch.autograd.grad(y, qkv, eye)
    keep = mask(seed, batch * n_head, T, p)
    keep = keep.tril() if causal else keep

    def by_head(x: Tensor) -> Tensor:
        return x.view(batch, T, n_head, D)[..., :T].transpose(1, 2).flatten(0, 1)

    assert torch.equal(by_head(y) != 0, keep)
    assert torch.equal(by_head(dqkv[..., 2 * n_head * D :]).transpose(1, 2) != 0, keep)


@pytest.mark.parametrize("p", [2**-16, 0.1, 0.5, 0.9])
def test_rate(p: float) -> None:
    heads, T = 6, 500
    keep = mask(77, heads, T, p).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(keep.mean().item() - (1 - p)) < 5 * deviation / keep.numel() ** 0.5 + 2**-17
    if 0.05 < p < 0.95:  # rows, columns and heads on their own: largest of 3000 means of 500
        for dim in (1, 2):
            assert (keep.mean(dim) - (1 - p)).abs().max() < 5.5 * deviation / T**0.5
    assert abs(dropout_threshold(p)[1] * (1 - p) - 1) < 2e-4


def test_masks_are_independent() -> None:
    """Neighbours in row, column, head and seed agree as often as chance has it."""
    a, b = (mask(seed, 4, 256, 0.5) for seed in (1, 2))
    pairs = {
        "seed": (a, b),
        "head": (a[1:], a[:-1]),
        "row": (a[:, 1:], a[:, :-1]),
        "8 rows": (a[:, 8:], a[:, :-8]),
        "column": (a[..., 1:], a[..., :-1]),
        "8 columns": (a[..., 8:], a[..., :-8]),
        "transposed": (a, a.transpose(1, 2)),
    }
    for name, (x, y) in pairs.items():
        agree = (x == y).double().mean().item()
        assert abs(agree - 0.5) < 5 * 0.5 * (2 / x.numel()) ** 0.5, (name, agree)


def test_seeds() -> None:
    qkv = torch.randn(1, 30, 96, device=DEVICE)

    def run(seed: int | Tensor | None, p: float = 0.5) -> Tensor:
        return attention(qkv, 1, dropout_p=p, seed=seed)

    assert torch.equal(run(3), run(torch.tensor([3], device=DEVICE)))
    assert torch.equal(run(3), run(torch.tensor(3, device=DEVICE)))
    assert torch.equal(run(2**63 - 1), run(2**63 - 1))
    assert not torch.equal(run(3), run(4))
    assert not torch.equal(run(3), run(3 + 2**32))  # all 64 bits count
    assert torch.equal(run(5, p=0.0), attention(qkv, 1))
    torch.manual_seed(0)
    first, second = run(None), run(None)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, run(None))
    assert seed_tensor(None, DEVICE).device.type == DEVICE.type


# --- torch.compile and FLOPs ------------------------------------------------------------------


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
    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
    qkv = random_qkv(1, 40, 1, 32, torch.float32, DEVICE).requires_grad_()
    f = torch.compile(
        lambda x: attention(x, 1, dropout_p=0.5, seed=seed), fullgraph=True, backend=backend
    )
    first, second = f(qkv), f(qkv)
    assert torch.equal(first, second) == (seed is not None)
    first.sum().backward()
    assert qkv.grad is not None and qkv.grad.isfinite().all()


@BOTH
def test_flops_are_counted_as_for_sdpa(causal: bool) -> None:
    """Causal attention counts in full, as torch counts its own; seen without running anything."""
    with torch.device("meta"):
        qkv = torch.randn(2, 48, 3 * 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y, _ = registered("attention")(qkv, None, 2, causal, 0.0, None, 1.0, False)
        y.sum().backward()
    product = 2 * (2 * 2) * 48 * 48 * 32  # multiply-adds of one T x T x D product, every head
    assert counter.get_total_flops() == (2 + 5) * product


# --- Wrong arguments --------------------------------------------------------------------------

GOOD = torch.zeros(1, 4, 192)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"qkv": [1.0]}, TypeError, "qkv must be a tensor, got list"),
    ({"qkv": torch.zeros(4, 192)}, ValueError, r"qkv must have 3 dimensions, got shape \(4, 192\)"),
    ({"qkv": GOOD.long()}, TypeError, "qkv must be of dtype bfloat16, .* got int64"),
    ({"qkv": GOOD[:, :0]}, ValueError, r"qkv must have at least one position, got \(1, 0, 192\)"),
    ({"n_head": 0}, ValueError, "n_head must be at least 1, got 0"),
    ({"n_head": 2.0}, TypeError, "n_head must be an int, got float"),
    ({"n_head": True}, TypeError, "n_head must be an int, got bool"),
    ({"n_head": 5}, ValueError, "n_head must divide qkv's last dimension .* n_head=5 and 192"),
    ({"n_head": 4}, ValueError, "head dim must be one of 32, 64, 80, 96, 128, got 16"),
    ({"causal": 1}, TypeError, "causal must be a bool, got int"),
    ({"bias": torch.zeros(32)}, ValueError, r"bias must have shape \(192\), got \(32,\)"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    ({"dropout_p": float("nan")}, ValueError, r"dropout_p must be in \[0, 1\), got nan"),
    ({"dropout_p": None}, TypeError, "dropout_p must be a float, got NoneType"),
    ({"scale": 0.0}, ValueError, "scale must be finite and > 0, got 0.0"),
    ({"scale": float("inf")}, ValueError, "scale must be finite and > 0, got inf"),
    ({"scale": "1"}, TypeError, "scale must be a float or None, got str"),
    ({"seed": 1.5}, TypeError, "seed must be an int, a tensor or None, got float"),
    ({"seed": 2**63}, ValueError, "seed must fit in 64 bits, got 9223372036854775808"),
    ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, r"seed must have one element, .*2"),
    ({"seed": torch.zeros(1)}, TypeError, "seed must be of dtype int64, got float32"),
    ({"seed": torch.zeros(1, dtype=torch.int64, device="meta")}, ValueError, "seed must be on"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda x: str(x)[:40])
def test_bad_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"qkv": GOOD, "n_head": 2, **change}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.device.type == "cpu":
            arguments[name] = value.to(DEVICE)
    with pytest.raises(error, match=f"^attention: {message}"):
        attention(**arguments)


# --- Implementations that a run can take ------------------------------------------------------


def reason(name: str, arch: str, dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> str | None:
    return spec("attention").unsupported_reason(name, arch, dtype, Sizes(**sizes))


def test_limits_say_why() -> None:
    assert reason("triton", "sm_80") is reason("flash", "sm_80") is reason("cudnn", "sm_80") is None
    assert reason("triton", "sm_80", n_head=16) == "head dim 48 is none of 32, 64, 80, 96, 128"
    for arch in ("sm_75", "gfx942"):
        said = f"the kernels are for NVIDIA GPUs from sm_80 on, not {arch}"
        assert reason("triton", arch, torch.float16) == reason("hopper", arch) == said
    assert reason("flash", "mps") == reason("cudnn", "cpu") == "no GPU"
    assert reason("flash", "cpu", dropout=0.1) == "on a CPU it has no dropout"


def test_flash_is_the_reference() -> None:
    qkv = torch.randn(2, 8, 3 * 32)
    y = spec("attention").implementations["flash"].function(qkv, 2)
    torch.testing.assert_close(y, reference.attention(qkv, 2))
