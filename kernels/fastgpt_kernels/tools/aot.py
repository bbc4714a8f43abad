"""The gate: every kernel that training, evaluation and decoding launch, held to its machine code.

    python -m fastgpt_kernels.tools.aot [--arch sm_90 ...] [--op layer_norm ...] [--update]

No GPU is needed: launches are recorded from the launchers (`launches`), compiled by Triton, and
read with the disassembler that comes with it (`sass`). A kernel fails if it spills, does not fit an
SM, has a serialised wgmma loop or none where there should be one, reads or writes its tensors a few
bits at a time, leaves the contraction of a * b + c to Triton's default, or does not compile in
time; if warps of a Gluon kernel do not wait for each other where its source takes that for granted
(`ptx`); and if its hot path, its bound (`bound`) or the number of programs that an SM holds has got
worse than what the baseline in its op's room says, `ops/NAME/gate.json`.

The baselines have a hash of all that decides a kernel's machine code, and a kernel whose hash is
there passed. On sm_90 the kernels of a training step are compiled all the same, and of the others
those that changed; `--arch sm_90` compiles all. On the other architectures and versions of Triton
nothing is, so that the gate fails, and says which command helps, until somebody has compiled what
changed:

    python -m fastgpt_kernels.tools.aot --update [--triton DIR ...]

Each DIR has another Triton: pip install --no-deps --target DIR triton==3.6.0
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton
from triton.compiler import ASTSource

import fastgpt_kernels
from fastgpt_kernels.specs import spec_modules
from fastgpt_kernels.telling import telling
from fastgpt_kernels.tools import baseline, bound, ptx, sass
from fastgpt_kernels.tools.baseline import Verdict
from fastgpt_kernels.tools.launches import Launch, record_all, target
from fastgpt_kernels.tools.sass import Code, count, flops
from fastgpt_kernels.tools.workers import TaskFailed, Worker

PROGRAM = "python -m fastgpt_kernels.tools.aot"
ALWAYS = "sm_90"  # compiled in every run
NARROW = 4  # global accesses of 16 bits or less that a hot path may have, for scalars
README = Path(fastgpt_kernels.__file__).parents[1] / "README.md"

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def compile_launch(launch: Launch) -> tuple[Code, Any]:
    """(machine code, Triton's compiled kernel)."""
    make: Any = ASTSource
    if launch.kernel.is_gluon():  # it cannot be imported where kernels are interpreted
        from triton.experimental.gluon._runtime import GluonASTSource

        make = GluonASTSource
    source = make(launch.kernel, launch.signature, launch.constexprs, launch.attrs)
    compiled = triton.compile(source, target=target(launch.arch), options=dict(launch.options))
    if "cubin" in compiled.asm:
        code = sass.disassemble(compiled.asm["cubin"])
    else:
        code = sass.parse_amdgcn(compiled.asm["amdgcn"])
    # Dynamic shared memory is not in the binary.
    return replace(code, shared=max(code.shared, compiled.metadata.shared)), compiled


def judge(launch: Launch, code: Code, warps: int) -> list[str]:
    """All that is wrong with a kernel."""
    problems = []
    limit = bound.LIMITS[launch.arch][0] * 1024
    if code.local:
        problems.append(f"spills {code.local} bytes a thread")
    if code.shared > limit:
        problems.append(f"shared memory {code.shared} > {limit}")
    elif not bound.programs_per_sm(launch.arch, code, warps):
        problems.append(f"{warps} warps of {code.registers} registers do not fit an SM")
    if code.serialised:
        problems.append(f"wgmma serialised: {code.serialised} products wait for the one before")
    if launch.arch == "sm_90" and flops(code.hot) and not count(code.hot, "HGMMA"):
        problems.append("matrix products without wgmma")
    accesses = sass.widths(code.hot)
    narrow = sum(n for bits, n in accesses.items() if bits <= 16)
    share = sum(n * bits for bits, n in accesses.items() if bits <= 16)
    if narrow > NARROW and 8 * share > sum(n * bits for bits, n in accesses.items()):
        problems.append(f"{narrow} of {sum(accesses.values())} global accesses of 16 bits or less")
    if "enable_fp_fusion" not in launch.options:
        problems.append("the launch does not say enable_fp_fusion: see configs.options")
    return problems


def measure(launch: Launch, code: Code, warps: int) -> dict[str, Any]:
    """The figures of a verdict."""
    programs = bound.programs_per_sm(launch.arch, code, warps)
    specialised = count(code.body, "USETMAXREG") > 0
    working = warps - 4 if specialised else warps  # one warpgroup has the copies alone
    found = {
        "registers": code.registers,
        "shared": code.shared,
        "programs": programs,
        "times": launch.times,
        "instructions": len(code.hot),
        "barriers": count(code.hot, "BAR", "s_barrier"),
        "width": sass.width_text(code.hot),
        "flight": code.in_flight * sass.WARP * warps * programs,
        "waits": round(code.waits, 2),
    }
    for name, device in bound.DEVICES.items():
        if device.arch == launch.arch:
            b = bound.bound(
                code, device, warps=working, grid=launch.grid, programs=programs,
                work=launch.work, moved=launch.moved,
            )  # fmt: skip
            found[name] = [round(b.us, 2), round(b.share, 3), b.rule, b.rate]
            if specialised:  # of the tensor cores, for the hot loop's instructions
                found["clocks"] = round(b.clocks["tensor"])
    return found


def inspect(launch: Launch) -> Verdict:
    """Compile a launch and judge it."""
    code, compiled = compile_launch(launch)
    warps = compiled.metadata.num_warps
    problems = judge(launch, code, warps)
    if launch.kernel.is_gluon():
        problems += ptx.problems(compiled.asm["ptx"])
    return Verdict(
        launch.name, launch.arch, launch.op, launch.key, measure(launch, code, warps),
        "; ".join(problems), sass.summary(code),
    )  # fmt: skip


def _task(cache: str, launch: Launch) -> Verdict:
    """One launch in a worker process; with a fresh cache, so nothing stale is looked at."""
    triton.knobs.cache.dir = cache
    triton.knobs.compilation.always_compile = True
    return inspect(launch)


def inspect_all(
    launches: Sequence[Launch], *, jobs: int = 2, timeout: float = 120.0
) -> list[Verdict]:
    """Verdicts on all launches, in `jobs` processes.

    A kernel whose compilation takes over `timeout` seconds, or kills its process, is reported so.
    """
    here = threading.local()  # a worker process a thread
    workers: list[Worker] = []
    verdicts: list[Verdict] = []

    def one(launch: Launch) -> Verdict:
        if not hasattr(here, "worker"):
            here.worker = Worker(_task, cache)
            workers.append(here.worker)
        try:
            return here.worker.ask(launch, timeout=timeout)
        except TaskFailed as error:
            problem = f"does not compile: {error}"
            return Verdict(launch.name, launch.arch, launch.op, launch.key, problem=problem)

    def say(line: str) -> None:
        print(f"{line}, {len(verdicts)} of {len(launches)} kernels", file=sys.stderr, flush=True)

    with (
        tempfile.TemporaryDirectory() as cache,
        ThreadPoolExecutor(jobs) as pool,
        telling("compiling", say, every=10),
    ):
        try:
            for verdict in pool.map(one, launches):
                verdicts.append(verdict)
            return verdicts
        finally:
            for worker in workers:
                worker.close()


# ------------------------------------------------------------------------------------ the command


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--arch", nargs="+", default=(), choices=ARCHITECTURES, help="compile all for these")
    add("--op", nargs="+", default=(), help="only the rooms of these ops")
    add("--only", default="", help="only kernels with this text in their name")
    add("--show", action="store_true", help="print each loop of a kernel too")
    add("--jobs", type=int, default=os.cpu_count() or 1)
    add("--timeout", type=float, default=120.0, help="seconds for one kernel")
    add("--update", action="store_true", help="compile what changed too, and write the baselines")
    add("--readme", action="store_true", help="write the table of kernels/README.md, nothing else")
    add("--triton", nargs="+", default=(), metavar="DIR", help="with the Tritons of these folders")
    args = parser.parse_args(arguments)
    if args.update and args.only:
        parser.error("--update is for whole rooms: leave --only out")
    if triton.knobs.runtime.interpret:
        print("unset TRITON_INTERPRET: interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    if args.triton:
        given = list(sys.argv[1:] if arguments is None else arguments)
        return max(_with_triton(folder, given) for folder in args.triton)
    modules, version = spec_modules(args.op), triton.__version__
    known = {module: baseline.read(baseline.path(module)) for module in modules}
    if args.readme:
        table = baseline.step_table(known.values(), version)
        README.write_text(baseline.with_table(README.read_text(), table))
        return 0
    start = time.monotonic()
    launches: list[Launch] = []
    for arch in args.arch or ARCHITECTURES:
        found, left_out = record_all(arch, modules)
        launches += found
        for op, reason in left_out.items():
            print(f"{arch}: {op} runs eager: {reason}")
    launches = [x for x in launches if args.only in x.name]
    changed = {id(x) for x in baseline.stale(launches, known, version)}
    todo = [
        x
        for x in launches
        if x.arch in args.arch
        or (id(x) in changed and (args.update or x.arch == ALWAYS))
        or (x.arch == ALWAYS and x.times and not args.arch)
    ]
    verdicts = inspect_all(todo, jobs=args.jobs, timeout=args.timeout)
    if args.update:
        for module in modules:
            mine = [x for x in launches if baseline.room(x) == module]
            known[module] = baseline.updated(known[module], version, mine, verdicts)
            baseline.write(baseline.path(module), known[module])
    else:
        verdicts = [baseline.compare(v, known, version) for v in verdicts]
    bad = sum(bool(v.problem) for v in verdicts)
    print(baseline.table(verdicts, args.show))
    print(
        f"{len(verdicts)} of {len(launches)} kernels compiled in {time.monotonic() - start:.0f} s "
        f"with Triton {version}: {bad} with problems"
    )
    looked_at = {(version, x.arch) for x in todo}
    for other in sorted({v for b in known.values() for v in b}):
        # What nobody has compiled at all with a version is not held against it.
        held = {arch for b in known.values() for arch in b.get(other, {})}
        old = [
            x
            for x in baseline.stale([x for x in launches if x.arch in held], known, other)
            if (other, x.arch) not in looked_at
        ]
        if old:
            where = "" if other == version else f" --triton DIR, where DIR has triton=={other}"
            print(
                f"{len(old)} kernels have changed since they were compiled with Triton {other}, "
                f"such as {old[0].arch} {old[0].name}: {PROGRAM} --update{where}"
            )
            bad += len(old)
    return 1 if bad else 0


def _with_triton(folder: str, arguments: list[str]) -> int:
    """The same command with the Triton that lies in a folder."""
    first = arguments.index("--triton")
    last = first + 1
    while last < len(arguments) and not arguments[last].startswith("-"):
        last += 1
    path = os.pathsep.join([os.path.abspath(folder), *filter(None, sys.path)])
    command = [sys.executable, "-m", "fastgpt_kernels.tools.aot"]
    command += arguments[:first] + arguments[last:]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode


if __name__ == "__main__":
    sys.exit(main())
