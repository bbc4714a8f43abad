"""Kills and faults at the n-th change of a file: in a forked child, by Python's audit events."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

# What changes the disk, and what of it Python announces before it happens.
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link")
KILLED, REFUSED = 77, 78


def _is_change(event: str, args: tuple) -> bool:
    if event == "open":  # (path, mode, flags)
        path = os.fsdecode(args[0]) if isinstance(args[0], str | bytes) else "/dev"
        if path.startswith(("/dev", "/proc")) or "__pycache__" in path:
            return False
        return bool(args[2] & (os.O_WRONLY | os.O_RDWR))
    return event in _CHANGES


def at_change(n: int, fault: Callable[[], object]) -> None:
    """From now on, in this process, call `fault` before the n-th change of a file."""
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if _is_change(event, args):
            count += 1
            if count == n:
                fault()

    sys.addaudithook(hook)


def in_child(action: Callable[[], object], n: int, fault: Callable[[], object]) -> int:
    """Run `action` in a forked process, with a fault at its n-th change.

    Returns its exit code: 0, REFUSED if it ended in a UserError or OSError, 1 if in any other.
    """
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        from fastgpt.errors import UserError

        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        at_change(n, fault)
        try:
            action()
            code = 0
        except (UserError, OSError):
            code = REFUSED
    finally:
        os._exit(code)


def kill() -> None:
    os._exit(KILLED)


def killed_at(n: int, action: Callable[[], object]) -> bool:
    """Run `action` and end it, with nothing cleaned up, before its n-th change of a file.

    False: it had fewer, and came to its end.
    """
    code = in_child(action, n, kill)
    assert code in (0, KILLED), f"exit code {code}"
    return code == KILLED
