"""The kernels against PyTorch's own, cuDNN's and liger-kernel's: one command on one GPU.

    python -m bench.kernels_gpu [attention layer_norm ...] [--rounds 30] [--out kernels.json]

Every provider of an op gets the same random inputs, first has to be right (error against fp64 at
most twice eager PyTorch's at the same dtype) and only then is timed: device events, cold L2,
providers interleaved, medians with quartiles, and the ratio to fastgpt with a bootstrap interval.
Without a GPU it runs a tiny size on the CPU, to show that it runs; those times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from bench.kernel_cases import CASES, Case, Provider
from bench.stats import ratio_of_medians, summarize
from fastgpt_kernels._timing import interleaved

ROOT = Path(__file__).resolve().parents[1]
OURS = "fastgpt"


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
            found[provider.name] = {"problem": f"{type(error).__name__}: {error}".split("\n")[0]}
            continue
        errors = relative_errors(results, oracle)
        found[provider.name] = {"errors": errors, "problem": ""}
        eps = [torch.finfo(x.dtype).eps for x in results]
        allowed = [2 * e + u for e, u in zip(found["eager"]["errors"], eps, strict=True)]
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
        passes = [Pass(case, provider, kind) for provider in sound]
        times = interleaved(
            [p.run for p in passes], device, rounds, prepare=[p.prepare for p in passes]
        )
        by_name = {p.name: t for p, t in zip(sound, times, strict=True)}
        for name, verdict in judged.items():
            row = {"op": case.name, "size": case.size, "pass": kind, "provider": name, **verdict}
            if name in by_name:
                s = summarize(by_name[name])
                scale = 1e12 if case.unit == "TFLOP/s" else 1e9
                row |= {
                    "median_ms": s.median,
                    "q1_ms": s.q1,
                    "q3_ms": s.q3,
                    "times_ms": by_name[name],
                    "rate": work / (s.median * 1e-3) / scale,
                    "unit": case.unit,
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
            text += f" {row['rate']:7.1f} {row['unit']}  error {max(row['errors']):.1e}"
            if "ours_is" in row:
                ratio, low, high = row["ours_over_it"]
                text += f"  fastgpt/it {ratio:.3f} [{low:.3f}, {high:.3f}] {row['ours_is']}"
            print(f"  {row['provider']:28} {text}")


def output_of(*command: str) -> str:
    """A command's output, or why there is none: provenance must not stop a measurement."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({type(error).__name__})"
    return done.stdout.strip() or "unknown"


def environment(device: torch.device) -> dict[str, str]:
    """What the numbers hold for."""
    sources = hashlib.sha256()
    for path in sorted([*ROOT.glob("bench/*.py"), *ROOT.glob("kernels/fastgpt_kernels/*.py")]):
        sources.update(path.read_bytes())
    query = "--query-gpu=name,driver_version,power.limit,clocks.sm,clocks.mem,temperature.gpu"
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU {platform.machine()}",
        "nvidia_smi": output_of("nvidia-smi", query, "--format=csv,noheader") if cuda else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": output_of("git", "rev-parse", "HEAD"),
        "sources_sha256": sources.hexdigest(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ops", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--rounds", type=int, default=30, help="timings of each provider")
    parser.add_argument("--out", type=Path, help="write everything here as JSON")
    args = parser.parse_args(arguments)
    if unknown := [op for op in args.ops if op not in CASES]:
        parser.error(f"no op {unknown[0]!r}: there are {', '.join(CASES)}")
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {args.rounds}")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        print("no GPU: tiny sizes on the CPU, where fastgpt runs plain PyTorch; times mean nothing")
    described = environment(device)
    print(" · ".join(f"{k} {v}" for k, v in described.items()))
    rows: list[dict[str, Any]] = []
    for op in args.ops or CASES:
        torch.manual_seed(0)
        case = CASES[op](device)
        rows += (found := measure(case, device, args.rounds))
        show(found)
        del case
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"environment": described, "rows": rows}, indent=1) + "\n")
    ours_wrong = [row for row in rows if row["provider"].startswith(OURS) and row["problem"]]
    return 1 if ours_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
