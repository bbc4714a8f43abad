"""`fastgpt` as torchrun starts it, with a fault on one rank: FAULT=kind:rank:forward_call."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from fastgpt.cli import main
from fastgpt.model import GPT

torch.set_num_threads(1)
kind, rank, at = os.environ.get("FAULT", "none:0:0").split(":")
calls = 0
forward = GPT.forward


def faulty(self: GPT, *args: torch.Tensor) -> torch.Tensor:
    global calls
    calls += torch.is_grad_enabled()
    loss = forward(self, *args)
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if calls != int(at) or os.environ["RANK"] != rank or again or not torch.is_grad_enabled():
        # A bad number stays bad, as it would for the same weights and tokens.
        return loss * float("nan") if kind == "nan" and 0 < int(at) < calls and mine() else loss
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        time.sleep(600)
    return loss * float("nan") if kind == "nan" else loss


def mine() -> bool:
    return os.environ["RANK"] == rank


if kind != "none":
    GPT.forward = faulty  # type: ignore[method-assign]
main(sys.argv[1:])
