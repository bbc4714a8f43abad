"""python -m bench compare OLD NEW [PRESET]: which of two commits trains faster?

    python -m bench compare v0.1 HEAD gpt2 --variant compile

Both are checked out aside, and their training steps are interleaved. The ratio is NEW's time over
OLD's, with a 95 % interval. Exit code 0: not slower; 1: slower; 2: nothing could be compared.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bench import processes, results, setup, step
from bench.variants import choose
from fastgpt.errors import UserError


@contextmanager
def checkouts(refs: Sequence[str]) -> Iterator[list[str]]:
    """Makes a worktree per ref, gone afterwards. Raises UserError for a ref that is none."""
    with tempfile.TemporaryDirectory() as folder:
        places: list[str] = []
        try:
            for i, ref in enumerate(refs):
                place = str(Path(folder, str(i)))
                git("worktree", "add", "--detach", "--quiet", place, f"{ref}^{{commit}}")
                places.append(place)
            yield places
        finally:
            for place in places:
                git("worktree", "remove", "--force", place)


def git(*args: str) -> None:
    """Runs git in the checkout. Raises UserError with its last line."""
    done = subprocess.run(["git", *args], cwd=results.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(done.stderr.strip().splitlines()[-1])


def main(argv: list[str]) -> int:
    parser = setup.Parser("compare", __doc__)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("preset", nargs="?", default="gpt2")
    parser.add_argument("--variant", default="", help="of `bench step`; default: the fast path")
    step.add_plan(parser)
    args, flags = parser.parse(argv)
    result = results.Result("compare", argv, {"flags": flags})
    config, vocab_size = setup.configure(args.preset, flags)
    gpu = setup.machine(config).device.type == "cuda"
    (variant,) = choose(args.variant or ("kernels+compile" if gpu else "eager"), "", gpu)
    with checkouts([args.old, args.new]) as places:
        named = zip((args.old, args.new), places, strict=True)
        pair = [replace(variant, name=name, root=place) for name, place in named]
        plan = args.rounds, args.turn_seconds, args.sustained
        found = processes.measure(pair, config, vocab_size, *plan)
    result.rows[:] = step.rows_of(found, args.preset, config, vocab_size)
    step.show(result.rows)
    result.end(args.out)
    if any(row["problem"] for row in result.rows):
        return 2
    return 1 if result.rows[1]["ratio"]["verdict"] == "slower" else 0
