"""python -m bench compare OLD NEW [PRESET]: the training steps of two commits.

    python -m bench compare HEAD~1 HEAD gpt2 --variant compile

The commits' files are extracted to a temporary folder, and their steps interleaved. The ratio is
NEW's time over OLD's, with a 95 % interval. Exit code 0: not slower; 1: slower; 2: not compared.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import processes, results, setup, step
from bench.variants import choose
from fastgpt.errors import UserError


def check_out(ref: str, folder: Path) -> str:
    """Extracts a commit's files into a new folder, and returns it. Raises UserError."""
    command = ["git", "archive", f"{ref}^{{commit}}"]
    done = subprocess.run(command, cwd=results.ROOT, capture_output=True)
    if done.returncode:
        raise UserError(done.stderr.decode().strip().splitlines()[-1])
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", folder], input=done.stdout, check=True)
    return str(folder)


def main(argv: list[str]) -> int:
    parser = setup.Parser("compare", __doc__)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("preset", nargs="?", default="gpt2")
    parser.add_argument("--variant", default="", help="as of bench step; default: the fast path")
    step.add_plan(parser)
    args, flags = parser.parse(argv)
    result = results.Result("compare", argv, {"flags": flags})
    config, vocab_size = setup.configure(args.preset, flags)
    gpu = setup.machine(config).device.type == "cuda"
    refs = ("old", args.old), ("new", args.new)
    (variant,) = choose(args.variant or ("kernels+compile" if gpu else "eager"), "", gpu)
    with TemporaryDirectory() as folder:
        roots = {ref: check_out(ref, Path(folder, name)) for name, ref in refs}
        pair = [variant._replace(name=ref, root=root) for ref, root in roots.items()]
        plan = args.rounds, args.turn_seconds, args.sustained
        *_, found = processes.measure(pair, config, vocab_size, *plan)
    result.rows[:] = step.rows_of(found, args.preset, config, vocab_size)
    step.show(result.rows)
    result.end(args.out)
    if any(row["problem"] for row in result.rows):
        return 2
    return 1 if result.rows[1]["ratio"]["verdict"] == "slower" else 0
