"""Which implementation of an op, with which launch configs, is the fastest here: asked once.

The candidates come from the op's record; nothing here knows an op by name.

    tuned = fastgpt_kernels.tune("attention", qkv, 12)
    y = tuned(qkv, 12)
"""

from __future__ import annotations

import hashlib
import inspect
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import OPS, host
from fastgpt_kernels.plans import device as devices
from fastgpt_kernels.plans.child import Child, Failed, Spent
from fastgpt_kernels.plans.choose import ROUNDS, Candidate, Found, choose
from fastgpt_kernels.plans.measure import describe, differentiable, put
from fastgpt_kernels.plans.store import Store
from fastgpt_kernels.registry import OpSpec, Sizes, spec

CHECK_S = 120.0  # limit for one candidate, compilation included
NEXT = 4  # others that are named beside the choice
WORTH_TUNING = 1.3  # ours may be this much slower than the best and still get other configs

Say = Callable[[str], object]


@dataclass(frozen=True)
class Question:
    """An op as it is called: what a measurement answers, and what its key says.

    compile  whether calls run under torch.compile
    sizes    of a model, whose calls are those of the record; or
    call     an example, as `measure.describe` tells tensors
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    compile: bool
    sizes: Sizes | None = None
    call: Mapping[str, Any] | None = None
    deterministic: bool = False

    @property
    def what(self) -> dict[str, Any]:
        """All of it but the device, as JSON."""
        return {
            "op": self.op,
            "dtype": str(self.dtype).removeprefix("torch."),
            "compile": self.compile,
            "sizes": asdict(self.sizes) if self.sizes else None,
            "call": self.call,
            "precision": torch.get_float32_matmul_precision(),
            "deterministic": self.deterministic,
        }

    def key(self, **more: Any) -> dict[str, Any]:
        return devices.key(self.device, {**self.what, **more})


@dataclass(frozen=True)
class OpPlan:
    """What was chosen for an op.

    implementation  as in its record
    configs         launch configs to use with it, as `measure.put` takes them
    found           the figures
    """

    implementation: str
    configs: Sequence[Mapping[str, Any]] = ()
    found: Found = field(default_factory=lambda: Found(""))

    @property
    def reason(self) -> str:
        """On which figures, from when: "measured 2026-11-25: 2.31 ms, 1.18x of cudnn"."""
        return f"measured {self.found.date[:10]}: {figures(self.found)}"


def figures(found: Found) -> str:
    """The choice's time, its share of the default's, and how many times the speed of the next ones
    it has.
    """
    mine = found.trials.get(found.choice)
    if mine is None or not mine.ms:
        return "nothing else can run here"
    others = [
        (t.ratio / mine.ratio, name)
        for name, t in found.trials.items()
        if t.ratio and name != found.choice and "[" not in name
    ]
    told = [f"{gain:.2f}x of {name}" for gain, name in sorted(others)[:NEXT]]
    told.insert(0, f"{mine.ms:.3g} ms")
    if mine.against and found.choice != found.default:
        told[1:1] = [f"{mine.ratio:.3f} [{mine.low:.3f}, {mine.high:.3f}] of {mine.against}'s time"]
    return ", ".join(told)


def names(op: OpSpec, question: Question) -> list[str]:
    """The implementations that can run, the one that is taken unmeasured first."""
    sizes, arch = question.sizes or Sizes(), host.arch_on(question.device)

    def obstacle(name: str) -> str:
        # Of one call the launcher tells its limits.
        if question.call is not None and name in ("triton", "hopper"):
            return "" if host.HAS_TRITON and question.device.type == "cuda" else "no GPU"
        return op.unsupported_reason(name, arch, question.dtype, sizes) or ""

    able = [name for name in op.implementations if not obstacle(name)]
    first = "triton" if "triton" in able and not op.slower(arch) else "eager"
    return [first, *(name for name in able if name != first)]


class OpMeasurer:
    """Tries an op's candidates in processes of their own: several that check, one that times."""

    def __init__(
        self, question: Question, parallel: int = 1, left: Callable[[], float] = lambda: CHECK_S
    ):
        what = question.what
        self.parallel, self.left = parallel, left
        self._arguments = {**what, "device": str(question.device)}
        self.timer = self._child()
        self._checkers: list[Child] = []
        self._here = threading.local()

    def _child(self) -> Child:
        return Child("fastgpt_kernels.plans.measure:OpBench", self._arguments)

    def check(self, candidate: Candidate) -> None:
        if self.parallel == 1:
            self.timer.ask_within(self.left, "check", candidate.spec, timeout=CHECK_S)
            return
        if not hasattr(self._here, "child"):
            self._here.child = self._child()
            self._checkers.append(self._here.child)
        self._here.child.ask_within(self.left, "check", candidate.spec, timeout=CHECK_S)

    def time(self, candidate: Candidate) -> float:
        return self.timer.ask_within(self.left, "turn", candidate.spec, timeout=CHECK_S)

    def tables(self) -> list[dict[str, Any]]:
        return self.timer.ask_within(self.left, "tables", timeout=CHECK_S)

    def close(self) -> None:
        for child in (self.timer, *self._checkers):
            child.close()


def known(question: Question, store: Store) -> OpPlan | None:
    """What was chosen before; None if nothing was measured."""
    found = Found.of(store.load(question.key()))
    if found is None or not found.choice:
        return None
    plan = _plan(found, question, store)
    return plan if plan.implementation in spec(question.op).implementations else None


def _plan(found: Found, question: Question, store: Store) -> OpPlan:
    implementation, _, tuned = found.choice.partition(" ")
    chosen = tuple(_chosen_configs(question, store)) if tuned else ()
    if tuned and found.choice != tuned_name([*chosen]):  # the configs were measured anew since
        return OpPlan(implementation, (), found)
    return OpPlan(implementation, chosen, found)


def tuned_name(chosen: Sequence[Mapping[str, Any]]) -> str:
    """What ours is called among the candidates with these launch configs."""
    text = json.dumps(chosen, sort_keys=True)
    return f"triton [{hashlib.sha256(text.encode()).hexdigest()[:8]}]"


def _chosen_configs(question: Question, store: Store) -> list[dict[str, Any]]:
    entry = store.load(question.key(part="configs"))
    chosen = entry.get("configs") if entry else None
    return chosen if isinstance(chosen, list) else []


def measure(
    question: Question,
    store: Store,
    *,
    seconds: float = float("inf"),
    rounds: int = ROUNDS,
    with_configs: bool = False,
    say: Say = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
    measurer: Callable[..., Any] = OpMeasurer,
) -> OpPlan | None:
    """Measure what is not known yet within about `seconds`, keep it, and return the choice.

    `with_configs`: launch configs of our kernels too, which takes long. None if nothing could be
    measured.
    """
    op, end = spec(question.op), clock() + seconds
    key, able = question.key(), names(op, question)
    candidates = [Candidate(name, {"implementation": name}) for name in able]
    tuned = _chosen_configs(question, store)
    if tuned:
        asked = {"implementation": "triton", "configs": tuned}
        candidates.append(Candidate(tuned_name(tuned), asked))
    if len(candidates) == 1:
        return None
    there = measurer(question, 1, lambda: end - clock())
    try:
        found = _choose(key, candidates, there, store, end - clock(), rounds, say, clock)
        if with_configs and _worth_it(found, able):
            tuned = _tune_configs(question, store, there, end, rounds, say, clock, measurer)
            if tuned:
                asked = {"implementation": "triton", "configs": tuned}
                candidates = [c for c in candidates if not c.spec.get("configs")]
                candidates.append(Candidate(tuned_name(tuned), asked))
                found = _choose(key, candidates, there, store, end - clock(), rounds, say, clock)
    finally:
        there.close()
    return _plan(found, question, store) if found.choice else None


def _worth_it(found: Found, able: Sequence[str]) -> bool:
    """Whether our kernels are near enough to the best for other configs to matter."""
    mine = found.trials.get("triton")
    best = found.trials.get(found.choice)
    if "triton" not in able or mine is None or mine.problem or best is None:
        return False
    return not best.ratio or mine.ratio <= WORTH_TUNING * best.ratio


def _choose(
    key: Mapping[str, Any], candidates: Sequence[Candidate], measurer: Any, store: Store,
    seconds: float, rounds: int, say: Say, clock: Callable[[], float],
) -> Found:  # fmt: skip
    """`choose` with what the store knows, which keeps what is found out."""
    return choose(
        candidates, measurer, known=Found.of(store.load(key)), seconds=seconds, rounds=rounds,
        keep=lambda found: store.update(key, lambda old: found.to_dict()), say=say, clock=clock,
    )  # fmt: skip


def _tune_configs(
    question: Question, store: Store, there: Any, end: float, rounds: int, say: Say,
    clock: Callable[[], float], measurer: Callable[..., Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """The best entry of each table that our kernels read, one table after the other."""
    chosen: list[dict[str, Any]] = []
    try:
        tables = there.tables()
    except (Failed, Spent) as e:
        say(f"launch configs: {e}")
        return []
    jobs = min(8, max(2, devices.cores() // 2))
    several = measurer(question, jobs, lambda: end - clock())
    try:
        for table in tables:
            if clock() >= end:
                break
            where = {k: table[k] for k in ("room", "table", "bound")}
            candidates = [Candidate("present", {"implementation": "triton", "configs": chosen})]
            for config in table["candidates"]:
                one = [*chosen, {**where, "config": config}]
                asked = {"implementation": "triton", "configs": one}
                candidates.append(Candidate(f"{where['table']} {_short(config)}", asked))
            key = question.key(part="configs", entry=where, behind=chosen)
            tell = lambda line, name=where["table"]: say(f"{name}: {line}")  # noqa: E731
            found = _choose(key, candidates, several, store, end - clock(), rounds, tell, clock)
            best = [c for c in candidates if c.name == found.choice] or candidates
            chosen = list(best[0].spec["configs"])
    finally:
        several.close()
    if chosen:
        store.update(question.key(part="configs"), lambda old: {"configs": chosen})
    return chosen


def _short(config: Mapping[str, Any]) -> str:
    blocks = " ".join(f"{k}={v}" for k, v in config["blocks"].items())
    return f"{blocks} warps={config['num_warps']} stages={config['num_stages']}"


# --- for a model of one's own --------------------------------------------------------------------


class Tuned:
    """The op's fastest implementation here, called as the op itself; `plan` says why this one."""

    def __init__(self, op: str, function: Callable[..., Any], plan: OpPlan | None):
        self.op, self.function, self.plan = op, function, plan

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        how = f"{self.plan.implementation}, {self.plan.reason}" if self.plan else "not measured"
        return f"<{self.op}: {how}>"


def tune(
    op: str | Callable[..., Any],
    *inputs: Any,
    seconds: float = 60.0,
    compile: bool = False,
    say: Say = lambda line: None,
    **arguments: Any,
) -> Tuned:
    """The fastest right implementation of an op for calls like `op(*inputs, **arguments)`.

    op       a function of this package or its name; those of decoding and the optimizer raise
             ValueError, since they are no functions of tensors alone
    seconds  budget, all in all, if it is not known yet; the answer is kept for the next time
    compile  whether the calls will be inside torch.compile

    Only shapes, types and devices of the inputs matter, and the range of whole numbers; gradients
    are timed too if any input wants one. Measured on this device, in a process of its own; until
    something is proven faster it is what the package takes by itself.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    if name not in OPS or not differentiable(found := spec(name)):
        able = ", ".join(n for n in OPS if differentiable(spec(n)))
        raise ValueError(f"tune: no op {name!r} that can be measured: there are {able}")
    bound = inspect.signature(found.reference).bind(*inputs, **arguments)
    leading: list[Any] = []
    rest = dict(bound.arguments)
    for argument, value in bound.arguments.items():
        if value is not None and not (isinstance(value, Tensor) and value.is_floating_point()):
            break
        leading.append(rest.pop(argument))
    tensors = [x for x in leading if x is not None]
    if not tensors:
        raise ValueError(f"tune: {name} needs its tensors, as in a call")
    call = {
        "inputs": [describe(x) for x in leading],
        "arguments": {argument: describe(value) for argument, value in rest.items()},
        "gradients": any(x.requires_grad for x in tensors),
    }
    at = tensors[0].device
    question = Question(
        name, at, tensors[0].dtype, compile, call=call,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    store = Store()
    plan = known(question, store)
    if plan is None or not plan.found.complete:
        plan = measure(question, store, seconds=seconds, say=say)
    if plan is None:
        return Tuned(name, found.implementations[names(found, question)[0]].function, None)
    put(plan.configs, host.arch_on(at))
    return Tuned(name, found.implementations[plan.implementation].function, plan)
