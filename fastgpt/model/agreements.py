"""Kernels that agreed here before: a start asks again only about what is new.

They are kept in Triton's cache folder, so that whoever empties that has all compiled and checked
anew; `fastgpt doctor` checks anew too. A kernel that failed is not kept: memory that others had
taken may have been the reason.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastgpt_kernels import host
from fastgpt_kernels.plans import device as devices
from fastgpt_kernels.plans.store import Store, canonical


def _folder() -> Path:
    from triton import knobs

    return Path(knobs.cache.dir, "fastgpt")


class Agreements:
    """Of one kind of GPU with one driver, PyTorch, Triton and state of the kernels' sources.

    A task is what was checked, as JSON. Which of equal GPUs it was makes no difference.
    """

    def __init__(self, device: torch.device):
        self._store = Store(_folder())
        self._key = devices.key(device, {"question": "which kernels agree?"})
        self._known = set(_names(self._store.load(self._key)))

    def __contains__(self, task: Mapping[str, Any]) -> bool:
        return _name(task) in self._known

    def add(self, tasks: Iterable[Mapping[str, Any]]) -> None:
        """Keep them, if the folder can be written."""
        if new := {_name(task) for task in tasks} - self._known:
            self._store.update(self._key, lambda old: {"agree": sorted({*_names(old), *new})})

    def forget(self) -> None:
        """Have all checked anew."""
        self._known = set()
        self._store.update(self._key, lambda old: {"agree": []})


def kept(device: torch.device) -> Agreements | None:
    """None on a CPU, where nothing is checked, and without Triton, whose folder this is."""
    return Agreements(device) if device.type == "cuda" and host.HAS_TRITON else None


def _names(entry: Mapping[str, Any] | None) -> list[str]:
    found = (entry or {}).get("agree")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _name(task: Mapping[str, Any]) -> str:
    """Short, and another if the source of a function from outside the kernels changes."""
    text = canonical({**task, "device": ""})
    module, _, _ = task["function"].partition(":")
    if module and (spec := importlib.util.find_spec(module)) and spec.origin:
        text += devices.hash_of(Path(spec.origin))
    return hashlib.sha256(text.encode()).hexdigest()[:24]
