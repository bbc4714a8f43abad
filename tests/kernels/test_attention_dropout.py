"""Attention's dropout mask: specified to the bit, the same in every kernel, of the right rate."""

import pytest
import torch

from fastgpt_kernels import attention, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_philox_known_answers() -> None:
    """Random123's published vectors for philox4x32 with 7 rounds, of zeros and of ones."""
    bits = reference.attention_dropout_bits(torch.tensor([0]), 1, 32)[0]
    words = [int(bits[8, 8 * i]) << 16 | int(bits[0, 8 * i]) for i in range(4)]
    assert words == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True], ids=["one_pass", "deterministic"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_mask_is_the_specified_one(causal: bool, deterministic: bool) -> None:
    """With v = I the output is the dropped softmax itself, with dO = I so is dv's transpose."""
    T, D, n_head, batch, p = 75, 96, 2, 2, 0.4
    eye = torch.eye(T, D, device=DEVICE).repeat(batch, 1, n_head)
    qk = torch.randn(batch, T, 2 * n_head * D, device=DEVICE)
    qkv = torch.cat([qk, eye], -1).requires_grad_()
    y = attention(
        qkv, n_head, causal=causal, dropout_p=p, seed=2**62 + 9, deterministic=deterministic
    )
    (dqkv,) = torch.autograd.grad(y, qkv, eye)
    seed = reference.seed_tensor(2**62 + 9, DEVICE)
    keep = reference.attention_dropout_mask(seed, batch * n_head, T, p)
    if causal:
        keep = keep.tril()
    forward = y.view(batch, T, n_head, D)[..., :T].transpose(1, 2).flatten(0, 1)
    dv = (
        dqkv[..., 2 * n_head * D :].view(batch, T, n_head, D)[..., :T].transpose(1, 2).flatten(0, 1)
    )
    assert torch.equal(forward != 0, keep)
    assert torch.equal(dv.transpose(1, 2) != 0, keep)


@pytest.mark.parametrize("p", [2**-16, 0.1, 0.5, 0.9])
def test_rate(p: float) -> None:
    heads, T = 6, 500
    keep = reference.attention_dropout_mask(torch.tensor([77], device=DEVICE), heads, T, p).double()
    deviation = (p * (1 - p)) ** 0.5
    n = keep.numel()
    assert abs(keep.mean().item() - (1 - p)) < 5 * deviation / n**0.5 + 2**-17
    if 0.05 < p < 0.95:  # rows, columns and heads on their own: largest of 3000 means of 500
        for dim in (1, 2):
            assert (keep.mean(dim) - (1 - p)).abs().max() < 5.5 * deviation / T**0.5
    scale = reference.dropout_threshold(p)[1]
    assert abs(scale * (1 - p) - 1) < 2e-4


def test_masks_are_independent() -> None:
    """Neighbours in row, column, head and seed agree as often as chance has it."""
    a, b = (
        reference.attention_dropout_mask(torch.tensor([s], device=DEVICE), 4, 256, 0.5)
        for s in (1, 2)
    )
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

    def run(seed: int | torch.Tensor | None) -> torch.Tensor:
        return attention(qkv, 1, dropout_p=0.5, seed=seed)

    assert torch.equal(run(3), run(torch.tensor([3], device=DEVICE)))
    assert torch.equal(run(3), run(torch.tensor(3, device=DEVICE)))
    assert torch.equal(run(2**63 - 1), run(2**63 - 1))
    assert not torch.equal(run(3), run(4))
    assert not torch.equal(run(3), run(3 + 2**32))  # all 64 bits count
    torch.manual_seed(0)
    first, second = run(None), run(None)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, run(None))


def test_no_dropout_ignores_the_seed() -> None:
    qkv = torch.randn(1, 30, 96, device=DEVICE)
    assert torch.equal(attention(qkv, 1), attention(qkv, 1, dropout_p=0.0, seed=5))
