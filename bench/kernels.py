"""python -m bench kernels [OP ...]: each op's implementations against each other and baselines.

    python -m bench kernels attention layer_norm --rounds 30
    python -m bench kernels attention --sweep

All get the same random inputs at a preset's sizes (--preset gpt2, and flags of `fastgpt train`).
An implementation is timed if its error against the reference in fp32 or fp64 is at most twice that
of eager PyTorch. Passes are timed by device events from a cold L2, interleaved. --sweep times other
launch configs than those of the op's tables, on a GPU or with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench import baselines, power, results, setup, stats
from bench.baselines import Baseline, Function
from bench.interleave import Call, interleave, mark, ms_between, roofs
from bench.results import Row
from bench.stats import MIN_ROUNDS, ratio_of_medians
from fastgpt.model.build import sizes_of
from fastgpt.model.device import synchronize
from fastgpt_kernels.launch import Config, arch_on
from fastgpt_kernels.registry import ExampleInputs, OpSpec, Sizes, differentiate, normal, specs

OWN = "triton"  # others are compared with it, or with eager where it cannot run
ALONE = ", kernel alone"  # without the copies that its layout needs
SWEEP_GAIN = 0.02  # a config has to be faster by this, twice


@dataclass(frozen=True)
class Case:
    """Inputs of one call of an op in a run; `x` is the first."""

    op: OpSpec
    sizes: Sizes
    device: torch.device
    example: ExampleInputs
    x: Tensor
    autotune: bool = False

    @classmethod
    def of(cls, op: OpSpec, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
        """Returns the op's first example, in the dtypes of a run."""
        e = op.example_inputs(sizes, normal(device))[0]
        wide = [x is None or i in e.fp32_inputs for i, x in enumerate(e.inputs)]
        low = [x if w else x.to(dtype) for x, w in zip(e.inputs, wide, strict=True)]
        return cls(op, sizes, device, replace(e, inputs=low), low[0])

    @property
    def label(self) -> str:
        """Returns the shapes of tensors and the dtype."""
        shapes = ["x".join(map(str, x.shape)) for x in self.example.inputs if x is not None]
        return " ".join([*shapes, str(self.x.dtype).removeprefix("torch.")])

    def functions(self) -> tuple[dict[str, Function], dict[str, str]]:
        """Returns the op's implementations and baselines here, and why others cannot run."""
        known, here = self.op.implementations, (arch_on(self.device), self.x.dtype, self.sizes)
        reasons = {name: self.op.unsupported_reason(name, *here) for name in ("eager", *known)}
        found = {name: known[name].function for name, reason in reasons.items() if not reason}
        others, missing = baselines.of(self.op, self.device.type == "cuda", self.autotune)
        return found | others, {name: r for name, r in reasons.items() if r} | missing

    def judge(self, functions: Mapping[str, Function], repeats: int = 1) -> dict[str, Row]:
        """Returns each one's errors, and its problem if it fails or errs over twice eager's."""
        wide = torch.float64 if self.x.dtype == torch.float32 else torch.float32
        exact = [None if x is None else x.to(wide) for x in self.example.inputs]
        truth = differentiate(self.op.reference, replace(self.example, inputs=exact))
        unit, found = torch.finfo(self.x.dtype).eps, dict[str, Row]()
        allowed = [3 * unit] * len(truth)  # if eager itself fails, rounding alone
        for name, function in functions.items():
            try:
                first, *others = (differentiate(function, self.example) for _ in range(repeats))
                pairs = zip(first, truth, strict=True)
                off = [((x - t).norm() / t.norm()).item() for x, t in pairs]
            except Exception as error:  # another library's failure is that row's result
                found[name] = {"problem": f"{type(error).__name__}: {error}".split("\n")[0]}
                continue
            allowed = [2 * e + unit for e in off] if name == "eager" else allowed
            right = all(e <= most for e, most in zip(off, allowed, strict=True))  # NaN is not
            problem = "wrong: relative errors " + ", ".join(f"{e:.1e}" for e in off)
            found[name] = {"problem": "" if right else problem, "errors": off}
            for more in others:
                same = all(map(torch.equal, first, more))
                found[name]["same_bits"] = same and found[name].get("same_bits", True)
        return found

    def alone(self, baseline: Baseline) -> Case:
        """Returns the case of a baseline's kernel, whose inputs have its layout already."""
        assert baseline.layout
        inputs = self.example.call(baseline.layout, self.example.inputs)
        return replace(self, example=replace(self.example, inputs=inputs, keywords=()))

    def calls(self, function: Function, kind: str) -> Callable[[], Call]:
        """Returns a maker of calls of a pass: forward, backward or both. It runs untimed."""
        leaves = [None if x is None else x.detach().requires_grad_() for x in self.example.inputs]
        wanted = [x for x in leaves if x is not None]

        def outputs() -> list[Tensor]:
            y = self.example.call(function, leaves)
            return list(y) if isinstance(y, tuple) else [y]

        dys = [torch.ones_like(y) if not y.ndim else torch.randn_like(y) for y in outputs()]

        def make() -> Call:
            y = outputs() if kind == "backward" else []
            both: Call = lambda: torch.autograd.grad(y or outputs(), wanted, dys)  # noqa: E731
            return outputs if kind == "forward" else both

        return make


def measure(case: Case, rounds: int, roof: Mapping[str, float], repeats: int = 1) -> list[Row]:
    """Returns one row per function and pass."""
    functions, skipped = case.functions()
    rows, judged = list[Row](), case.judge(functions, repeats)
    sound = {n: (case, f) for n, f in functions.items() if not judged[n]["problem"]}
    for name, (_, function) in [*sound.items()]:
        other = baselines.SDPA.get(name, function)
        if isinstance(other, Baseline) and other.layout:
            sound[name + ALONE] = case.alone(other), other.kernel
            judged[name + ALONE] = judged[name]
    for kind, cost in case.op.cost(case.sizes, case.x.element_size()).items():
        unit, work = ("TFLOP/s", cost.flops / 1e12) if cost.flops else ("GB/s", cost.bytes / 1e9)
        makes = {name: c.calls(f, kind) for name, (c, f) in sound.items()}
        timed = interleave([*makes.values()], case.device, rounds)
        times = {name: results.timed(t) for name, t in zip(makes, timed, strict=True)}
        base = OWN if OWN in times else "eager"
        used = load(makes[base], case.device) if base in times else {}
        for name, row in [*judged.items(), *((n, {"problem": why}) for n, why in skipped.items())]:
            row = {"op": case.op.name, "size": case.label, "pass": kind, "provider": name, **row}
            row["key"] = " | ".join(row[k] for k in ("op", "size", "pass", "provider"))
            if name in times:
                rate = work / (times[name]["median_ms"] * 1e-3)
                row |= times[name] | {"rate": rate, "unit": unit}
                row |= {"share_of_roof": rate / roof[unit], **(used if name == base else {})}
                if name != base and base in times:
                    samples = [times[n]["samples_ms"] for n in (name, base)]
                    row["ratio"] = {"to": base, **ratio_of_medians(*samples)}
                if name + ALONE in times:
                    row["copies_ms"] = row["median_ms"] - times[name + ALONE]["median_ms"]
            rows.append(row)
    return rows


def show(rows: Sequence[Row]) -> None:
    """Prints the rows of one case, fastest first, then the problems of others."""
    base = next((row["ratio"]["to"] for row in rows if "ratio" in row), OWN)
    columns: dict[str, Callable[[Row], str]] = {
        "ms": lambda r: f"{r['median_ms']:.4f} [{r['q1_ms']:.4f}, {r['q3_ms']:.4f}]",
        "rate": lambda r: f"{r['rate']:.4g} {r['unit']}",
        "of the roof": lambda r: f"{r['share_of_roof']:.0%}",
        "error": lambda r: f"{max(r['errors']):.1e}",
        "W": lambda r: f"{r['watts']:.0f}",
        "MHz": lambda r: f"{r['clock_mhz']:.0f}",
        "copies, ms": lambda r: f"{r['copies_ms']:.4f}",
        f"time / {base}'s": lambda r: stats.describe(r["ratio"]),
    }
    for kind in dict.fromkeys(row["pass"] for row in rows):
        print(f"\n{rows[0]['op']} {kind}, {rows[0]['size']}")
        print(results.columns([r for r in rows if r["pass"] == kind], "provider", columns))
    for provider, problem in {r["provider"]: r["problem"] for r in rows if r["problem"]}.items():
        print(f"  {provider}: {problem}")


# --- launch configs ------------------------------------------------------------------------------


class Spied(dict):
    """Entries of a table that note the keys of lookups."""

    used: tuple[int, ...] = ()

    def __getitem__(self, key: int) -> Config:
        self.used = *self.used, key
        return super().__getitem__(key)


def is_table(value: Any) -> bool:
    """Returns True for a table of launch configs, by architecture and key."""
    inner = value.values() if isinstance(value, dict) else ()
    return any(isinstance(c, Config) for e in inner if isinstance(e, dict) for c in e.values())


def neighbours(config: Config) -> Iterator[Config]:
    """Yields configs with one other number: a tile, the warps or the stages."""
    for name, size in config.blocks.items():
        for other in (2 * size, size // 2) if size > 1 else ():  # 0 and 1 are switches
            yield replace(config, blocks={**config.blocks, name: other})
    for warps in {2 * config.num_warps, config.num_warps // 2} & {1, 2, 4, 8, 16}:
        yield replace(config, num_warps=warps)
    for stages in {config.num_stages - 1, config.num_stages + 1} - {0}:
        yield replace(config, num_stages=stages)


def sweep(case: Case, rounds: int) -> Iterator[Row]:
    """Yields a row per config of the op's tables. Prints the entries to paste into them."""
    arch, functions = arch_on(case.device), {"eager": case.op.reference, OWN: case.op.triton}
    run, module = case.calls(case.op.triton, "both"), sys.modules[case.op.triton.__module__]
    for place, table in [(n, v) for n, v in vars(module).items() if is_table(v)]:
        spy = Spied(table.get(arch) or table.get("default", {}))
        with patch.dict(table, {arch: spy}):
            run()()
        if not spy.used:
            continue
        key, start = spy.used[0], spy[spy.used[0]]
        configs = [start, *neighbours(start)]

        def under(config: Config, call: Call, table: Any = table, key: int = key) -> Any:
            with patch.dict(table, {arch: {key: config}}):
                return call()

        def make(config: Config, under: Callable[..., Any] = under) -> Callable[[], Call]:
            return lambda: lambda: under(config, lambda: run()())

        errors = {repr(c): under(c, lambda: case.judge(functions)[OWN]) for c in configs}
        sound = [c for c in configs if not errors[repr(c)]["problem"]]
        timed = interleave([make(config) for config in sound], case.device, rounds)
        times = {repr(config): t for config, t in zip(sound, timed, strict=True)}
        best = min(sound, key=lambda config: statistics.median(times[repr(config)]))
        r = ratio_of_medians(*interleave([make(best), make(start)], case.device, rounds))
        said = stats.describe(r)
        better = r["verdict"] == "faster" and r["ratio"] < 1 - SWEEP_GAIN
        entry = f"{key}: {best if better else start},  # {case.op.name} {case.label}"
        place = f"{module.__name__}.{place}[{arch!r}]"
        print(f"{place}, {len(sound)} configs, best / table: {said}\n    {entry}", flush=True)
        for config in configs:
            row = {"key": f"{place} {key} {config}", **errors[repr(config)]}
            row |= {"entry": f"{place}: {entry}; {said}"} if better and config is best else {}
            yield row if row["problem"] else row | results.timed(times[repr(config)])


def load(make: Callable[[], Call], device: torch.device, seconds: float = 0.5) -> Row:
    """Returns power and clock under calls back to back, or {} if NVML reads no GPU."""
    if (gpu := power.open_gpu()[0]) is None:
        return {}
    end, before = time.monotonic() + seconds, mark(device)
    with power.metered(gpu) as energy:
        while time.monotonic() < end:
            make()()
        after = mark(device)
        synchronize(device)
    watts = 1e3 * energy["joules"] / ms_between(before, after)
    return {"watts": watts, "clock_mhz": energy["clock_mhz"]}


def main(argv: list[str]) -> int:
    known = {op.name: op for op in specs()}
    parser = setup.Parser("kernels", __doc__)
    parser.add_argument("ops", nargs="*", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--preset", default="gpt2")
    parser.add_argument("--rounds", type=setup.at_least(MIN_ROUNDS), default=30)
    parser.add_argument("--repeats", type=setup.at_least(1), default=1, help="runs with equal bits")
    slow = "also time max-autotuned matmuls, which compile for minutes"
    parser.add_argument("--autotune", action="store_true", help=slow)
    parser.add_argument("--sweep", action="store_true", help="search launch configs")
    args, flags = parser.parse(argv)
    if unknown := [op for op in args.ops if op not in known]:
        parser.error(f"no op {unknown[0]!r}: there are {', '.join(known)}")
    config, vocab_size = setup.configure(args.preset, flags)
    sizes, device = sizes_of(config, vocab_size), setup.machine(config).device
    dtype = setup.machine(config).torch_dtype
    matmul, copy = roofs(device, dtype, 1 << (30 if device.type == "cuda" else 26))
    roof = {"TFLOP/s": matmul / 1e12, "GB/s": copy / 1e9}
    result = results.Result("kernels", argv, {"rounds": args.rounds, "roofs": roof})
    print(" · ".join(f"{value:,.1f} {unit}" for unit, value in roof.items()), flush=True)
    for name in args.ops or known:
        torch.manual_seed(0)
        case = replace(Case.of(known[name], sizes, device, dtype), autotune=args.autotune)
        found = [] if args.sweep else measure(case, args.rounds, roof, args.repeats)
        for row in sweep(case, args.rounds) if args.sweep else found:
            result.rows.append(row)
            result.save(args.out)
        if found:
            show(found)
        gc.collect()
        torch._dynamo.reset()  # or the recompile limit ends the next op's compiling
        torch.cuda.empty_cache()
    result.end(args.out)
    return int(any("errors" in r and r["problem"] and r["provider"] == OWN for r in result.rows))
