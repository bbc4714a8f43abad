"""Which versions of PyTorch and Triton are supported.

The tests run with those of constraints.txt; with both ends of Triton the kernels are compiled too
(`make gate GATE_ARGS="--triton DIR"`). The ends of PyTorch follow from its own notes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

# The oldest and the newest; those between are of the same kind.
SUPPORTED = {"torch": ((2, 11), (2, 15)), "triton": ((3, 6), (3, 9))}


def outside(installed: Mapping[str, str]) -> str:
    """What is older or newer than that, in words; empty if nothing is."""
    for package, (oldest, newest) in SUPPORTED.items():
        found = re.match(r"(\d+)\.(\d+)", installed.get(package, ""))
        if found and not oldest <= (int(found[1]), int(found[2])) <= newest:
            ends = " to ".join(f"{major}.{minor}" for major, minor in (oldest, newest))
            return f"{package} {installed[package]} is not among {ends}, which are supported"
    return ""


@functools.cache
def untested() -> str:
    """`outside` of what is installed here."""
    installed = {}
    for package in SUPPORTED:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return outside(installed)
