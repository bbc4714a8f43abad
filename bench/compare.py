"""python -m bench compare A B: two result files, or two git refs. Faster, slower, no difference?

    python -m bench compare old.json new.json
    python -m bench compare v0.1 HEAD gpt2 --variant compile

The ratio is B's time over A's, with a 95 % interval. Files: every row that both have; they should
be from the same device. Refs: both are checked out aside and their training steps take turns in
one run. Exit code 0: nothing is slower; 1: something is; 2: nothing could be compared, or from
too few samples to say.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bench import results
from bench.provenance import ROOT
from bench.stats import TOO_FEW, Ratio, ratio_of_independent_medians, ratio_of_medians
from bench.tables import table


def compare_files(a: Path, b: Path) -> tuple[list[tuple[str, Ratio]], list[str]]:
    """Ratios b / a of the rows that both have, and what makes the comparison doubtful.

    Raises ValueError if they cannot be compared.
    """
    old, new = results.load(a), results.load(b)
    if old["name"] != new["name"]:
        raise ValueError(f"{a} is of {old['name']}, {b} of {new['name']}")
    warnings = []
    for key in ("device", "torch", "triton", "cuda", "python"):
        x, y = (d["environment"].get(key) for d in (old, new))
        if x != y:
            warnings.append(f"{key} differs: {x} and {y}")
    times = [{r["key"]: r["samples_ms"] for r in d["rows"] if not r["problem"]} for d in (old, new)]
    both = [k for k in times[0] if k in times[1]]
    if not both:
        raise ValueError(f"{a} and {b} have no measured row in common")
    for d, path in ((old, a), (new, b)):
        warnings += [f"{path}: {r['key']}: {r['problem']}" for r in d["rows"] if r["problem"]]
    return [(k, ratio_of_independent_medians(times[1][k], times[0][k])) for k in both], warnings


@contextmanager
def checkouts(refs: list[str]) -> Iterator[list[str]]:
    """A worktree a ref, gone afterwards. Raises ValueError for a ref that is none."""
    with tempfile.TemporaryDirectory() as folder:
        places = []
        try:
            for i, ref in enumerate(refs):
                place = str(Path(folder, str(i)))
                _git("worktree", "add", "--detach", "--quiet", place, f"{ref}^{{commit}}")
                places.append(place)
            yield places
        finally:
            for place in places:
                _git("worktree", "remove", "--force", place)


def _git(*args: str) -> None:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1])


def compare_refs(a: str, b: str, argv: list[str]) -> tuple[list[tuple[str, Ratio]], list[str]]:
    """Ratios of the training step of two commits, measured in turns."""
    import torch

    from bench import setup, step, turns
    from bench.variants import contenders
    from fastgpt.errors import UserError

    gpu = torch.cuda.is_available()
    parser = setup.Parser("compare REF REF", __doc__, out=False)
    parser.add_argument("preset", nargs="?", default="gpt2")
    parser.add_argument("--variant", default="kernels+compile" if gpu else "eager")
    step.add_measuring_arguments(parser)
    args, flags = parser.parse(argv)
    setup.say_small()
    try:
        (variant,), _ = contenders(args.variant, "", gpu)
        config, vocab_size = setup.configure(args.preset, flags)
    except UserError as e:
        raise ValueError(str(e)) from e
    with checkouts([a, b]) as places:
        pair = [replace(variant, name=n, root=p) for n, p in zip((a, b), places, strict=True)]
        found = turns.measure(pair, config, vocab_size, **step.turn_arguments(args))
    problems = [f"{m.variant.name}: {m.problem}" for m in found if m.problem]
    if problems:
        raise ValueError("; ".join(problems))
    old, new = found
    return [(f"{args.preset} {args.variant}", ratio_of_medians(new.samples, old.samples))], []


def main(argv: list[str]) -> int:
    if len(argv) < 2 or "-h" in argv or "--help" in argv:
        print(__doc__)
        return 0 if {"-h", "--help"} & set(argv) else 2
    a, b, *rest = argv
    try:
        if a.endswith(".json") or b.endswith(".json"):
            if rest:
                raise ValueError(f"{rest[0]}: not understood with two files")
            ratios, warnings = compare_files(Path(a), Path(b))
        else:
            ratios, warnings = compare_refs(a, b, rest)
    except ValueError as e:
        print(f"bench compare: {e}", file=sys.stderr)
        return 2
    for warning in warnings:
        print(f"  note: {warning}")
    print(table(["what", "B / A [95 %], B is"], [[key, str(ratio)] for key, ratio in ratios]))
    verdicts = {ratio.verdict for _, ratio in ratios}
    return 1 if "slower" in verdicts else 2 if verdicts == {TOO_FEW} else 0
