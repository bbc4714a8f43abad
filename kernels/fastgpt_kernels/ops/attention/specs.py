"""Attention for the tools: the variants to compile ahead of time, the configs to try."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton

from fastgpt_kernels import reference
from fastgpt_kernels.configs import Config, lookup
from fastgpt_kernels.ops.attention import configs
from fastgpt_kernels.ops.attention.backward import (
    attention_finish_kernel,
    attention_key_value_kernel,
    attention_prepare_kernel,
    attention_query_kernel,
    launch_backward,
)
from fastgpt_kernels.ops.attention.forward import attention_forward_kernel, launch_forward
from fastgpt_kernels.specs import AotSpec, Tunable

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


def _spec(kernel, name: str, config: Config, constexprs: dict[str, object]) -> AotSpec:
    """Types by argument name: they mean the same in every kernel here."""
    types = dict.fromkeys(("qkv", "y", "grad_y", "dqkv"), "*bf16")
    types |= dict.fromkeys(("lse", "delta", "dq_sum"), "*fp32") | {"seed_pointer": "*i64"}
    types |= dict.fromkeys(("scale", "scale_log2", "keep_scale"), "fp32")
    constexprs = {**constexprs, **config.blocks}
    if config.blocks.get("TMA_REDUCE"):
        box = f"1,{config.blocks['BLOCK_M']},{constexprs['HEAD_PAD']}"
        types["dq_sum"] = f"tensordesc<fp32[{box}]>"
    return AotSpec.of(
        f"attention {name}", kernel, config, types, constexprs,
        aligned=STRIDES, expect_wgmma="BLOCK_M" in config.blocks,
    )  # fmt: skip


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """Every kernel with every config of `arch`, bf16, in the variants that change its registers."""
    for op, kernel in KERNELS.items():
        for head, causal, dropout, even in VARIANTS:
            table = getattr(configs, f"{op}{'_DROPOUT' if dropout else ''}")
            flags = {
                "HEAD": head,
                "HEAD_PAD": triton.next_power_of_2(head),
                "CAUSAL": causal,
                "DROPOUT": dropout,
                "EVEN": even,
                "PRECISION": "ieee",
            }
            if op == "KEY_VALUE":
                flags["dq_sum"] = None
            name = (
                f"{op.lower()} D={head}{' causal' if causal else ''}"
                f"{' dropout' if dropout else ''}{'' if even else ' ragged'}"
            )
            yield _spec(kernel, name, lookup(table, arch, head), flags)
    for head in (64, 96):
        config = lookup(configs.ROWS, arch, head)
        sizes = {"HEAD": head, "HEAD_PAD": triton.next_power_of_2(head)}
        yield _spec(attention_prepare_kernel, f"prepare D={head}", config, sizes)
        yield _spec(attention_finish_kernel, f"finish D={head}", config, sizes)


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
    batch, T, n_head, seed = 8, 1024, 12, 1234
    tma_reduce = (0, 1) if arch.startswith("sm_") and int(arch[3:]) >= 90 else (0,)
    for dropout_p in (0.0, 0.2):
        for head in (64, 128):
            scale = 1 / math.sqrt(head)
            suffix = "_DROPOUT" if dropout_p else ""

            def inputs(device, head=head, scale=scale, p=dropout_p):
                """qkv, the gradient of y, the seed, and what the forward pass saves."""
                qkv = torch.randn(batch, T, 3 * n_head * head, device=device, dtype=torch.bfloat16)
                grad_y = torch.randn(batch, T, n_head * head, device=device, dtype=torch.bfloat16)
                seed_tensor = reference.seed_tensor(seed, device)
                saved = launch_forward(qkv, n_head, True, p, seed_tensor, scale)
                return qkv, grad_y, seed_tensor, *saved

            def forward(x, config, scale=scale, p=dropout_p):
                return launch_forward(x[0], n_head, True, p, x[2], scale, config)[:1]

            def backward(x, config, query=None, deterministic=False, scale=scale, p=dropout_p):
                qkv, grad_y, seed_tensor, y, lse = x
                return (
                    launch_backward(
                        grad_y, qkv, y, lse, seed_tensor, n_head, True, p, scale, deterministic,
                        config, query,
                    ),
                )  # fmt: skip

            def key_value(x, config, backward=backward):
                return backward(x, config, deterministic=True)

            def query(x, config, backward=backward):
                return backward(x, None, query=config, deterministic=True)

            def forward_reference(x, p=dropout_p):
                with torch.no_grad():
                    return (reference.attention(x[0].float(), n_head, dropout_p=p, seed=seed),)

            def backward_reference(x, p=dropout_p):
                qkv = x[0].float().requires_grad_()
                y = reference.attention(qkv, n_head, dropout_p=p, seed=seed)
                return torch.autograd.grad(y, qkv, x[1].float())

            for op, run, wanted, tma in (
                ("FORWARD", forward, forward_reference, (None,)),
                ("BACKWARD", backward, backward_reference, tma_reduce),
                ("KEY_VALUE", key_value, backward_reference, (0,)),
                ("QUERY", query, backward_reference, (None,)),
            ):
                name = f"{op}{suffix}"
                yield Tunable(name, head, _candidates(tma), inputs, run, wanted)
