"""The waterfall on the console: a table with rich, plain text in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from bench import tables
from bench.ladder import Ladder

COLUMNS = ("", "adds ms", "points", "MFU", "takes ms", "bound ms", "of bound")


def show(ladder: Ladder) -> None:
    """Print the rungs, then each one's bound and what would help."""
    print(peaks(ladder))
    if sys.stdout.isatty():
        _show_rich(ladder)
    else:
        print(tables.table(COLUMNS, list(rows(ladder))))
    print("\n".join(details(ladder)), flush=True)


def peaks(ladder: Ladder) -> str:
    """One line: what the ladder starts from, and what was measured here."""
    m = ladder.measured
    peak, source = m.datasheet_flops or m.matmul_flops, m.datasheet_source or m.matmul_source
    return (
        f"peak {peak / 1e12:.4g} TFLOP/s ({source}); matmul reaches {m.matmul_flops / 1e12:.4g}, "
        f"copies {m.copy_bytes / 1e9:,.0f} GB/s"
    )


def rows(ladder: Ladder) -> Iterator[tuple[str, ...]]:
    """Cells of `COLUMNS` by rung, and the measured step."""
    for r in ladder.rungs:
        yield (
            r.name,
            f"{r.ms:.3f}",
            f"{-r.mfu_points:.1f}" if r.name != "ideal" else "",
            f"{r.mfu_after:.1f}%",
            "" if r.takes_ms is None else f"{r.takes_ms:.3f}",
            "" if r.bound_ms is None else f"{r.bound_ms:.3f}",
            f"{r.bound_ms / r.takes_ms:.0%}" if r.bound_ms and r.takes_ms else "",
        )
    residual = f"residual {ladder.residual_share:+.2%}"
    yield "measured step", f"{ladder.step_ms:.3f}", "", f"{ladder.mfu:.1f}%", "", "", residual


def details(ladder: Ladder) -> Iterator[str]:
    """How each bound was computed, what would help, and what the part is made of."""
    for r in ladder.rungs:
        if r.bound or r.help:
            yield f"  {r.name}: " + "; ".join(filter(None, (r.bound, r.help)))
        if len(r.items) > 1:
            yield "      " + ", ".join(f"{kind} {ms:.3g}" for kind, ms in r.items.items()) + " ms"
    if ladder.scale != 1.0:
        yield f"profiled steps took {1 / ladder.scale:.2f}x; the parts are scaled to match"


def _show_rich(ladder: Ladder) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    ends = {0: "green", len(ladder.rungs): "bold"}
    for i, row in enumerate(rows(ladder)):
        table.add_row(*row, style=ends.get(i))
    Console().print(table)
