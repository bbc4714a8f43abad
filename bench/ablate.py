"""python -m bench ablate [PRESET]: what each kernel is worth in the whole training step.

The fast path, then the fast path with one op at a time switched to eager; the ratio says how much
longer the step takes without that kernel. The matrix products are on cuBLAS in the fast path, so
these are switched the other way, to Triton. Flags of `fastgpt train` work here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bench import results, setup, step, turns
from bench.variants import Variant
from fastgpt import mfu, ops
from fastgpt.device import DTYPES
from fastgpt.errors import UserError

FAST = "kernels+compile"


def contenders(gpu: bool) -> list[Variant]:
    """The fast path first. Without a GPU it is eager, and so are all the others."""
    fast: dict[str, Any] = {"kernels": "triton", "compile": True} if gpu else {"kernels": "eager"}
    fast["graph"] = gpu
    switched = {
        op: "triton" if gpu and op in ops.FASTER_THAN_CUBLAS else "eager" for op in ops.EAGER
    }
    others = [Variant(f"{op} {to}", overrides={op: to}, **fast) for op, to in switched.items()]
    return [Variant(FAST if gpu else "eager", **fast), *others]


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
        device, dtype = torch.device(config.system.device), DTYPES[config.system.dtype]
        peak = mfu.device_peak(device, dtype, config.system.peak_tflops)
    except UserError as e:
        parser.error(str(e))
    result.data["settings"]["peak"] = str(peak)
    print(f"\n{args.preset}: {setup.describe(config, vocab_size)}; peak {peak}", flush=True)

    def keep(done: Sequence[turns.Measured]) -> None:
        result.rows[:] = step.rows_of(done, args.preset, config, vocab_size, peak)
        for row in result.rows[1:]:
            if row.get("ratio", {}).get("low"):
                base = result.rows[0]["median_ms"]
                row["worth_ms"] = [(row["ratio"][k] - 1) * base for k in ("ratio", "low", "high")]
        result.save(args.out)

    found = turns.measure(
        contenders(gpu),
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
            worth, low, high = row["worth_ms"]
            op, to = row["variant"].split()
            if to == "triton":  # the switch itself is what would be gained
                worth, low, high = -worth, -high, -low
            print(f"  {op}: its kernel is worth {worth:+.3f} ms [{low:+.3f}, {high:+.3f}] a step")
    if path := result.finish(args.out):
        print(f"written: {path}")
    return 1 if any(row["problem"] for row in result.rows) else 0
