"""Prints what sm_90's machine code of a token's kernels loads before its first wait, as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgpt_kernels.ops.decode import specs
from fastgpt_kernels.specs import AotSpec

KERNELS = ("decode_attention_layer", "decode_mlp_layer", "decode_linear head")
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
LOAD = re.compile(r"^LDG\.E(?:\.EF)?(?:\.(64|128))?(?: |$)")


def instructions(cubin: bytes) -> tuple[list[str], dict[str, int]]:
    """(instructions in order, with their operands; REG, STACK, SHARED and LOCAL)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass, usage = (
            subprocess.run(
                [TOOL, flag, file.name], check=True, capture_output=True, text=True
            ).stdout
            for flag in ("--dump-sass", "-res-usage")
        )
    found = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)
    return re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?) ?;", sass), {k: int(n) for k, n in found}


def measure(spec: AotSpec) -> dict[str, Any]:
    names = spec.kernel.arg_names
    source = ASTSource(
        spec.kernel,
        {n: spec.signature.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in spec.constexprs.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in spec.divisible_by_16},
    )
    options = {"num_warps": 4, "launch_pdl": True, "maxnreg": 128}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    code, used = instructions(compiled.asm["cubin"])
    first_wait = next(i for i, line in enumerate(code) if line.startswith("ACQBULK"))
    loads = [LOAD.match(line) for line in code[:first_wait]]
    bits = sum(int(load[1] or 32) for load in loads if load)
    registers = -(-used["REG"] // 8) * 8
    return {
        "spills": max(used["LOCAL"], used["STACK"]),
        "registers": used["REG"],
        "programs": 65536 // (128 * registers),
        "bytes_ahead": 128 * bits // 8,
        "instructions": len(code),
    }


def main() -> None:
    wanted = [s for s in specs.aot_specs("sm_90") if s.name in {f"{k} C=768 B=1" for k in KERNELS}]
    print(json.dumps({spec.name: measure(spec) for spec in wanted}))


if __name__ == "__main__":
    main()
