"""python -m bench check [FOLDER]: which results no longer match the sources they measured.

Silent, exit code 0, if all do. A line a result, exit code 1, if sources changed since or a file is
not a result.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import provenance, results


def stale(data: dict, now: dict[str, str]) -> list[str]:
    """Files that changed, came or went since."""
    then = data["environment"].get("sources", {})
    return sorted(path for path in then.keys() | now.keys() if then.get(path) != now.get(path))


def shortly(files: list[str], most: int = 4) -> str:
    """ "a, b, c, d and 12 more"."""
    more = f" and {len(files) - most} more" if len(files) > most else ""
    return ", ".join(files[:most]) + more


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
            print(f"{path}: measured other sources than these: {shortly(changed)} changed since")
            found += 1
    return 1 if found else 0
