"""Which versions of PyTorch and Triton the kernels are tested with."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

# The oldest and the newest; those between are of the same kind.
TESTED = {"torch": ((2, 11), (2, 15)), "triton": ((3, 6), (3, 9))}


def outside(installed: Mapping[str, str]) -> str:
    """What is older or newer than what is tested, in words; empty if nothing is."""
    for package, (oldest, newest) in TESTED.items():
        found = re.match(r"(\d+)\.(\d+)", installed.get(package, ""))
        if found and not oldest <= (int(found[1]), int(found[2])) <= newest:
            ends = " to ".join(f"{major}.{minor}" for major, minor in (oldest, newest))
            return f"{package} {installed[package]} is not among {ends}, which are tested"
    return ""


@functools.cache
def untested() -> str:
    """`outside` of what is installed here."""
    installed = {}
    for package in TESTED:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return outside(installed)
