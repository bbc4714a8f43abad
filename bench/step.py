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
import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import provenance, results, setup, turns
from bench.setup import at_least
from bench.stats import MIN_ROUNDS, Ratio, ratio_of_medians, summarize
from bench.tables import table
from bench.turns import Measured
from bench.variants import HF, PEER, Variant
from fastgpt.config.schema import Config
from fastgpt.errors import UserError
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.model.peaks import Peak
from fastgpt.train import mfu

# Relative difference from the reference that rounding explains, and dropout's other random numbers.
LOSS_TOLERANCE, NORM_TOLERANCE = 0.01, 0.05
DROPOUT_FACTOR = 4
SWEEPS = {"batch": "batch_size"} | {k: k for k in ("block_size", "n_layer", "n_embd")}


def contenders(names: str, peer_path: str, gpu: bool) -> tuple[list[Variant], dict[str, str]]:
    """The variants asked for, and why others are not there. Raises UserError."""
    peer = str(Path(peer_path).expanduser().resolve()) if peer_path else ""
    peer_name = Path(peer).name or "peer"
    if peer and not Path(peer, "model.py").is_file():
        raise UserError(f"--peer-path={peer_path}: there is no model.py in it")
    known = {
        "eager": Variant("eager"),
        "compile": Variant("compile", compile=True),
        "kernels": Variant("kernels", kernels="triton"),
        "kernels+compile": Variant("kernels+compile", kernels="triton", compile=True, graph=True),
        "peer": Variant(f"{peer_name}, eager", kind=PEER, path=peer),
        "peer+compile": Variant(f"{peer_name}, compile", kind=PEER, path=peer, compile=True),
        "hf": Variant("transformers, eager", kind=HF),
        "hf+compile": Variant("transformers, compile", kind=HF, compile=True),
    }
    if names:
        chosen = names.split(",")
        for name in chosen:
            if name not in known:
                raise UserError(f"--variants: no {name!r}; there are {', '.join(known)}")
            if name.startswith("peer") and not peer:
                raise UserError(f"--variants: {name} needs --peer-path")
        return [known[n] for n in chosen], {}
    skipped = {}
    chosen = ["eager", "compile", "kernels", "kernels+compile", "peer+compile", "hf+compile"]
    if not gpu:
        chosen = ["eager", "peer", "hf"]
        skipped = {
            "compile": "not built without a GPU unless --variants names it",
            "kernels": "no GPU",
            "kernels+compile": "no GPU",
        }
    if not peer:
        chosen = [c for c in chosen if not c.startswith("peer")]
    if importlib.util.find_spec("transformers") is None:
        chosen = [c for c in chosen if not c.startswith("hf")]
        skipped["transformers"] = "not installed"
    return [known[n] for n in chosen], skipped


def judge(dropout: float) -> Callable[[Sequence[Measured]], None]:
    """Mark variants whose first losses or gradient norms are not the first sound variant's."""
    factor = DROPOUT_FACTOR if dropout else 1

    def compare(found: Sequence[Measured]) -> None:
        built = [m for m in found if not m.problem]
        for m in built:
            loss_off = apart(m.built["losses"], built[0].built["losses"])
            # Norms of later steps differ as the weights drift apart; the first sees all gradients.
            norm_off = apart(m.built["grad_norms"][:1], built[0].built["grad_norms"][:1])
            if not (loss_off <= factor * LOSS_TOLERANCE and norm_off <= factor * NORM_TOLERANCE):
                m.problem = (
                    f"wrong: losses differ from {built[0].variant.name}'s by {loss_off:.1%}, "
                    f"the first gradient norm by {norm_off:.1%}"
                )

    return compare


def apart(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest relative difference; infinite where one is not finite."""
    pairs = list(zip(a, b, strict=True))
    if not all(map(math.isfinite, [*a, *b])):
        return math.inf
    return max(abs(x - y) / abs(y) for x, y in pairs)


def rows_of(
    found: Sequence[Measured],
    preset: str,
    config: Config,
    vocab_size: int,
    peak: Peak,
    **more: Any,
) -> list[dict[str, Any]]:
    """Result rows; ratios are of each variant's time to the first sound one's."""
    flops = vars(mfu.flops_per_token(sizes_only(config, vocab_size)))
    o = config.optim
    tokens = o.rows * config.model.block_size
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
            s = summarize(m.samples)
            rate = tokens / (s.median * 1e-3)
            row |= {
                "samples_ms": m.samples,
                "median_ms": s.median,
                "q1_ms": s.q1,
                "q3_ms": s.q3,
                "tokens_per_second": rate,
                **{name: count * rate / peak.flops for name, count in flops.items()},
                "peak_memory_bytes": m.peak_bytes,
                "reserved_memory_bytes": m.reserved_bytes,
                "warm_up_s": m.built["warm_up_s"],
            }
            if base is not None and m is not base:
                r = ratio_of_medians(m.samples, base.samples)
                row["ratio"] = results.ratio(base.variant.name, r)
        rows.append(row)
    return rows


def sizes_only(config: Config, vocab_size: int) -> GPT:
    """The model without memory: nothing is drawn or stored."""
    with torch.device("meta"):
        return GPT(ModelShape.of(config.model, vocab_size))


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Fastest first, then what has no time and why."""
    lines = []
    for row in sorted(rows, key=lambda r: r.get("median_ms", math.inf)):
        if row["problem"]:
            continue
        r = row.get("ratio")
        lines.append(
            [
                row["variant"],
                f"{row['median_ms']:.2f} [{row['q1_ms']:.2f}, {row['q3_ms']:.2f}]",
                f"{row['tokens_per_second']:,.0f}",
                " / ".join(f"{100 * row[k]:.1f}" for k in ("mfu", "mfu_causal", "mfu_6n")),
                f"{row['peak_memory_bytes'] / 2**30:.2f}",
                f"{row['warm_up_s']:.1f}",
                f"{row['losses'][0]:.4f} -> {row['losses'][-1]:.4f}",
                str(Ratio(r["ratio"], r["low"], r["high"])) if r else "1",
            ]
        )
    head = ["variant", "ms a step", "tokens/s", "MFU / causal / 6N, %", "GiB", "warm-up s"]
    print(table([*head, f"loss, {turns.CHECK_STEPS} steps", "time ratio"], lines))
    for row in rows:
        if row["problem"]:
            print(f"  {row['variant']}: {row['problem']}")


def sweep_values(name: str, config: Config, given: str, gpu: bool) -> list[int]:
    """Values of a sweep: doubling around the preset's own."""
    if given:
        try:
            values = [int(v) for v in given.split(",")]
        except ValueError:
            raise UserError(f"--values={given}: wanted whole numbers, as 1,2,4") from None
        if min(values) < 1:
            raise UserError(f"--values={given}: must be at least 1")
        return values
    section = config.optim if name == "batch" else config.model
    middle = getattr(section, SWEEPS[name])
    ratios = (0.25, 0.5, 1, 2) if gpu else (0.5, 1, 2)
    return sorted({max(1, int(middle * r)) for r in ratios})


def at_value(flags: dict[str, str], preset: str, name: str, value: int) -> dict[str, str]:
    """Flags for one point of a sweep; the head dim stays as the width grows."""
    changed = flags | {SWEEPS[name]: str(value)}
    if name == "n_embd":
        m = setup.configure(preset, flags)[0].model
        head_dim = m.n_embd // m.n_head
        if value % head_dim:
            raise UserError(f"--values: n_embd {value} is no multiple of the head dim {head_dim}")
        changed["n_head"] = str(value // head_dim)
    return changed


def main(argv: list[str]) -> int:
    parser = setup.parser("step", __doc__)
    parser.add_argument("presets", nargs="*", help="default: gpt2 shakespeare_char")
    parser.add_argument("--variants", default="", help="comma-separated; default: what can run")
    parser.add_argument("--peer-path", default="", help="a nanoGPT checkout; its model.py is used")
    parser.add_argument("--sweep", choices=sorted(SWEEPS), help="grow one size")
    parser.add_argument("--values", default="", help="the sweep's values, comma-separated")
    add_measuring_arguments(parser)
    args, flags = setup.parse(parser, argv)
    gpu = torch.cuda.is_available() and flags.get("device") != "cpu"
    setup.say_small()
    result = results.Result("step", argv, {"rounds": args.rounds, "flags": flags})
    if args.peer_path:
        peer = Path(args.peer_path).expanduser()
        result.data["settings"]["peer_commit"] = provenance.commit(peer)
    try:
        variants, skipped = contenders(args.variants, args.peer_path, gpu)
        for preset in args.presets or ["gpt2", "shakespeare_char"]:
            config, vocab_size = setup.configure(preset, flags)
            peak = setup.machine_of(config).peak
            points: list[tuple[dict[str, str], dict[str, int]]] = [(flags, {})]
            if args.sweep:
                values = sweep_values(args.sweep, config, args.values, gpu)
                points = [(at_value(flags, preset, args.sweep, v), {args.sweep: v}) for v in values]
            for point, more in points:
                config, vocab_size = setup.configure(preset, point)
                result.data["settings"][f"{preset} peak"] = str(peak)
                print(f"\n{preset}: {setup.describe(config, vocab_size)}; peak {peak}", flush=True)
                before = len(result.rows)
                where = (preset, config, vocab_size, peak, more)
                keep = partial(_keep, result, before, where, args.out)

                found = turns.measure(
                    variants,
                    config,
                    vocab_size,
                    rounds=args.rounds,
                    turn_s=args.turn_seconds,
                    alive=args.alive,
                    builders=args.builders,
                    judge=judge(config.model.dropout),
                    progress=keep,
                )
                keep(found)
                show(result.rows[before:])
        path = result.finish(args.out)
    except UserError as e:
        parser.error(str(e))
    for name, why in skipped.items():
        print(f"  {name}: {why}")
    if path:
        print(f"written: {path}")
    return 1 if any(row["problem"] for row in result.rows) else 0


def _keep(
    result: results.Result,
    before: int,
    where: tuple[str, Config, int, Peak, dict[str, int]],
    out: Path | None,
    found: Sequence[Measured],
) -> Path | None:
    """Put the rows of what is measured so far behind the first `before`, and save."""
    preset, config, vocab_size, peak, more = where
    result.rows[before:] = rows_of(found, preset, config, vocab_size, peak, **more)
    return result.save(out)


def add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that measures steps takes."""
    gpu = torch.cuda.is_available()
    least = at_least(MIN_ROUNDS)
    parser.add_argument("--rounds", type=least, default=15 if gpu else 8, help="turns each")
    parser.add_argument("--turn-seconds", type=float, default=1.0 if gpu else 0.1)
    parser.add_argument(
        "--alive",
        choices=["all", "one"],
        default="all",
        help="one: only one variant at a time on the GPU, for models of which several do not fit",
    )
    parser.add_argument(
        "--builders", type=at_least(1), default=3 if gpu else 1, help="built at the same time"
    )
    setup.add_out(parser)
