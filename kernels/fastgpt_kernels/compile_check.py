"""Check of the compiled kernels, for GPUs that need not be present.

    python -m fastgpt_kernels.compile_check [--all] [--op NAME ...] [--triton DIR]

Every op runs its example inputs at each preset's sizes on meta tensors, which have no data. What it
launches is recorded, compiled and disassembled. A launch fails if it spills registers, needs too
much shared memory, waits for each wgmma, or moves 16 bits of global memory at a time in a loop.
Without --all: training and evaluation of every preset for sm_90, and of gpt2 for the others.
"""

from __future__ import annotations

import argparse
import copyreg
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fastgpt_kernels import OPS
from fastgpt_kernels.launch import pretend
from fastgpt_kernels.progress import progress
from fastgpt_kernels.registry import ExampleInputs, OpSpec, Sizes, spec
from fastgpt_kernels.worker import ask_all

# The sizes of fastgpt's presets as they train. A test compares them with fastgpt's own.
PRESETS = {
    "gpt2": Sizes(32, 1024, 12, 768, bias=False),
    "gpt2_medium": Sizes(16, 1024, 16, 1024, bias=False),
    "gpt2_large": Sizes(8, 1024, 20, 1280, bias=False),
    "gpt2_xl": Sizes(4, 1024, 25, 1600, bias=False),
    "finetune_shakespeare": Sizes(1, 1024, 25, 1600),
    "shakespeare_char": Sizes(64, 256, 6, 384, 65, 128, dropout=0.2, bias=False, gelu="erf"),
    "laptop": Sizes(12, 64, 4, 128, 65, 128, bias=False, gelu="erf"),
}
LIMIT_S = 120.0  # per launch
# KB of shared memory that a program may have. Source: CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability".
SHARED_KB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}


# --- Recording --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Kernel as an op launches it: the arguments of `triton.compile`, the op and its sizes."""

    source: Any
    target: GPUTarget
    options: Mapping[str, Any]
    op: str = ""
    preset: str = ""

    @property
    def arch(self) -> str:
        return f"sm_{self.target.arch}"

    def __str__(self) -> str:
        """Returns one line: architecture, op, preset, and the kernel with its launch config."""
        names = list(self.source.signature)
        constants = {names[path[0]]: value for path, value in self.source.constants.items()}
        config = constants | {k: self.options[k] for k in ("num_warps", "num_stages")}
        text = ", ".join(f"{k}={v}" for k, v in config.items() if isinstance(v, int))
        return f"{self.arch} {self.op}, {self.preset}: {self.source.fn.__name__}({text})"


@contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Appends each new kind of launch on meta tensors to a list, without compiling it.

    Triton's own JIT binds the arguments, for a driver whose device is `arch`.
    """
    found, kernels, target = list[Launch](), list[Any](), GPUTarget("cuda", int(arch[3:]), 32)

    def compile_later(source: Any, target: GPUTarget, options: Mapping[str, Any]) -> Any:
        # A launch is sent to a worker with its kernel's name.
        copyreg.pickle(type(source.fn), lambda fn: (resolve_name, (f"{fn.module}:{fn.__name__}",)))
        found.append(Launch(source, target, options))
        kernels.append(source.fn)
        return mock.Mock()  # a compiled kernel that launches nothing

    device = mock.Mock()
    device.get_current_target.return_value = target
    device.get_current_device.return_value = arch
    with (
        mock.patch.object(driver, "_active", device),
        mock.patch.object(triton.compiler, "compile", compile_later),
        pretend(arch),
    ):
        yield found
    for kernel in kernels:
        kernel.device_caches.pop(arch, None)


def record(arch: str, ops: Sequence[OpSpec], presets: Mapping[str, Sizes]) -> list[Launch]:
    """Returns each different launch of the ops' implementations that `arch` supports."""
    launches = []
    with recording(arch) as found:
        for preset, sizes in presets.items():
            for op in ops:
                for name, implementation in op.implementations.items():
                    if name == "eager" or op.unsupported_reason(name, arch, torch.bfloat16, sizes):
                        continue
                    for example in op.example_inputs(sizes, partial(torch.randn, device="meta")):
                        run(implementation.function, example)
                    launches += [replace(x, op=op.name, preset=preset) for x in found]
                    found.clear()
    return launches


def run(function: Callable[..., Any], example: ExampleInputs) -> None:
    """Makes one call with bf16 activations, forward and, if a run differentiates it, backward."""
    example = example.rounded(torch.bfloat16)
    outs = example.outputs(function, example.leaves())
    for n in {len(outs), 1} if example.gradients else ():  # nothing reads the last norm's stream
        grads = [torch.empty_like(o) for o in outs[:n]]
        torch.autograd.backward(outs[:n], grads, retain_graph=True)


# --- Machine code -----------------------------------------------------------------------------

_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,6})\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][^\s;]*)([^;]*);", re.MULTILINE
)
_GLOBAL = re.compile(r"(LDG|STG|LDGSTS|REDG?|ATOMG?)\.")
_NARROW = re.compile(r"\.[US](8|16)\b")


def problems(sass: str) -> list[str]:
    """Returns what is wrong with a kernel, by the text of `cuobjdump -sass`."""
    code = [(int(at, 16), op, rest.strip()) for at, op, rest in _INSTRUCTION.findall(sass)]
    if not code:
        raise ValueError("no instructions in the disassembly")
    branches = {
        at: int(found[1], 16)
        for at, op, rest in code
        if op.startswith("BRA") and (found := re.search(r"\b0x([0-9a-f]+)", rest))
    }
    counts = {
        "spills: {} loads from local memory": sum(op.startswith("LDL") for _, op, _ in code),
        "serialised wgmma: {} wait for the one before": _serialised(code, branches),
        "{} global accesses of 16 bits or less": _narrow(code, branches),
    }
    return [text.format(n) for text, n in counts.items() if n]


def _serialised(code: Sequence[tuple[int, str, str]], branches: Mapping[int, int]) -> int:
    """Counts wgmma that add to the sum of the one before, after a wait for all in flight.

    Such a chain needs no wait. ptxas inserts one if it cannot prove that no other instruction
    touches the registers of the sum meanwhile (its warning C7515).
    """
    count, last, waited = 0, "", False
    for at, op, rest in code:
        if at in branches or at in branches.values():  # a chain lies within a basic block
            last = ""
        if op.startswith("HGMMA"):
            accumulator, *factors = (x.strip() for x in rest.split(","))
            count += waited and accumulator == last and accumulator in factors
            last, waited = accumulator, False
        elif op.startswith("WARPGROUP.DEPBAR") and rest.endswith("0x0"):
            waited = True
    return count


def _narrow(code: Sequence[tuple[int, str, str]], branches: Mapping[int, int]) -> int:
    """Counts loads and stores of at most 16 bits in loops, and all of them if most are such.

    Outside of loops a few are scalars. A kernel without loops that lost its vectors has many.
    """
    loops = [(target, at) for at, target in branches.items() if target < at]
    accesses = [(at, op) for at, op, _ in code if _GLOBAL.match(op)]
    narrow = [at for at, op in accesses if _NARROW.search(op)]
    if 2 * len(narrow) > len(accesses):
        return len(narrow)
    return sum(any(start <= at <= end for start, end in loops) for at in narrow)


def check(launch: Launch) -> tuple[int, int, list[str]]:
    """Compiles a launch; returns its registers, bytes of shared memory, and problems."""
    compiled = triton.compile(launch.source, target=launch.target, options=dict(launch.options))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "-sass", "-res-usage", file.name]
        sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    shared, limit = compiled.metadata.shared, SHARED_KB[launch.arch] << 10
    too_much = [f"{shared} bytes of shared memory, {limit} are there"] * (shared > limit)
    registers = max(int(n) for n in re.findall(r"\bREG:(\d+)", sass))
    return registers, shared, [*too_much, *problems(sass)]


@dataclass(frozen=True)
class Result:
    """Launch with its registers per thread, bytes of shared memory per program, and problems."""

    launch: Launch
    registers: int
    shared: int
    problems: Sequence[str]


# --- The command ------------------------------------------------------------------------------


def chosen_presets(arch: str, everything: bool) -> Mapping[str, Sizes]:
    """Returns the presets as they train, or all with and without biases and dropout."""
    if not everything:
        return PRESETS if arch == "sm_90" else {"gpt2": PRESETS["gpt2"]}
    return {
        f"{name} bias={bias} dropout={dropout}": replace(sizes, bias=bias, dropout=dropout)
        for name, sizes in PRESETS.items()
        for bias in (False, True)
        for dropout in (0.0, 0.2)
    }


def table(results: Sequence[Result]) -> str:
    """Returns a row per op with a cell per architecture: the most that any launch needs."""

    def cell(op: str, arch: str) -> str:
        found = [r for r in results if (r.launch.op, r.launch.arch) == (op, arch)]
        if not found:
            return "-"
        verdict = "FAILS" if any(r.problems for r in found) else "ok"
        registers, shared = max(r.registers for r in found), max(r.shared for r in found)
        return f"{registers} {shared >> 10}K {verdict}"

    ops = dict.fromkeys(r.launch.op for r in results)
    lines = [f"{'op':22}" + "".join(f"{arch:15}" for arch in SHARED_KB)]
    lines += [f"{op:22}" + "".join(f"{cell(op, arch):15}" for arch in SHARED_KB) for op in ops]
    return "\n".join(line.rstrip() for line in lines)


def report(launches: Sequence[Launch], check: Callable[[Launch], Any] = check) -> int:
    """Checks the launches in child processes; prints the progress, each failure and the table."""
    results = list[Result]()

    def say(line: str) -> None:
        print(f"{line}, {len(results)} of {len(launches)} launches", flush=True)

    with progress("compiling", say) as elapsed:
        jobs = min(len(os.sched_getaffinity(0)), 8)
        for launch, found in zip(launches, ask_all(check, launches, LIMIT_S, jobs), strict=True):
            results.append(Result(launch, *((0, 0, [found]) if isinstance(found, str) else found)))
            for problem in results[-1].problems:
                print(f"{launch}: {problem}", flush=True)
        seconds = elapsed()
    failed = sum(bool(r.problems) for r in results)
    print(f"{table(results)}\nregisters per thread, shared memory per program: the most")
    print(f"{len(results)} launches, {failed} fail, Triton {triton.__version__}, {seconds:.0f} s")
    return 1 if failed or not results else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastgpt_kernels.compile_check", description=str(__doc__).partition("\n")[0]
    )
    add = parser.add_argument
    add("--all", action="store_true", help="every preset, with and without biases and dropout")
    add("--op", nargs="+", choices=OPS, default=[*OPS], metavar="NAME", help="only these ops")
    add("--triton", metavar="DIR", help="another Triton: pip install --target DIR triton==3.6.0")
    args = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("unset TRITON_INTERPRET: interpreted kernels have no machine code")
    if args.triton and Path(args.triton).resolve() != Path(triton.__file__).parents[1]:
        if not Path(args.triton, "triton").is_dir():
            parser.error(f"--triton: there is no triton in {args.triton}")
        path = os.pathsep.join([os.path.abspath(args.triton), *filter(None, sys.path)])
        command = [sys.executable, "-m", "fastgpt_kernels.compile_check"]
        command += sys.argv[1:] if arguments is None else arguments
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode
    ops = [spec(name) for name in args.op]
    launches = [x for a in SHARED_KB for x in record(a, ops, chosen_presets(a, args.all))]
    return report(launches)


if __name__ == "__main__":
    from fastgpt_kernels.compile_check import main  # whose functions a worker finds by name

    sys.exit(main())
