"""`fastgpt tune`, and what `--tune` does before a run: measure here what is the fastest, keep it.

Op by op first, those with the largest share of a step before the others; then the winners together,
as whole micro-steps, against what is taken unmeasured and, on a GPU, against plain PyTorch under
torch.compile: Inductor fuses across ops, so that sums of parts mislead. On a CPU the micro-steps
also tell whether to compile and with how many threads. What is not proven to be faster changes
nothing.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fastgpt.config import settings
from fastgpt.config.schema import Config
from fastgpt.errors import UserError
from fastgpt.model import ops
from fastgpt.model.build import build, set_precision, sizes_of
from fastgpt.model.device import Machine
from fastgpt.model.gpt import ModelShape
from fastgpt.model.plan import Measured, Plan
from fastgpt.storage import run
from fastgpt.train import memory
from fastgpt.train.trainer import Trainer
from fastgpt_kernels import host
from fastgpt_kernels.plans import device as devices
from fastgpt_kernels.plans import tune as op_tuning
from fastgpt_kernels.plans.child import Child, Failed, Spent
from fastgpt_kernels.plans.choose import MARGIN, ROUNDS, Candidate, Found, choose
from fastgpt_kernels.plans.store import Store
from fastgpt_kernels.plans.tune import OpPlan, Question, figures
from fastgpt_kernels.registry import OpSpec, Sizes, specs
from fastgpt_kernels.telling import telling

AUTO_S = 60.0  # what --tune=auto may take,
WORTH = 20.0  # of runs that take so many times as long
MFU = 0.3  # by which a run's length is guessed
MICRO_SHARE = 0.5  # of the budget is kept for whole micro-steps
BUILD_S, TURN_S = 300.0, 120.0  # limits for a micro-step: to build and compile it, for a turn
TURN_MS = 200.0
TOLERANCE = 0.02  # of loss and gradient norm, as a captured graph's are held against a plain step's
WITH_DROPOUT = 0.1  # other random numbers
# A GPU does so many FLOPs in the time in which it moves a byte; for the order of worth alone.
FLOPS_A_BYTE = 250.0

Say = Callable[[str], object]


def say_line(line: str) -> None:
    print(f"tune: {line}", flush=True)


# --- the command and a run -----------------------------------------------------------------------


def tune(config: Config, vocab_size: int, seconds: float) -> int:
    """`fastgpt tune`: measure all there is within the budget, and show it."""
    machine = machine_of(config)
    obstacle = _obstacle(config)
    if obstacle:
        raise UserError(f"tune: {obstacle}")
    plan = measure(config, vocab_size, machine, seconds, with_configs=True)
    show(plan, Store())
    if not plan.lines:
        print(f"nothing was measured in {seconds:g} s: --budget gives it more")
    return 0


def for_run(config: Config, vocab_size: int, machine: Machine, alone: bool = True) -> Plan:
    """The plan of a new run: measured now if --tune says so, else what is known.

    `alone`: no other ranks wait for this one meanwhile.
    """
    asked = config.system.tune
    if asked == "off" or _obstacle(config):
        return Plan()
    plan = known(config, vocab_size, machine)
    seconds = 0.0
    if asked != "auto":
        seconds = float(asked)
    elif estimate_s(config, vocab_size, machine) > WORTH * AUTO_S:
        seconds = AUTO_S
    most = config.system.dist_timeout / 2
    if not alone and seconds > most:
        print(f"tune: {most:g} s in place of {seconds:g}: other ranks wait (--dist_timeout)")
        seconds = most
    if seconds and not complete(config, vocab_size, machine):
        plan = measure(config, vocab_size, machine, seconds)
        show(plan, Store())
    elif plan.lines:
        print(f"kernels: as measured {plan.date} on this {plan.device}")
    return plan


def of_run(run_dir: Path) -> Plan:
    """The plan that a run began with; an empty one if it has none. Raises UserError."""
    document = run.load_plan(run_dir)
    if document is None:
        return Plan()
    try:
        return Plan.of(document)
    except ValueError as e:
        raise UserError(
            f"{run_dir / 'plan.json'}: {e}; without the file the run goes on, on other kernels "
            "perhaps"
        ) from e


def show(plan: Plan, store: Store) -> None:
    """What a user sees: how long it took, where it is kept, and the figures."""
    if not plan.lines:
        return
    took = plan.lines[0]
    versions = f"torch {torch.__version__.partition('+')[0]}"
    if triton := devices.facts(torch.device("cpu"))["triton"]:
        versions += f", triton {triton}"
    where = f"not kept: {store.problem}" if store.problem else f"kept in {_short(store.folder)}"
    print(f"kernels: measured {took} on this {plan.device} ({versions}), {where}")
    for line in plan.lines[1:]:
        print(f"  {line}")


def _short(path: Path | None) -> str:
    text = str(path)
    try:
        home = str(Path.home())
    except RuntimeError:
        return text
    return "~" + text.removeprefix(home) if text.startswith(home + "/") else text


def machine_of(config: Config) -> Machine:
    s = config.system
    return Machine.of(s.device, s.dtype, s.compile, s.peak_tflops)


def estimate_s(config: Config, vocab_size: int, machine: Machine) -> float:
    """About how long a run takes, by its FLOPs at a usual share of the peak."""
    shape = ModelShape.of(config.model, vocab_size)
    attention = 12 * shape.n_layer * shape.n_embd * shape.block_size
    flops = 6 * memory.n_parameters(shape) + attention
    tokens = float(config.run.max_iters) * config.optim.rows * config.model.block_size
    return tokens * flops / (MFU * machine.peak.flops)


def _obstacle(config: Config) -> str:
    """Why plans do not go with these settings; empty if they do."""
    if config.system.parallel == "fsdp":
        return "a plan is for one GPU that holds the model, not for --parallel=fsdp"
    if config.optim.auto_batch_size:
        return "a plan is for one size of the micro-batch, not for --batch_size=auto"
    return ""


# --- what is known, and what is measured ---------------------------------------------------------


def _questions(config: Config, vocab_size: int, machine: Machine) -> dict[str, Question]:
    """The ops that the settings leave open and that have a choice, the worthiest first."""
    wish = ops.Wish(config.system.kernels, vars(config.op))
    sizes = sizes_of(config, vocab_size)
    found = {}
    for op in sorted(specs("model"), key=lambda op: -_share(op, sizes, machine)):
        if wish.of(op)[0] != "auto":
            continue
        question = Question(
            op.name, machine.device, machine.torch_dtype, machine.compile, sizes,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        if len(op_tuning.names(op, question)) > 1:
            found[op.name] = question
    return found


def _share(op: OpSpec, sizes: Sizes, machine: Machine) -> float:
    """An op's part of a step, by the FLOPs and bytes of its record, in no unit."""
    work = op.cost(sizes, machine.torch_dtype.itemsize).values()
    return op.calls_per_step * sum(max(w.flops, FLOPS_A_BYTE * w.bytes) for w in work)


def _micro_key(config: Config, vocab_size: int, machine: Machine) -> dict[str, Any]:
    here = Path(__file__).resolve().parent
    model = here.parent / "model"
    return devices.key(machine.device, {
        "micro_step": asdict(config.model) | {"vocab_size": vocab_size},
        "batch_size": config.optim.batch_size,
        "settings": {**asdict(config.system), **_without(machine)},
        "ops": vars(config.op),
        "threads": torch.get_num_threads() if machine.device.type == "cpu" else 0,
        "code": devices.hash_of(model / "gpt.py", model / "ops.py", here / "trainer.py"),
    })  # fmt: skip


def _without(machine: Machine) -> dict[str, Any]:
    """What the machine says in place of settings, and settings that do not matter to a step."""
    others = ("tune", "peak_tflops", "parallel", "reduce_dtype", "dist_timeout", "backend")
    open_ = {"dtype": machine.dtype, "device": machine.device.type}
    return {**dict.fromkeys(others), **open_}


def _winners(questions: Mapping[str, Question], store: Store) -> dict[str, OpPlan]:
    found = {op: op_tuning.known(question, store) for op, question in questions.items()}
    return {op: plan for op, plan in found.items() if plan is not None}


def known(config: Config, vocab_size: int, machine: Machine) -> Plan:
    """What was measured before, here and for these settings; empty if nothing was."""
    set_precision(config, machine)
    store = Store()
    winners = _winners(_questions(config, vocab_size, machine), store)
    found = Found.of(store.load(_micro_key(config, vocab_size, machine)))
    return _plan(config, vocab_size, machine, winners, found, 0.0)


def complete(config: Config, vocab_size: int, machine: Machine) -> bool:
    """Whether there is nothing left to measure, launch configs aside."""
    set_precision(config, machine)
    store, questions = Store(), _questions(config, vocab_size, machine)
    winners = _winners(questions, store)
    if any(op not in winners or not winners[op].found.complete for op in questions):
        return False
    candidates = micro_candidates(config, machine, winners)
    found = Found.of(store.load(_micro_key(config, vocab_size, machine)))
    tried = set(found.trials) if found and found.complete else set()
    return len(candidates) < 2 or {c.name for c in candidates} <= tried


def measure(
    config: Config,
    vocab_size: int,
    machine: Machine,
    seconds: float,
    *,
    with_configs: bool = False,
    rounds: int = ROUNDS,
    say: Say = say_line,
    clock: Callable[[], float] = time.monotonic,
    op_measurer: Callable[..., Any] = op_tuning.OpMeasurer,
    micro_measurer: Callable[..., Any] | None = None,
) -> Plan:
    """Measure what is not known yet, within about `seconds`, and return the plan."""
    set_precision(config, machine)
    began, store = clock(), Store()
    end = began + seconds
    questions = _questions(config, vocab_size, machine)
    name = devices.name(machine.device)
    with store.measuring(name) as alone:
        if not alone:
            say(f"another process measures on this {name}: going on with what is known")
            return known(config, vocab_size, machine)
        say(f"at most {seconds:g} s on this {name}")
        ops_end = began + seconds * (1 - MICRO_SHARE)
        for at, (op, question) in enumerate(questions.items()):
            left = ops_end - clock()
            if left <= 0:
                say(f"{', '.join([*questions][at:])}: the next time")
                break
            tell = lambda line, op=op: say(f"{op}: {line}")  # noqa: E731
            with telling(op, say):
                op_tuning.measure(
                    question, store, seconds=left, rounds=rounds, with_configs=with_configs,
                    say=tell, clock=clock, measurer=op_measurer,
                )  # fmt: skip
        winners = _winners(questions, store)
        found = _micro_steps(
            config, vocab_size, machine, winners, store, end, rounds, say, clock,
            micro_measurer or MicroMeasurer,
        )  # fmt: skip
    return _plan(config, vocab_size, machine, winners, found, clock() - began)


def _micro_steps(
    config: Config, vocab_size: int, machine: Machine, winners: Mapping[str, OpPlan],
    store: Store, end: float, rounds: int, say: Say, clock: Callable[[], float],
    measurer: Callable[..., Any],
) -> Found | None:  # fmt: skip
    candidates = micro_candidates(config, machine, winners)
    if len(candidates) < 2:
        return None
    key = _micro_key(config, vocab_size, machine)
    there = measurer(config, vocab_size, machine, lambda: end - clock())
    try:
        with telling("whole micro-steps", say):
            return choose(
                candidates, there, known=Found.of(store.load(key)), seconds=end - clock(),
                rounds=rounds, keep=lambda found: store.update(key, lambda old: found.to_dict()),
                say=lambda line: say(f"micro-step: {line}"), clock=clock,
            )  # fmt: skip
    finally:
        there.close()


def micro_candidates(
    config: Config, machine: Machine, winners: Mapping[str, OpPlan]
) -> list[Candidate]:
    """Whole micro-steps to try; the first is what is taken unmeasured."""
    arch = host.arch_on(machine.device)
    chosen = {
        op: {"implementation": p.implementation, "reason": p.reason, "configs": [*p.configs]}
        for op, p in winners.items()
        if p.found.choice != p.found.default
    }
    tables: dict[str, dict[str, Any]] = {"default": {}}
    if chosen:
        # What is measured is named, so that other winners are another candidate.
        told = ", ".join(f"{op} {winners[op].found.choice}" for op in sorted(chosen))
        tables[f"winners ({told})"] = chosen
    if machine.device.type == "cuda" and config.system.kernels == "auto":
        wish = ops.Wish("auto", vars(config.op))
        eager = {
            op.name: {"implementation": "eager", "reason": "plain PyTorch", "configs": []}
            for op in specs("model")
            if wish.of(op)[0] == "auto"
        }
        tables["all eager"] = eager
    found = []
    for name, ops_ in tables.items():
        for compile, threads in _ways(config, machine):
            plan = {"ops": ops_, "arch": arch, "compile": compile, "threads": threads}
            how = [] if compile is None else ["compiled" if compile else "not compiled"]
            how += [f"{threads} thread{'s' * (threads > 1)}"] if threads else []
            found.append(Candidate(", ".join([name, *how]), {"plan": plan}))
    return found


def _ways(config: Config, machine: Machine) -> list[tuple[bool | None, int]]:
    """(compile, threads): on a CPU what the settings leave open, as it is now first."""
    if machine.device.type != "cpu":
        return [(None, 0)]
    now, cores = torch.get_num_threads(), devices.cores()
    few = range(1, cores + 1)
    doubled = [2**i for i in range(int(math.log2(cores)) + 1)] + [cores]
    threads = [now, *(n for n in (few if cores <= 4 else dict.fromkeys(doubled)) if n != now)]
    compiled: list[bool | None] = [None]
    if config.system.compile == "auto":
        compiled = [machine.compile, not machine.compile]
    return [(c, n) for c in compiled for n in threads]


def _plan(
    config: Config, vocab_size: int, machine: Machine, winners: Mapping[str, OpPlan],
    micro: Found | None, seconds: float,
) -> Plan:  # fmt: skip
    """What is to be used: the micro-step that was proven to be the fastest."""
    candidates = {c.name: c for c in micro_candidates(config, machine, winners)}
    arch, name = host.arch_on(machine.device), devices.name(machine.device)
    measured = {op: p for op, p in winners.items() if any(t.ms for t in p.found.trials.values())}
    if not measured and micro is None:
        return Plan(arch=arch, device=name)
    spent = seconds or sum(p.found.seconds for p in winners.values())
    spent += 0 if seconds or micro is None else micro.seconds
    lines = [f"{spent:.0f} s"]
    width = max((len(op) for op in [*measured, "whole micro-step"]), default=0)
    for op, p in measured.items():
        lines.append(f"{op:{width}}  {p.implementation:7} {figures(p.found)}")
    dates = [p.found.date for p in measured.values()] + ([micro.date] if micro else [])
    plan = Plan(arch=arch, device=name, date=max(dates, default=""))
    chosen = candidates.get(micro.choice) if micro else None
    if micro is None or chosen is None:
        if len(candidates) > 1:
            lines.append(f"{'whole micro-step':{width}}  not measured yet: as without a plan")
        return replace(plan, lines=lines)
    lines.append(f"{'whole micro-step':{width}}  {micro.choice}: {figures(micro)}")
    if micro.choice == micro.default:
        lines.append(f"nothing is faster by {MARGIN:.0%} or more: as without a plan")
    # Where the default is the fastest it says so too.
    table = {
        op: Measured(p.implementation, p.reason, p.configs)
        for op, p in measured.items()
        if p.found.choice == p.found.default
    }
    if micro.choice == micro.default:
        return replace(plan, ops=table, lines=lines)
    spec = chosen.spec["plan"]
    for op, m in spec["ops"].items():
        table[op] = Measured(m["implementation"], m["reason"], m["configs"])
    return replace(plan, ops=table, compile=spec["compile"], threads=spec["threads"], lines=lines)


# --- whole micro-steps, each in a process of its own ---------------------------------------------


class MicroMeasurer:
    """A child a candidate, so that each has its own threads, compiler and memory; parked between
    its turns. All have to find the first one's loss and gradient norm."""

    def __init__(
        self, config: Config, vocab_size: int, machine: Machine, left: Callable[[], float]
    ):
        self.left = left
        self._arguments = {
            "values": settings.to_dict(settings.replace(config, **machine.settings)),
            "vocab_size": vocab_size,
            "compile": config.system.compile,
        }
        self.parallel = 1 if machine.device.type == "cpu" else max(1, min(3, devices.cores() // 4))
        self._tolerance = WITH_DROPOUT if config.model.dropout else TOLERANCE
        self._children: dict[str, Child] = {}
        self._wanted: dict[str, float] = {}
        self._begun, self._first_is_done = threading.Lock(), threading.Event()

    def check(self, candidate: Candidate) -> None:
        child = self._children[candidate.name] = Child(
            "fastgpt.train.tuning:MicroStep", {**self._arguments, **candidate.spec}
        )
        first = self._begun.acquire(blocking=False)
        try:
            got = child.ask_within(self.left, "check", timeout=BUILD_S)
            if not first:
                self._first_is_done.wait()
            for what, value in got.items():
                want = self._wanted.setdefault(what, value)
                if not abs(value - want) <= self._tolerance * abs(want):
                    raise Failed(f"wrong: its {what} is {value:.4g}, not {want:.4g}")
        except (Failed, Spent):
            child.close()
            raise
        finally:
            if first:
                self._first_is_done.set()

    def time(self, candidate: Candidate) -> float:
        if candidate.name not in self._children:
            self.check(candidate)
        child = self._children[candidate.name]
        return child.ask_within(self.left, "turn", timeout=TURN_S)

    def close(self) -> None:
        for child in self._children.values():
            child.close()


class MicroStep:
    """Lives in a child: forward and backward of the run's micro-batch, as the trainer does them."""

    def __init__(self, values: dict, vocab_size: int, compile: str | bool, plan: Mapping[str, Any]):
        config = settings.replace(Config(), **values)
        config = settings.replace(config, gradient_accumulation_steps=1)
        made = Plan.of({**plan, "device": "", "date": "", "lines": []})
        machine = made.adopt(machine_of(config), compile)
        if machine.device.type == "cuda" and machine.device.index is not None:
            torch.cuda.set_device(machine.device)
        self.trainer = Trainer(build(config, vocab_size, machine, plan=made), config, machine)
        generator = torch.Generator().manual_seed(0)
        size = (config.optim.batch_size, config.model.block_size + 1)
        tokens = torch.randint(vocab_size, size, generator=generator)
        self.tokens, self.machine = tokens.to(machine.device), machine
        self.count = 1

    def check(self) -> dict[str, float]:
        """Compile; the loss and the norm of all gradients."""
        trainer = self.trainer
        trainer.warm_up(0, self.tokens)
        trainer.capture_if_it_pays(0, lambda: self.tokens, update=False)
        loss = trainer._backward(0, self.tokens)
        grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        found = {"loss": loss.item(), "gradient norm": torch.nn.utils.get_total_norm(grads).item()}
        self._turn(1)
        self.count = max(1, min(50, round(TURN_MS / max(self._turn(1), 1e-3))))
        self._park()
        return found

    def turn(self) -> float:
        """Milliseconds of a micro-step, the mean of several in a row."""
        self._turn(1)  # memory comes back, clocks rise
        ms = self._turn(self.count)
        self._park()
        return ms

    def _turn(self, count: int) -> float:
        self.machine.synchronize()
        began = time.perf_counter()
        for step in range(count):
            self.trainer._backward(step, self.tokens)
            self.trainer._zero_grad()
        self.machine.synchronize()
        return 1e3 * (time.perf_counter() - began) / count

    def _park(self) -> None:
        if self.machine.device.type == "cuda":
            torch.cuda.empty_cache()
