"""Decoding for the tools: what is compiled ahead of time. Its configs are not tuned yet."""

from __future__ import annotations

from collections.abc import Iterator

import triton

from fastgpt_kernels.configs import Config, lookup
from fastgpt_kernels.ops.decode import configs
from fastgpt_kernels.ops.decode.kernels import (
    decode_attention_combine_kernel,
    decode_attention_kernel,
    decode_linear_kernel,
)
from fastgpt_kernels.specs import AotSpec, Tunable

_BF16 = ("qkv", "k_cache", "v_cache", "y", "x", "weight", "bias", "residual")
_FP32 = ("partial", "stats", "norm_weight", "norm_bias")
_TYPES = dict.fromkeys(_BF16, "*bf16") | dict.fromkeys(_FP32, "*fp32")
_TYPES |= {"positions": "*i64", "scale_log2": "fp32", "eps": "fp32"}
_ALIGNED = ("stride_qkv", "stride_b", "stride_h", "stride_s", "stride_x", "stride_w")
# name, rows, K, norm, activation, residual: the four layers of a block at GPT-2's 768 for one row,
# and the plainest for more rows.
_LAYERS = (
    ("norm", 1, 768, True, "none", False),
    ("norm tanh", 1, 768, True, "tanh", False),
    ("residual", 1, 3072, False, "none", True),
    ("norm", 2, 768, True, "none", False),
    ("norm", 4, 768, True, "none", False),
    ("norm", 8, 768, True, "none", False),
)


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """Attention at every entry of its table and with a padded head dim, and the linear layers."""
    for D in (64, 80, 128, 256):
        config = lookup(configs.ATTENTION, arch, D)
        head = {"HEAD": D, "HEAD_PAD": triton.next_power_of_2(D)}
        yield AotSpec.of(
            f"decode_attention chunk D={D}", decode_attention_kernel, config, _TYPES,
            head | {"SPLIT": True}, aligned=_ALIGNED,
        )  # fmt: skip
        if D in (64, 256):
            yield AotSpec.of(
                f"decode_attention combine D={D}", decode_attention_combine_kernel, Config({}, 4),
                _TYPES, head | {"CHUNKS_PAD": 64}, aligned=_ALIGNED,
            )  # fmt: skip
    for name, B, K, norm, activation, residual in _LAYERS:
        yield AotSpec.of(
            f"decode_linear {name} B={B} K={K}", decode_linear_kernel,
            lookup(configs.LINEAR, arch, B), _TYPES,
            {"B": B, "B_PAD": B, "K": K, "NORM": norm, "ACTIVATION": activation},
            absent=("residual",) * (not residual) + ("norm_weight", "norm_bias") * (not norm),
            aligned=_ALIGNED,
        )  # fmt: skip


def tunables(arch: str) -> Iterator[Tunable]:
    """None yet."""
    return iter(())
