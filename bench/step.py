"""python -m bench step [PRESET ...]: the whole training step, as it is and as others do it.

    python -m bench step gpt2 shakespeare_char
    python -m bench step gpt2 --batch_size=64 --peer-path ~/nanoGPT --sustained
    python -m bench step gpt2 --swap op.attention=hopper --swap op.bias_gelu=eager
    python -m bench step gpt2 --swap each

Flags of `fastgpt train` work here too. A step has one micro-batch of random tokens unless they say
otherwise. Every variant starts from the same weights and has to reach the first one's losses and
gradient norms on the same batch: a wrong one gets no time. --swap measures the fast path against
itself with other settings, and "each" swaps every op for every other implementation of it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench import power, processes, results, setup
from bench.processes import Measured
from bench.results import Row
from bench.stats import MIN_ROUNDS, ratio_of_medians
from bench.variants import choose, swaps
from fastgpt.config.schema import Config


def add_plan(parser: setup.Parser) -> None:
    """Adds --rounds, --turn-seconds and --sustained."""
    rounds, seconds = (15, 1.0) if torch.cuda.is_available() else (8, 0.1)
    parser.add_argument(
        "--rounds", type=setup.at_least(MIN_ROUNDS), default=rounds, help="of turns"
    )
    parser.add_argument("--turn-seconds", type=float, default=seconds)
    parser.add_sustained()


def rows_of(found: Sequence[Measured], preset: str, config: Config, vocab_size: int) -> list[Row]:
    """Returns result rows; ratios are of each variant's time to the first sound one's."""
    flops, peak = setup.flops_per_token(config, vocab_size), setup.machine(config).peak
    tokens = config.optim.rows * config.model.block_size
    base = next((m for m in found if m.turns), None)
    rows = []
    for m in found:
        row: Row = {
            "key": f"{preset} {m.variant.name}",
            "preset": preset,
            "variant": m.variant.name,
            "tokens": tokens,
            "problem": m.problem or ("" if m.turns else results.NOT_YET),
            "losses": [x for x in m.built.get("losses", []) if math.isfinite(x)],
            "first_grad_norm": next(filter(math.isfinite, m.built.get("grad_norms", [])), None),
            "ops": m.built.get("ops", []),
        }
        if m.turns:
            row |= results.timed(m.samples)
            rate = tokens / (row["median_ms"] * 1e-3)
            row |= {
                "tokens_per_second": rate,
                **{name: count * rate / peak.flops for name, count in flops.items()},
                "peak_memory_bytes": max(t["peak_bytes"] for t in m.turns),
                "reserved_memory_bytes": max(t["reserved_bytes"] for t in m.turns),
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
                r = ratio_of_medians(m.samples, base.samples)
                row["ratio"] = results.ratio(base.variant.name, r)
                ms = statistics.median(base.samples)
                ends = [None if x is None else (x - 1) * ms for x in (r.low, r.high)]
                row["difference_ms"] = [(r.ratio - 1) * ms, *ends]
        rows.append(row)
    return rows


COLUMNS: dict[str, Callable[[Row], str]] = {
    "ms per step": lambda r: f"{r['median_ms']:.2f} [{r['q1_ms']:.2f}, {r['q3_ms']:.2f}]",
    "tokens/s": lambda r: f"{r['tokens_per_second']:,.0f}",
    "MFU / causal / 6N, %": lambda r: " / ".join(
        f"{100 * r[k]:.1f}" for k in ("mfu", "mfu_causal", "mfu_6n")
    ),
    "GiB": lambda r: f"{r['peak_memory_bytes'] / 2**30:.2f}",
    "J/step": lambda r: f"{r['joules_per_step']:.1f}",
    "mJ/token": lambda r: f"{r['millijoules_per_token']:.3f}",
    "MHz": lambda r: f"{r['clock_mhz']:.0f}",
    "clock held by": lambda r: ", ".join(r["throttled"]),
    "time ratio": lambda r: results.ratio_text(r) or "1",
    "difference, ms": lambda r: f"{r['difference_ms'][0]:+.2f}",
}


def show(rows: Sequence[Row]) -> None:
    """Prints a table, fastest first, then which variants have no time, and why."""
    print(results.columns(rows, "variant", COLUMNS))
    for row in rows:
        if row["problem"]:
            print(f"  {row['variant']}: {row['problem']}")
    if nvml := power.open_gpu()[1]:
        print(f"  no energy and clock: {nvml}")


def main(argv: list[str]) -> int:
    parser = setup.Parser("step", __doc__)
    parser.add_argument("presets", nargs="*", default=["gpt2", "shakespeare_char"])
    parser.add_argument("--variants", default="", help="comma-separated; default: what can run")
    parser.add_argument("--swap", action="append", default=[], metavar="SETTING=VALUE")
    parser.add_argument("--peer-path", default="", help="a nanoGPT checkout; its model.py is used")
    add_plan(parser)
    args, flags = parser.parse(argv)
    gpu = torch.cuda.is_available() and flags.get("device") != "cpu"
    kept = {"rounds": args.rounds, "flags": flags, "sustained_s": args.sustained}
    if args.peer_path:
        kept["peer_commit"] = results.commit(Path(args.peer_path).expanduser())
    result = results.Result("step", argv, kept)
    for preset in args.presets:
        config, vocab_size = setup.configure(preset, flags)
        found = swaps(args.swap, gpu, config, vocab_size) if args.swap else []
        if args.variants or not args.swap:
            found = choose(args.variants, args.peer_path, gpu) + found
        variants = list({v.name: v for v in found}.values())
        peak, before = setup.machine(config).peak, len(result.rows)
        kept[f"{preset} peak"] = str(peak)
        state = "sustained: the clock has settled under load" if args.sustained else "short"
        print(f"\n{preset}: {setup.describe(config, vocab_size)}; peak {peak}")
        print(f"{state}; {args.rounds} turns of {args.turn_seconds:g} s each", flush=True)

        def keep(
            found: Sequence[Measured],
            at: int = before, run: tuple[str, Config, int] = (preset, config, vocab_size),
        ) -> None:  # fmt: skip
            result.rows[at:] = rows_of(found, *run)
            result.save(args.out)

        processes.measure(
            variants, config, vocab_size, args.rounds, args.turn_seconds, args.sustained, keep
        )
        show(result.rows[before:])
    return result.end(args.out)
