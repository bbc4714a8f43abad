"""Supported versions of PyTorch and Triton, and the version of this package's own sources.

The tests run with those of constraints.txt. `make gate GATE_ARGS="--triton DIR"` compiles the
kernels with another Triton. The range of PyTorch follows from its release notes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# The oldest and the newest version.
SUPPORTED = {"torch": ((2, 11), (2, 15)), "triton": ((3, 6), (3, 9))}


def outside(installed: Mapping[str, str]) -> str | None:
    """Returns why a package's version is unsupported, or None if all are supported."""
    for package, (oldest, newest) in SUPPORTED.items():
        found = re.match(r"(\d+)\.(\d+)", installed.get(package, ""))
        if found and not oldest <= (int(found[1]), int(found[2])) <= newest:
            ends = " to ".join(f"{major}.{minor}" for major, minor in (oldest, newest))
            return f"{package} {installed[package]} is not among {ends}, which are supported"
    return None


@functools.cache
def installed() -> dict[str, str]:
    """Returns the versions of these packages that are installed."""
    found = {}
    for package in SUPPORTED:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def untested() -> str | None:
    """Returns why an installed package's version is unsupported, or None."""
    return outside(installed())


@functools.cache
def sources() -> str:
    """Returns a hash of this package's modules."""
    found = hashlib.sha256()
    for module in sorted(Path(__file__).parent.rglob("*.py")):
        found.update(module.name.encode() + module.read_bytes())
    return found.hexdigest()[:16]
