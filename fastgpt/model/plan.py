"""What a run computes with beyond its settings: a plan, measured on this device or empty.

A run's folder has its plan, so that a resume computes with the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from fastgpt.model.device import Machine


@dataclass(frozen=True)
class Measured:
    """An op's implementation, launch configs to use with it, and on which figures."""

    implementation: str
    reason: str
    configs: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Plan:
    """Empty: what the package takes unmeasured.

    ops      by name; of those that are not here the default is taken
    compile  whether to compile, where the settings leave that open; None: by the device
    threads  of a CPU; 0: PyTorch's own number
    arch     for which the launch configs are
    device   its name
    date     of the measurement
    lines    the figures, for people
    """

    ops: Mapping[str, Measured] = field(default_factory=dict)
    compile: bool | None = None
    threads: int = 0
    arch: str = ""
    device: str = ""
    date: str = ""
    lines: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def of(cls, document: Any) -> Plan:
        """The way back. Raises ValueError if it is no plan."""
        try:
            given = dict(document)
            ops = {}
            for op, m in given.pop("ops").items():
                ops[op] = Measured(m["implementation"], m["reason"], tuple(m["configs"]))
                for one in ops[op].configs:
                    one["room"], one["table"], one["bound"], one["config"]["blocks"]
            plan = cls(**given, ops=ops)
            texts = (plan.arch, plan.device, plan.date, *plan.lines)
            texts += tuple(t for m in ops.values() for t in (m.implementation, m.reason))
            good = all(isinstance(t, str) for t in texts) and type(plan.threads) is int
            good &= plan.threads >= 0 and plan.compile in (None, True, False)
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise ValueError(f"no plan: {e!r}") from e
        if not good:
            raise ValueError("no plan: a value of another type")
        return plan

    def adopt(self, machine: Machine, compile: str | bool) -> Machine:
        """The machine as the plan wants it, where the setting `compile` leaves it open.

        Sets, for the whole process, how many threads a CPU computes with.
        """
        if self.threads and machine.device.type == "cpu":
            torch.set_num_threads(self.threads)
        if self.compile is None or compile != "auto":
            return machine
        return replace(machine, compile=self.compile)
