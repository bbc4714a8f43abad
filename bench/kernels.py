"""The kernels against PyTorch's own, cuDNN's and liger-kernel's: one command on one GPU.

    python -m bench kernels [attention layer_norm ...] [--rounds 30] [--sweep] [--out FOLDER]

Every provider of an op gets the same random inputs, first has to be right (error against fp64 at
most twice eager PyTorch's at the same dtype) and only then is timed: device events, cold L2,
providers interleaved, medians with quartiles, and the ratio to fastgpt with a bootstrap interval.
Without a GPU it runs a tiny size on the CPU, to show that it runs; those times mean nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import provenance, results, roof, setup
from bench.cases import CASES, Case, complete
from bench.rivals import Provider
from bench.stats import MIN_ROUNDS, Ratio, ratio_of_medians
from bench.timing import interleaved
from fastgpt.model.device import synchronize

OURS = "fastgpt"
WIDTHS, VOCABULARIES = (1024, 1280, 1600, 4096), (8192, 32768, 128256)
SWEEPS = {
    "attention": (512, 2048, 4096),
    "cross_entropy": VOCABULARIES,
    "linear_cross_entropy": VOCABULARIES,
}  # of all others the model's width
SMALL_SWEEP = (32, 128)
Rows = list[dict[str, Any]]


class Handed(torch.autograd.Function):
    """A leaf as the result of an op: a fresh copy forward, the gradient untouched backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


class Pass:
    """How one provider's pass (forward, backward or both) is prepared, before the clock starts,
    and run."""

    def __init__(self, case: Case, provider: Provider, kind: str) -> None:
        self.case, self.provider, self.kind = case, provider, kind
        self.leaves = [x.detach().requires_grad_() for x in provider.leaves(case.inputs)]
        self.dys = provider.dys(case.dys)

    def inputs(self) -> list[Tensor]:
        return [Handed.apply(x) for x in self.leaves] if self.case.owned else self.leaves

    def outputs(self, inputs: list[Tensor]) -> list[Tensor]:
        y = self.provider.forward(*inputs)
        return list(y) if isinstance(y, tuple) else [y]

    def prepare(self) -> tuple[list[Tensor], list[Tensor]]:
        inputs = self.inputs()
        return inputs, self.outputs(inputs) if self.kind == "backward" else []

    def run(self, prepared: tuple[list[Tensor], list[Tensor]]) -> tuple[list[Tensor], ...]:
        """(outputs, gradients); none of a forward pass."""
        inputs, outputs = prepared
        outputs = outputs or self.outputs(inputs)
        if self.kind == "forward":
            return outputs, []
        return outputs, list(torch.autograd.grad(outputs, inputs, self.dys))

    def rehearse(self) -> None:
        self.run(self.prepare())
        synchronize(self.case.device)

    def peak_memory(self) -> int:
        """Bytes that the pass takes besides its inputs; 0 on a CPU, which does not count."""
        if self.case.device.type != "cuda":
            return 0
        given = self.prepare()
        torch.cuda.reset_peak_memory_stats(self.case.device)
        before = torch.cuda.memory_allocated(self.case.device)
        self.run(given)
        return torch.cuda.max_memory_allocated(self.case.device) - before


def errors_of(
    case: Case, provider: Provider, truth: Sequence[Tensor]
) -> tuple[list[float], list[float]]:
    """Relative Frobenius error of each output and gradient, and the unit of its dtype."""
    one = Pass(case, provider, "both")
    y, gradients = one.run(one.prepare())
    found = case.pick(provider.collect([x.detach() for x in y], gradients))
    errors = [
        ((x.double() - t).norm() / t.norm().clamp(min=1e-300)).item()
        for x, t in zip(found, truth, strict=True)
    ]
    return errors, [torch.finfo(x.dtype).eps for x in found]


def judge(case: Case) -> dict[str, dict[str, Any]]:
    """By provider its errors, and a problem if it fails or errs over twice what eager does."""
    truth = case.truth()
    found: dict[str, dict[str, Any]] = {}
    for provider in sorted(case.providers, key=lambda p: p.name != "eager"):
        made, problem = attempt(errors_of, case, provider, truth)
        if made is None:
            found[provider.name] = {"problem": problem}
            continue
        errors, eps = made
        found[provider.name] = {"errors": errors, "problem": ""}
        # If eager itself fails (no memory), its errors are taken to be of rounding alone.
        eager = found["eager"].get("errors", eps)
        allowed = [2 * e + u for e, u in zip(eager, eps, strict=True)]
        if not all(e <= a for e, a in zip(errors, allowed, strict=True)):  # NaN fails
            listed = ", ".join(f"{e:.1e}" for e in errors)
            found[provider.name]["problem"] = f"wrong: relative errors {listed}"
    return found


def measure(case: Case, rounds: int) -> Rows:
    """One row a provider and pass, fastest first."""
    judged = judge(case)
    rows: Rows = []
    for kind, work in case.work.items():
        sound = [Pass(case, p, kind) for p in case.providers if not judged[p.name]["problem"]]
        # A pass may fail when it is run by itself.
        failed = {p.provider.name: attempt(p.rehearse)[1] for p in sound}
        passes = [p for p in sound if not failed[p.provider.name]]
        memory = [p.peak_memory() for p in passes]
        runs, prepare = [p.run for p in passes], [p.prepare for p in passes]
        times = interleaved(runs, case.device, rounds, prepare=prepare)
        measured = {
            p.provider.name: {**results.timed(t), "unit": case.unit, "peak_memory_bytes": bytes_}
            for p, t, bytes_ in zip(passes, times, memory, strict=True)
        }
        for name, verdict in judged.items():
            row = verdict | {"problem": verdict["problem"] or failed[name]}
            if mine := measured.get(name):
                scale = 1e12 if case.unit == "TFLOP/s" else 1e9
                row |= mine | {"rate": work / (mine["median_ms"] * 1e-3) / scale}
                if OURS in measured and name != OURS:
                    r = ratio_of_medians(measured[OURS]["samples_ms"], mine["samples_ms"])
                    row |= {"ours_over_it": [r.ratio, r.low, r.high], "ours_is": r.verdict}
            rows.append({"pass": kind, "provider": name, **row})
        rows += [{"pass": kind, "provider": n, "problem": w} for n, w in case.skipped.items()]
    rows = [{"op": case.name, "size": case.size, **row} for row in rows]
    return sorted(rows, key=lambda row: (row["pass"], row.get("median_ms", float("inf"))))


def attempt(do: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    """What came of it; or None, and the error's kind and first line: the row's problem."""
    try:
        return do(*args), ""
    except Exception as error:  # another library's failure is that row's result
        return None, f"{type(error).__name__}: {error}".split("\n")[0]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The rows of one case, fastest first."""
    for kind in dict.fromkeys(row["pass"] for row in rows):
        here = [row for row in rows if row["pass"] == kind]
        print(f"\n{here[0]['op']} {kind}, {here[0]['size']}")
        for row in here:
            text = f"-- {row['problem']}"
            if "median_ms" in row:
                text = f"{row['median_ms']:9.4f} ms [{row['q1_ms']:.4f}, {row['q3_ms']:.4f}]"
                text += f" {row['rate']:7.1f} {row['unit']}"
                if "share_of_roof" in row:
                    text += f" ({row['share_of_roof']:.0%} of the roof)"
                text += f"  error {max(row['errors']):.1e}"
                if "ours_is" in row:
                    text += f"  fastgpt/it {Ratio(*row['ours_over_it'])}"
            print(f"  {row['provider']:28} {text}")


class Session:
    """A run of cases: their rows against this device's roofs, shown and kept as they come.

    ours_failed  whether one of our own kernels was wrong or failed; others' failures are their own
    """

    def __init__(
        self, name: str, argv: list[str], rounds: int, device: torch.device, out: Path | None
    ):
        self.rounds, self.out, self.roofs = rounds, out, roof.measure(device)
        self.ours_failed = False
        self.result = results.Result(name, argv, {"rounds": rounds, "roofs": self.roofs})
        roofs = [f"{v:,.1f} {k}" for k, v in self.roofs.items()]
        print(" · ".join([provenance.device_name(), *roofs]))
        self.result.save(out)

    def measure(
        self, make: Callable[[], Case], *key: str, without: str = "", **labels: str
    ) -> Rows:
        """`key` names the columns whose values are a row's key, `labels` are further columns."""
        torch.manual_seed(0)
        case = complete(make(), without)
        found: Rows = [labels | row for row in measure(case, self.rounds)]
        for row in found:
            mine = row["provider"].startswith(OURS) and row["provider"] not in case.skipped
            self.ours_failed |= mine and bool(row["problem"])
            row["key"] = " | ".join(row[k] for k in key)
            if "rate" in row:
                row["share_of_roof"] = row["rate"] / self.roofs[row["unit"]]
        show(found)
        self.result.rows.extend(found)
        self.result.save(self.out)
        gc.collect()
        torch._dynamo.reset()  # or the recompile limit ends the next op's compiling
        torch.cuda.empty_cache()
        return found


def add_rounds(parser: setup.Parser) -> None:
    kind = setup.at_least(MIN_ROUNDS)
    parser.add_argument("--rounds", type=kind, default=30, help="timings of each provider")


def main(argv: list[str]) -> int:
    parser = setup.Parser("kernels", __doc__)
    parser.add_argument("ops", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    add_rounds(parser)
    parser.add_argument("--sweep", action="store_true", help="over T, width and vocabulary too")
    args = parser.parse_args(argv)
    if unknown := [op for op in args.ops if op not in CASES]:
        parser.error(f"no op {unknown[0]!r}: there are {', '.join(CASES)}")
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    if not gpu:
        print("no GPU: tiny sizes on the CPU, where fastgpt runs plain PyTorch; times mean nothing")
    with setup.one_thread(device):
        session = Session("kernels", argv, args.rounds, device, args.out)
        for op in args.ops or CASES:
            swept = (SWEEPS.get(op, WIDTHS) if gpu else SMALL_SWEEP) if args.sweep else ()
            for size in (0, *swept):
                session.measure(partial(CASES[op], device, size), "op", "size", "pass", "provider")
    session.result.end(args.out)
    return 1 if session.ours_failed else 0
