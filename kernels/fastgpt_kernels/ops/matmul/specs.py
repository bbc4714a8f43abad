"""The matrix products for the tools."""

from __future__ import annotations
