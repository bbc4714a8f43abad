"""python -m bench step [PRESET ...]: the whole training step, as it is and as others do it.

    python -m bench step gpt2 shakespeare_char
    python -m bench step gpt2 --batch_size=64 --peer-path ~/nanoGPT
    python -m bench step gpt2 --sweep n_layer

Flags of `fastgpt train` work here too; a step has one micro-batch unless they say otherwise. Tokens
are random. Every variant starts from the same weights and first has to reach eager's losses and
gradient norms on the same batch: a wrong one gets no time.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench import provenance, results, setup, turns
from bench.setup import at_least
from bench.stats import MIN_ROUNDS, ratio_of_medians
from bench.tables import table
from bench.turns import Measured
from bench.variants import Variant, contenders
from fastgpt.config.schema import Config
from fastgpt.errors import UserError

SWEEPS = {"batch": "batch_size"} | {k: k for k in ("block_size", "n_layer", "n_embd")}
Rows = list[dict[str, Any]]


def add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that measures steps takes; `turn_arguments` are those of turns.measure."""
    gpu = torch.cuda.is_available()
    least = at_least(MIN_ROUNDS)
    parser.add_argument("--rounds", type=least, default=15 if gpu else 8, help="turns each")
    seconds = 1.0 if gpu else 0.1
    parser.add_argument("--turn-seconds", type=float, default=seconds, dest="turn_s")
    parser.add_argument(
        "--alive",
        choices=["all", "one"],
        default="all",
        help="one: only one variant at a time on the GPU, for models of which several do not fit",
    )
    parser.add_argument(
        "--builders", type=at_least(1), default=3 if gpu else 1, help="built at the same time"
    )


def turn_arguments(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("rounds", "turn_s", "alive", "builders")}


def measure(
    result: results.Result,
    variants: Sequence[Variant],
    preset: str,
    flags: dict[str, str],
    args: argparse.Namespace,
    amend: Callable[[Rows], object] = lambda rows: None,
    more: dict[str, int] | None = None,
) -> Rows:
    """Measure a preset's step; print the table, and return the rows, which are in `result` too.

    All there is so far is saved after each round, with what `amend` does to the rows.
    """
    config, vocab_size = setup.configure(preset, flags)
    peak = setup.machine(config).peak
    result.data["settings"][f"{preset} peak"] = str(peak)
    print(f"\n{preset}: {setup.describe(config, vocab_size)}; peak {peak}", flush=True)
    before = len(result.rows)

    def keep(found: Sequence[Measured]) -> None:
        result.rows[before:] = rows_of(found, preset, config, vocab_size, more or {})
        amend(result.rows[before:])
        result.save(args.out)

    keep(turns.measure(variants, config, vocab_size, progress=keep, **turn_arguments(args)))
    show(result.rows[before:])
    return result.rows[before:]


def rows_of(
    found: Sequence[Measured], preset: str, config: Config, vocab_size: int, more: dict[str, int]
) -> Rows:
    """Result rows; ratios are of each variant's time to the first sound one's."""
    flops, peak = vars(setup.flops_per_token(config, vocab_size)), setup.machine(config).peak
    tokens = config.optim.rows * config.model.block_size
    base = next((m for m in found if m.samples), None)
    where = " ".join([preset, *(f"{k}={v}" for k, v in more.items())])
    rows = []
    for m in found:
        row: dict[str, Any] = {
            "key": f"{where} {m.variant.name}",
            "preset": preset,
            "variant": m.variant.name,
            **more,
            "problem": m.problem or ("" if m.samples else results.NOT_YET),
            "losses": [x for x in m.built.get("losses", []) if math.isfinite(x)],
            "first_grad_norm": next(filter(math.isfinite, m.built.get("grad_norms", [])), None),
            "ops": m.built.get("choices", []),
        }
        if m.samples:
            row |= results.timed(m.samples)
            rate = tokens / (row["median_ms"] * 1e-3)
            row |= {
                "tokens_per_second": rate,
                **{name: count * rate / peak.flops for name, count in flops.items()},
                "peak_memory_bytes": m.peak_bytes,
                "reserved_memory_bytes": m.reserved_bytes,
                "warm_up_s": m.built["warm_up_s"],
            }
            if base is not None and m is not base:
                compared = ratio_of_medians(m.samples, base.samples)
                row["ratio"] = results.ratio(base.variant.name, compared)
        rows.append(row)
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Fastest first, then what has no time, and why."""
    lines = []
    for row in sorted(rows, key=lambda r: r.get("median_ms", math.inf)):
        if row["problem"]:
            continue
        lines.append(
            [
                row["variant"],
                f"{row['median_ms']:.2f} [{row['q1_ms']:.2f}, {row['q3_ms']:.2f}]",
                f"{row['tokens_per_second']:,.0f}",
                " / ".join(f"{100 * row[k]:.1f}" for k in ("mfu", "mfu_causal", "mfu_6n")),
                f"{row['peak_memory_bytes'] / 2**30:.2f}",
                f"{row['warm_up_s']:.1f}",
                f"{row['losses'][0]:.4f} -> {row['losses'][-1]:.4f}",
                results.said(row) or "1",
            ]
        )
    head = ["variant", "ms a step", "tokens/s", "MFU / causal / 6N, %", "GiB", "warm-up s"]
    print(table([*head, f"loss, {turns.CHECK_STEPS} steps", "time ratio"], lines))
    for row in rows:
        if row["problem"]:
            print(f"  {row['variant']}: {row['problem']}")


def points(
    args: argparse.Namespace, preset: str, flags: dict[str, str]
) -> Iterator[tuple[dict[str, str], dict[str, int]]]:
    """(flags, {name: value}) of each point of a sweep; without one there is a single point.

    Values double around the preset's own; the head dim stays as the width grows.
    """
    if not args.sweep:
        yield flags, {}
        return
    config, _ = setup.configure(preset, flags)
    name, m = SWEEPS[args.sweep], config.model
    middle = config.optim.batch_size if args.sweep == "batch" else getattr(m, name)
    ratios = (0.25, 0.5, 1, 2) if config.system.device != "cpu" else (0.5, 1, 2)
    values = sorted({max(1, int(middle * r)) for r in ratios})
    if args.values:
        try:
            values = [int(v) for v in args.values.split(",")]
        except ValueError:
            raise UserError(f"--values={args.values}: wanted whole numbers, as 1,2,4") from None
        if min(values) < 1:
            raise UserError(f"--values={args.values}: must be at least 1")
    for value in values:
        changed = flags | {name: str(value)}
        if name == "n_embd":
            heads, rest = divmod(value, head_dim := m.n_embd // m.n_head)
            if rest:
                raise UserError(
                    f"--values: n_embd {value} is no multiple of the head dim {head_dim}"
                )
            changed["n_head"] = str(heads)
        yield changed, {args.sweep: value}


def main(argv: list[str]) -> int:
    parser = setup.Parser("step", __doc__)
    parser.add_argument("presets", nargs="*", help="default: gpt2 shakespeare_char")
    parser.add_argument("--variants", default="", help="comma-separated; default: what can run")
    parser.add_argument("--peer-path", default="", help="a nanoGPT checkout; its model.py is used")
    parser.add_argument("--sweep", choices=sorted(SWEEPS), help="grow one size")
    parser.add_argument("--values", default="", help="the sweep's values, comma-separated")
    add_measuring_arguments(parser)
    args, flags = parser.parse(argv)
    setup.say_small()
    result = results.Result("step", argv, {"rounds": args.rounds, "flags": flags})
    result.data["settings"] |= provenance.peer(args.peer_path)
    with parser.user_errors():
        gpu = setup.device_of(flags).type == "cuda"
        variants, skipped = contenders(args.variants, args.peer_path, gpu)
        for preset in args.presets or ["gpt2", "shakespeare_char"]:
            for point, more in list(points(args, preset, flags)):
                measure(result, variants, preset, point, args, more=more)
    for name, why in skipped.items():
        print(f"  {name}: {why}")
    return result.end(args.out)
