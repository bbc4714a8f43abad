"""Machine code as data: what a compiled kernel does, read off its disassembly.

`disassemble` reads a cubin with Triton's own cuobjdump, `parse_sass` and `parse_amdgcn` turn text
into a `Code`; all else is counting. What is counted is the hot path: the loop with the most matrix
products or, where there are none, the most bytes; a kernel without a loop is its own hot path.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

WARP = 32


@dataclass(frozen=True)
class Instruction:
    """One instruction: `op` with its modifiers ("LDG.E.128"), its operands as text."""

    address: int
    op: str
    operands: str = ""
    guard: str = ""  # the predicate, "@!P0"
    target: int = -1  # address a branch or call goes to

    @property
    def base(self) -> str:
        return self.op.partition(".")[0]

    @cached_property
    def modifiers(self) -> frozenset[str]:
        return frozenset(self.op.split(".")[1:])

    @property
    def access(self) -> int:
        """Bits a thread moves to or from memory, global or shared; 0 for all but loads and stores.

        The matrix loads and stores (LDSM, STSM) move 32 bits a matrix and thread.
        """
        if self.base.startswith(("global_", "buffer_", "ds_", "scratch_")):
            if found := re.search(r"(dword|b32|b64|b128|short|u16|byte|u8)(x\d)?", self.base):
                unit = {"dword": 32, "b32": 32, "b64": 64, "b128": 128, "byte": 8, "u8": 8}
                return unit.get(found[1], 16) * int((found[2] or "x1")[1:])
            return 0
        if self.base in ("LDSM", "STSM"):
            return 32 * next((int(m) for m in ("2", "4") if m in self.modifiers), 1)
        if self.base not in _MEMORY:
            return 0
        for bits in ("256", "128", "64"):
            if bits in self.modifiers:
                return int(bits)
        if self.modifiers & {"U16", "S16"}:
            return 16
        return 8 if self.modifiers & {"U8", "S8"} else 32

    @property
    def flops(self) -> float:
        """FLOPs of a matrix product, a warp's share; 0 for all other instructions."""
        if self.base == "HGMMA":  # a warpgroup of four warps
            m, n, k = map(int, re.findall(r"\d+", self.op)[:3])
            return 2.0 * m * n * k / 4
        if self.base in ("HMMA", "IMMA", "OMMA", "QMMA"):  # HMMA.16816.F32: 16 x 8 x 16
            shape = next((m for m in self.op.split(".")[1:] if m.isdigit() and len(m) > 2), "16816")
            return 2.0 * 16 * 8 * int(shape[3:])
        if self.base.startswith("v_mfma"):
            m, n, k = map(int, re.search(r"(\d+)x(\d+)x(\d+)", self.base).groups())  # type: ignore[union-attr]
            return 2.0 * m * n * k
        return 0.0

    @property
    def is_global(self) -> bool:
        return self.base in _GLOBAL or self.base.startswith(("global_", "buffer_"))

    def reads(self, registers: str) -> bool:
        """Whether it reads any of them, which are a regular expression (`_registers`)."""
        stores = self.base in ("STG", "STS")  # of all others the first operand is the result
        sources = self.operands if stores else self.operands.partition(",")[2]
        return re.search(rf"\b{registers}\b", sources) is not None

    @property
    def loads_global(self) -> bool:
        return self.base in ("LDG", "LDGSTS") or self.base.startswith(
            ("global_load", "buffer_load")
        )

    @property
    def is_tma(self) -> bool:
        return self.base.startswith(("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UBLKRED"))


_GLOBAL = frozenset(("LDG", "STG", "LDGSTS", "RED", "REDG", "ATOMG", "ATOM"))
_SHARED = frozenset(("LDS", "STS", "LDSM", "STSM", "ATOMS"))
_MEMORY = _GLOBAL | _SHARED | {"LDL", "STL"}


@dataclass(frozen=True)
class Code:
    """One kernel's instructions and resources; `local` is bytes a thread of spills and stack."""

    instructions: tuple[Instruction, ...]
    registers: int = 0
    shared: int = 0
    local: int = 0

    @cached_property
    def body(self) -> tuple[Instruction, ...]:
        """Without padding, and without the slow paths of divisions and roots that are called."""
        called = [i.target for i in self.instructions if i.base == "CALL" and i.target >= 0]
        end = min(called, default=1 << 62)
        idle = ("NOP", "s_nop")
        keep = (i for i in self.instructions if i.address < end and i.base not in idle)
        return tuple(i for i in keep if i.target != i.address)

    @cached_property
    def loops(self) -> list[tuple[Instruction, ...]]:
        """The innermost loops, in the order of the code."""
        at = {i.address: n for n, i in enumerate(self.body)}
        branches = ("BRA", "s_branch") + tuple(i.base for i in self.body if "s_cbranch" in i.base)
        spans = [
            (at[i.target], n)
            for n, i in enumerate(self.body)
            if i.base in branches and i.target in at and at[i.target] < n
        ]
        ends: dict[int, int] = {}
        for start, end in spans:  # several branches back to one place are one loop
            ends[start] = max(end, ends.get(start, 0))
        inner = [
            (s, e)
            for s, e in ends.items()
            if not any((s, e) != (a, b) and s <= a and b <= e for a, b in ends.items())
        ]
        return [self.body[s : e + 1] for s, e in sorted(inner)]

    @cached_property
    def hot(self) -> tuple[Instruction, ...]:
        """The loop that does the work, or the whole body.

        A loop does it if it has matrix products, or moves at least an eighth of the bytes that the
        body does if all loops run once: what moves less only tidies up. So does what adds up the
        sums that other programs wrote: it reads them past the L1 (STRONG).
        """

        def moves(code: Iterable[Instruction]) -> int:
            return traffic(i for i in code if "STRONG" not in i.modifiers)

        if not self.loops:
            return self.body
        best = max(self.loops, key=lambda loop: (products(loop), -len(loop)))
        if not products(best):
            best = max(self.loops, key=lambda loop: (moves(loop), len(loop)))
        return best if products(best) or 8 * moves(best) >= moves(self.body) else self.body

    @property
    def loops_over(self) -> bool:
        """Whether the hot path is a loop."""
        return len(self.hot) < len(self.body)

    @cached_property
    def serialised(self) -> int:
        """Products of the loops that wait for the one before them in the same sum.

        A chain of wgmma on one accumulator needs no wait inside. ptxas puts one there, for all
        that is in flight, if it cannot prove that nobody else touches the registers (C7515).
        """
        found = 0
        for loop in self.loops or [self.body]:
            last, waits = "", False
            for i in loop:
                if i.base == "HGMMA":
                    accumulator = i.operands.partition(",")[0]
                    found += waits and accumulator == last
                    last, waits = accumulator, False
                elif i.op.startswith("WARPGROUP.DEPBAR") and i.operands.endswith("0x0"):
                    waits = True
        return found

    @cached_property
    def waits(self) -> float:
        """How often an iteration of the hot path waits for global memory.

        Loads that are asked for together are one wait; what is asked for once some of them came is
        another, however little it is: ptxas moves loads down to where they are used if that spares
        registers. Copies that are ahead by n iterations are 1 / n. TMA's are not in the code.
        """
        now = 0.0  # in latencies: nothing else takes time
        pending: list[tuple[str, float]] = []  # registers awaited, and until when
        copies: list[float] = []  # when the committed groups are there
        at = []
        for _ in range(9 if self.loops_over else 1):
            for i in self.hot:
                awaited = [w for registers, w in pending if i.reads(registers)]
                if i.base == "DEPBAR" and i.operands.startswith("SB0"):
                    awaited += copies[: len(copies) - int(i.operands.rpartition(" ")[2], 16)]
                now = max([now, *awaited])
                pending = [(registers, w) for registers, w in pending if w > now]
                if i.base == "LDG":
                    pending.append((_registers(i), now + 1))
                elif i.base == "LDGDEPBAR":
                    copies.append(now + 1)
            at.append(now)
        return (at[-1] - at[0]) / (len(at) - 1) if self.loops_over else now

    @cached_property
    def in_flight(self) -> int:
        """Most bytes a thread has asked of global memory before it waits for some of them.

        Loads come back in order: reading what one brought means that those before it are there.
        Copies to shared memory (LDGSTS) fly in groups, of which DEPBAR says how many may; TMA's
        bytes are not in the code.
        """
        pending: list[tuple[str, int]] = []  # registers awaited, bytes
        groups, group = [0], 0  # bytes of the committed groups of copies, and of the next one
        most = 0
        for i in self.body:
            for n in range(len(pending) - 1, -1, -1):
                if i.reads(pending[n][0]):
                    del pending[: n + 1]
                    break
            if i.base == "LDG":
                pending.append((_registers(i), i.access // 8))
            elif i.base == "LDGSTS":
                group += i.access // 8
            elif i.base == "LDGDEPBAR":
                groups.append(group)
                group = 0
            elif i.base == "DEPBAR" and i.operands.startswith("SB0"):
                allowed = int(i.operands.rpartition(" ")[2], 16)
                groups = groups[-allowed:] if allowed else [0]
            most = max(most, sum(b for _, b in pending) + sum(groups) + group)
        return most


def _registers(load: Instruction) -> str:
    """A pattern for the registers that a load fills: R4 and .128 are R4 to R7."""
    first = re.match(r"R(\d+)", load.operands)
    if first is None:
        return "RZ"
    count = max(1, load.access // 32)
    return "R(?:" + "|".join(str(int(first[1]) + n) for n in range(count)) + ")"


def flops(code: Iterable[Instruction]) -> float:
    """FLOPs of the matrix products, a warp's share."""
    return sum(i.flops for i in code)


def products(code: Iterable[Instruction]) -> float:
    """The same where the code tells, else how many products there are (tcgen05)."""
    return sum(i.flops or (i.base.startswith("UTC") and i.base.endswith("MMA")) for i in code)


def traffic(code: Iterable[Instruction]) -> int:
    """Bytes a thread moves to and from global memory; without TMA's."""
    return sum(i.access // 8 for i in code if i.is_global)


def widths(code: Iterable[Instruction]) -> dict[int, int]:
    """How many global accesses there are of each width in bits."""
    found: dict[int, int] = {}
    for i in code:
        if i.is_global:
            found[i.access] = found.get(i.access, 0) + 1
    return dict(sorted(found.items()))


def count(code: Iterable[Instruction], *bases: str) -> int:
    """How many instructions there are of these kinds, modifiers aside."""
    return sum(i.base in bases for i in code)


def width_text(code: Sequence[Instruction]) -> str:
    """The global accesses of a piece of code by width, for people: "128x8 32x1 tma2"."""
    texts = [f"{bits}x{n}" for bits, n in sorted(widths(code).items(), reverse=True)]
    tma = sum(i.is_tma for i in code)
    return " ".join(texts + [f"tma{tma}"] * bool(tma)) or "-"


# ------------------------------------------------------------------------------------------ reading

_SASS = re.compile(
    r"^\s+/\*([0-9a-f]{4,6})\*/\s+(?:\{\s*)?(@!?U?P\w+ )?\s*([A-Z]\S*?)(?: ([^;]*?))?\s*;"
)


def parse_sass(text: str) -> Code:
    """What `cuobjdump -sass -res-usage` prints of a cubin with one kernel."""
    found = []
    for line in text.splitlines():
        if match := _SASS.match(line):
            address, guard, op, operands = match.groups()
            # For sm_120 some versions print how an instruction is scheduled behind its operands.
            operands = re.sub(r"\s*[?&]\S+", "", operands or "").strip()
            branch = re.search(r"0x([0-9a-f]+)$", operands) if op[:3] in ("BRA", "CAL") else None
            target = int(branch[1], 16) if branch else -1
            found.append(Instruction(int(address, 16), op, operands, (guard or "").strip(), target))
    if not found:
        raise ValueError("no instructions in the disassembly")
    used = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    # ptxas keeps spilled registers in the stack frame or in .nv.local, by version; nothing was
    # spilled to a frame that no instruction reads.
    local = max(used["LOCAL"], used["STACK"]) if any(i.base == "LDL" for i in found) else 0
    return Code(tuple(found), used["REG"], used["SHARED"], local)


def parse_amdgcn(text: str) -> Code:
    """The assembly of a kernel for AMD, with the metadata at its end."""

    def field(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        if found is None:
            raise ValueError(f"no .{key} in the amdgcn metadata")
        return int(found[1])

    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in text.partition("s_endpgm")[0].splitlines():
        if label := re.match(r"^(\.LBB\w+):", line):
            labels[label[1]] = len(found)
        elif match := re.match(r"^\t([a-z]\w+)\s*([^;]*)", line):
            found.append((match[1], match[2].strip()))
    code = tuple(
        Instruction(n, op, operands, "", labels.get(operands, -1))
        for n, (op, operands) in enumerate(found)
    )
    spills = 4 * field("vgpr_spill_count") + field("private_segment_fixed_size")
    # vgpr_count counts the accumulation registers too.
    return Code(code, field("vgpr_count"), field("group_segment_fixed_size"), spills)


def disassemble(cubin: bytes) -> Code:
    """A cubin's code; with the cuobjdump that came with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-sass", "-res-usage", file.name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return parse_sass(done.stdout)


def summary(code: Code) -> str:
    """A few lines about a kernel, for those who write it."""
    lines = [
        f"{len(code.body)} instructions, {code.registers} registers, {code.local} bytes spilled, "
        f"{code.in_flight} bytes a thread in flight, accesses {width_text(code.body)}"
    ]
    for loop in code.loops:
        hot = "hot loop" if loop == code.hot else "loop"
        tensor = count(loop, "HGMMA", "HMMA")
        gsb = sum("gsb0" in i.operands for i in loop if i.base == "HGMMA")
        lines.append(
            f"  {hot} at {loop[0].address:#06x}: {len(loop)} instructions, {tensor} products "
            f"({gsb} gsb0), {count(loop, 'MUFU')} MUFU, {count(loop, 'BAR')} barriers, "
            f"accesses {width_text(loop)}"
        )
    if code.serialised:
        lines.append(f"  wgmma serialised: {code.serialised} products wait for the one before")
    return "\n".join(lines)
