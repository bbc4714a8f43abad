"""The cross entropy for the tools."""

from __future__ import annotations

from collections.abc import Iterator

from fastgpt_kernels.configs import Config, entries
from fastgpt_kernels.ops.loss.configs import CROSS_ENTROPY
from fastgpt_kernels.ops.loss.kernels import (
    SCALE_BLOCK,
    SCALE_WARPS,
    cross_entropy_kernel,
    cross_entropy_scale_kernel,
    tiling,
)
from fastgpt_kernels.ops.loss.record import RECORDS
from fastgpt_kernels.record import Sizes
from fastgpt_kernels.specs import AotSpec, Tunable, tunable


def aot_specs(arch: str) -> Iterator[AotSpec]:
    """Every config at the widest row it is for; the wide ones for all that changes registers.

    Their vocabulary is odd, as GPT-2's is, and padded.
    """
    aligned = ("n_cols", "stride", "gradient_stride")
    for bound, config in entries(CROSS_ENTROPY, arch).items():
        # Whose gradient: of the mean; of losses by row, in the backward; as linear_cross_entropy's.
        cases: list[tuple[str, str, tuple[str, ...]]] = [("bf16", "mean", aligned)]
        if bound > 16384:
            cases += [("bf16", "rows", aligned), ("bf16", "linear", aligned)]
            cases += [("fp32", "mean", aligned)]
        if bound > 51200:
            cases += [("bf16", "mean", ())]
        for dtype, scale, divisible in cases:
            size = 4 if dtype == "fp32" else 2
            n_cols = min(bound, 1 << 18) * 2 // size
            types = {"targets_ptr": "*i64", "losses_ptr": "*fp32"}
            types |= dict.fromkeys(("logits_ptr", "gradient_ptr"), f"*{dtype}")
            types |= {"scale_ptr": "*i64" if scale == "mean" else "*fp32"}
            yield AotSpec.of(
                f"cross_entropy V<={bound} {dtype} {scale}{'' if divisible else ' unaligned'}",
                cross_entropy_kernel, config, types,
                {**tiling(config, n_cols, n_cols - 47, size), "COUNT": scale == "mean"},
                absent={"mean": (), "rows": ("losses_ptr",), "linear": ("scale_ptr",)}[scale],
                aligned=divisible,
            )  # fmt: skip
    for name, x, in_place in (("in place", "bf16", True), ("dW", "fp32", False)):
        types = {"x_ptr": f"*{x}", "out_ptr": f"*{x}", "scale_ptr": "*fp32", "n_cols": "i64"}
        yield AotSpec.of(
            f"cross_entropy scale {name}", cross_entropy_scale_kernel, Config({}, SCALE_WARPS),
            types, {"BLOCK": SCALE_BLOCK, "STEPS": 1024, "IN_PLACE": in_place},
            aligned=("n_cols", "stride"),
        )  # fmt: skip


def tunables(arch: str) -> Iterator[Tunable]:
    """Loss and gradient, at the widest row of each entry: 1 GiB of logits, GPT-2's vocabulary."""
    candidates = [
        Config({"BLOCK": 256 * warps, "TILES": tiles}, warps)
        for warps in (1, 2, 4, 8, 16, 32)
        for tiles in (1, 2, 4, 8, 13, 25)
    ]
    for key in entries(CROSS_ENTROPY, arch):
        V = {51200: 50304, 1 << 31: 128256}.get(key, key)
        sizes = Sizes(1, min(65536, (1 << 29) // V), vocab_size=V, padded_vocab_size=V)
        yield tunable(RECORDS["cross_entropy"], arch, "CROSS_ENTROPY", key, sizes, candidates)
