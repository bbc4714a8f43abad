"""python -m bench ablate [PRESET]: what each kernel is worth in the whole training step.

The fast path, then the fast path with one op at a time switched to eager; the ratio says how much
longer the step takes without that kernel. Attention is also switched to its kernels for Hopper,
which the fast path does not take by itself. Flags of `fastgpt train` work here too.
"""

from __future__ import annotations

from typing import Any

import torch

from bench import results, setup, step
from bench.variants import FAST, Variant
from fastgpt_kernels.registry import OpSpec, Sizes, specs


def contenders(arch: str = "") -> list[Variant]:
    """The fast path first. Without a GPU (`arch` "sm_90" or so) it is eager, as are all others."""
    ops = specs("model")
    if not arch:
        return [Variant(name) for name in ("eager", *(f"{op.name} eager" for op in ops))]

    def runs(op: OpSpec, name: str) -> bool:
        return not op.unsupported_reason(name, arch, torch.bfloat16, Sizes())

    ops = [op for op in ops if runs(op, "triton")]
    # First what is not decided yet, in case that time runs out.
    switched = [
        (op.name, further)
        for op in ops
        for further in op.implementations
        if further == "hopper" and runs(op, further)
    ]
    switched += [(op.name, "eager") for op in ops]
    return [Variant("kernels+compile", FAST, graph=True)] + [
        Variant(f"{op} {kind}", FAST | {f"op.{op}": kind}, graph=True) for op, kind in switched
    ]


def worth(row: dict[str, Any], base_ms: float) -> list[float]:
    """ms a step that the kernel saves, and its interval's ends."""
    ratio = row["ratio"]
    if not row["variant"].endswith(" eager"):  # this row has the kernel, the fast path has not
        return [(1 - ratio[k]) * base_ms for k in ("ratio", "high", "low")]
    return [(ratio[k] - 1) * base_ms for k in ("ratio", "low", "high")]


def add_worth(rows: step.Rows) -> None:
    for row in rows[1:]:
        if row.get("ratio", {}).get("low"):
            row["worth_ms"] = worth(row, rows[0]["median_ms"])


def main(argv: list[str]) -> int:
    parser = setup.Parser("ablate", __doc__)
    parser.add_argument("preset", nargs="?", default="gpt2")
    step.add_measuring_arguments(parser)
    args, flags = parser.parse(argv)
    setup.say_small()
    result = results.Result("ablate", argv, {"rounds": args.rounds, "flags": flags})
    with parser.user_errors():
        arch = setup.arch(setup.device_of(flags))
        if not arch:
            print("every op is eager here: all ratios should be 1")
        rows = step.measure(result, contenders(arch), args.preset, flags, args, add_worth)
    for row in rows:
        if "worth_ms" in row:
            saved, low, high = row["worth_ms"]
            what = row["variant"].removesuffix(" eager")
            print(f"  {what}: its kernel is worth {saved:+.3f} ms [{low:+.3f}, {high:+.3f}] a step")
    return result.end(args.out)
