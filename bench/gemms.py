"""python -m bench gemms: the step's matrix products, cuBLAS against Inductor's max-autotune.

The linear layers and the head are where most of a step goes. Each layer's product, and the two of
its backward pass, run at a preset's own size on cuBLAS, on cuBLASLt's heuristics, and on what
`torch.compile(mode="max-autotune-no-cudagraphs")` finds among cuBLAS and Triton templates, the
persistent ones with tensor-memory access included (`fastgpt train --max_autotune=True` trains on
those), and on fastgpt's own kernel (`--op.linear=triton`). The MLP as one op, its GELU in the
products' epilogues (`--op.mlp=triton`), runs against the same of separate ops. The last lines say
what all layers of a step come to for each.
"""

from __future__ import annotations

from functools import partial

import torch

from bench import cases, kernels, setup
from bench.kernels import Rows
from bench.rivals import AUTOTUNE
from fastgpt.config.presets import PRESETS
from fastgpt.config.schema import Config

SIZES = ("gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl")
HEAD = 50304
SMALL_TOKENS, SMALL_WIDTH, SMALL_HEAD = 96, 32, 200


def layers(config: Config, small: bool = False) -> dict[str, tuple[int, int, int, int]]:
    """Each kind of layer: (tokens of a micro-batch, features in, features out, how many)."""
    m = config.model
    M = SMALL_TOKENS if small else config.optim.batch_size * m.block_size
    C, V = (SMALL_WIDTH, SMALL_HEAD) if small else (m.n_embd, HEAD)
    return {
        "c_attn": (M, C, 3 * C, m.n_layer),
        "attn.c_proj": (M, C, C, m.n_layer),
        "c_fc": (M, C, 4 * C, m.n_layer),
        "mlp.c_proj": (M, 4 * C, C, m.n_layer),
        "lm_head": (M, C, V, 1),
    }


def totals(rows: Rows, counts: dict[str, int]) -> list[tuple[str, float]]:
    """(provider, ms of all layers of a step), best first; only providers with every time."""
    out = {}
    for provider in dict.fromkeys(row["provider"] for row in rows):
        own = [row for row in rows if row["provider"] == provider]
        if all("median_ms" in row for row in own):
            out[provider] = sum(row["median_ms"] * counts[row["op"]] for row in own)
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        if "median_ms" in row:
            key = row["op"], row["pass"]
            best[key] = min(best.get(key, float("inf")), row["median_ms"])
    out["the best of each"] = sum(ms * counts[op] for (op, _), ms in best.items())
    return sorted(out.items(), key=lambda item: item[1])


def main(argv: list[str]) -> int:
    parser = setup.Parser("gemms", __doc__)
    parser.add_argument("sizes", nargs="*", help=f"of {', '.join(SIZES)}; default: gpt2")
    kernels.add_rounds(parser)
    parser.add_argument(
        "--without-autotune", action="store_true", help="leave out Inductor's search: minutes"
    )
    args = parser.parse_args(argv)
    if unknown := [s for s in args.sizes if s not in SIZES]:
        parser.error(f"no size {unknown[0]!r}: there are {', '.join(SIZES)}")
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    if gpu:
        torch._inductor.config.triton.enable_persistent_tma_matmul = True
    else:
        print("no GPU: tiny products on the CPU show that this runs; times mean nothing")
    with setup.one_thread(device):
        session = kernels.Session("gemms", argv, args.rounds, device, args.out)
        for size in args.sizes or SIZES[:1]:
            shapes = layers(PRESETS[size](), small=not gpu)
            makes = [partial(cases.linear, device, n, *MKN[:3]) for n, MKN in shapes.items()]
            makes.append(partial(cases.mlp, device, *shapes["c_fc"][:2]))
            rows: Rows = []
            key, without = ("preset", "op", "pass", "provider"), AUTOTUNE * args.without_autotune
            for make in makes:
                rows += session.measure(make, *key, without=without, preset=size)
            print(f"\n{size}, all layers of a micro-batch, forward and backward")
            rows = [row for row in rows if row["op"] in shapes]
            for provider, ms in totals(rows, {name: n for name, (*_, n) in shapes.items()}):
                print(f"  {provider:28} {ms:9.3f} ms")
    session.result.end(args.out)
    return 0
