"""python -m bench check [FOLDER]: which results no longer match the sources they measured.

Silent, exit code 0, where all do. A line a result, exit code 1, where sources changed since, or a
file is not a result.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import provenance, results


def stale(data: dict, now: dict[str, str]) -> list[str]:
    """Parts of the sources that changed since."""
    then = data["environment"].get("sources", {})
    return [p for p in provenance.needed_parts(data["name"]) if then.get(p) != now[p]]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench check", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="default: the committed results")
    folder = parser.parse_args(argv).folder
    now, found = provenance.sources(), 0
    for path in results.files(folder) if folder else results.committed():
        try:
            changed = stale(results.load(path), now)
        except ValueError as e:
            print(e)
            found += 1
            continue
        if changed:
            print(f"{path}: measured other sources than these: {', '.join(changed)} changed since")
            found += 1
    return 1 if found else 0
