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
