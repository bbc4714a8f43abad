"""python -m bench NAME [ARGS]; NAME --help lists its arguments."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("fastgpt_kernels") is None:  # a checkout needs no installation
    sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "kernels"))

COMMANDS = {
    "step": "the training step: variants, swapped ops, a peer; ms, MFU, joules, memory",
    "kernels": "each op's implementations and baselines; --sweep searches launch configs",
    "waterfall": "the milliseconds of a step: a picture, and a budget that adds up",
    "curves": "losses of variants over seeds, and races to a target loss",
    "compare": "the training steps of two git commits",
    "all": "all of this inside a time budget, and the decisions that follow",
}


def main(argv: list[str]) -> int:
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__, *(f"{name:12} {about}" for name, about in COMMANDS.items()), sep="\n")
        return 0 if argv else 2
    import torch

    from fastgpt.errors import UserError

    try:
        if name not in COMMANDS:
            raise UserError(f"unknown benchmark; there are {', '.join(COMMANDS)}")
        return importlib.import_module(f"bench.{name}").main(rest)
    except (UserError, torch.OutOfMemoryError) as e:
        print(f"bench {name}: {str(e).splitlines()[0]}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
