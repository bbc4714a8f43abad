"""Compile every kernel with every config for GPUs that are not here, and count what they use.

    python -m fastgpt_kernels.tools.aot [--arch sm_90 ...] [--op layer_norm ...] [--baseline FILE]

prints registers a thread, shared memory, spilled bytes and the widest global access by kernel, and
exits with 1 if a kernel spills, needs more shared memory than the device has, lacks the wgmma
it should have, or does not compile in time. No GPU is needed: ptxas and cuobjdump come with Triton.
With --baseline it also fails if a kernel uses markedly more than FILE says for this version of
Triton, or is not in FILE; --update then writes what was found to FILE.

The kernels are what the rooms' `specs.py` list (`fastgpt_kernels.specs`).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgpt_kernels.configs import ARCHITECTURES
from fastgpt_kernels.specs import AotSpec, spec_modules
from fastgpt_kernels.tools.workers import TaskFailed, Worker

# Shared memory one block may have, in bytes: CUDA C++ Programming Guide, "Technical Specifications
# per Compute Capability" (the opt-in maximum); CDNA3 ISA for gfx942.
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel uses; `problem` is empty if all is well."""

    name: str
    arch: str
    registers: int = 0
    shared: int = 0  # bytes a block
    spills: int = 0  # bytes a thread of local memory
    widest: int = 0  # bits of the widest global load or store
    seconds: float = 0.0
    problem: str = ""


def target(arch: str) -> GPUTarget:
    """Triton's target for "sm_90" or "gfx942"."""
    is_cuda = arch.startswith("sm_")
    return GPUTarget("cuda", int(arch[3:]), 32) if is_cuda else GPUTarget("hip", arch, 64)


def compile_spec(spec: AotSpec, arch: str) -> Any:
    """Triton's compiled kernel for `spec`; `.asm` holds ttgir, ptx and cubin, or amdgcn."""
    names = spec.kernel.arg_names
    unknown = (set(spec.signature) | set(spec.constexprs) | set(spec.divisible_by_16)) - set(names)
    missing = set(names) - set(spec.signature) - set(spec.constexprs)
    if unknown or missing:
        raise ValueError(
            f"{spec.name}: arguments of {spec.kernel.__name__} without a type: {sorted(missing)}; "
            f"named in the spec but not arguments: {sorted(unknown)}"
        )
    source = ASTSource(
        spec.kernel,
        {n: "constexpr" if n in spec.constexprs else spec.signature[n] for n in names},
        constexprs={(names.index(n),): value for n, value in spec.constexprs.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in spec.divisible_by_16},
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    return triton.compile(source, target=target(arch), options=options)


def _cuda_usage(compiled: Any) -> tuple[int, int, int, int]:
    """(registers, static shared bytes, local bytes, widest access) of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    line = next(line for line in text.splitlines() if "REG:" in line)
    used = {key: int(n) for key, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
    access = r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.[bsuf](\d+)\b"
    accesses = re.findall(access, compiled.asm["ptx"])
    widest = max((int(n or 1) * int(bits) for n, bits in accesses), default=0)
    # ptxas keeps spilled registers in the stack frame or in .nv.local, by version.
    return used["REG"], used["SHARED"], max(used["LOCAL"], used["STACK"]), widest


def _amd_usage(compiled: Any) -> tuple[int, int, int, int]:
    """The same for AMD, from the kernel metadata at the end of the assembly."""
    text = compiled.asm["amdgcn"]

    def field(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        if found is None:
            raise ValueError(f"no .{key} in the amdgcn metadata")
        return int(found[1])

    accesses = re.findall(r"\b(?:global|buffer)_(?:load|store)_dword(?:x(\d))?\b", text)
    words = [int(n or 1) for n in accesses]
    spills = 4 * field("vgpr_spill_count") + field("private_segment_fixed_size")
    registers = field("vgpr_count")  # counts the accumulation registers too on gfx942
    return registers, field("group_segment_fixed_size"), spills, 32 * max(words, default=0)


def inspect(spec: AotSpec, arch: str) -> Usage:
    """Compile `spec` for `arch` and judge what it uses."""
    start = time.perf_counter()
    compiled = compile_spec(spec, arch)
    judge = _cuda_usage if arch.startswith("sm_") else _amd_usage
    registers, shared, spills, widest = judge(compiled)
    shared = max(shared, compiled.metadata.shared)  # dynamic shared memory is not in the binary
    problems = []
    if spills:
        problems.append(f"spills {spills} bytes a thread")
    if shared > SHARED_LIMIT[arch]:
        problems.append(f"shared memory {shared} > {SHARED_LIMIT[arch]}")
    if spec.expect_wgmma and arch == "sm_90" and "wgmma.mma_async" not in compiled.asm["ptx"]:
        problems.append("no wgmma in the PTX")
    used = (registers, shared, spills, widest, time.perf_counter() - start)
    return Usage(spec.name, arch, *used, problem="; ".join(problems))


@functools.cache
def _specs(module: str, arch: str) -> list[AotSpec]:
    return list(importlib.import_module(module).aot_specs(arch))


def _inspect_task(cache: str, module: str, arch: str, index: int) -> Usage:
    """One kernel in a worker process; with a fresh cache, so nothing stale is looked at."""
    triton.knobs.cache.dir = cache
    triton.knobs.compilation.always_compile = True
    return inspect(_specs(module, arch)[index], arch)


def inspect_all(
    modules: Sequence[str], archs: Sequence[str], *, jobs: int = 2, timeout: float = 60.0
) -> list[Usage]:
    """Usage of every spec of `modules` on `archs`, in `jobs` processes.

    A kernel whose compilation takes over `timeout` seconds, or kills its process, is reported so.
    """
    tasks = [
        (module, arch, index, spec.name)
        for arch in archs
        for module in modules
        for index, spec in enumerate(_specs(module, arch))
    ]
    names = [(arch, name) for _, arch, _, name in tasks]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"specs with the same name: {twice}")
    here = threading.local()  # a worker process a thread
    workers: list[Worker] = []

    def one(task: tuple[str, str, int, str]) -> Usage:
        if not hasattr(here, "worker"):
            here.worker = Worker(_inspect_task, cache)
            workers.append(here.worker)
        try:
            return here.worker.ask(*task[:3], timeout=timeout)
        except TaskFailed as error:
            return Usage(task[3], task[1], problem=f"does not compile: {error}")

    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(jobs) as pool:
        try:
            return list(pool.map(one, tasks))
        finally:
            for worker in workers:
                worker.close()


def table(usages: Sequence[Usage]) -> str:
    """The usages as text, one row a kernel."""
    width = max(len(name) for name in ["kernel", *(usage.name for usage in usages)])
    lines = [f"{'kernel':{width}}  arch    regs  shared spills ld/st     s"]
    for u in usages:
        lines.append(
            f"{u.name:{width}}  {u.arch:7} {u.registers:4} {u.shared:7} {u.spills:6} {u.widest:5}"
            f" {u.seconds:5.1f}  {u.problem}".rstrip()
        )
    return "\n".join(lines)


# More than this over the baseline is a regression. Registers come in steps of 8, and one step can
# be the scheduler's whim.
REGISTER_TOLERANCE, SHARED_TOLERANCE = 8, 1024


def compare(usages: Sequence[Usage], baseline: dict[str, Any] | None) -> list[Usage]:
    """The usages, with a problem added if one exceeds the baseline's {arch: {name: [r, s]}}."""
    if baseline is None:
        return list(usages)
    judged = []
    for usage in usages:
        known, problem = baseline.get(usage.arch, {}).get(usage.name), ""
        if known is None:
            problem = "not in the baseline"
        elif usage.registers > known[0] + REGISTER_TOLERANCE:
            problem = f"{known[0]} registers in the baseline"
        elif usage.shared > known[1] + SHARED_TOLERANCE:
            problem = f"{known[1]} bytes of shared memory in the baseline"
        judged.append(replace(usage, problem=usage.problem or problem))
    return judged


def main(arguments: Sequence[str] | None = None) -> int:
    program = "python -m fastgpt_kernels.tools.aot"
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, choices=sorted(SHARED_LIMIT))
    parser.add_argument("--op", nargs="+", default=(), help="only these ops' rooms")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one kernel")
    parser.add_argument("--baseline", type=Path, help="JSON file of what each kernel used before")
    parser.add_argument("--update", action="store_true", help="write the baseline, not compare")
    args = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        print("unset TRITON_INTERPRET: interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    start = time.monotonic()
    usages = inspect_all(spec_modules(args.op), args.arch, jobs=args.jobs, timeout=args.timeout)
    version, exists = triton.__version__, args.baseline and args.baseline.exists()
    known = json.loads(args.baseline.read_text()) if exists else {}
    if args.baseline and not args.update:
        usages = compare(usages, known.get(version))
    bad = [usage for usage in usages if usage.problem]
    print(table(usages))
    seconds = time.monotonic() - start
    print(
        f"{len(usages)} kernels in {seconds:.0f} s with Triton {version}: {len(bad)} with problems"
    )
    if args.baseline and not args.update and version not in known:
        print(f"{args.baseline} says nothing about Triton {version}: not compared")
    if args.baseline and args.update and not bad:
        rows = known.setdefault(version, {})
        if not args.op:  # a whole run: kernels that are gone leave the file too
            for arch in args.arch:
                rows.pop(arch, None)
        for usage in usages:
            rows.setdefault(usage.arch, {})[usage.name] = [usage.registers, usage.shared]
        text = json.dumps(known, indent=1, sort_keys=True)
        # One line a kernel: [registers, shared memory].
        args.baseline.write_text(re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
