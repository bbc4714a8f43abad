"""Plain tables for a console and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], lines: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """Columns as wide as they need to be; the first left, the others right."""
    widths = [max(len(row[i]) for row in [head, *lines]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join(cells) + " |" if markdown else ("  " + "  ".join(cells)).rstrip()

    rule = [["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]] if markdown else []
    return "\n".join(line(row) for row in [head, *rule, *lines])
