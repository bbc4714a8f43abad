"""python -m bench step [PRESET ...]: the whole training step, by variants and a peer.

    python -m bench step gpt2 shakespeare_char
    python -m bench step gpt2 --batch_size=64 --peer-path ~/nanoGPT --sustained
    python -m bench step gpt2 --swap op.attention=hopper --swap op.bias_gelu=eager

A step has one micro-batch of random tokens unless flags of `fastgpt train` say otherwise. Variants
start from the same weights, and must reach the first one's losses and gradient norm on the same
batch. A wrong one gets no time. --swap measures the fast path with other settings.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench import power, processes, results, setup, stats
from bench.processes import Measured
from bench.results import Row
from bench.stats import MIN_ROUNDS, ratio_of_medians
from bench.variants import choose, swaps
from fastgpt.config.schema import Config


def add_plan(parser: setup.Parser) -> None:
    """Adds --rounds, --turn-seconds and --sustained."""
    rounds, seconds = (15, 1.0) if torch.cuda.is_available() else (8, 0.1)
    parser.add_argument("--rounds", type=setup.at_least(MIN_ROUNDS), default=rounds)
    parser.add_argument("--turn-seconds", type=float, default=seconds)
    parser.add_sustained()


def rows_of(found: Sequence[Measured], preset: str, config: Config, vocab_size: int) -> list[Row]:
    """Returns result rows. Ratios are to the first variant that has a time."""
    flops, peak = setup.flops_per_token(config, vocab_size), setup.machine(config).peak
    tokens = config.optim.rows * config.model.block_size
    base, rows = next((m for m in found if m.turns), None), []
    for m in found:
        row: Row = {
            "key": f"{preset} {m.variant.name}", "preset": preset, "variant": m.variant.name,
            "tokens": tokens, "problem": m.problem or ("" if m.turns else results.NOT_YET),
            "losses": [x for x in m.built.get("losses", []) if math.isfinite(x)],
            "first_grad_norm": next(filter(math.isfinite, m.built.get("grad_norms", [])), None),
            "ops": m.built.get("ops", []),
        }  # fmt: skip
        if m.turns:
            row |= results.timed([t["ms"] for t in m.turns])
            rate = tokens / (row["median_ms"] * 1e-3)
            row |= {
                "tokens_per_second": rate,
                **{name: count * rate / peak.flops for name, count in flops.items()},
                "peak_memory_bytes": max(t["peak_bytes"] for t in m.turns),
                "warm_up_s": m.built["warm_up_s"],
            }
            if joules := [t["joules"] for t in m.turns if t["joules"] is not None]:
                row |= {
                    "joules_per_step": statistics.median(joules),
                    "millijoules_per_token": 1e3 * statistics.median(joules) / tokens,
                    "clock_mhz": statistics.fmean(t["clock_mhz"] for t in m.turns),
                    "throttled": sorted({reason for t in m.turns for reason in t["throttled"]}),
                }
            if base is not None and m is not base:
                r = ratio_of_medians(*([t["ms"] for t in x.turns] for x in (m, base)))
                row["ratio"] = {"to": base.variant.name, **r}
                ms = statistics.median(t["ms"] for t in base.turns)
                ends = [None if x is None else (x - 1) * ms for x in (r["low"], r["high"])]
                row["difference_ms"] = [(r["ratio"] - 1) * ms, *ends]
        rows.append(row)
    return rows


MFU = "mfu", "mfu_causal", "mfu_6n"
COLUMNS: dict[str, Callable[[Row], str]] = {
    "ms per step": lambda r: f"{r['median_ms']:.2f} [{r['q1_ms']:.2f}, {r['q3_ms']:.2f}]",
    "tokens/s": lambda r: f"{r['tokens_per_second']:,.0f}",
    "MFU / causal / 6N, %": lambda r: " / ".join(f"{100 * r[k]:.1f}" for k in MFU),
    "GiB": lambda r: f"{r['peak_memory_bytes'] / 2**30:.2f}",
    "J/step": lambda r: f"{r['joules_per_step']:.1f}",
    "mJ/token": lambda r: f"{r['millijoules_per_token']:.3f}",
    "MHz": lambda r: f"{r['clock_mhz']:.0f}",
    "throttled by": lambda r: ", ".join(r["throttled"]),
    "time ratio": lambda r: stats.describe(r["ratio"]) if "ratio" in r else "1",
    "difference, ms": lambda r: f"{r['difference_ms'][0]:+.2f}",
}


def show(rows: Sequence[Row]) -> None:
    """Prints a table, fastest first, then the problems of variants without a time."""
    print(results.columns(rows, "variant", COLUMNS))
    for row in rows:
        if row["problem"]:
            print(f"  {row['variant']}: {row['problem']}")
    if reason := power.open_gpu()[1]:
        print(f"  no energy and clock: {reason}")


def main(argv: list[str]) -> int:
    parser = setup.Parser("step", __doc__)
    parser.add_argument("presets", nargs="*", default=["gpt2", "shakespeare_char"])
    parser.add_argument("--variants", default="", help="comma-separated; default: all that run")
    parser.add_argument("--swap", action="append", default=[], metavar="SETTING=VALUE")
    parser.add_argument("--peer-path", default="", help="a nanoGPT checkout, for its model.py")
    add_plan(parser)
    args, flags = parser.parse(argv)
    gpu = torch.cuda.is_available() and flags.get("device") != "cpu"
    kept = {"rounds": args.rounds, "flags": flags, "sustained_s": args.sustained}
    if args.peer_path:
        kept["peer_commit"] = results.commit(Path(args.peer_path).expanduser())
    result = results.Result("step", argv, kept)
    for preset in args.presets:
        config, vocab_size = setup.configure(preset, flags)
        found = swaps(args.swap, gpu) if args.swap else []
        if args.variants or not args.swap:
            found = choose(args.variants, args.peer_path, gpu) + found
        variants = list({v.name: v for v in found}.values())
        peak, before = setup.machine(config).peak, len(result.rows)
        kept[f"{preset} peak"] = str(peak)
        state = "sustained, with a settled clock" if args.sustained else "short"
        print(f"\n{preset}: {setup.describe(config, vocab_size)}; peak {peak}")
        print(f"{state}; {args.rounds} turns of {args.turn_seconds:g} s each", flush=True)

        plan = args.rounds, args.turn_seconds, args.sustained
        for measured in processes.measure(variants, config, vocab_size, *plan):
            result.rows[before:] = rows_of(measured, preset, config, vocab_size)
            result.save(args.out)
        show(result.rows[before:])
    return result.end(args.out)
