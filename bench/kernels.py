"""python -m bench kernels [OP ...]: each op's implementations against each other and baselines.

    python -m bench kernels attention layer_norm --rounds 30
    python -m bench kernels attention --sweep

All get the same random inputs at a preset's sizes (--preset gpt2, and flags of `fastgpt train`).
An implementation has to be right first: its error against the reference in more bits is at most
twice eager PyTorch's. Then its passes are timed by device events from a cold L2, interleaved.
--sweep tries launch configs beside those of the op's tables, wrong ones left out, and prints the
entries to paste. It needs a GPU; TRITON_INTERPRET=1 shows on a CPU that it works.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench import baselines, results, setup
from bench.interleave import Call, interleave, roofs
from bench.results import Row
from bench.stats import MIN_ROUNDS, ratio_of_medians
from fastgpt.model.build import sizes_of
from fastgpt_kernels.launch import Config, arch_on
from fastgpt_kernels.registry import ExampleInputs, OpSpec, Sizes, differentiate, normal, specs

OWN = "triton"  # other times are compared with this one's, or with eager's where it cannot run
ALONE = ", kernel alone"  # beside it, the time with the copies that PyTorch makes around it
SWEEP_GAIN = 0.02  # by so much a config has to be faster, in a second measurement
Function = Callable[..., Any]
Table = dict[str, dict[int, Config]]


@dataclass(frozen=True)
class Case:
    """An op at one size, with the inputs of a run's call; `x` is the first of them."""

    op: OpSpec
    sizes: Sizes
    device: torch.device
    example: ExampleInputs
    x: Tensor

    @classmethod
    def of(cls, op: OpSpec, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
        """Returns the op's first example, in the dtypes of a run."""
        e = op.example_inputs(sizes, normal(device))[0]
        low = [
            x if x is None or i in e.fp32_inputs else x.to(dtype) for i, x in enumerate(e.inputs)
        ]
        return cls(op, sizes, device, replace(e, inputs=low), low[0])

    @property
    def label(self) -> str:
        """Returns the shapes of tensors and the dtype."""
        shapes = ["x".join(map(str, x.shape)) for x in self.example.inputs if x is not None]
        return " ".join([*shapes, str(self.x.dtype).removeprefix("torch.")])

    def functions(self) -> tuple[dict[str, Function], dict[str, str]]:
        """Returns who computes the op here, eager PyTorch first, and why others do not."""
        known, here = self.op.implementations, (arch_on(self.device), self.x.dtype, self.sizes)
        reasons = {name: self.op.unsupported_reason(name, *here) for name in ("eager", *known)}
        found = {name: known[name].function for name, reason in reasons.items() if not reason}
        others, missing = baselines.of(self.op, self.device.type == "cuda")
        return found | others, {name: r for name, r in reasons.items() if r} | missing

    def judge(self, functions: Mapping[str, Function]) -> dict[str, Row]:
        """Returns the errors of each, and its problem if it fails or errs over twice eager's."""
        wide = torch.float64 if self.x.dtype == torch.float32 else torch.float32
        exact = [None if x is None else x.to(wide) for x in self.example.inputs]
        truth = differentiate(self.op.reference, replace(self.example, inputs=exact))
        unit, found = torch.finfo(self.x.dtype).eps, dict[str, Row]()
        allowed = [3 * unit] * len(truth)  # if eager itself fails, rounding alone
        for name, function in functions.items():
            try:
                pairs = zip(differentiate(function, self.example), truth, strict=True)
                off = [((x - t).norm() / t.norm()).item() for x, t in pairs]
            except Exception as error:  # another library's failure is that row's result
                found[name] = {"problem": f"{type(error).__name__}: {error}".split("\n")[0]}
                continue
            allowed = [2 * e + unit for e in off] if name == "eager" else allowed
            right = all(e <= most for e, most in zip(off, allowed, strict=True))  # NaN is not
            problem = "wrong: relative errors " + ", ".join(f"{e:.1e}" for e in off)
            found[name] = {"problem": "" if right else problem, "errors": off}
        return found

    def calls(self, function: Function, kind: str, own: Sequence[Any] = ()) -> Callable[[], Call]:
        """Returns a maker of calls of a pass (forward, backward or both); it runs before the clock.

        own  the inputs of a kernel alone, in the layout that it likes
        """
        given = own or self.example.inputs
        leaves = [None if x is None else x.detach().requires_grad_() for x in given]
        wanted = [x for x in leaves if x is not None]

        def outputs() -> list[Tensor]:
            y = function(*leaves) if own else self.example.call(function, leaves)
            return list(y) if isinstance(y, tuple) else [y]

        dys = [torch.ones_like(y) if not y.ndim else torch.randn_like(y) for y in outputs()]

        def make() -> Call:
            y = outputs() if kind == "backward" else []
            both: Call = lambda: torch.autograd.grad(y or outputs(), wanted, dys)  # noqa: E731
            return outputs if kind == "forward" else both

        return make


def measure(case: Case, rounds: int, roof: Mapping[str, float]) -> list[Row]:
    """Returns one row per function and pass, fastest first."""
    functions, skipped = case.functions()
    rows, judged = list[Row](), case.judge(functions)
    sound: dict[str, tuple[Function, Sequence[Any]]] = {}
    sound |= {n: (f, ()) for n, f in functions.items() if not judged[n]["problem"]}
    if case.op.name == "attention":
        for name in sound.keys() & baselines.SDPA.keys():
            sound[name + ALONE] = baselines.alone(name, case.x, case.sizes.n_head)
            judged[name + ALONE] = judged[name]
    for kind, cost in case.op.cost(case.sizes, case.x.element_size()).items():
        unit, work = ("TFLOP/s", cost.flops / 1e12) if cost.flops else ("GB/s", cost.bytes / 1e9)
        makes = {name: case.calls(f, kind, own) for name, (f, own) in sound.items()}
        timed = interleave([*makes.values()], case.device, rounds)
        times = {name: results.timed(t) for name, t in zip(makes, timed, strict=True)}
        base = OWN if OWN in times else "eager"
        for name, row in [*judged.items(), *((n, {"problem": why}) for n, why in skipped.items())]:
            row = {"op": case.op.name, "size": case.label, "pass": kind, "provider": name, **row}
            row["key"] = " | ".join(row[k] for k in ("op", "size", "pass", "provider"))
            if name in times:
                rate = work / (times[name]["median_ms"] * 1e-3)
                row |= times[name] | {"rate": rate, "unit": unit}
                row["share_of_roof"] = rate / roof[unit]
                if name != base and base in times:
                    samples = [times[n]["samples_ms"] for n in (name, base)]
                    row["ratio"] = results.ratio(base, ratio_of_medians(*samples))
                if name + ALONE in times:
                    row["copies_ms"] = row["median_ms"] - times[name + ALONE]["median_ms"]
            rows.append(row)
    return rows


def show(rows: Sequence[Row]) -> None:
    """Prints the rows of one case, fastest first, then why others have no time."""
    base = next((row["ratio"]["to"] for row in rows if "ratio" in row), OWN)
    columns: dict[str, Callable[[Row], str]] = {
        "ms": lambda r: f"{r['median_ms']:.4f} [{r['q1_ms']:.4f}, {r['q3_ms']:.4f}]",
        "rate": lambda r: f"{r['rate']:.4g} {r['unit']}",
        "of the roof": lambda r: f"{r['share_of_roof']:.0%}",
        "error": lambda r: f"{max(r['errors']):.1e}",
        "copies, ms": lambda r: f"{r['copies_ms']:.4f}",
        f"time / {base}'s": results.ratio_text,
    }
    for kind in dict.fromkeys(row["pass"] for row in rows):
        print(f"\n{rows[0]['op']} {kind}, {rows[0]['size']}")
        print(results.columns([r for r in rows if r["pass"] == kind], "provider", columns))
    for provider, problem in {r["provider"]: r["problem"] for r in rows if r["problem"]}.items():
        print(f"  {provider}: {problem}")


# --- launch configs ------------------------------------------------------------------------------


class Spied(dict):
    """Entries of a table that note which keys are looked up."""

    used: tuple[int, ...] = ()

    def __getitem__(self, key: int) -> Config:
        self.used = *self.used, key
        return super().__getitem__(key)


def tables() -> dict[str, Table]:
    """Returns the tables of launch configs in loaded modules, each once, by their place."""
    found: dict[int, tuple[str, Table]] = {}
    for place, module in [m for m in sys.modules.items() if m[0].startswith("fastgpt_kernels.")]:
        for name, value in vars(module).items():
            inner = [*value.values()] if isinstance(value, dict) else []
            configs = [c for e in inner for c in (e.values() if isinstance(e, dict) else [None])]
            if configs and all(isinstance(c, Config) for c in configs):
                found.setdefault(id(value), (f"{place}.{name}", value))
    return dict(found.values())


@contextlib.contextmanager
def replaced(table: Table, arch: str, found: dict[int, Config]) -> Iterator[None]:
    """Has a table return other entries on an architecture."""
    before = dict(table)
    table[arch] = found
    yield
    table.clear()
    table.update(before)


def lookups(run: Call, arch: str) -> list[tuple[str, Table, Spied]]:
    """Returns the tables that a call looks up, and their entries, which note the keys."""
    spies = [(n, t, Spied(t.get(arch) or t.get("default", {}))) for n, t in tables().items()]
    with contextlib.ExitStack() as stack:
        for _, table, spy in spies:
            stack.enter_context(replaced(table, arch, spy))
        run()
    return [found for found in spies if found[2].used]


def neighbours(config: Config) -> Iterator[Config]:
    """Yields configs that differ in one number: a tile, the warps or the stages."""
    for name, size in config.blocks.items():
        for other in (2 * size, size // 2) if size > 1 else ():  # 0 and 1 are switches
            yield replace(config, blocks={**config.blocks, name: other})
    for warps in {2 * config.num_warps, config.num_warps // 2} & {1, 2, 4, 8, 16}:
        yield replace(config, num_warps=warps)
    for stages in {config.num_stages - 1, config.num_stages + 1} - {0}:
        yield replace(config, num_stages=stages)


def sweep(case: Case, rounds: int) -> Iterator[Row]:
    """Yields a row for each config tried; prints the entries to paste into the tables."""
    arch, functions = arch_on(case.device), {"eager": case.op.reference, OWN: case.op.triton}
    run = case.calls(case.op.triton, "both")
    for place, table, spy in lookups(lambda: run()(), arch):
        key, start = spy.used[0], spy[spy.used[0]]
        configs = [start, *neighbours(start)]

        def under(config: Config, call: Call, table: Table = table, key: int = key) -> Any:
            with replaced(table, arch, {key: config}):
                return call()

        def make(config: Config, under: Callable[..., Any] = under) -> Callable[[], Call]:
            return lambda: lambda: under(config, lambda: run()())

        judge = lambda: case.judge(functions)[OWN]["problem"]  # noqa: E731
        judged = [under(config, judge) for config in configs]
        sound = [config for config, problem in zip(configs, judged, strict=True) if not problem]
        timed = interleave([make(config) for config in sound], case.device, rounds)
        times = {repr(config): t for config, t in zip(sound, timed, strict=True)}
        for config, problem in zip(configs, judged, strict=True):
            row = {"key": f"{place} {key} {config}", "problem": problem}
            yield row if problem else row | results.timed(times[repr(config)])
        best = min(sound, key=lambda config: statistics.median(times[repr(config)]))
        r = ratio_of_medians(*interleave([make(best), make(start)], case.device, rounds))
        kept = best if r.verdict == "faster" and r.ratio < 1 - SWEEP_GAIN else start
        print(f"{place}[{arch!r}], {len(sound)} configs; time of the best / the table's: {r}")
        print(f"    {key}: {kept},  # {case.op.name} {case.label}", flush=True)


def main(argv: list[str]) -> int:
    known = {op.name: op for op in specs()}
    parser = setup.Parser("kernels", __doc__)
    parser.add_argument("ops", nargs="*", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--preset", default="gpt2")
    parser.add_argument("--rounds", type=setup.at_least(MIN_ROUNDS), default=30)
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
        case = Case.of(known[name], sizes, device, dtype)
        for row in sweep(case, args.rounds) if args.sweep else measure(case, args.rounds, roof):
            result.rows.append(row)
            result.save(args.out)
        if not args.sweep:
            show([row for row in result.rows if row["op"] == name])
        gc.collect()
        torch._dynamo.reset()  # or the recompile limit ends the next op's compiling
        torch.cuda.empty_cache()
    result.end(args.out)
    return int(any("errors" in r and r["problem"] and r["provider"] == OWN for r in result.rows))
