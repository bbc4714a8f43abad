"""Decoding for the tools: what is compiled ahead of time. Its configs are not tuned yet."""

from __future__ import annotations

from collections.abc import Iterator

from fastgpt_kernels.configs import Config, lookup
from fastgpt_kernels.ops.decode import configs
from fastgpt_kernels.ops.decode.kernels import (
    WARPS,
    attention_constants,
    decode_attention_kernel,
    decode_attention_layer_kernel,
    decode_linear_kernel,
    decode_mlp_layer_kernel,
    product_constants,
    repeat_and_ahead,
)
from fastgpt_kernels.specs import AotSpec, Tunable

_BF16 = (
    "qkv", "k_cache", "v_cache", "y", "x", "weight", "bias", "residual", "attended", "hidden",
    *(f"{layer}_{part}" for layer in ("qkv", "proj", "fc") for part in ("weight", "bias")),
)  # fmt: skip
_FP32 = ("partial", "stats", "norm_weight", "norm_bias")
_TYPES = dict.fromkeys(_BF16, "*bf16") | dict.fromkeys(_FP32, "*fp32")
_TYPES |= dict.fromkeys(("arrived", "counters"), "*i32")
_TYPES |= {"positions": "*i64", "scale_log2": "fp32", "eps": "fp32"}
_ALIGNED = ("stride_qkv", "stride_b", "stride_h", "stride_s", "stride_x", "stride_w")
_SMS, _S, _VOCAB = 132, 1024, 50257


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """A token of GPT-2 124M, 1558M too for one row, and attention at every head dim's entry."""
    early = {"EARLY": arch.startswith("sm_") and int(arch[3:]) >= 90}
    config = Config({}, WARPS)
    products = lookup(configs.LINEAR, arch, 1)

    def of(name: str, N: int, K: int) -> dict[str, int]:
        repeat, ahead = repeat_and_ahead(N, K, 2, products, _SMS)
        return {f"{name}REPEAT": repeat, f"{name}AHEAD": ahead}

    for D in (64, 80, 128, 256):
        _, flags = attention_constants(1, 12, _S, D, lookup(configs.ATTENTION, arch, D), _SMS)
        name = f"decode_attention D={D}"
        yield AotSpec.of(name, decode_attention_kernel, config, _TYPES, flags, aligned=_ALIGNED)
    for B, H in ((1, 12), (2, 12), (8, 12), (1, 25)):
        C, size = 64 * H, f"C={64 * H} B={B}"
        _, head = attention_constants(B, H, _S, 64, lookup(configs.ATTENTION, arch, 64), _SMS)
        common = product_constants(B, products) | early
        yield AotSpec.of(
            f"decode_attention_layer {size}", decode_attention_layer_kernel, config, _TYPES,
            {"C": C, **of("QKV_", 3 * C, C), **of("PROJ_", C, C), **head, **common},
            aligned=_ALIGNED,
        )  # fmt: skip
        yield AotSpec.of(
            f"decode_mlp_layer {size}", decode_mlp_layer_kernel, config, _TYPES,
            {"C": C, "HIDDEN": 4 * C, "ACTIVATION": "tanh", **of("FC_", 4 * C, C),
             **of("PROJ_", C, 4 * C), **common},
            aligned=_ALIGNED,
        )  # fmt: skip
        yield AotSpec.of(
            f"decode_linear head {size}", decode_linear_kernel, config, _TYPES,
            {"K": C, "ACTIVATION": "none", **of("", _VOCAB, C), **common},
            absent=("bias", "residual"), aligned=_ALIGNED,
        )  # fmt: skip


def tunables(arch: str) -> Iterator[Tunable]:
    """None yet."""
    return iter(())
