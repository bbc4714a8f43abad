"""`fastgpt` as torchrun starts it, with a fault on one rank: FAULT=kind:rank:at.

kill, term (SIGTERM to this rank alone), hang and nan strike in the forward pass number `at` of that
rank, crash while it hashes file number `at` of its checkpoints, and full once a file of it grows
past `at` bytes. flag gives that rank the flag `at`, and cwd lets it run in the folder `at`.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from fastgpt.cli import main
from fastgpt.model.gpt import GPT
from fastgpt.storage import checkpoint

torch.set_num_threads(1)
kind, rank, at = os.environ.get("FAULT", "none:0:0").split(":")
mine = os.environ["RANK"] == rank
calls = 0
forward = GPT.forward


def faulty(self: GPT, *args: torch.Tensor) -> torch.Tensor:
    global calls
    calls += torch.is_grad_enabled()
    loss = forward(self, *args)
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not mine or again or not torch.is_grad_enabled():
        return loss
    if calls == int(at) and kind in ("kill", "term"):
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGTERM)
    if calls == int(at) and kind == "hang":
        time.sleep(600)
    # A bad number stays bad, as it would for the same weights and tokens.
    return loss * float("nan") if kind == "nan" and calls >= int(at) else loss


hashed = 0
sha256_file = checkpoint.sha256_file


def crash(path: Path) -> str:
    global hashed
    hashed += 1
    if hashed == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    return sha256_file(path)


if kind == "crash" and mine:
    checkpoint.sha256_file = crash
elif kind == "flag":
    sys.argv += [f"--{at}"] if mine else []
elif kind == "cwd":
    os.chdir(at if mine else ".")
elif kind == "full" and mine:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(at), int(at)))
elif kind != "none":
    GPT.forward = faulty  # type: ignore[method-assign, assignment]
main(sys.argv[1:])
