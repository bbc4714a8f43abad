"""The versions of PyTorch and Triton that are supported.

The tests run with those of constraints.txt; `make gate GATE_ARGS="--triton DIR"` compiles the
kernels with another Triton. The ends of PyTorch follow from its own release notes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

# The oldest and the newest; those between are of the same kind.
SUPPORTED = {"torch": ((2, 11), (2, 15)), "triton": ((3, 6), (3, 9))}


def outside(installed: Mapping[str, str]) -> str | None:
    """Returns which package is older or newer than supported, or None if none is."""
    for package, (oldest, newest) in SUPPORTED.items():
        found = re.match(r"(\d+)\.(\d+)", installed.get(package, ""))
        if found and not oldest <= (int(found[1]), int(found[2])) <= newest:
            ends = " to ".join(f"{major}.{minor}" for major, minor in (oldest, newest))
            return f"{package} {installed[package]} is not among {ends}, which are supported"
    return None


@functools.cache
def untested() -> str | None:
    """Returns `outside` of the installed packages."""
    installed = {}
    for package in SUPPORTED:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return outside(installed)
