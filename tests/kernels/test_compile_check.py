"""The check of compiled kernels, with planted faults; their process has no interpreter."""

import importlib
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl

from fastgpt.config import settings
from fastgpt.config.presets import PRESETS
from fastgpt.model.build import sizes_of
from fastgpt_kernels import compile_check
from fastgpt_kernels.compile_check import SHARED_KB, main, problems, recording, report
from fastgpt_kernels.launch import SMS

ROOT = Path(__file__).resolve().parents[2]


@triton.jit
def outer_sums(x_ptr, y_ptr, B: tl.constexpr):
    """x lives across the loop, in B * B / 32 / num_warps registers."""
    offsets = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    x = tl.load(x_ptr + offsets).to(tl.float32)
    for _ in range(2):
        x += tl.sum(x, 0)[None, :] * tl.sum(x, 1)[:, None]
    tl.store(y_ptr + offsets, x.to(y_ptr.dtype.element_ty))


@triton.jit
def matmul(x_ptr, y_ptr, depth, B: tl.constexpr):
    """The pipeline keeps 2 * num_stages tiles of B x B bf16 in shared memory."""
    offsets = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    y = tl.zeros([B, B], tl.float32)
    for _ in range(depth):
        y = tl.dot(tl.load(x_ptr + offsets), tl.load(x_ptr + B + offsets), y)
        x_ptr += B * B
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty))


@triton.jit
def masked_copy(x_ptr, y_ptr, rows, n, B: tl.constexpr):
    """Accesses are as wide as n allows: 16 bits, if it is no multiple of 16."""
    columns = tl.arange(0, B)
    for row in range(rows):
        x = tl.load(x_ptr + row * n + columns, mask=columns < n, other=0.0)
        tl.store(y_ptr + row * n + columns, x, mask=columns < n)


@triton.jit
def attention_gradients(q_ptr, y_ptr, rows, B: tl.constexpr, D: tl.constexpr):
    at = tl.arange(0, B)[:, None] * D + tl.arange(0, D)[None, :]
    k = tl.load(q_ptr + at)
    dk, dv = tl.zeros([B, D], tl.float32), tl.zeros([B, D], tl.float32)
    for _ in range(0, rows, B):
        q = tl.load(q_ptr + at)
        p = tl.exp2(tl.dot(k, tl.trans(q)))
        dp = tl.dot(k, tl.trans(q))
        dv = tl.dot(p.to(q.dtype), q, dv)
        dk = tl.dot((p * dp).to(q.dtype), q, dk)
        q_ptr += B * D
    tl.store(y_ptr + at, (dk + dv).to(y_ptr.dtype.element_ty))


def launches(arch: str) -> dict[str, compile_check.Launch]:
    """Returns launches by name: sound ones, and one with each fault (152 registers are too few)."""
    x = torch.empty(1 << 20, dtype=torch.bfloat16, device="meta")
    planted: dict[str, Any] = {
        "sound": lambda: outer_sums[(1,)](x, x, 32),
        "sound matmul": lambda: matmul[(1,)](x, x, 64, 128, num_warps=8),
        "sound copy": lambda: masked_copy[(1,)](x, x, 64, 2048, 4096),
        "sound chains": lambda: attention_gradients[(1,)](x, x, 1024, 64, 64),
        "spills": lambda: outer_sums[(1,)](x, x, 128, num_warps=2),
        "shared": lambda: matmul[(1,)](x, x, 64, 128, num_warps=8, num_stages=5),
        "narrow": lambda: masked_copy[(1,)](x, x, 64, 2049, 4096),
        "serialised": lambda: attention_gradients[(1,)](x, x, 1024, 64, 64, maxnreg=152),
        "no power of two": lambda: outer_sums[(1,)](x, x, 48),
    }
    with recording(arch) as found:
        for launch in planted.values():
            launch()
    return {k: replace(x, op="op", preset=k) for k, x in zip(planted, found, strict=True)}


def check_planted() -> None:
    """Prints a report for two architectures, and those of a compiler that hangs or crashes."""
    hopper, ada = launches("sm_90"), launches("sm_89")
    assert report([hopper["sound"]]) == 0
    assert report([*hopper.values(), ada["sound matmul"], ada["sound copy"]]) == 1
    with mock.patch.object(compile_check, "LIMIT_S", 1):
        assert report([replace(hopper["sound"], preset="hangs")], hang) == 1
    assert report([replace(hopper["sound"], preset="crashes")], crash) == 1


def hang(launch: compile_check.Launch) -> None:
    time.sleep(100)


def crash(launch: compile_check.Launch) -> None:
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["", *os.environ.get("FASTGPT_TRITONS", "").split()])
def test_each_planted_fault_is_noticed(folder: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{folder}:{ROOT}:{ROOT}/kernels".removeprefix(":")
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_compile_check"],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    lines = re.findall(r"^(sm_\d+) op, ([\w ]+): (\w+\(.*?\)): (.*)$", done.stdout, re.M)
    found = {(arch, name): problem for arch, name, _, problem in lines}
    wanted = {
        ("sm_90", "spills"): r"spills: \d+ loads from local memory",
        ("sm_90", "shared"): r"\d+ bytes of shared memory, 232448 are there",
        ("sm_89", "sound matmul"): r"131072 bytes of shared memory, 101376 are there",
        ("sm_90", "narrow"): r"\d+ global accesses of 16 bits or less",
        ("sm_90", "serialised"): r"serialised wgmma: \d+ wait for the one before",
        ("sm_90", "no power of two"): r"\w+Error: .*must be a power of 2",
        ("sm_90", "hangs"): r"took over 1 s",
        ("sm_90", "crashes"): r"ended its process \(exit code 0\)",
    }
    assert found.keys() == wanted.keys() and len(found) == len(lines), done.stdout
    assert not [x for x in wanted if not re.fullmatch(wanted[x], found[x])], done.stdout
    said = "outer_sums(B=128, num_warps=2, num_stages=3)", "FAILS", "11 launches, 6 fail, Triton"
    assert done.returncode == 0 and all(text in done.stdout for text in said), done.stderr


# A loop of attention's backward pass, shortened: between two wgmma on R104 a wait for all.
SASS = """
        /*0010*/              @!P0 LDG.E.64 R6, desc[UR12][R146.64] ; /* 0x0000000c92288981 */
        /*0020*/                   HGMMA.64x32x16.F32.BF16 R104, gdesc[UR32], RZ, !UPT, gsb0 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/                   HGMMA.64x32x16.F32.BF16 R104, gdesc[UR28], R104, gsb0 ;
        /*0050*/                   MUFU.EX2 R5, R5 ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R56, R104, gdesc[UR24].tnspB, R56, gsb0 ;
        /*0070*/              @!P3 STG.E.64 desc[UR4][R2.64], R5 ;
        /*0080*/               @P2 BRA 0x20 ;
        /*0090*/                   LDG.E.64 R6, desc[UR4][R2.64] ;
        /*00a0*/                   STG.E.U16 desc[UR4][R2.64], R5 ;
        /*00b0*/                   STL [R1], RZ ;
        /*00c0*/                   BRA 0xc0;
"""
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
SERIALISED = "serialised wgmma: 1 wait for the one before"
NARROW, ALL_NARROW = (f"{n} global accesses of 16 bits or less" for n in (1, 4))


@pytest.mark.parametrize(
    ("edits", "found"),
    [
        ({}, [SERIALISED]),
        ({WAIT: "NOP"}, []),
        ({WAIT: "WARPGROUP.DEPBAR.LE gsb0, 0x1"}, []),  # for those before this chain
        ({"UR28], R104": "UR28], RZ, !UPT"}, []),  # another sum in the same registers
        ({"R104, gdesc[UR28], R104": "R88, gdesc[UR28], R88"}, []),
        ({"MUFU.EX2 R5, R5": "LDL R5, [R1]"}, ["spills: 1 loads from local memory", SERIALISED]),
        ({"STG.E.64": "STG.E.U16"}, [SERIALISED, NARROW]),
        ({"STG.E.64": "RED.E.ADD.S8", WAIT: "NOP"}, [NARROW]),
        # sm_120's disassembler adds the schedule.
        ({"STG.E.64": "STG.E.U16", "BRA 0x20 ;": "BRA 0x20 ?trans1 ;"}, [SERIALISED, NARROW]),
        ({"STG.E.64": "STG.E.U16", "BRA 0x20": "NOP"}, [SERIALISED]),  # these may be scalars
        ({"E.64": "E.U16", "BRA 0x20": "NOP"}, [SERIALISED, ALL_NARROW]),  # vectors were lost
    ],
)
def test_machine_code_is_read(edits: dict[str, str], found: list[str]) -> None:
    sass = SASS
    for old, new in edits.items():
        assert old in sass
        sass = sass.replace(old, new)
    assert problems(sass) == found


def test_presets_are_those_of_fastgpt() -> None:
    """Without the vocabulary of a corpus; finetuning takes GPT-2 XL's shape from its weights."""
    xl = {"n_layer": 48, "n_head": 25, "n_embd": 1600, "bias": True}
    found = {}
    for name, preset in PRESETS.items():
        config = settings.replace(preset(), **xl if preset().run.init_from == "gpt2-xl" else {})
        found[name] = sizes_of(config, 50257 if config.model.n_embd >= 768 else 65)
    assert {n: found[n] for n in compile_check.PRESETS} == compile_check.PRESETS
    assert set(found.values()) <= set(compile_check.PRESETS.values()), "a preset is not checked"
    assert SHARED_KB.keys() == SMS.keys(), "what runs by itself is not what is checked"


def test_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for interpreted, arguments, said in (
        ("0", ["--triton", "/nowhere"], "there is no triton in /nowhere"),
        ("1", [], "unset TRITON_INTERPRET: interpreted kernels have no machine code"),
    ):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert capsys.readouterr().err.endswith(f"{said}\n")


if __name__ == "__main__":
    importlib.import_module("tests.kernels.test_compile_check").check_planted()
