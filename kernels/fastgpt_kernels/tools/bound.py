"""How fast a kernel could run at most, by its machine code: a bound, not a measurement.

Of an iteration of the hot loop (or of a whole program, if there is no loop) every pipe of an SM
needs so many clocks; none can overlap itself, so the slowest rules. How many iterations there are
follows from the work: FLOPs by the op's record over FLOPs an iteration, else the bytes of the
launch's tensors over bytes an iteration, else the programs of the grid. Beside the pipes stands
DRAM: each tensor moved once, at the data sheet's rate, or at that which the loads in flight can
sustain. What comes out is a lower bound of the time: nothing waits, nothing is fetched twice, and
the rest of the kernel is free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastgpt_kernels.tools.sass import WARP, Code, Instruction, count, flops, traffic


@dataclass(frozen=True)
class Device:
    """A data sheet: SMs, tensor TFLOP/s (16 bits in, fp32 sums, dense), TB/s of DRAM."""

    arch: str
    sms: int
    tflops: float
    tbs: float
    tensor: int  # FLOPs a clock and SM
    fma: int  # fp32 lanes an SM
    source: str

    @property
    def hertz(self) -> float:
        """The clock at which the data sheet's TFLOP/s are."""
        return self.tflops * 1e12 / (self.sms * self.tensor)


DEVICES = {
    "H100": Device("sm_90", 132, 989.4, 3.35, 4096, 128, "H100 SXM5 data sheet and whitepaper"),
    "H200": Device("sm_90", 132, 989.4, 4.8, 4096, 128, "H200 SXM data sheet"),
    "A100": Device(
        "sm_80", 108, 312.0, 2.039, 2048, 64, "A100 80 GB SXM data sheet and whitepaper"
    ),
    "4090": Device("sm_89", 128, 165.2, 1.008, 512, 128, "Ada whitepaper, appendix"),
}
MUFU_LANES, ISSUE, SHARED_BYTES = 16, 4, 128  # a clock and SM: CUDA C++ Programming Guide
L2_BYTES = 64  # a clock, what an SM's port takes; the L2 itself may give less to all of them
# Of a load that goes to DRAM under traffic. On no data sheet: published measurements of Ampere and
# Hopper lie between 0.5 and 0.8.
LATENCY_US = 0.7

# Limits of an SM: registers are 65,536 everywhere. CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability": shared memory a block and an SM in KB, warps, blocks.
LIMITS = {
    "sm_75": (64, 64, 32, 16),
    "sm_80": (163, 164, 64, 32),
    "sm_86": (99, 100, 48, 16),
    "sm_89": (99, 100, 48, 24),
    "sm_90": (227, 228, 64, 32),
    "sm_100": (227, 228, 64, 32),
    "sm_120": (99, 100, 48, 24),
    "gfx942": (64, 64, 32, 32),
}


def programs_per_sm(arch: str, code: Code, warps: int) -> int:
    """How many programs an SM holds; on AMD by registers (512 a SIMD lane) and LDS of a CU."""
    _, shared, most_warps, blocks = LIMITS[arch]
    if not arch.startswith("sm_"):
        waves = 4 * min(8, 512 // max(8 * -(-code.registers // 8), 1))
        return min(waves // warps, shared * 1024 // max(code.shared, 1))
    by_registers = 65536 // (256 * -(-code.registers * WARP // 256)) // warps
    reserved = 1024 if arch != "sm_75" else 0
    by_shared = shared * 1024 // max(code.shared + reserved, 1)
    return min(by_registers, by_shared, most_warps // warps, blocks)


def operand_bytes(i: Instruction) -> float:
    """Bytes of shared memory that a wgmma reads, a warp's share of them."""
    if i.base != "HGMMA":
        return 0.0
    m, n, k = map(int, re.findall(r"\d+", i.op)[:3])
    from_shared = i.operands.split(",")[1].strip().startswith("gdesc")
    return 2.0 * k * (n + (m if from_shared else 0)) / 4


def pipes(hot: Sequence[Instruction], warps: int, device: Device) -> dict[str, float]:
    """Clocks of an SM for one iteration of one program, by pipe."""
    shared = sum(i.access // 8 for i in hot if i.base in ("LDS", "STS", "LDSM", "STSM", "LDGSTS"))
    fma = count(hot, "FFMA", "FMUL", "FADD", "IMAD", "HFMA2")
    one_warp = {
        "tensor": flops(hot) / device.tensor,
        "MUFU": count(hot, "MUFU") * WARP / MUFU_LANES,
        "FMA": fma * WARP / device.fma,
        "issue": len(hot) / ISSUE,
        "shared": (shared * WARP + sum(map(operand_bytes, hot))) / SHARED_BYTES,
        "L2": traffic(hot) * WARP / L2_BYTES,
    }
    return {pipe: clocks * warps for pipe, clocks in one_warp.items()}


@dataclass(frozen=True)
class Bound:
    """A launch on one device: what rules, microseconds, share of the roof, TFLOP/s or TB/s.

    The roof is the time for the FLOPs at the tensor cores' rate or for the bytes at DRAM's.
    """

    rule: str
    us: float
    share: float
    rate: str
    clocks: Mapping[str, float]


def bound(
    code: Code, device: Device, *, warps: int, grid: int, programs: int, work: float, moved: float
) -> Bound:
    """The bound of a launch of `work` FLOPs (0 without matrix products) and `moved` bytes."""
    clocks = pipes(code.hot, warps, device)
    once = WARP * warps * traffic(code.hot)
    if work and flops(code.hot):
        iterations = work / (flops(code.hot) * warps)
    elif code.loops_over and once:
        iterations = moved / once
    else:
        iterations = grid
    dram = moved / device.tbs / 1e6
    times = {"DRAM": dram}
    for pipe, n in clocks.items():
        times[pipe] = iterations * n / (device.sms * device.hertz) * 1e6
    resident = min(programs * device.sms, grid)
    flying = code.in_flight * WARP * warps * resident
    if not flops(code.hot) and flying and not any(i.is_tma for i in code.body):
        read = sum(i.access // 8 for i in code.hot if i.loads_global) / max(traffic(code.hot), 1)
        times["latency"] = LATENCY_US * max(read * moved / flying, 1)
    rule = max(times, key=lambda pipe: times[pipe])
    us = max(times[rule], 1e-9)
    roof, rate = dram, f"{moved / us / 1e6:.2f} TB/s"
    if work and flops(code.hot):
        roof, rate = max(dram, work / device.tflops / 1e6), f"{work / us / 1e6:.0f} TFLOP/s"
    return Bound(rule, us, roof / us, rate, clocks)
