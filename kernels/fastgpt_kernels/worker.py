"""Worker processes, each of which answers one task after another within a time limit.

Kernels fault and compilers hang in a worker instead of in its owner. A worker ends with its owner,
however that ended. It is started as a script, so it may have another `sys.path` than its owner.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any


class TaskFailed(Exception):
    """The failure of a task that raised, took too long or ended its process, as one line."""


class Worker:
    """A process in which `ask(*task)` calls `handle(*arguments, *task)`.

    The handle is pickled, so it is a function of a module. A quiet worker prints nothing.
    """

    def __init__(self, handle: Callable[..., Any], *arguments: Any, quiet: bool = False):
        self._call, self._output = (handle, arguments), subprocess.DEVNULL if quiet else None
        self._process: subprocess.Popen[bytes] | None = None

    def spawn(self) -> None:
        """Starts the process without waiting for its imports: `ready` does. Raises TaskFailed."""
        self._connection, its_end = Pipe()
        with its_end:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", __file__, str(its_end.fileno())],
                    stdin=subprocess.PIPE, stdout=self._output, stderr=self._output,
                    pass_fds=[its_end.fileno()],
                    start_new_session=True,  # Ctrl+C is the owner's, which then kills it
                )  # fmt: skip
            except OSError as e:
                raise TaskFailed(f"its process cannot start ({e.strerror})") from e
        self._send([*map(str, sys.path)])
        self._send(self._call)

    def ready(self) -> None:
        """Waits until the handle is imported. Raises TaskFailed if that fails."""
        self._answer(120)

    def ask(self, *task: Any, timeout: float) -> Any:
        """Returns the answer. Raises TaskFailed after `timeout` seconds, not counting the start."""
        if self._process is None:
            self.spawn()
            self.ready()
        self._send(task)
        return self._answer(timeout)

    def _send(self, message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # its end shows when it does not answer
            self._connection.send(message)

    def _answer(self, timeout: float) -> Any:
        if not self._connection.poll(timeout):
            self.close()
            raise TaskFailed(f"took over {timeout:.0f} s")
        try:
            done, answer = self._connection.recv()
        except (EOFError, ConnectionResetError):
            how = "closed its connection"
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(10)  # type: ignore[union-attr]
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self.close()
            raise TaskFailed(f"ended its process ({how})") from None
        if not done:
            raise TaskFailed(answer)
        return answer

    def close(self) -> None:
        """Kills the process and all that it started; the next `ask` starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        self._connection.close()
        assert process.stdin
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)  # a driver may keep it longer


def ask_all(
    handle: Callable[[Any], Any], tasks: Sequence[Any], limit_s: float, jobs: int
) -> Iterator[Any]:
    """Yields the answer to each task in order, from several workers at a time.

    A str is the reason of a failure. The worker's process is then replaced, since after an illegal
    access it cannot use the GPU any more.
    """
    workers, idle = [Worker(handle, quiet=True) for _ in range(jobs)], queue.SimpleQueue[Worker]()
    for worker in workers:
        idle.put(worker)

    def ask(task: Any) -> Any:
        worker = idle.get()
        try:
            answer = worker.ask(task, timeout=limit_s)
            if isinstance(answer, str):
                worker.close()
            return answer
        except TaskFailed as e:
            worker.close()
            return str(e)
        finally:  # also after other errors, since tasks would wait for it forever
            idle.put(worker)

    pool = ThreadPoolExecutor(jobs)
    try:
        yield from pool.map(ask, tasks)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.close()


# --- In the process ---------------------------------------------------------------------------


def serve(connection: Connection) -> None:
    """Sends (True, result) or (False, message) for each task, until the owner is gone."""
    threading.Thread(target=_end_with_owner, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        sys.path[:] = connection.recv()
        found, call = _attempt(connection.recv)  # which imports the handle
        connection.send((found, None if found else call))
        while found:
            handle, arguments = call
            connection.send(_attempt(handle, *arguments, *connection.recv()))


def _attempt(function: Callable[..., Any], *arguments: Any) -> tuple[bool, Any]:
    try:
        return True, function(*arguments)
    except Exception as e:  # of any kind: it is the task's answer
        return False, f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[-1]}"


def _end_with_owner() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
