"""python -m bench NAME [ARGS]: NAME --help tells more."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("fastgpt_kernels") is None:  # a checkout needs no installation
    sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "kernels"))

COMMANDS = {
    "step": "the whole training step: variants, ops swapped, a peer; ms, MFU, joules, memory",
    "kernels": "each op's implementations and baselines; --sweep searches launch configs",
    "waterfall": "where a step's milliseconds go: a picture, and a budget that adds up",
    "curves": "losses of variants over seeds, and races to a target loss",
    "compare": "two git refs: is the newer step faster, slower, or no different",
    "all": "step, waterfall and kernels inside a time budget, and what follows from them",
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__, *(f"{name:12} {what}" for name, what in COMMANDS.items()), sep="\n")
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        print(f"bench: {name}: no such benchmark; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    import torch

    from fastgpt.errors import UserError

    try:
        return importlib.import_module(f"bench.{name}").main(rest)
    except (UserError, torch.OutOfMemoryError) as e:
        print(f"bench {name}: {str(e).splitlines()[0]}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
