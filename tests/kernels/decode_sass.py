"""Prints what sm_90's machine code of a token's kernels loads before its first wait, as JSON."""

from __future__ import annotations

import json
from typing import Any

from fastgpt_kernels.specs import models
from fastgpt_kernels.tools import bound
from fastgpt_kernels.tools.aot import compile_launch
from fastgpt_kernels.tools.launches import Launch, record_all
from fastgpt_kernels.tools.sass import WARP

KERNELS = ("decode_attention_layer_kernel", "decode_mlp_layer_kernel", "decode_linear_kernel")


def measure(launch: Launch) -> dict[str, Any]:
    code, compiled = compile_launch(launch)
    warps = compiled.metadata.num_warps
    wait = next(n for n, i in enumerate(code.body) if i.op.startswith("ACQBULK"))
    bits = sum(i.access for i in code.body[:wait] if i.loads_global)
    return {
        "spills": code.local,
        "programs": bound.programs_per_sm("sm_90", code, warps),
        "bytes_ahead": WARP * warps * bits // 8,
    }


def main() -> None:
    """Of GPT-2 124M with biases, a token of one sequence; of the single products the first."""
    chosen = models("sm_90", ["gpt2"])[1:2]
    launches, _ = record_all("sm_90", ["fastgpt_kernels.ops.decode.specs"], chosen)
    found = {x.kernel.fn.__name__: x for x in reversed(launches)}  # the first are of one row
    print(json.dumps({name: measure(found[name]) for name in KERNELS}))


if __name__ == "__main__":
    main()
