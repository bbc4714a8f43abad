"""The waterfall on the console."""

from __future__ import annotations

from collections.abc import Iterator

from bench.ladder import Ladder
from bench.tables import table

COLUMNS = ("", "adds ms", "points", "MFU", "takes ms", "bound ms", "of bound")


def show(ladder: Ladder) -> None:
    """Print the rungs, then each one's bound and what would help."""
    print(peaks(ladder))
    print(table(COLUMNS, list(rows(ladder))))
    print("\n".join(details(ladder)), flush=True)


def peaks(ladder: Ladder) -> str:
    """One line: what the ladder starts from, and what was measured here."""
    m = ladder.measured
    reached = f"matmul reaches {m.matmul_flops / 1e12:.4g}, copies {m.copy_bytes / 1e9:,.0f} GB/s"
    return f"peak {ladder.peak}; {reached}"


def rows(ladder: Ladder) -> Iterator[tuple[str, ...]]:
    """Cells of `COLUMNS` by rung, and the step."""
    for r in ladder.rungs:
        yield (
            r.name,
            _ms(r.ms),
            f"{-r.mfu_points:.1f}" if r.name != "ideal" else "",
            f"{r.mfu_after:.1f}%",
            "" if r.takes_ms is None else _ms(r.takes_ms),
            "" if r.bound_ms is None else _ms(r.bound_ms),
            f"{r.bound_ms / r.takes_ms:.0%}" if r.bound_ms and r.takes_ms else "",
        )
    yield "measured step", _ms(ladder.step_ms), "", f"{ladder.mfu:.1f}%", "", "", ""


def details(ladder: Ladder) -> Iterator[str]:
    """How each bound was computed, what would help, and what the part is made of."""
    yield f"residual {ladder.residual_share:+.2%} of the measured step"
    for r in ladder.rungs:
        if r.bound or r.help:
            yield f"  {r.name}: " + "; ".join(filter(None, (r.bound, r.help)))
        if len(r.items) > 1:
            yield "      " + ", ".join(f"{kind} {ms:.3g}" for kind, ms in r.items.items()) + " ms"
    if ladder.scale != 1.0:
        yield f"profiled steps took {1 / ladder.scale:.2f}x; the parts are scaled to match"


def _ms(ms: float) -> str:
    return f"{ms:.3f}" if abs(ms) < 100 else f"{ms:.1f}"
