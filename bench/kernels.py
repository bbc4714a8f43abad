"""The kernels against PyTorch's own, cuDNN's and liger-kernel's: one command on one GPU.

    python -m bench kernels [attention layer_norm ...] [--rounds 30] [--sweep] [--out FOLDER]

Every provider of an op gets the same random inputs, first has to be right (error against fp64 at
most twice eager PyTorch's at the same dtype) and only then is timed: device events, cold L2,
providers interleaved, medians with quartiles, and the ratio to fastgpt with a bootstrap interval.
Without a GPU it runs a tiny size on the CPU, to show that it runs; those times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench import kernel_cases, provenance, results, roof, setup
from bench.kernel_cases import Case, Provider
from bench.kernel_heads import linear_cross_entropy
from bench.setup import at_least
from bench.stats import MIN_ROUNDS, Ratio, ratio_of_medians, summarize
from fastgpt.model.device import synchronize
from fastgpt_kernels.tools.timing import interleaved

OURS = "fastgpt"
CASES = kernel_cases.CASES | {"linear_cross_entropy": linear_cross_entropy}
WIDTHS, VOCABULARIES = (1024, 1280, 1600, 4096), (8192, 32768, 128256)
SWEEPS = {
    "attention": (512, 2048, 4096),
    "layer_norm": WIDTHS,
    "add_layer_norm": WIDTHS,
    "bias_gelu": tuple(4 * w for w in WIDTHS),
    "cross_entropy": VOCABULARIES,
    "linear_cross_entropy": VOCABULARIES,
}
SMALL_SWEEPS = {op: (32, 128) for op in SWEEPS}


class Handed(torch.autograd.Function):
    """A leaf as the result of an op: a fresh copy forward, the gradient untouched backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


class Pass:
    """How one provider's pass is prepared, before the clock starts, and run."""

    def __init__(self, case: Case, provider: Provider, kind: str) -> None:
        self.case, self.provider, self.kind = case, provider, kind
        self.leaves = [x.detach().requires_grad_() for x in provider.leaves(case.inputs)]
        self.dys = provider.dys(case.dys)

    def inputs(self) -> list[Tensor]:
        return [Handed.apply(x) for x in self.leaves] if self.case.owned else self.leaves

    def outputs(self, inputs: list[Tensor]) -> list[Tensor]:
        y = self.provider.forward(*inputs)
        return list(y) if isinstance(y, tuple) else [y]

    def gradients(self, inputs: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(outputs, inputs, self.dys))

    def prepare(self) -> tuple[list[Tensor], list[Tensor]]:
        inputs = self.inputs()
        return inputs, self.outputs(inputs) if self.kind == "backward" else []

    def run(self, prepared: tuple[list[Tensor], list[Tensor]]) -> None:
        inputs, outputs = prepared
        if self.kind != "backward":
            outputs = self.outputs(inputs)
        if self.kind != "forward":
            self.gradients(inputs, outputs)

    def results(self) -> list[Tensor]:
        """What the oracle speaks of: outputs and gradients."""
        inputs = self.inputs()
        outputs = self.outputs(inputs)
        gradients = self.gradients(inputs, outputs)
        return self.case.pick(self.provider.collect([y.detach() for y in outputs], gradients))


def relative_errors(results: Sequence[Tensor], oracle: Sequence[Tensor]) -> list[float]:
    """Relative Frobenius error of each output and gradient."""
    return [
        ((x.double() - y).norm() / y.norm().clamp(min=1e-300)).item()
        for x, y in zip(results, oracle, strict=True)
    ]


def judge(case: Case) -> dict[str, dict[str, Any]]:
    """By provider its errors, and a problem where it fails or errs over twice what eager does."""
    oracle = case.oracle()
    found: dict[str, dict[str, Any]] = {}
    for provider in sorted(case.providers, key=lambda p: p.name != "eager"):
        try:
            results = Pass(case, provider, "both").results()
        except Exception as error:  # another library's failure is that row's result
            found[provider.name] = {"problem": reason(error)}
            continue
        errors = relative_errors(results, oracle)
        found[provider.name] = {"errors": errors, "problem": ""}
        eps = [torch.finfo(x.dtype).eps for x in results]
        # Where eager itself fails (no memory), its errors are taken to be of rounding alone.
        eager = found["eager"].get("errors", eps)
        allowed = [2 * e + u for e, u in zip(eager, eps, strict=True)]
        if not all(e <= a for e, a in zip(errors, allowed, strict=True)):  # NaN fails
            listed = ", ".join(f"{e:.1e}" for e in errors)
            found[provider.name]["problem"] = f"wrong: relative errors {listed}"
    return found


def measure(case: Case, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """One row a provider and pass."""
    judged = judge(case)
    rows: list[dict[str, Any]] = []
    for kind, work in case.work.items():
        sound = [p for p in case.providers if not judged[p.name]["problem"]]
        passes, failed = rehearse([Pass(case, provider, kind) for provider in sound], device)
        memory = {p.provider.name: peak_memory(p, device) for p in passes}
        times = interleaved(
            [p.run for p in passes], device, rounds, prepare=[p.prepare for p in passes]
        )
        by_name = {p.provider.name: t for p, t in zip(passes, times, strict=True)}
        for name, verdict in judged.items():
            verdict = verdict | ({"problem": failed[name]} if name in failed else {})
            row = {"op": case.name, "size": case.size, "pass": kind, "provider": name, **verdict}
            if name in by_name:
                s = summarize(by_name[name])
                scale = 1e12 if case.unit == "TFLOP/s" else 1e9
                row |= {
                    "median_ms": s.median,
                    "q1_ms": s.q1,
                    "q3_ms": s.q3,
                    "samples_ms": by_name[name],
                    "rate": work / (s.median * 1e-3) / scale,
                    "unit": case.unit,
                    "peak_memory_bytes": memory[name],
                }
                if OURS in by_name and name != OURS:
                    r = ratio_of_medians(by_name[OURS], by_name[name])
                    row |= {"ours_over_it": [r.ratio, r.low, r.high], "ours_is": r.verdict}
            rows.append(row)
        rows += [
            {"op": case.name, "size": case.size, "pass": kind, "provider": n, "problem": why}
            for n, why in case.skipped.items()
        ]
    return sorted(rows, key=lambda row: (row["pass"], row.get("median_ms", float("inf"))))


def rehearse(passes: list[Pass], device: torch.device) -> tuple[list[Pass], dict[str, str]]:
    """The passes that can be run by themselves, and why the others cannot, by provider."""
    fit, failed = [], {}
    for one in passes:
        try:
            one.run(one.prepare())
            synchronize(device)
            fit.append(one)
        except Exception as error:  # as in `judge`
            failed[one.provider.name] = reason(error)
    return fit, failed


def reason(error: Exception) -> str:
    """A row's problem: the kind of error and its first line."""
    return f"{type(error).__name__}: {error}".split("\n")[0]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The rows of one case, fastest first."""
    for kind in dict.fromkeys(row["pass"] for row in rows):
        here = [row for row in rows if row["pass"] == kind]
        print(f"\n{here[0]['op']} {kind}, {here[0]['size']}")
        for row in here:
            if "median_ms" not in row:
                print(f"  {row['provider']:28} -- {row['problem']}")
                continue
            text = f"{row['median_ms']:9.4f} ms [{row['q1_ms']:.4f}, {row['q3_ms']:.4f}]"
            text += f" {row['rate']:7.1f} {row['unit']}"
            if "share_of_roof" in row:
                text += f" ({row['share_of_roof']:.0%} of the roof)"
            text += f"  error {max(row['errors']):.1e}"
            if "ours_is" in row:
                text += f"  fastgpt/it {Ratio(*row['ours_over_it'])}"
            print(f"  {row['provider']:28} {text}")


def peak_memory(prepared: Pass, device: torch.device) -> int:
    """Bytes that a pass takes besides its inputs; 0 on a CPU, where nobody counts."""
    if device.type != "cuda":
        return 0
    given = prepared.prepare()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    prepared.run(given)
    return torch.cuda.max_memory_allocated(device) - before


def main(argv: list[str]) -> int:
    parser = setup.parser("kernels", __doc__)
    parser.add_argument("ops", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument(
        "--rounds", type=at_least(MIN_ROUNDS), default=30, help="timings of each provider"
    )
    parser.add_argument("--sweep", action="store_true", help="over T, width and vocabulary too")
    gpu = torch.cuda.is_available()
    setup.add_out(parser)
    args = parser.parse_args(argv)
    if unknown := [op for op in args.ops if op not in CASES]:
        parser.error(f"no op {unknown[0]!r}: there are {', '.join(CASES)}")
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    if not gpu:
        print("no GPU: tiny sizes on the CPU, where fastgpt runs plain PyTorch; times mean nothing")
    with setup.one_thread(device):
        return run(args, device, argv)


def run(args: argparse.Namespace, device: torch.device, argv: list[str]) -> int:
    """Measure, show and save what `main` was asked for. 1: one of our own kernels is wrong."""
    gpu = device.type == "cuda"
    roofs = roof.measure(device)
    result = results.Result("kernels", argv, {"rounds": args.rounds, "roofs": roofs})
    print(" · ".join([provenance.device_name(), *(f"{v:,.1f} {k}" for k, v in roofs.items())]))
    result.save(args.out)
    for op in args.ops or CASES:
        for size in (0, *(SWEEPS[op] if gpu else SMALL_SWEEPS[op])) if args.sweep else (0,):
            torch.manual_seed(0)
            case = CASES[op](device, size)
            found = measure(case, device, args.rounds)
            for row in found:
                row["key"] = " | ".join(row[k] for k in ("op", "size", "pass", "provider"))
                if "rate" in row:
                    row["share_of_roof"] = row["rate"] / roofs[row["unit"]]
            show(found)
            result.rows.extend(found)
            result.save(args.out)
            del case
            gc.collect()
            torch._dynamo.reset()  # or the recompile limit ends the next op's compiling
            if gpu:
                torch.cuda.empty_cache()
    if path := result.finish(args.out):
        print(f"written: {path}")
    ours_wrong = [r for r in result.rows if r["provider"].startswith(OURS) and r["problem"]]
    return 1 if ours_wrong else 0
