"""python -m bench NAME [ARGS]: NAME --help tells more."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

# A checkout needs no installation: the kernels live in a folder of their own.
if importlib.util.find_spec("fastgpt_kernels") is None:
    sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "kernels"))

COMMANDS = {
    "kernels": "each op, forward and backward, against whatever else is installed",
    "step": "the whole training step: ms, tokens/s, MFU, memory, losses side by side",
    "ablate": "what each kernel is worth in the whole step",
    "waterfall": "where the milliseconds of a step go, from the device's peak down",
    "convergence": "who reaches a loss first: optimizers, implementations, a peer",
    "curves": "the fast path's losses against eager fp32's, over seeds",
    "all": "the above in order of worth, inside a time budget",
    "compare": "two result files, or two git refs: faster, slower, or no difference",
}
# A command is its module's `main`, unless it shares a module with another one.
SHARED = {"curves": "whole_runs"}


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__, *(f"{name:12} {what}" for name, what in COMMANDS.items()), sep="\n")
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        print(f"bench: {name}: no such benchmark; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"bench.{SHARED.get(name, name)}")
    return getattr(module, name if name in SHARED else "main")(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
