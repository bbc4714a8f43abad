"""The gate: what it reads in machine code, what it makes of it, and that it misses nothing.

The gate itself, over all kernels, is a command of its own: `python -m fastgpt_kernels.tools.aot`.
Compiling needs kernels that are not interpreted, so that goes on in other processes.
"""

import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgpt_kernels.registry import OpSpec, Sizes, spec
from fastgpt_kernels.specs import spec_modules
from fastgpt_kernels.tools import aot, baseline
from fastgpt_kernels.tools.baseline import Verdict
from fastgpt_kernels.tools.bound import DEVICES, bound, pipes, programs_per_sm
from fastgpt_kernels.tools.launches import Launch
from fastgpt_kernels.tools.sass import Code, Instruction, flops, parse_amdgcn, parse_sass, widths

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


# --------------------------------------------------------------------------------- reading the code

# A loop of attention's backward with dropout, shortened: between products on R104 a wait for all.
SERIALISED = """
 Function attention_key_value_kernel:
  REG:210 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:616 TEXTURE:0 SURFACE:0 SAMPLER:0
        /*0000*/                   LDC R1, c[0x0][0x28] ;           /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDG.E.128 R40, desc[UR12][R146.64] ; /* 0x0000000c92288981 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64], P1 ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/                   HGMMA.64x32x16.F32.BF16 R104, gdesc[UR32], RZ, !UPT, gsb0 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/                   HGMMA.64x32x16.F32.BF16 R104, gdesc[UR28], R104, gsb0 ;
        /*0070*/                   MUFU.EX2 R5, R5 ;
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R56, R104, gdesc[UR24].tnspB, R56, gsb0 ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/               @P2 BRA 0x40 ;
        /*00b0*/                   CALL.REL.NOINC 0xe0 ;
        /*00c0*/                   STG.E.U16 desc[UR4][R2.64], R5 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   FMUL.FTZ R61, R61, 2.3283064365386962891e-10 ;
        /*00f0*/                   RET.REL.NODEC R60 0x0 ;
        /*0100*/                   BRA 0x100;
        /*0110*/                   NOP;
"""
AMD = """
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tglobal_load_dwordx4 v[2:5], v[0:1], off
\tglobal_load_ushort v6, v[0:1], off
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[2:3], v[4:5], v[0:15]
\ts_barrier
\ts_cbranch_scc0 .LBB0_1
\tglobal_store_dwordx2 v[0:1], v[2:3], off
\ts_endpgm
    .group_segment_fixed_size: 4096
    .private_segment_fixed_size: 8
    .vgpr_count:     94
    .vgpr_spill_count: 2
"""


def test_a_spill_is_what_is_read_back() -> None:
    """ptxas may set up a stack frame, and write zeros to it, that nothing reads."""
    written = SERIALISED.replace("STACK:0", "STACK:8").replace("MUFU.EX2 R5, R5", "STL [R1], RZ")
    assert parse_sass(written).local == 0
    assert parse_sass(written.replace("RET.REL.NODEC R60 0x0", "LDL R5, [R1]")).local == 8


def test_how_an_instruction_is_scheduled_is_no_operand() -> None:
    """Some disassemblers say it, for sm_120."""
    annotated = SERIALISED.replace("@P2 BRA 0x40 ;", "@P2 BRA 0x40 ?trans1 &req={0} ?WAIT4 ;")
    assert parse_sass(annotated) == parse_sass(SERIALISED)


def test_sass_is_read() -> None:
    code = parse_sass(SERIALISED)
    assert (code.registers, code.shared, code.local) == (210, 1024, 0)
    assert [i.op.split(".")[0] for i in code.body][-2:] == [
        "STG",
        "EXIT",
    ]  # no slow path, no padding
    assert code.instructions[1] == Instruction(16, "LDG.E.128", "R40, desc[UR12][R146.64]", "@!P0")
    assert (code.hot[0].address, code.hot[-1].address) == (0x40, 0xA0)
    assert widths(code.body) == {16: 1, 128: 2}
    assert code.in_flight == 32  # a load and a copy, 16 bytes each, neither waited for
    assert flops(code.hot) * 4 == 2 * 64 * 16 * (32 + 32 + 64)
    assert code.serialised == 1


def test_products_that_wait_at_their_sums_end_are_in_flight() -> None:
    """A wait between products on different sums, or none at all, serialises nothing."""
    text = SERIALISED.replace("R104, gsb0 ;\n        /*0070*/", "R88, gsb0 ;\n        /*0070*/")
    other = text.replace("BF16 R104, gdesc[UR28]", "BF16 R88, gdesc[UR28]")
    assert parse_sass(other).serialised == 0
    assert parse_sass(SERIALISED.replace("gsb0, 0x0", "gsb0, 0x1")).serialised == 0


def test_a_load_that_is_used_flies_no_more() -> None:
    loads = [Instruction(n, "LDG.E.64", f"R{2 * n}, desc[UR4][R90.64]") for n in range(4)]
    assert Code(tuple(loads)).in_flight == 32
    used = Instruction(9, "FADD", "R80, R1, R80")  # the first one's second register
    assert Code((loads[0], loads[1], used, loads[2], loads[3])).in_flight == 24


def loop(*body: Instruction) -> Code:
    end = 16 * len(body)
    code = [replace(x, address=16 * n) for n, x in enumerate(body)]
    return Code((*code, Instruction(end, "BRA", "0x0", target=0), Instruction(end + 16, "EXIT")))


def test_an_iteration_waits_once_for_what_it_asks_for_at_once() -> None:
    first, second = (Instruction(0, "LDG.E.128", f"R{n}, desc[UR4][R90.64]") for n in (4, 8))
    use = [Instruction(0, "FADD", f"R80, R{n}, R80") for n in (4, 8)]
    assert loop(first, second, *use).waits == Code((first, second, *use)).waits == 1
    assert loop(first, use[0], second, use[1]).waits == 2, "the second was moved down"
    assert loop(use[0], first).waits == 1, "asked for an iteration ahead, and nothing else to do"
    assert loop(use[0]).waits == 0


@pytest.mark.parametrize(("allowed", "waits"), [(0, 1), (1, 1 / 2), (3, 1 / 4)])
def test_copies_that_are_ahead_are_waited_for_less(allowed: int, waits: float) -> None:
    copy = Instruction(0, "LDGSTS.E.BYPASS.128", "[R9], desc[UR4][R2.64], P1")
    commit = Instruction(0, "LDGDEPBAR")
    depbar = Instruction(0, "DEPBAR.LE", f"SB0, {allowed:#x}")
    assert loop(copy, commit, depbar).waits == pytest.approx(waits, abs=0.13)


def test_what_adds_up_other_programs_sums_is_not_hot() -> None:
    """Even if it reads more an iteration than the loop that does the work."""
    work = [
        Instruction(0, "LDG.E.128", "R4, desc[UR4][R90.64]"),
        Instruction(16, "STG.E.128", "desc[UR4][R90.64], R4"),
        Instruction(32, "BRA", "0x0", target=0),
    ]
    sums = [
        Instruction(48 + 16 * n, "LDG.E.128.STRONG.GPU", f"R{4 * n}, desc[UR4][R90.64]")
        for n in range(8)
    ]
    code = Code((*work, *sums, Instruction(176, "BRA", "0x30", target=48)))
    assert len(code.loops) == 2 and code.hot == tuple(work)


def test_amdgcn_is_read() -> None:
    code = parse_amdgcn(AMD)
    assert (code.registers, code.shared, code.local) == (94, 4096, 16)
    assert widths(code.hot) == {16: 1, 128: 1}
    assert len(code.hot) == 5 and flops(code.hot) == 2 * 32 * 32 * 8


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "programs"),
    [
        ("sm_90", 245, 65536, 4, 2),  # by registers: 8 warps of 8 KB; by shared memory 3
        ("sm_90", 223, 98816, 8, 1),
        ("sm_90", 40, 0, 4, 12),
        ("sm_89", 16, 0, 4, 12),  # 48 warps
        ("sm_80", 32, 81920, 4, 2),  # 163 KB
        ("sm_75", 64, 0, 1, 16),
        ("gfx942", 128, 16384, 4, 4),
    ],
)
def test_programs_that_an_sm_holds(arch, registers, shared, warps, programs) -> None:
    assert programs_per_sm(arch, Code((), registers, shared), warps) == programs


def test_bound_of_a_product() -> None:
    """2 x 64 x 256 x 16 FLOPs a warpgroup at 4,096 a clock: 128 clocks; operands 10 KB: 80."""
    product = Instruction(16, "HGMMA.64x256x16.F32.BF16", "R24, gdesc[UR8], R24")
    code = Code((Instruction(0, "LDC"), product, Instruction(32, "BRA", "0x10", target=16)), 165)
    clocks = pipes(code.hot, 4, DEVICES["H100"])
    assert clocks["tensor"] == 128 and clocks["shared"] == 80 and clocks["issue"] == 2
    work = 2.0 * 65536 * 768 * 768
    found = bound(
        code, DEVICES["H100"], warps=4, grid=132, programs=1, work=work, moved=2e6
    )  # fmt: skip
    assert found.rule == "tensor"
    assert found.us == pytest.approx(work / 989.4e6) and found.share == pytest.approx(1)
    assert found.rate == "989 TFLOP/s"


def test_bound_of_a_copy() -> None:
    """16 bytes read and written a thread: DRAM, until so few fly that its latency rules."""
    load = Instruction(0, "LDG.E.128", "R4, desc[UR4][R2.64]")
    store = Instruction(16, "STG.E.128", "desc[UR4][R2.64], R4")
    moved, grid = 2.0**30, 2**30 // (32 * 4 * 32)
    options = {"warps": 4, "grid": grid, "work": 0.0, "moved": moved}
    found = bound(Code((load, store)), DEVICES["H200"], programs=16, **options)
    assert (found.rule, found.share) == ("DRAM", 1.0)
    few = bound(Code((load, store)), DEVICES["H200"], programs=1, **options)
    assert few.rule == "latency" and few.us == pytest.approx(0.7 * 2**29 / (132 * 4 * 32 * 16))
    slow = bound(Code((load, store, *[store] * 500)), DEVICES["H200"], programs=16, **options)
    assert slow.rule in ("issue", "L2") and slow.share < 0.5


# ---------------------------------------------------------------------------------------- baselines

FIGURES: dict[str, Any] = {
    "instructions": 100, "programs": 4, "times": 12, "registers": 90, "shared": 0, "barriers": 0,
    "width": "128x4", "flight": 4096, "waits": 1.0, "H100": [10.0, 0.5, "issue", "1.00 TB/s"],
    "H200": [10.0, 0.4, "issue", "1.00 TB/s"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("figures", "problem"),
    [
        ({}, ""),
        ({"instructions": 103, "programs": 5}, ""),
        ({"instructions": 104}, "104 instructions, 100 in the baseline"),
        ({"H100": [10.4, 0.4, "issue"]}, "10.4 us at least on H100, 10 in the baseline"),
        ({"waits": 2.0}, "2 waits, 1 in the baseline"),
        ({"programs": 3}, "3 programs an SM, 4 in the baseline"),
    ],
)
def test_what_got_worse_is_named(figures: dict[str, Any], problem: str) -> None:
    known = {baseline.room(Verdict("", "", "bias_gelu")): {"3.7.1": {"sm_90": {"a": FIGURES}}}}
    now = Verdict("a", "sm_90", "bias_gelu", figures=FIGURES | figures)
    assert baseline.compare(now, known, "3.7.1").problem == problem
    assert baseline.compare(replace(now, problem="spills"), known, "3.7.1").problem == "; ".join(
        filter(None, ["spills", problem])
    )
    assert baseline.compare(now, known, "3.6.0") == now
    new = baseline.compare(replace(now, name="b"), known, "3.7.1")
    assert new.problem == "not in the baseline"


def test_baseline_keeps_what_passed(tmp_path: Path) -> None:
    """Through a file; what failed or is gone leaves it, what was not compiled stays as it was."""
    names = {"sm_90": "abcd", "gfx942": "efg"}
    launches = [
        SimpleNamespace(name=n.upper(), key=n, arch=arch, op="bias_gelu")
        for arch, letters in names.items()
        for n in letters
    ]
    room = baseline.room(launches[0])
    verdicts = [
        Verdict(x.name, x.arch, "bias_gelu", x.key, FIGURES, "spills" if x.key in "bf" else "")
        for x in launches
    ]
    known = baseline.updated({"3.6.0": {}}, "3.7.1", launches, verdicts)
    baseline.write(tmp_path / "gate.json", known)
    known = baseline.read(tmp_path / "gate.json")
    assert [x.key for x in baseline.stale(launches, {room: known}, "3.7.1")] == ["b", "f"]
    assert [x.key for x in baseline.stale(launches, {room: known}, "3.6.0")] == [*"abcdefg"]
    left = [x for x in launches if x.key not in "ce"]
    verdicts = [Verdict("A", "sm_90", "bias_gelu", "a", FIGURES | {"programs": 9})]
    archs = baseline.updated(known, "3.7.1", left, verdicts)["3.7.1"]
    assert archs["gfx942"] == ["g"]
    assert archs["sm_90"] == {
        "A": {"key": "a", **FIGURES, "programs": 9}, "D": {"key": "d", **FIGURES},
    }  # fmt: skip


def test_what_a_kernel_overwrites_is_read_and_written() -> None:
    room = json.loads((ROOT / "kernels/fastgpt_kernels/ops/loss/gate.json").read_text())
    found = [kernels["sm_90"] for kernels in room.values()]
    assert found
    for kernels in found:
        chunk = 16384 * 50304 * 2  # logits of a chunk, bf16, that become their gradient
        least = kernels["gpt2 linear_cross_entropy forward: cross_entropy"]["H200"][0]
        assert least == pytest.approx(2 * chunk / 4.8e12 * 1e6, rel=0.01)


def test_readme_shows_the_baselines() -> None:
    text = aot.README.read_text()
    table = text.partition(baseline.BEGIN)[2].partition(baseline.END)[0]
    version = re.match(r"Triton ([\d.]+);", table)
    assert version, f"no table between {baseline.BEGIN!r} and {baseline.END!r}"
    known = [baseline.read(baseline.path(module)) for module in spec_modules()]
    assert table == baseline.step_table(known, version[1]), f"{aot.PROGRAM} --readme"
    assert len(table.splitlines()) > 4


# --------------------------------------------------------------------------------------- everything


def test_launches_go_to_other_processes_by_name() -> None:
    kernel = SimpleNamespace(fn=python)
    launch = Launch(kernel, "sm_90", {"x": "*fp32"}, {}, {}, moved=3)
    found = pickle.loads(pickle.dumps(launch))
    assert (found.kernel, found.arch, found.moved) == (python, "sm_90", 3)


def test_an_architecture_says_what_it_cannot_have() -> None:
    op = spec("layer_norm")

    def reason(op: OpSpec, dtype: torch.dtype) -> str | None:
        return op.unsupported_reason("triton", "sm_75", dtype, Sizes())

    assert reason(op, torch.bfloat16) == "sm_75 has no bfloat16, only float16"
    assert reason(op, torch.float16) is None
    assert "no tensor-core" in (reason(spec("attention"), torch.float16) or "")
    assert "no TMA" in (reason(spec("linear"), torch.float16) or "")


SAMPLES = """
import json
from dataclasses import asdict
from fastgpt_kernels.specs import models
from fastgpt_kernels.tools.aot import inspect_all
from fastgpt_kernels.tools.launches import record_all
if __name__ == "__main__":
    launches = []
    for arch in ("sm_90", "gfx942"):
        launches += record_all(arch, ["tests.kernels.aot_samples"], models(arch, ["gpt2"])[:1])[0]
    slow = [x for x in launches if x.op == "endless"][:1]
    rest = [x for x in launches if x.op != "endless"]
    rest = [x for x in rest if x.arch == "sm_90" or x.op in ("sound", "unaligned")]
    found = inspect_all(rest, jobs=2, timeout=60) + inspect_all(slow, jobs=1, timeout=5)
    print(json.dumps([asdict(verdict) for verdict in found]))
"""


@pytest.mark.slow
@pytest.mark.slow
def test_gate_names_each_fault(tmp_path: Path) -> None:
    script = tmp_path / "inspect_samples.py"
    script.write_text(SAMPLES)
    done = python(str(script), timeout=300)
    assert done.returncode == 0, done.stderr
    found = {(v["arch"], v["op"]): v for v in json.loads(done.stdout.splitlines()[-1])}
    problems = {op: v["problem"] for (arch, op), v in found.items() if arch == "sm_90"}
    for op in ("sound", "matmul", "aligned", "in flight"):
        assert problems[op] == "", op
    assert problems["spill"].startswith("spills ")
    assert problems["unaligned"] == "64 of 64 global accesses of 16 bits or less"
    assert re.fullmatch(r"wgmma serialised: \d+ products wait .*", problems["serialised"])
    assert problems["no wgmma"] == "matrix products without wgmma"
    assert problems["no power of two"].endswith("must be a power of 2")
    assert problems["default fusion"].startswith("the launch does not say enable_fp_fusion")
    assert problems["endless"] == "does not compile: took over 5 s"
    assert found["sm_90", "aligned"]["figures"]["width"] == "128x8"
    assert found["gfx942", "sound"]["problem"] == ""
    assert found["gfx942", "unaligned"]["problem"].endswith("global accesses of 16 bits or less")


@pytest.mark.slow
@pytest.mark.slow
def test_gate_compiles_all_that_is_launched() -> None:
    """Training, evaluation and decoding of every preset, with and without biases and dropout."""
    done = python("-m", "tests.kernels.real_launches", "sm_90", timeout=300)
    assert done.returncode == 0, (
        f"no `uses` of a room's specs.py launches these:\n{done.stdout}{done.stderr}"
    )


def test_interpreted_kernels_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert aot.main([]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err
