"""python -m bench ablate [PRESET]: what each kernel is worth in the whole training step.

The fast path, then the fast path with one op at a time switched to eager; the ratio says how much
longer the step takes without that kernel. Matrix products and the optimizer, which the fast path
leaves to libraries, are switched the other way, to Triton. Flags of `fastgpt train` work here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bench import results, setup, step, turns
from bench.variants import Variant
from fastgpt.errors import UserError
from fastgpt_kernels import host
from fastgpt_kernels.record import Record, Sizes, records

FAST = "kernels+compile"


def with_flags() -> list[Record]:
    return [*records("model"), *records("train")]


def contenders(arch: str = "") -> list[Variant]:
    """The fast path first. Without a GPU (`arch` "sm_90" or so) it is eager, as are all others."""
    if not arch:
        names = ("eager", *(f"{op.name} eager" for op in with_flags()))
        return [Variant(name, kernels="eager") for name in names]
    fast: dict[str, Any] = {"kernels": "triton", "compile": True, "graph": True}
    # First what is not decided yet, in case that time runs out.
    switched = {
        op.name: "triton" for op in with_flags() if op.library and arch not in op.measured_faster
    }
    switched |= {op.name: "eager" for op in with_flags() if op.name not in switched}
    for op in with_flags():
        if op.limits(Sizes(), torch.bfloat16, arch):
            del switched[op.name]
    others = [Variant(f"{op} {to}", overrides={op: to}, **fast) for op, to in switched.items()]
    return [Variant(FAST, **fast), *others]


def worth(row: dict[str, Any], base_ms: float) -> list[float]:
    """ms a step that the kernel saves, and its interval's ends."""
    ratio = row["ratio"]
    if row["variant"].endswith(" triton"):  # this row has the kernel, the fast path has not
        return [(1 - ratio[k]) * base_ms for k in ("ratio", "high", "low")]
    return [(ratio[k] - 1) * base_ms for k in ("ratio", "low", "high")]


def main(argv: list[str]) -> int:
    parser = setup.parser("ablate", __doc__)
    parser.add_argument("preset", nargs="?", default="gpt2")
    step.add_measuring_arguments(parser)
    args, flags = setup.parse(parser, argv)
    gpu = torch.cuda.is_available() and flags.get("device") != "cpu"
    setup.say_small()
    if not gpu:
        print("every op is eager here: all ratios should be 1")
    result = results.Result("ablate", argv, {"rounds": args.rounds, "flags": flags})
    try:
        config, vocab_size = setup.configure(args.preset, flags)
        machine = setup.machine_of(config)
        peak = machine.peak
    except UserError as e:
        parser.error(str(e))
    result.data["settings"]["peak"] = str(peak)
    print(f"\n{args.preset}: {setup.describe(config, vocab_size)}; peak {peak}", flush=True)

    def keep(done: Sequence[turns.Measured]) -> None:
        result.rows[:] = step.rows_of(done, args.preset, config, vocab_size, peak)
        for row in result.rows[1:]:
            if row.get("ratio", {}).get("low"):
                row["worth_ms"] = worth(row, result.rows[0]["median_ms"])
        result.save(args.out)

    found = turns.measure(
        contenders(host.arch(machine.device.index or 0) if gpu else ""),
        config,
        vocab_size,
        rounds=args.rounds,
        turn_s=args.turn_seconds,
        alive=args.alive,
        builders=args.builders,
        judge=step.judge(config.model.dropout),
        progress=keep,
    )
    keep(found)
    step.show(result.rows)
    for row in result.rows:
        if "worth_ms" in row:
            saved, low, high = row["worth_ms"]
            op = row["variant"].split()[0]
            print(f"  {op}: its kernel is worth {saved:+.3f} ms [{low:+.3f}, {high:+.3f}] a step")
    if path := result.finish(args.out):
        print(f"written: {path}")
    return 1 if any(row["problem"] for row in result.rows) else 0
