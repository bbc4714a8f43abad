"""Kills and faults at the n-th change of a file: in a forked child, by Python's audit events."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

# What changes the disk, and what of it Python announces before it happens.
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link")
KILLED = 77


def _is_change(event: str, args: tuple) -> bool:
    if event == "open":  # (path, mode, flags)
        return isinstance(args[0], str | bytes) and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
    return event in _CHANGES


def in_child(action: Callable[[], object], at_change: Callable[[int], None]) -> int:
    """Run `action` in a forked process, where `at_change(k)` is called before its k-th change.

    Returns its exit code: 0, or 1 if it raised.
    """
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        count = 0

        def hook(event: str, args: tuple) -> None:
            nonlocal count
            if _is_change(event, args):
                count += 1
                at_change(count)

        sys.addaudithook(hook)
        action()
        code = 0
    finally:
        os._exit(code)


def killed_at(n: int, action: Callable[[], object]) -> bool:
    """Run `action` and end it, with nothing cleaned up, before its n-th change of a file.

    False: it had fewer, and came to its end.
    """

    def kill(k: int) -> None:
        if k == n:
            os._exit(KILLED)

    code = in_child(action, kill)
    assert code in (0, KILLED), f"exit code {code}"
    return code == KILLED
