"""What the launchers launch, recorded without a GPU.

The launchers run on meta tensors, which have shapes and strides but no data, and through Triton's
own JIT, which binds and specialises the arguments as always; only its driver is one that launches
nothing, and nothing is compiled either. So a `Launch` is what a GPU would have been asked for: the
kernel, the types of its arguments, which of them are multiples of 16, the constants, the options.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastgpt_kernels import OPS, launch
from fastgpt_kernels.registry import spec
from fastgpt_kernels.specs import Model, Use, models, uses


def target(arch: str) -> GPUTarget:
    """Triton's target for "sm_90" or "gfx942"."""
    is_cuda = arch.startswith("sm_")
    return GPUTarget("cuda", int(arch[3:]), 32) if is_cuda else GPUTarget("hip", arch, 64)


@dataclass(frozen=True)
class Launch:
    """One kernel as it was launched.

    signature, constexprs, attrs  as `triton.compiler.ASTSource` takes them
    options                       the launch's own, num_warps and the like
    grid                          programs
    moved                         bytes of the tensors among its arguments, each counted once; what
                                  the kernel's `in_place` names twice is read and written
    work                          FLOPs of the matrix products, by the op's record
    times                         how often a training step of the model launches it
    name                          of the first use that launched it, unique in a recording
    op                            of that use
    """

    kernel: Any
    arch: str
    signature: Mapping[str, str]
    constexprs: Mapping[tuple[int, ...], Any]
    attrs: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    grid: int = 1
    moved: int = 0
    work: float = 0.0
    times: int = 0
    name: str = ""
    op: str = ""

    def __getstate__(self) -> dict[str, Any]:
        """Launches go to other processes, kernels by name."""
        return vars(self) | {"kernel": (self.kernel.fn.__module__, self.kernel.fn.__name__)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        module, name = state["kernel"]
        vars(self).update(state, kernel=getattr(importlib.import_module(module), name))

    @property
    def title(self) -> str:
        """The kernel and the flags that are set, without sizes and tiles."""
        names = list(self.signature)
        flags = [names[path[0]] for path, v in self.constexprs.items() if v is True]
        return " ".join([self.kernel.fn.__name__.removesuffix("_kernel"), *flags])

    @property
    def detail(self) -> str:
        """All that was specialised: "x: *bf16 /16" is a multiple of 16, "C=768" a constant."""
        texts = []
        for i, (name, kind) in enumerate(self.signature.items()):
            even = " /16" * bool(self.attrs.get((i,)))
            constant = (i,) in self.constexprs
            texts.append(f"{name}={self.constexprs[i,]}" if constant else f"{name}: {kind}{even}")
        return f"{self.kernel.fn.__name__}({', '.join(texts)})"

    @property
    def key(self) -> str:
        """A hash of all that decides the machine code, but for the version of Triton."""
        parts = (
            source(self.kernel), self.arch, sorted(self.signature.items()),
            sorted((k, _stable(v)) for k, v in self.constexprs.items()),
            sorted((k, str(v)) for k, v in self.attrs.items() if v), sorted(self.options.items()),
        )  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _stable(value: Any) -> str:
    return source(value) if hasattr(value, "src") else re.sub(r" at 0x\w+", "", str(value))


@functools.cache
def source(kernel: Any) -> str:
    """A kernel's code and that of all it calls, comments and layout aside, and its constants.

    Triton's own `cache_key` has line numbers in it and is another in every version.
    """
    used = inspect.getclosurevars(kernel.fn)
    names = {**used.globals, **used.nonlocals}
    for module in [m for m in names.values() if inspect.ismodule(m)]:
        if module.__name__.split(".")[0] in ("triton", "torch"):  # their versions are no part of it
            continue
        names |= {n: getattr(module, n) for n in used.unbound if hasattr(module, n)}
    text = [ast.unparse(ast.parse(kernel.src))]
    for name, value in sorted(names.items()):
        if not inspect.ismodule(value) and not _from_triton(value) and value is not kernel:
            text.append(f"{name} = {_stable(value)}")
    return "\n".join(text)


def _from_triton(value: Any) -> bool:
    home = getattr(getattr(value, "fn", value), "__module__", "") or ""
    return home.split(".")[0] in ("triton", "torch")


class _Driver:
    """As much of a driver as Triton's JIT asks for; the architecture's name is the device."""

    def __init__(self, arch: str):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return target(self.arch)

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: str) -> int:
        return 0


@dataclass
class _Recorded:
    """What stands for a compiled kernel."""

    launch: Launch
    found: list[Launch]
    function: Any = None
    packed_metadata: Any = None

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        kernel, arguments = self.launch.kernel, rest[6:]
        tensors = {id(t): t for t in (getattr(a, "base", a) for a in arguments)}
        counted: list[Any] = [t for t in tensors.values() if isinstance(t, Tensor)]
        named = dict(zip(kernel.arg_names, arguments, strict=True))
        read, written = (named.get(name) for name in getattr(kernel, "in_place", ("", "")))
        if read is not None and read is written:
            counted.append(read)
        moved = sum(t.numel() * t.element_size() for t in counted)
        self.found.append(replace(self.launch, grid=x * y * z, moved=moved))


@contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Within, launches on meta tensors are appended to the list, and nothing is launched."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("unset TRITON_INTERPRET: interpreted kernels have no machine code")
    found: list[Launch] = []
    kernels: set[Any] = set()
    run, compile_now, active = JITFunction.run, JITFunction._do_compile, driver._active
    given: dict[str, Any] = {}

    def note(self: Any, *args: Any, **kwargs: Any) -> Any:
        given.clear()
        given.update(
            {k: v for k, v in kwargs.items() if k not in (*self.arg_names, "grid", "warmup")}
        )
        return run(self, *args, **kwargs)

    def stand_in(self: Any, key: Any, signature: Any, device: Any, constexprs: Any, *rest: Any):
        launch = Launch(self, arch, signature, constexprs, rest[1], dict(given))
        kernels.add(self)
        self.device_caches[device][0][key] = _Recorded(launch, found)
        return self.device_caches[device][0][key]

    JITFunction.run, JITFunction._do_compile = note, stand_in
    driver.set_active(_Driver(arch))
    try:
        with launch.pretend(arch):
            yield found
    finally:
        JITFunction.run, JITFunction._do_compile, driver._active = run, compile_now, active
        for kernel in kernels:
            kernel.device_caches.pop(arch)


def run(use: Use) -> Iterator[str]:
    """Make a use of an op, forward and, if it is for training, backward; after each its name."""
    with torch.set_grad_enabled(use.trains):
        outs = use.call()
    yield "forward"
    if use.trains:
        outs = [o for o in (outs if isinstance(outs, tuple) else (outs,)) if o.requires_grad]
        torch.autograd.backward(outs, [torch.empty_like(o) for o in outs])
        yield "backward"


def record_all(
    arch: str, modules: Sequence[str], chosen: Sequence[Model] = ()
) -> tuple[list[Launch], dict[str, str]]:
    """Every different launch of the rooms' ops for the models, and why an op has none, by its name.

    Names are unique, and stay the same as long as the launchers do: tiles are not in them.
    """
    found: dict[str, Launch] = {}
    names: dict[str, int] = {}
    left_out: dict[str, str] = {}
    with recording(arch) as launches:
        for model in chosen or models(arch):
            for use in (use for module in modules for use in uses(module, model)):
                op = spec(use.op) if use.op in OPS else None
                reason = None
                if op:
                    sizes = use.sizes or model
                    reason = op.unsupported_reason("triton", arch, model.dtype, sizes)
                if reason:
                    left_out[use.op] = reason
                    continue
                for phase in run(use):
                    work = op.cost(use.sizes or model, model.dtype.itemsize) if op else {}
                    flops = work[phase].flops if phase in work else 0.0
                    for key, n in Counter(launch.key for launch in launches).items():
                        if key in found:
                            continue
                        launch = next(x for x in launches if x.key == key)
                        name = f"{model.name} {use.op} {phase}: {launch.title}"
                        names[name] = number = names.get(name, 0) + 1
                        alike = sum(x.kernel is launch.kernel for x in launches)
                        found[key] = replace(
                            launch, op=use.op, name=name + f" {number}" * (number > 1),
                            moved=use.moved or launch.moved, work=flops / alike,
                            times=n * use.often,
                        )  # fmt: skip
                    launches.clear()
    return [*found.values()], left_out
