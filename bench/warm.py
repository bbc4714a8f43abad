"""python -m bench warm [PRESET]: compile the variants of `step`, all at once, for later commands.

Builds each variant in a process of its own, in parallel, and measures nothing: what they compile is
kept in PyTorch's and Triton's caches, where `step`, `waterfall` and a training run find it.
"""

from __future__ import annotations

import time
from typing import Any

from bench import results, setup, turns
from bench.variants import contenders


def main(argv: list[str]) -> int:
    parser = setup.Parser("warm", __doc__)
    parser.add_argument("preset", nargs="?", default="gpt2")
    parser.add_argument("--peer-path", default="", help="a nanoGPT checkout")
    args, flags = parser.parse(argv)
    setup.say_small()
    result = results.Result("warm", argv, {"flags": flags})
    with parser.user_errors():
        gpu = setup.device_of(flags).type == "cuda"
        variants, _ = contenders("", args.peer_path, gpu)
        config, vocab_size = setup.configure(args.preset, flags)
        began = time.perf_counter()
        found = turns.measure(variants, config, vocab_size, rounds=0, builders=len(variants))
    for m in found:
        row: dict[str, Any] = {"key": f"{args.preset} {m.variant.name}", "problem": m.problem}
        if m.built:
            row["samples_ms"] = [1e3 * m.built["warm_up_s"]]
        said = m.problem or f"{m.built['warm_up_s']:.1f} s"
        print(f"  {m.variant.name}: {said}")
        result.rows.append(row)
    print(f"{args.preset}: {len(found)} variants in {time.perf_counter() - began:.0f} s")
    return result.end(args.out)
