"""python -m bench generate: tokens a second with a cache and without, and whether the texts agree.

The model has a GPT-2's shape and random weights; text is greedy, so that both paths must choose the
same tokens. The cache-free path computes the whole text anew for every token; it is timed at every
--every-th length of the text that the cached path made, and the tokens it chooses there are
compared (--every=1: all of them, and its time is measured whole rather than summed up from
samples). On a GPU the cached path is also held against what reading the weights once a token at
copy bandwidth allows, and in turn against the same steps without the fused linear layers.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from bench import results, roof, setup
from bench.tables import table
from fastgpt.config import settings
from fastgpt.config.schema import Config
from fastgpt.inference.generate import BatchGenerator, Sampling
from fastgpt.model.build import build
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.model.peaks import synchronize
from fastgpt.weights.hugging_face import SIZES, shape_of_size
from fastgpt_kernels.stats import summarize

SMALL = ModelShape(2, 2, 64, 256, 512, bias=True)
GREEDY = Sampling(temperature=0)
WARM_UP = 8  # tokens


def make(shape: ModelShape, machine: Machine) -> GPT:
    """Random weights; norms of either sign, or the likeliest token would be the last one again."""
    model = build(settings.replace(Config(), **vars(shape)), shape.vocab_size, machine)
    generator = torch.Generator(machine.device).manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.05 if p.ndim > 1 else 1.0, generator=generator)
    return model.eval()


def cached(
    batch: BatchGenerator, prompts: list[list[int]], n: int, device: torch.device
) -> tuple[list[list[int]], float, float]:
    """(texts, seconds of the decoding, seconds until the first token), after a short warm-up.

    Decoding is all tokens but the first, which comes from the prompt's own forward pass.
    """
    for new in (min(n, WARM_UP), n):  # the first time compiles and captures
        texts = [list(p) for p in prompts]
        synchronize(device)
        started = began = time.perf_counter()
        for i, tokens in enumerate(batch.stream(prompts, new, seeds=[0] * len(prompts))):
            if i == 0:
                began = time.perf_counter()
            for text, token in zip(texts, tokens, strict=True):
                assert token is not None
                text.append(token)
        synchronize(device)
    return texts, time.perf_counter() - began, began - started


@torch.no_grad()
def cache_free(
    model: GPT, text: list[int], n_prompt: int, every: int, device: torch.device
) -> tuple[float, int, int, float]:
    """(seconds for the whole text, tokens compared, how many differ, smallest gap of the two
    likeliest tokens when they differ). The text's own beginning is given at every length."""
    ids = torch.tensor([text], device=device)
    lengths = list(range(n_prompt, len(text), every))
    model.logits(model.hidden(ids[:, :n_prompt])[:, -1])
    seconds, differ, gap = 0.0, 0, 0.0
    for n in lengths:
        window = ids[:, max(0, n - model.shape.block_size) : n]
        synchronize(device)
        started = time.perf_counter()
        logits = model.logits(model.hidden(window)[:, -1])[0]
        token = int(logits.argmax())
        # A length stands for those up to the next one that is timed.
        seconds += (time.perf_counter() - started) * min(every, len(text) - n)
        if token != text[n]:
            differ += 1
            gap = max(gap, (logits[token] - logits[text[n]]).item())
    return seconds, len(lengths), differ, gap


def weight_bytes(model: GPT) -> int:
    """What a step reads of the weights: all but the embeddings' rows that are not looked up, the
    output layer included, in the dtype of the activations; norms in fp32."""
    size = torch.finfo(model.dtype).bits // 8
    total = model.shape.vocab_size * model.shape.n_embd * size
    for name, p in model.named_parameters():
        if "wte" not in name and "wpe" not in name:
            total += p.numel() * (4 if ".ln_" in name else size)
    return total


def main(argv: list[str]) -> int:
    gpu = torch.cuda.is_available()
    parser = setup.Parser("generate", __doc__, out=False)
    sizes = ["small", *SIZES]
    parser.add_argument("--size", choices=sizes, default="gpt2" if gpu else "small")
    parser.add_argument("--batch", type=int, default=1, help="texts at a time")
    parser.add_argument("--prompt", type=int, default=8, help="tokens")
    parser.add_argument("--new", type=int, default=512 if gpu else 128, help="tokens to generate")
    parser.add_argument("--every", type=int, default=16, help="cache-free: lengths that are timed")
    parser.add_argument("--rounds", type=int, default=5 if gpu else 1, help="of the cached path")
    parser.add_argument("--compile", action="store_true", help="torch.compile the cached step")
    parser.add_argument("--no-graph", action="store_true", help="no CUDA graph")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    args = parser.parse_args(argv)
    with parser.user_errors():
        machine = Machine.of(args.device, args.dtype)
    if min(args.batch, args.prompt, args.new - 1, args.every, args.rounds) < 1:
        parser.error("--batch, --prompt, --every and --rounds must be at least 1, --new 2")
    shape = SMALL if args.size == "small" else shape_of_size(args.size)
    options = {k: v for k, v in vars(args).items() if k != "out"} | {"dtype": machine.dtype}
    result = results.Result("generate", argv, options)
    row = measure(args, shape, machine)
    result.rows.append(row)
    folder = args.out or (results.FOLDER if machine.device.type == "cuda" else None)
    path = result.finish(folder)
    if path:
        print(f"written to {path}")
    short = {k: v for k, v in row.items() if k not in ("samples_ms", "first_token_ms")}
    print(json.dumps(short))
    return 1 if row["problem"] else 0


def measure(args: argparse.Namespace, shape: ModelShape, machine: Machine) -> dict[str, Any]:
    """Measure, print the table, and return the result's row."""
    model, device, dtype = make(shape, machine), machine.device, machine.dtype
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(shape.vocab_size, (args.batch, args.prompt), generator=generator)
    graph = False if args.no_graph else None

    def generator_of() -> BatchGenerator:
        longest = args.prompt + args.new
        return BatchGenerator(
            model, args.batch, longest, GREEDY, compiled=args.compile, graph=graph
        )

    batches = [generator_of()]
    fused = batches[0].decoder.linear is not None
    if fused:
        batches.append(generator_of())
        batches[1].decoder.linear = None
    # In turn, so that both meet the same clocks.
    rounds = [
        [cached(batch, prompts.tolist(), args.new, device) for batch in batches]
        for _ in range(args.rounds)
    ]
    (texts, *_), *_ = rounds[-1]
    step_ms, *without = (
        [1e3 * r[1] / (args.new - 1) for r in path] for path in zip(*rounds, strict=True)
    )
    first = [path[0][2] for path in rounds]
    seconds, compared, differ, gap = cache_free(model, texts[0], args.prompt, args.every, device)
    ms = summarize(step_ms).median
    whole = ms * 1e-3 * (args.new - 1) + summarize(first).median
    key = f"{args.size} batch={args.batch} prompt={args.prompt} new={args.new} {dtype}"
    row: dict[str, Any] = {
        "key": key,
        "problem": "",
        "samples_ms": step_ms,
        "median_ms": ms,
        "first_token_ms": [1e3 * s for s in first],
        "tokens_per_second": args.batch / (ms * 1e-3),
        "cache_free_tokens_per_second": args.new / seconds,
        "speedup": args.batch * seconds / whole,
        "tokens_compared": compared,
        "tokens_that_differ": differ,
        "different_tokens_in_the_text": len(set(texts[0])),
        "fused_linears": fused,
    }
    lines: list[list[str]] = []

    def add(path: str, ms: float, texts: int, ratio: str) -> None:
        lines.append([path, f"{ms:.3f}", f"{1e3 * texts / ms:,.1f}", ratio])

    add("cache, fused linear layers" if fused else "cache", ms, args.batch, "1")
    if fused:
        row["without_fused_linears_ms"] = plain = summarize(without[0]).median
        add("cache, PyTorch's", plain, args.batch, f"{plain / ms:.2f}")
    some = "" if args.every == 1 else f" (each {args.every}th length)"
    add(f"no cache, one text{some}", 1e3 * seconds / args.new, 1, f"{row['speedup']:.2f}")
    if device.type == "cuda":
        copy = roof.copy_bandwidth(device)
        row["weight_bytes"], row["copy_bytes_per_second"] = weight_bytes(model), copy
        least = 1e3 * row["weight_bytes"] / copy
        row["share_of_weight_roof"] = least / ms
        add("reading the weights once", least, 1, "")
    print(f"{key}, {device}: {args.new} new tokens, greedy, random weights")
    print(table(["path", "ms a token", "tokens/s", "time ratio"], lines))
    print(f"{compared - differ} of {compared} tokens compared are the same", end="")
    print(f", largest gap {gap:.2g}" if differ else "")
    if "share_of_weight_roof" in row:
        print(f"{row['share_of_weight_roof']:.1%} of what reading the weights once a token allows")
    if differ and dtype == "float32":
        row["problem"] = f"{differ} of {compared} tokens are not the cache-free path's"
        del row["samples_ms"]
    return row
