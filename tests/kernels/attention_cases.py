"""What the attention tests share: PyTorch's own attention and the accuracy check."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import attention, reference
from tests.kernels.helpers import NUDGED_RUNS, assert_accurate, forward_backward, nudged


def random_qkv(
    batch: int, T: int, n_head: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.randn(batch, T, 3 * n_head * head_dim, device=device).to(dtype)


def torch_attention(
    qkv: Tensor, n_head: int, *, causal: bool, dropout_p: float = 0.0, seed: int = 0,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """PyTorch's own at qkv's dtype: SDPA, or with dropout the eager formula and our mask."""
    batch, T, width = qkv.shape
    q, k, v = qkv.view(batch, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)
    if dropout_p == 0:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    else:
        logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if causal:
            above = torch.ones(T, T, dtype=torch.bool, device=qkv.device).triu(1)
            logits = logits.masked_fill(above, float("-inf"))
        seed_tensor = reference.seed_tensor(seed, qkv.device)
        keep = reference.attention_dropout_mask(seed_tensor, batch * n_head, T, dropout_p)
        keep_scale = reference.dropout_threshold(dropout_p)[1]
        y = logits.softmax(-1) * keep.view(batch, n_head, T, T) * keep_scale @ v
    return y.transpose(1, 2).reshape(batch, T, width // 3)


def check_attention(
    qkv: Tensor, n_head: int, grad_y: Tensor | None = None, *, deterministic: bool = False, **kwargs
) -> None:
    """Output and packed gradient err at most twice as much as PyTorch's own at the same dtype.

    A probability is exp2(logit - log_sum_exp) of fp32 numbers: the logit's matmul, its scaling and
    the stored log-sum-exp are each rounded, by up to eps / 2 of the largest logit. Nothing next to
    other errors but where logits are in the thousands.
    """
    q, k, _ = qkv.double().view(*qkv.shape[:2], 3, n_head, -1).permute(2, 0, 3, 1, 4)
    scale = kwargs.get("scale") or q.shape[-1] ** -0.5
    largest = (q @ k.transpose(-2, -1)).abs().max().item() * scale
    inherent = 3 * torch.finfo(torch.float32).eps / 2 * largest
    if grad_y is None:
        grad_y = torch.randn(*qkv.shape[:2], qkv.shape[2] // 3, device=qkv.device).to(qkv.dtype)
    (y,), (dqkv,) = forward_backward(
        lambda x: attention(x, n_head, deterministic=deterministic, **kwargs), [qkv], [grad_y]
    )
    (same_y,), (same_dqkv,) = forward_backward(
        lambda x: torch_attention(x, n_head, **kwargs), [qkv], [grad_y]
    )
    runs = [
        forward_backward(
            lambda x: torch_attention(x, n_head, **kwargs),
            nudged([qkv], seed),
            nudged([grad_y], -1 - seed),
        )
        for seed in range(NUDGED_RUNS)
    ]
    (oracle_y,), (oracle_dqkv,) = forward_backward(
        lambda x: reference.attention(x, n_head, **kwargs), [qkv.double()], [grad_y.double()]
    )
    assert y.is_contiguous() and dqkv.is_contiguous()
    assert_accurate(
        y, same_y, oracle_y, name="y", nudged_runs=[ys[0] for ys, _ in runs], inherent=inherent
    )
    for i, name in enumerate(("dq", "dk", "dv")):
        ours, same, oracle, *others = (
            x.chunk(3, -1)[i] for x in (dqkv, same_dqkv, oracle_dqkv, *(dx[0] for _, dx in runs))
        )
        if oracle.abs().max() > 1e-12:
            assert_accurate(ours, same, oracle, name=name, nudged_runs=others, inherent=inherent)
        else:  # one visible key: dq = dk = 0 in theory, here dP - delta is off by fp32 roundings
            bound = 16 * torch.finfo(torch.float32).eps * dqkv.abs().max()
            assert ours.abs().max() <= bound, f"{name}: {ours.abs().max()} where 0 is right"
