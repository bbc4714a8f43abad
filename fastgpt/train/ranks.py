"""More than one process: what torchrun starts, and what they tell each other.

Every rank takes its rows of the same global batch, and what the host decides (to stop, to give up)
all ranks decide alike. Without torchrun there is one rank and no process group.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastgpt.config.schema import Config, OptimConfig
from fastgpt.errors import RankError, SharedError, UserError
from fastgpt.model.device import resolve_device


class Ranks:
    """This process among its fellows: `rank` of `size`. The default is one process alone."""

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None):
        self.rank, self.size, self.store = rank, size, store

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, rows: int) -> slice:
        """This rank's part of a step's rows."""
        each = rows // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def micro_batch(self, rows: int, batch_size: int) -> int:
        """Rows of a micro-batch: batch_size, or less if a rank's rows are no multiple of it."""
        each = rows // self.size
        return next(b for b in range(min(batch_size, each), 0, -1) if each % b == 0)

    def check(self, o: OptimConfig) -> None:
        """Raise UserError if the ranks cannot share the global batch equally."""
        rows = o.rows
        if rows % self.size:
            steps = o.gradient_accumulation_steps
            good = max(1, round(steps / self.size)) * self.size
            sizes = ", ".join(str(n) for n in range(1, min(rows, 64) + 1) if rows % n == 0)
            raise UserError(
                f"--batch_size={o.batch_size} x --gradient_accumulation_steps={steps} = {rows} "
                f"rows do not divide among {self.size} ranks; pass "
                f"--gradient_accumulation_steps={good}, or start one of {sizes} ranks"
            )

    def mean(self, value: Tensor) -> Tensor:
        """The mean over ranks, on the device; `value` is changed."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, on the device; `value` is changed."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def largest(self, value: int) -> Callable[[], int]:
        """Ask for the largest value of any rank; what comes back waits for the answer.

        Goes between hosts; the GPUs are not waited for. All ranks ask in the same order.
        """
        if self.size == 1:
            return lambda: value
        box = torch.tensor(value)
        work = dist.all_reduce(box, dist.ReduceOp.MAX, async_op=True)

        def answer() -> int:
            work.wait()
            return int(box)

        return answer

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value)
        return out

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A part that all ranks finish, or none: a UserError on any of them is raised on all.

        The text is that of the lowest rank that failed, so that one line is said in total.
        """
        error: UserError | None = None
        try:
            yield
        except UserError as e:
            error = e
        if self.size == 1:
            if error:
                raise error
            return
        said = self.gather(str(error) if error else None)
        for rank, text in enumerate(said):
            if text is not None:
                raise SharedError(f"rank {rank}: {text}" if rank else text) from error

    def silent(self) -> list[int]:
        """After a failed exchange: the ranks that do not say within two seconds that they live."""
        if self.store is None:
            return []
        with contextlib.suppress(Exception):
            self.store.set(f"alive/{self.rank}", "1")
            end, missing = time.monotonic() + 2.0, list(range(self.size))
            while missing and time.monotonic() < end:
                missing = [r for r in missing if not self.store.check([f"alive/{r}"])]
                time.sleep(0.05)
            return missing
        return []


def _number(name: str, default: int) -> int:
    """A number that torchrun sets. UserError if it is none."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(f"{name}={text}: wanted a whole number, as torchrun sets it; or unset it")
    return int(text)


def restarted() -> bool:
    """Whether torchrun started this run again after a failure."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0) > 0


def launcher() -> str:
    """Who started this process: torchrun's agent, which stays over restarts; "" without torchrun.

    Its number and the time of its start on its machine, which together are no other process's.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    parent, since = os.getppid(), ""
    with contextlib.suppress(OSError, IndexError):  # where there is /proc
        text = Path(f"/proc/{parent}/stat").read_text()
        since = text.rpartition(")")[2].split()[19]
        since += "-" + Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}:{parent}:{since}"


def check_launch(config: Config) -> None:
    """Raise UserError if the run's flags do not go with torchrun's."""
    if _number("TORCHELASTIC_MAX_RESTARTS", 0) > 0 and not config.run.out_dir:
        raise UserError(
            "torchrun --max-restarts: a restart has to find its run; name it with --out_dir"
        )
    if _number("WORLD_SIZE", 1) > 1 and config.optim.auto_batch_size:
        raise UserError("--batch_size=auto: not with several ranks; give a number")


def local_device(name: str) -> str:
    """--device of this process: if torchrun started one process for each GPU, the GPU of its own.

    Raises UserError if this machine does not have it.
    """
    if resolve_device(name).type != "cuda" or "LOCAL_RANK" not in os.environ:
        return name
    local, count = _number("LOCAL_RANK", 0), torch.cuda.device_count()
    if local >= count:
        raise UserError(
            f"torchrun started process {local + 1} on a machine with {count} GPUs; pass "
            f"--nproc_per_node={count}"
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


@contextlib.contextmanager
def join(config: Config, device: torch.device) -> Iterator[Ranks]:
    """The process group of torchrun's ranks, for as long as the block runs; else one rank alone.

    Only rank 0 writes to stdout. An error of another rank is a RankError that names it; so is a
    lost connection, which names the ranks that do not answer.
    """
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        if _number("WORLD_SIZE", 1) > 1:
            raise UserError("WORLD_SIZE is set, RANK or MASTER_ADDR is not: start with torchrun")
        yield Ranks()
        return
    system = config.system
    # Beside NCCL, Gloo for what hosts tell each other without waiting for their GPUs.
    backend = f"cpu:gloo,cuda:{system.backend}" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=system.dist_timeout)
    stdout = sys.stdout
    ranks = Ranks(_number("RANK", 0), _number("WORLD_SIZE", 1))
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        # A restart must not find the addresses of those who are gone.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt-{attempt}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        ranks = Ranks(rank, size, store)
        if rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        with ranks.together():
            ranks.check(config.optim)
        yield ranks
        ranks.largest(0)()  # leave together: rank 0 still draws the loss curve
    except SharedError:
        raise
    except UserError as e:
        if ranks.first:
            raise
        raise RankError(f"rank {ranks.rank}: {e}") from e
    except (dist.DistError, RuntimeError) as e:
        why = (str(e).strip().splitlines() or [type(e).__name__])[0]
        if ranks.size == 1 or not _is_connection(e):
            raise
        missing = ranks.silent()
        who = ", ".join(map(str, missing)) or "none of them silent"
        raise RankError(
            f"rank {ranks.rank}: lost the others (silent: rank {who}; "
            f"--dist_timeout={system.dist_timeout:g}): {why}"
        ) from e
    finally:
        if sys.stdout is not stdout:
            sys.stdout.close()
            sys.stdout = stdout
        # Not after an error: a peer that is gone would have to answer.
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _is_connection(e: BaseException) -> bool:
    words = ("gloo", "timed out", "timeout", "connection", "peer", "nccl", "socket")
    return isinstance(e, dist.DistError) or any(w in str(e).lower() for w in words)
