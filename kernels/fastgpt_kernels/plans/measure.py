"""One op's implementations on a device, as a run calls them; lives in a `Child`.

Timed are forward and backward together, at the sizes, types, dropout and biases of the run, under
torch.compile if the run is. The L2 is overwritten before a call if the call moves more than the L2
holds, as in a step: what fits is there still, just written by the op before.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import OPS, configs, host, selfcheck, specs
from fastgpt_kernels.configs import Config
from fastgpt_kernels.plans.child import Failed
from fastgpt_kernels.registry import ExampleInputs, OpSpec, Sizes, differentiate, normal, spec
from fastgpt_kernels.tools.timing import HEAD_START_CYCLES, L2_FLUSH_BYTES

TURN_MS = 20.0  # of calls, on a CPU
CALLS = 3  # a turn, on a GPU
# Two implementations round differently; the norm of a result of millions shows no more than this.
NORMS = 0.02

Spec = Mapping[str, Any]


class OpBench:
    """What a `Child` holds: `check` and `turn` take the spec of a candidate,
    {"implementation": "triton", "configs": [{"room", "table", "bound", "config"}, ...]}.
    """

    def __init__(
        self,
        op: str,
        device: str,
        dtype: str,
        compile: bool,
        sizes: Mapping[str, Any] | None = None,
        call: Mapping[str, Any] | None = None,
        precision: str = "highest",
        deterministic: bool = False,
    ):
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        self.op, self.compile = spec(op), compile
        if self.device.index is not None:
            torch.cuda.set_device(self.device)
        self.sizes = Sizes(**(sizes or {}))
        if call is not None:
            case = example_case(call, self.device, self.dtype)
            self.op = replace(self.op, example_inputs=lambda s, random: [case], few_tokens=0)
        self.arch = host.arch_on(self.device)
        self._made: dict[str, list[_Call]] = {}
        self._norms: list[float] | None = None
        self._flush: Tensor | None = None

    # --- a candidate -------------------------------------------------------------------------

    def check(self, spec: Spec) -> None:
        """Raises Failed unless it agrees with the specification, and runs at the full size."""
        name = spec["implementation"]
        given = spec.get("configs", ())
        if given and self.device.type == "cuda":
            problem = gate(self.op, self.sizes, self.dtype, self.arch, given)
            if problem:
                raise Failed(f"the gate: {problem}")
        with using(given, self.arch):
            problem = selfcheck.disagreement(self.op, name, self.device, self.dtype, self.sizes)
            if problem:
                raise Failed(problem)
            calls = self._calls(name)
            self._compare(calls)
        for call in calls:
            call.settle()

    def turn(self, spec: Spec) -> float:
        """Milliseconds of all the calls of the op that differ, each once."""
        with using(spec.get("configs", ()), self.arch):
            return sum(call.turn(self._flush) for call in self._calls(spec["implementation"]))

    def tables(self) -> list[dict[str, Any]]:
        """The entries of tables of launch configs that ours reads, and what to try for each."""
        with configs.watched() as seen, torch.enable_grad():
            for call in self._calls("triton"):
                call.once()
        found = []
        room = OPS[self.op.name].room
        tables = vars(importlib.import_module(f"{room}.configs"))
        tunables = list(importlib.import_module(f"{room}.specs").tunables(self.arch))
        for name, table in tables.items():
            for bound in dict.fromkeys(b for t, _, b in seen if t is table):
                tried = [t.candidates for t in tunables if (t.table, t.key) == (name, bound)]
                present = configs.entries(table, self.arch)[bound]
                others = [c.to_dict() for c in (tried or [[]])[0] if c != present]
                where = {"room": room, "table": name, "bound": bound}
                found.append({**where, "candidates": others})
        return [t for t in found if t["candidates"]]

    # --- its calls ---------------------------------------------------------------------------

    def _calls(self, name: str) -> list[_Call]:
        if name not in self._made:
            # The cache of compiled graphs does not know which attention PyTorch was told to take.
            torch.compiler.config.cache_key_tag = f"{self.op.name}={name}"
            function = self.op.implementations[name].function
            if self.compile:
                function = torch.compile(function, fullgraph=True, dynamic=False)
            cases = timed_cases(self.op, self.device, self.dtype, self.sizes)
            self._made[name] = [_Call(function, case, self.device) for case in cases]
            self._flush = self._flusher(self._made[name])
        return self._made[name]

    def _flusher(self, calls: Sequence[_Call]) -> Tensor | None:
        """What overwrites the L2; None if the calls fit into it, and on a CPU."""
        if self.device.type != "cuda":
            return None
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size
        if max(call.bytes for call in calls) <= l2:
            return None
        return torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=self.device)

    def _compare(self, calls: Sequence[_Call]) -> None:
        """Results and gradients at the full size against eager's, by their norms."""
        if self._norms is None:
            cases = timed_cases(self.op, self.device, self.dtype, self.sizes)
            try:
                plain = [_Call(self.op.eager, case, self.device) for case in cases]
                self._norms = [n for call in plain for n in call.norms()]
            except torch.OutOfMemoryError:
                self._norms = []
        norms = [(call, call.norms()) for call in calls]
        mine = [x for _, n in norms for x in n]
        # With dropout masks, and with them norms, may differ, which are to be finite all the same.
        drawn = ["dropout_p" in call.case.arguments for call, n in norms for _ in n]
        for got, want, own in zip(mine, self._norms or mine, drawn, strict=True):
            off = 0.0 if own else abs(got - want)
            if not (math.isfinite(got) and off <= NORMS * abs(want)):
                raise Failed(f"is off at the full size: a norm of {got:.4g} is {want:.4g} in eager")


class _Call:
    """One call of a function on inputs of its own, forward and backward."""

    def __init__(self, function: Callable[..., Any], case: ExampleInputs, device: torch.device):
        self.function, self.case, self.device = function, case, device
        self.leaves = [None if x is None else x.detach().clone() for x in case.inputs]
        tensors = [x for x in self.leaves if x is not None]
        for x in tensors:
            x.requires_grad_(case.gradients)
        self.wanted = [x for x in tensors if x.requires_grad]
        self.bytes = 3 * sum(x.numel() * x.element_size() for x in tensors)
        self.dys: list[Tensor] | None = None
        self.count = CALLS

    def once(self) -> list[Tensor]:
        """Results and gradients."""
        with torch.set_grad_enabled(self.case.gradients):
            out = self.case.call(self.function, self.leaves)
            outs = list(out) if isinstance(out, tuple) else [out]
            if not self.case.gradients:
                return outs
            if self.dys is None:
                make = enumerate(outs, 1)
                self.dys = [normal(o.device, seed=i)(*o.shape).to(o.dtype) for i, o in make]
            return [*outs, *torch.autograd.grad(outs, self.wanted, self.dys)]

    def norms(self) -> list[float]:
        return [x.detach().float().norm().item() for x in self.once()]

    def settle(self) -> None:
        """Warm up, and on a CPU find out how many calls make a turn."""
        for _ in range(2):
            self.once()
        if self.device.type == "cpu":
            began = time.perf_counter()
            self.once()
            ms = 1e3 * (time.perf_counter() - began)
            self.count = max(1, min(1000, round(TURN_MS / max(ms, 1e-3))))

    def turn(self, flush: Tensor | None) -> float:
        """Milliseconds of a call, the mean of a few."""
        if self.device.type == "cuda":
            pairs = []
            for _ in range(self.count):
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                if flush is not None:
                    flush.zero_()
                torch.cuda._sleep(HEAD_START_CYCLES)
                before.record()
                self.once()
                after.record()
                pairs.append((before, after))
            torch.cuda.synchronize(self.device)
            return sum(a.elapsed_time(b) for a, b in pairs) / len(pairs)
        began = time.perf_counter()
        for _ in range(self.count):
            self.once()
        if self.device.type == "mps":
            torch.mps.synchronize()
        return 1e3 * (time.perf_counter() - began) / self.count


def timed_cases(
    op: OpSpec, device: torch.device, dtype: torch.dtype, sizes: Sizes
) -> list[ExampleInputs]:
    """The calls of a training step at its full size; those without gradients if it has none."""
    found = op.example_inputs(sizes, normal(device))
    found = [c for c in found if c.gradients] or found
    return [
        replace(case, inputs=[
            x if x is None or i in case.fp32_inputs else x.to(dtype)
            for i, x in enumerate(case.inputs)
        ])
        for case in found
    ]  # fmt: skip


# --- launch configs ------------------------------------------------------------------------------


def table_of(given: Mapping[str, Any]) -> configs.Table:
    """The table that {"room", "table", ...} names. Raises LookupError or ImportError."""
    room = given["room"]
    if room not in {entry.room for entry in OPS.values()}:
        raise LookupError(f"no room {room}")
    return vars(importlib.import_module(f"{room}.configs"))[given["table"]]


def put(given: Sequence[Mapping[str, Any]], arch: str) -> None:
    """Use these launch configs from now on, in this process."""
    for one in given:
        configs.use(table_of(one), arch, int(one["bound"]), Config(**one["config"]))


@contextmanager
def using(given: Sequence[Mapping[str, Any]], arch: str):
    """Within, these launch configs are used."""
    tables = [table_of(one) for one in given]
    before = [dict(table) for table in tables]
    put(given, arch)
    try:
        yield
    finally:
        for table, old in zip(reversed(tables), reversed(before), strict=True):
            table.clear()  # type: ignore[attr-defined]
            table.update(old)  # type: ignore[attr-defined]


def gate(
    op: OpSpec, sizes: Sizes, dtype: torch.dtype, arch: str, given: Sequence[Mapping[str, Any]]
) -> str:
    """What the ahead-of-time gate has against these launch configs; empty if nothing.

    Spills, serialised products, narrow accesses, and fewer programs than the GPU has SMs where the
    present entries have more. Compiles for the launch that follows, which finds it in the cache.
    """
    from fastgpt_kernels.tools import aot, launches

    model = specs.Model(**asdict(sizes), name="here", dtype=dtype)

    def recorded() -> dict[str, launches.Launch]:
        with launches.recording(arch) as found:
            for use in specs.recorded(op, model):
                for _ in launches.run(use):
                    pass
        return {launch.key: launch for launch in found}

    present = recorded()
    enough = {launch.title: launch.grid for launch in present.values()}
    with using(given, arch):
        mine = recorded()
    for key, launch in mine.items():
        if key in present:
            continue
        if launch.grid < host.SMS.get(arch, 1) <= enough.get(launch.title, 0):
            return f"{launch.title}: {launch.grid} programs for {host.SMS[arch]} SMs"
        if problem := aot.inspect(launch).problem:
            return f"{launch.title}: {problem}"
    return ""


# --- calls by example ----------------------------------------------------------------------------


def describe(value: Any) -> Any:
    """A tensor as JSON: shape, type, and of whole numbers their range; other values as they are."""
    if not isinstance(value, Tensor):
        return value
    told: dict[str, Any] = {
        "shape": list(value.shape),
        "dtype": str(value.dtype).removeprefix("torch."),
    }
    if not value.dtype.is_floating_point and value.numel():
        told |= {"low": int(value.min()), "high": int(value.max())}
    return {"tensor": told}


def _make(told: Any, device: torch.device) -> Any:
    if not isinstance(told, Mapping):
        return told
    given = told["tensor"]
    dtype = getattr(torch, given["dtype"])
    if dtype.is_floating_point:
        return normal(device)(*given["shape"]).to(dtype)
    generator = torch.Generator().manual_seed(0)
    low, high = given.get("low", 0), given.get("high", 0) + 1
    made = torch.randint(low, high, given["shape"], generator=generator)
    return made.to(device, dtype)


def example_case(
    call: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> ExampleInputs:
    """The case of {"inputs", "arguments", "gradients"} as `describe` told them, random ones."""
    inputs = [_make(told, device) for told in call["inputs"]]
    arguments = {name: _make(told, device) for name, told in call["arguments"].items()}
    masters = [i for i, x in enumerate(inputs) if x is not None and x.dtype != dtype]
    return ExampleInputs(inputs, arguments, masters, call["gradients"])


def differentiable(op: OpSpec) -> bool:
    """Whether an op is measured as a function of tensors; optimizers and decoding are not."""
    return op.run is differentiate
