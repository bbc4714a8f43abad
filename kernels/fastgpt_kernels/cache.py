"""JSON files in the user's cache folder, $XDG_CACHE_HOME/fastgpt or ~/.cache/fastgpt.

A file has sections, such as one per GPU and versions, and a section has entries. A damaged file
counts as missing, and without a writable folder nothing is kept.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastgpt_kernels import versions

SECTIONS = 16  # per file: the oldest ones go


def path(name: str) -> Path:
    """Returns the path of a file. Raises OSError without a home, or for XDG_CACHE_HOME=~x."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(folder):
        raise OSError(f"{folder}: no absolute path; XDG_CACHE_HOME names the cache folder")
    return Path(folder, "fastgpt", f"{name}.json")


def load(name: str, section: str) -> dict[str, Any]:
    """Returns the entries of a section; empty if there are none."""
    found = _sections(name).get(section)
    return found if isinstance(found, dict) else {}


def keep(name: str, section: str, entries: Mapping[str, Any]) -> str | None:
    """Adds entries to a section by replacing the file; returns the error, or None."""
    sections, merged = _sections(name), {**load(name, section), **entries}
    sections.pop(section, None)
    newest = dict([*sections.items(), (section, merged)][-SECTIONS:])
    try:
        file = path(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=file.parent)
        try:
            with os.fdopen(descriptor, "w") as f:
                json.dump(newest, f, indent=1)
            os.replace(aside, file)
        finally:
            Path(aside).unlink(missing_ok=True)
    except OSError as e:
        return str(e)
    return None


def _sections(name: str) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        document = json.loads(path(name).read_bytes())
        return document if isinstance(document, dict) else {}
    return {}


@functools.cache
def environment(device: torch.device) -> str:
    """Returns the GPU, driver, versions and kernel sources for which a result is valid."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    triton = versions.installed().get("triton", "none")
    software = f"driver {_driver()}, torch {torch.__version__}, triton {triton}"
    return f"{name}, {software}, kernels {versions.sources()}"


def _driver() -> str:
    """Returns the NVIDIA driver's version, "570.86.10", or "none"."""
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        if found := re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text):
            return found[0]
    return "none"
