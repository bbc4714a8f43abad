"""The two halves of a transformer's layer on a few rows, one launch each, for generation.

    decode_attention_layer   x + proj(attention(qkv(norm(x))))
    decode_mlp_layer         x + proj(act(fc(norm(x))))

x (B, C), B up to 8. A token costs as many launches as there are halves of layers, and the head.

The programs of a launch have stages: qkv, then chunks of attention, then proj; or fc, then proj. A
program's number is a ticket that it draws, and those of a later stage wait, by a counter in memory,
for those of the stage before, which drew theirs earlier and so are running or done. Before they
wait they load their weights into registers: memory is busy while results travel, which is what most
of a token's time is made of. With `early` the weights are even loaded while the launch before is
still running (programmatic dependent launch, on NVIDIA GPUs from sm_90 on).

The bound, for GPT-2 124M in bf16, one row, nothing of it measured. A token reads 248 MB of weights:
83 us on an H100 at 3.0 TB/s, 58 on an H200 at 4.3. A stage's results take about 1.1 us to the next
one: store and release 0.4, the poll that sees them 0.3, loads of x and sums over it 0.4; that is
5.5 us a layer, whose weights, 14.2 MB, take 4.7 us (H200: 3.3), and the head's 26 us (18).

                             H100             H200
    nothing overlaps         148 us, 56 %     124 us, 47 % of the weights' roof
    a layer's weights do      92 us, 90 %      84 us, 69 %

They do if they are in flight: by Little's law 3.0 TB/s at 0.9 us need 20 KB an SM, 4.3 TB/s 29 KB.
Four programs an SM (128 registers a thread) with 12 KB each, 24 in the second stage, have room for
48 KB, which an mlp fills (71 KB an SM in all); qkv and proj are only 27 + 9 KB, of which 28 are in
flight at once beside 1,024 positions of attention. PyTorch's six small launches around the layers
come on top: at 1.5 us each 53 % of the roof on an H100 and 43 on an H200 if nothing overlaps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt_kernels import reference
from fastgpt_kernels.host import (
    FLOAT_DTYPES,
    HAS_TRITON,
    check_tensor,
    refuse_interpreted_bf16,
    use_kernel,
)
from fastgpt_kernels.ops.decode.attention import check_caches
from fastgpt_kernels.ops.decode.linear import ACTIVATIONS, MAX_ROWS
from fastgpt_kernels.register import Op

if HAS_TRITON:
    from fastgpt_kernels.ops.decode.kernels import launch_attention_layer, launch_mlp_layer

    _attention = Op(
        "decode_attention_layer",
        launch_attention_layer,
        lambda x, *_: x.new_empty(x.shape),
        mutates=("k_cache", "v_cache", "counters"),
    )
    _mlp = Op(
        "decode_mlp_layer",
        launch_mlp_layer,
        lambda x, *_: x.new_empty(x.shape),
        mutates=("counters",),
    )


def decode_counters(B: int, n_head: int, launches: int, device: torch.device) -> Tensor:
    """(launches, 4 + B * n_head rounded up to 4) int32 zeros: a row for each launch of a token.

    Launches that may overlap need rows of their own, so those of a token all do.
    """
    per_launch = 4 + -(-B * n_head // 4) * 4  # so that all rows are aligned alike
    return torch.zeros(launches, per_launch, dtype=torch.int32, device=device)


def decode_attention_layer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    counters: Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-5,
    early: bool = False,
) -> Tensor:
    """x + proj(attention(qkv(norm(x)))) for one new token a row, as one launch.

    x                         (B, C), 1 <= B <= 8, bf16, fp16 or fp32
    norm_weight, norm_bias    (C,), any of these dtypes; all biases may be None
    qkv_weight, qkv_bias      (3*C, C) contiguous and (3*C,), of x's dtype
    proj_weight, proj_bias    (C, C) contiguous and (C,), of x's dtype
    k_cache, v_cache, positions, scale   as for `decode_attention`; C = H * D
    counters                  (>= 4 + B*H,) int32 zeros, contiguous, as of `decode_counters`; zero
                              again when the launch ends. No other launch may use them meanwhile
    early                     on NVIDIA GPUs from sm_90 on: read the weights before the launches
                              ahead have ended, which must not write them

    Returns y (B, C), contiguous, x's dtype; sums are fp32, qkv and attention's result are rounded
    to x's dtype. For inference: not differentiable. On a CPU tensor the twins of `decode_linear`
    and `decode_attention` run. Raises TypeError/ValueError naming the argument.
    """
    op = "decode_attention_layer"
    C = _check(op, x, norm_weight, norm_bias)
    _check_linear(op, "qkv", x, qkv_weight, qkv_bias, (3 * C, C))
    _check_linear(op, "proj", x, proj_weight, proj_bias, (C, C))
    check_caches(op, x, (x.shape[0], C), k_cache, v_cache, positions, scale)
    _check_counters(op, x, counters, 4 + x.shape[0] * k_cache.shape[1])
    scale = k_cache.shape[3] ** -0.5 if scale is None else scale
    if use_kernel(x):
        refuse_interpreted_bf16(op, x)
        return _attention(
            x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias,
            k_cache, v_cache, positions, counters, scale, eps, early,
        )  # fmt: skip
    return plain_attention_layer(
        x, norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias,
        k_cache, v_cache, positions, counters, scale=scale, eps=eps,
    )  # fmt: skip


def decode_mlp_layer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    counters: Tensor,
    *,
    activation: str = "tanh",
    eps: float = 1e-5,
    early: bool = False,
) -> Tensor:
    """x + proj(act(fc(norm(x)))) for a few rows, as one launch.

    x                        (B, C), 1 <= B <= 8, bf16, fp16 or fp32
    norm_weight, norm_bias   (C,), any of these dtypes; all biases may be None
    fc_weight, fc_bias       (H, C) contiguous and (H,), of x's dtype
    proj_weight, proj_bias   (C, H) contiguous and (C,), of x's dtype
    activation               "none", or GELU: "tanh" or "erf"
    counters                 (>= 4,); they and `early` are as for `decode_attention_layer`

    Returns y (B, C), contiguous, x's dtype; sums are fp32, the hidden layer is rounded to x's
    dtype. For inference: not differentiable. On a CPU tensor the twin of `decode_linear` runs.
    Raises TypeError/ValueError naming the argument.
    """
    op = "decode_mlp_layer"
    C = _check(op, x, norm_weight, norm_bias)
    check_tensor(op, "fc_weight", fc_weight, ndim=2, like=x)
    hidden = fc_weight.shape[0]
    _check_linear(op, "fc", x, fc_weight, fc_bias, (hidden, C))
    _check_linear(op, "proj", x, proj_weight, proj_bias, (C, hidden))
    _check_counters(op, x, counters, 4)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")
    if use_kernel(x):
        refuse_interpreted_bf16(op, x)
        return _mlp(
            x, norm_weight, norm_bias, fc_weight, fc_bias, proj_weight, proj_bias,
            counters, activation, eps, early,
        )  # fmt: skip
    return plain_mlp_layer(
        x, norm_weight, norm_bias, fc_weight, fc_bias, proj_weight, proj_bias, counters,
        activation=activation, eps=eps,
    )  # fmt: skip


def plain_attention_layer(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, qkv_weight: Tensor,
    qkv_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None, k_cache: Tensor,
    v_cache: Tensor, positions: Tensor, counters: Tensor, *, scale: float | None = None,
    eps: float = 1e-5, early: bool = False,
) -> Tensor:  # fmt: skip
    """`decode_attention_layer` in plain PyTorch: the specification; counters are left alone."""
    qkv = reference.decode_linear(
        x, qkv_weight, qkv_bias, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps
    )
    y = reference.decode_attention(qkv, k_cache, v_cache, positions, scale=scale)
    return reference.decode_linear(y, proj_weight, proj_bias, residual=x)


def plain_mlp_layer(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, fc_weight: Tensor,
    fc_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None, counters: Tensor, *,
    activation: str = "tanh", eps: float = 1e-5, early: bool = False,
) -> Tensor:  # fmt: skip
    """`decode_mlp_layer` in plain PyTorch: the specification; counters are left alone."""
    h = reference.decode_linear(
        x, fc_weight, fc_bias, norm_weight=norm_weight, norm_bias=norm_bias,
        activation=activation, eps=eps,
    )  # fmt: skip
    return reference.decode_linear(h, proj_weight, proj_bias, residual=x)


def _check(op: str, x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None) -> int:
    """The width C, once x and the norm are what they should be."""
    dtypes = FLOAT_DTYPES if use_kernel(x) else (*FLOAT_DTYPES, torch.float64)
    check_tensor(op, "x", x, ndim=2, dtypes=dtypes)
    B, C = x.shape
    if not 1 <= B <= MAX_ROWS or C < 1:
        raise ValueError(f"{op}: x must have shape (1 to {MAX_ROWS}, C >= 1), got {(B, C)}")
    check_tensor(op, "norm_weight", norm_weight, shape=(C,), dtypes=dtypes, like=x)
    check_tensor(op, "norm_bias", norm_bias, shape=(C,), dtypes=dtypes, like=x, optional=True)
    return C


def _check_linear(
    op: str, name: str, x: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[int, int]
) -> None:
    check_tensor(op, f"{name}_weight", weight, shape=shape, like=x)
    check_tensor(op, f"{name}_bias", bias, shape=shape[:1], like=x, optional=True)
    if not weight.is_contiguous():
        raise ValueError(f"{op}: {name}_weight must be contiguous, got strides {weight.stride()}")


def _check_counters(op: str, x: Tensor, counters: Tensor, least: int) -> None:
    check_tensor(op, "counters", counters, ndim=1, dtypes=(torch.int32,), like=x)
    if len(counters) < least or not counters.is_contiguous():
        raise ValueError(
            f"{op}: counters must be contiguous, at least {least} of them, "
            f"got {len(counters)} with stride {counters.stride(0)}"
        )
