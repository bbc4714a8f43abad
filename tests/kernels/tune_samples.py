"""An op whose configs are good, slow, wrong, broken, hanging or deadly, for the search to sort."""

import os
import time
from collections.abc import Iterator

import torch

from fastgpt_kernels.configs import Config
from fastgpt_kernels.specs import Tunable

FAULTS = ["none", "slow", "wrong", "nan", "raises", "hangs", "dies"]
CANDIDATES = [Config({"FAULT": i}, 4) for i in range(len(FAULTS))]


def run(inputs: tuple[torch.Tensor], config: Config) -> tuple[torch.Tensor, ...]:
    fault = FAULTS[config.blocks["FAULT"]]
    y = inputs[0] * 2
    if fault == "slow":
        time.sleep(0.01)
    elif fault == "wrong":
        y[3] += 1
    elif fault == "nan":
        y[0] = float("nan")
    elif fault == "raises":
        raise ValueError("out of resource\nshared memory")
    elif fault == "hangs":
        time.sleep(600)
    elif fault == "dies":
        os._exit(3)
    return (y,)


def tunables(arch: str) -> Iterator[Tunable]:
    yield Tunable(
        "SAMPLE",
        64,
        CANDIDATES,
        inputs=lambda device: (torch.randn(100, device=device),),
        run=run,
        reference=lambda inputs: (inputs[0] + inputs[0],),
    )
