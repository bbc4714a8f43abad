"""Forked children, with kills and faults at the n-th change of a file, by audit events."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

# What changes the disk, and what of it Python announces before it happens.
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link")
KILLED = 77
LONGEST = 120  # seconds until a child that does not end is ended by SIGALRM


def _is_change(event: str, args: tuple) -> bool:
    if event == "open":  # (path, mode, flags)
        path = os.fsdecode(args[0]) if isinstance(args[0], str | bytes) else "/dev"
        if path.startswith(("/dev", "/proc")) or "__pycache__" in path:
            return False
        return bool(args[2] & (os.O_WRONLY | os.O_RDWR))
    return event in _CHANGES


def at_change(n: int, fault: Callable[[], object]) -> Callable[[], int]:
    """Calls `fault` before this process's n-th change of a file from now on.

    Returns a function that returns the number of changes so far.
    """
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if _is_change(event, args):
            count += 1
            if count == n:
                fault()

    sys.addaudithook(hook)
    return lambda: count


def fork(action: Callable[[], object], output: Path | str = os.devnull) -> int:
    """Runs `action` in a forked process that appends to the file `output`. Returns the pid.

    Its exit code is that of a SystemExit, 1 after another error, else 0.
    """
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    if pid := os.fork():
        os.close(file)
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(LONGEST)
        redirect(file, 1, 2)
        try:
            action()
            code = 0
        except SystemExit as e:
            code = int(e.code or 0)
        except Exception:
            traceback.print_exc()
        try:
            sys.stdout.flush()
        except OSError:
            code = 120  # as at the end of Python
    except KeyboardInterrupt:
        code = 130
    finally:
        os._exit(code)


def redirect(file: int, *outputs: int) -> None:
    """Makes a file descriptor stdout (1), stderr (2), or both."""
    for fd in outputs:
        os.dup2(file, fd)
        setattr(sys, ("stdout", "stderr")[fd - 1], open(fd, "w", closefd=False))  # noqa: SIM115


def wait(pid: int) -> int:
    """Returns the exit code of a child; negative, the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(action: Callable[[], object], n: int, fault: Callable[[], object]) -> int:
    """Runs `action` in a forked process with a fault at its n-th change. Returns the exit code."""

    def faulty() -> None:
        at_change(n, fault)
        action()

    return wait(fork(faulty))


def changes_in(action: Callable[[], object], output: Path | str) -> int:
    """Returns how many times an action changes files, in a forked process."""
    reader, writer = os.pipe()

    def count() -> None:
        changes = at_change(0, kill)
        try:
            action()
        finally:
            os.write(writer, str(changes()).encode())

    code = wait(fork(count, output))
    assert code == 0, f"exit code {code}: {Path(output).read_text()}"
    return int(os.read(reader, 20))


def kill() -> None:
    os._exit(KILLED)


def killed_at(n: int, action: Callable[[], object]) -> bool:
    """Runs `action` and ends it, with nothing cleaned up, before its n-th change of a file.

    Returns False if it had fewer, and came to its end.
    """
    code = in_child(action, n, kill)
    assert code in (0, KILLED), f"exit code {code}"
    return code == KILLED
