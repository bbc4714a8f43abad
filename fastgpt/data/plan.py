"""A dataset to be made: what was asked for, and what that comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastgpt.data.corpora import Corpus
from fastgpt.data.sources import Source


@dataclass(frozen=True)
class Plan:
    """A dataset to be made or found: equal `recipe` (JSON) means equal data."""

    corpus: Corpus
    recipe: dict[str, Any]
    base: str  # the preferred name of its folder
    tokenizer: str
    val_fraction: float
    source: Source | None = None  # where --input was looked through already
