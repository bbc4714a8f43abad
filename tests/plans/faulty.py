"""What lives in a child for the tests: it answers, fails, hangs, dies, or talks."""

import os
import time


class Faulty:
    def __init__(self, name: str):
        if name == "cannot be made":
            raise ValueError("no such thing")
        self.name, self.calls = name, 0

    def hello(self, who: str) -> list:
        print("what a compiler prints is no answer")
        self.calls += 1
        return [self.name, who, self.calls]

    def raises(self) -> None:
        raise RuntimeError("out of resource\nshared memory")

    def hangs(self) -> None:
        time.sleep(600)

    def dies(self) -> None:
        os._exit(3)

    def pid(self) -> int:
        return os.getpid()


class Gate:
    """The ahead-of-time gate in a process of its own, where kernels are not interpreted."""

    def judge(self, blocks: dict, num_warps: int, num_stages: int) -> str:
        import torch

        from fastgpt_kernels.plans.measure import gate
        from fastgpt_kernels.registry import Sizes, spec

        config = {"blocks": blocks, "num_warps": num_warps, "num_stages": num_stages}
        room = "fastgpt_kernels.ops.attention"
        given = [{"room": room, "table": "FORWARD", "bound": 64, "config": config}]
        sizes = Sizes(32, 1024, 12, 768)
        return gate(spec("attention"), sizes, torch.bfloat16, "sm_90", given)
