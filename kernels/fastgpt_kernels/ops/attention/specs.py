"""Attention for the tools: the variants to compile ahead of time, the configs to try."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import triton

from fastgpt_kernels.configs import Config, lookup
from fastgpt_kernels.ops.attention import configs
from fastgpt_kernels.ops.attention.backward import (
    attention_key_value_kernel,
    attention_prepare_kernel,
    attention_query_kernel,
)
from fastgpt_kernels.ops.attention.forward import attention_forward_kernel
from fastgpt_kernels.ops.attention.record import RECORDS
from fastgpt_kernels.record import Sizes
from fastgpt_kernels.specs import AotSpec, Tunable, tunable

KERNELS = {
    "FORWARD": attention_forward_kernel,
    "BACKWARD": attention_key_value_kernel,
    "KEY_VALUE": attention_key_value_kernel,
    "QUERY": attention_query_kernel,
}
# (head dim, causal, dropout, T a multiple of 128): the common case; masks everywhere; a padded head
# dim; and dropout, whose registers are the most.
VARIANTS = (
    (64, True, False, True),
    (64, False, False, False),
    (64, True, True, False),
    (96, True, False, False),
    (128, True, False, True),
    (128, True, True, False),
)
STRIDES = ("stride_b", "stride_t", "stride_gb", "stride_gt")


def _spec(kernel, name: str, config: Config, flags: Mapping[str, object]) -> AotSpec:
    """Types by argument name: they mean the same in every kernel here."""
    types = dict.fromkeys(("qkv", "y", "grad_y", "dqkv"), "*bf16")
    types |= dict.fromkeys(("lse", "lse_delta", "dq_sum", "dq_tiles"), "*fp32")
    types |= {"seed_pointer": "*i64", "arrived": "*i32"}
    types |= dict.fromkeys(("scale", "scale_log2", "keep_scale"), "fp32")
    if config.blocks.get("TMA_REDUCE"):
        m = config.blocks["BLOCK_M"]
        types["dq_tiles"] = f"tensordesc<fp32[1,{m},{flags['HEAD_PAD']}]>"
    return AotSpec.of(
        f"attention {name}", kernel, config, types, flags,
        aligned=STRIDES, expect_wgmma="BLOCK_M" in config.blocks,
    )  # fmt: skip


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """Every kernel with every config of `arch`, bf16, in the variants that change its registers."""
    if arch.startswith("sm_7"):  # see the record's limits
        return
    for op, kernel in KERNELS.items():
        for head, causal, dropout, even in VARIANTS:
            table = getattr(configs, f"{op}{'_DROPOUT' if dropout else ''}")
            flags = {
                "HEAD": head, "HEAD_PAD": triton.next_power_of_2(head),
                "CAUSAL": causal, "DROPOUT": dropout, "EVEN": even, "PRECISION": "ieee",
            }  # fmt: skip
            if op in ("BACKWARD", "KEY_VALUE"):
                flags["TARGET"] = {"sm_90": "wgmma", "gfx942": "amd"}.get(arch, "")
            if op == "KEY_VALUE":
                flags |= dict.fromkeys(("dq_tiles", "dq_sum", "arrived"))
            name = (
                f"{op.lower()} D={head}{' causal' if causal else ''}"
                f"{' dropout' if dropout else ''}{'' if even else ' ragged'}"
            )
            yield _spec(kernel, name, lookup(table, arch, head), flags)
    for head in (64, 96):
        config = lookup(configs.ROWS, arch, head)
        sizes = {"HEAD": head, "HEAD_PAD": triton.next_power_of_2(head)}
        yield _spec(attention_prepare_kernel, f"prepare D={head}", config, sizes)


def _candidates(tma: tuple[int | None, ...]) -> list[Config]:
    return [
        Config(
            {"BLOCK_M": m, "BLOCK_N": n} | ({} if t is None else {"TMA_REDUCE": t}), warps, stages
        )
        for m, n in ((32, 64), (32, 128), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128))
        for warps in (4, 8)
        for stages in (1, 2, 3)
        for t in tma
    ]


def tunables(arch: str) -> Iterator[Tunable]:
    """The 16-bit tables without and with dropout, causal, at (8, 1024, 12 heads)."""
    tma = (0, 1) if arch.startswith("sm_") and int(arch[3:]) >= 90 else (0,)
    passes: tuple[tuple[str, tuple[int | None, ...], dict[str, Any]], ...] = (
        ("FORWARD", (None,), {"backward": False}),
        ("BACKWARD", tma, {"backward": True, "deterministic": False}),
        ("KEY_VALUE", (0,), {"backward": True, "deterministic": True}),
        ("QUERY", (None,), {"backward": True, "deterministic": True}),
    )
    for dropout_p in (0.0, 0.2):
        for head in (64, 128):
            for name, reductions, options in passes:
                yield tunable(
                    RECORDS["attention"], arch, name + ("_DROPOUT" if dropout_p else ""), head,
                    Sizes(8, 1024, 12, 12 * head), _candidates(reductions),
                    dropout_p=dropout_p, seed=1234, **options,
                )  # fmt: skip
