"""Every launch of the training step and what it should take, without a GPU: a prediction.

    python -m bench ledger [PRESET] [--gpu=h100] [--key=value ...]
    python -m bench ledger [PRESET] --all-gpus
    python -m bench ledger [PRESET] --compare [--peer-path=DIR]

The step is `fastgpt train`'s own, compiled by Dynamo, AOTAutograd and Inductor for a GPU that need
not be here (`bench/fake_step.py`): what it launches, and the bytes and FLOPs of each launch, are
counted. How long each takes is not: products are taken at --matmul_share of the data sheet's
TFLOP/s, PyTorch's flash attention at its published rates, our kernels from sm_90 on at the shares
of the data sheet that they reached on an H200, else at nine tenths of the bound that their machine
code allows (`fastgpt_kernels.tools.aot`), all else at --copy_share of the data sheet's bandwidth,
no launch at less than 2 us. So the counts are facts, and milliseconds, tokens/s and MFU
predictions. The host's time is a call of an op on this CPU for each launch.

--kernel_share=X  of that bound, for all our kernels and GPUs
--gpu=NAME        of the table of data sheets: h100, h200, a100, 4090, b200, ...
--all-gpus        a line for each of them instead of the table of launches
--compare         a line for our kernels, for PyTorch's under torch.compile, and for the peer
--peer-path=DIR   the step of that nanoGPT checkout instead of ours; --kernels=eager is Inductor's
--out=DIR         write the result and its picture there; default: nowhere
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import fake_step, ladder, ladder_table, picture, results, setup
from bench.categories import MUON, Sizes
from bench.fake_cuda import FakeGpu, Launch
from bench.tables import table
from bench.trace import Breakdown
from fastgpt.config import settings
from fastgpt.config.schema import Config
from fastgpt.errors import UserError
from fastgpt.model.device import DTYPES
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.model.peaks import SHEETS, Sheet
from fastgpt.model.peaks import sheet as sheet_of
from fastgpt.train import memory
from fastgpt_kernels import host
from fastgpt_kernels.ops.loss.linear import SHARE
from fastgpt_kernels.registry import spec_of

# Shares of the data sheet's figures. Products: cuBLAS at the 124M's shapes, of which K = 768 is the
# shortest, gives about 680 of an H100's 989 TFLOP/s. Copies: 3.0 of 3.35 and 4.3 of 4.8 TB/s.
MATMUL_SHARE, COPY_SHARE, KERNEL_SHARE = 0.687, 0.895, 0.9
# Of the data sheet's TFLOP/s, or of its bandwidth where there are no products, what each of ours
# reached on an H200 in steps of GPT-2 124M, 15 micro-batches each: bench/results/nvidia-h200,
# 2026-11-26. Key_value and query were measured alone (ops/attention/configs.py), and take 5 %
# longer here, as the forward kernel of that run did in the step; each counts as half of the five
# products. A GPU with less bandwidth gives no less of it than it can: what holds up these kernels
# is not that alone.
MEASURED_ON, MEASURED_TBS = ("sm_90", "sm_100", "sm_103", "sm_120"), 4.8
MEASURED_SHARES = {
    "attention_forward": 0.26, "attention_key_value": 0.18, "attention_query": 0.272,
    "attention_prepare": 0.63, "layer_norm_forward": 0.80, "layer_norm_backward": 0.58,
    "bias_gelu_forward": 0.87, "bias_gelu_backward": 0.79, "cross_entropy": 0.69,
}  # fmt: skip
# PyTorch's flash attention at head dim 64 and 1,024 tokens, causal, forward and backward: published
# are 229 and 180 TFLOP/s for an H100; FlashAttention 2's paper has 119 of 312 for both on an A100.
FLASH_SHARES = {"sm_8": (0.38, 0.38), "": (0.23, 0.18)}
LEAST_US = 2.0  # a kernel's start and end, even inside a graph
BUDGET_TOKENS = 10e9  # for --all-gpus: hours to that many
PHASES = ("forward", "backward", "rest")
COLUMNS = ("launch", "times (a)", "line", "part", "reads MB", "writes MB", "GFLOP", "us", "ms",
           "share")  # fmt: skip
GPU_COLUMNS = ("GPU", "fits", "micro-batch", "ms", "tokens/s", "MFU %", "hours to 10 B tokens")
STEP_COLUMNS = ("compiled step", "a layer", "launches a micro-step", "kB a token", "GiB", "ms",
                "tokens/s", "MFU %")  # fmt: skip
# Ops that add to a gradient in place, but for products.
ADDS = {"add_scaled": ("head", "cross entropy"), "add_rows": ("memory", "embedding")}
FREE = ("reshape", "permute", "view", "expand", "unsqueeze", "full", "clone")  # moves no data
OWN = ("gpu", "all_gpus", "compare", "peer_path", "out", "matmul_share", "copy_share",
       "kernel_share")  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """What a GPU is taken to reach."""

    sheet: Sheet
    matmul_share: float = MATMUL_SHARE
    copy_share: float = COPY_SHARE
    kernel_share: float | None = None  # of the bound, for all; None: measured, or the usual one

    @property
    def matmul(self) -> float:
        """FLOP/s"""
        return self.sheet.tflops * 1e12 * self.matmul_share

    @property
    def flash(self) -> tuple[float, float]:
        """FLOP/s of PyTorch's attention, forward and backward."""
        shares = FLASH_SHARES.get(self.sheet.arch[:4], FLASH_SHARES[""])
        forward, backward = (self.sheet.tflops * 1e12 * share for share in shares)
        return forward, backward

    @property
    def copy(self) -> float:
        """Bytes/s, reads plus writes."""
        return self.sheet.tbs * 1e12 * self.copy_share

    def us(self, launch: Launch) -> float:
        """Microseconds of a launch, by the rule of the module's docstring."""
        moved = launch.reads + launch.writes
        rate = self.matmul
        if launch.what.startswith("_scaled_dot_product"):
            rate = self.flash["backward" in launch.what]
        seconds = max(moved / self.copy, launch.flops / rate)
        if launch.roof:
            seconds = self._ours(launch, moved)
        return max(1e6 * seconds, LEAST_US)

    def _ours(self, launch: Launch, moved: int) -> float:
        """Seconds of a launch of one of our kernels."""
        tflops, tbs = self.sheet.tflops * 1e12, self.sheet.tbs * 1e12
        known = self.sheet.arch in MEASURED_ON and self.kernel_share is None
        share = MEASURED_SHARES.get(launch.what) if known else None
        if share is None:
            share = launch.roof * (self.kernel_share or KERNEL_SHARE)
            return max(moved / tbs, launch.flops / tflops) / share
        if launch.flops:
            return max(moved / self.copy, launch.flops / tflops / share)
        return moved / min(self.copy, share * max(tbs, MEASURED_TBS * 1e12))


@dataclass(frozen=True)
class Line:
    """Launches that are alike, and how often a step makes them."""

    launch: Launch
    phase: str  # forward, backward or rest
    times: int
    us: float
    category: str
    item: str

    @property
    def ms(self) -> float:
        return self.times * self.us / 1e3


@dataclass(frozen=True)
class Prediction:
    """A step's lines, and what follows from them."""

    lines: list[Line]
    n_layer: int
    micro_batches: int
    tokens: int  # of a step

    @property
    def ms(self) -> float:
        return sum(line.ms for line in self.lines)

    def launches(self, phase: str = "") -> int:
        return sum(line.times for line in self.lines if phase in ("", line.phase))

    def a_layer(self, phase: str) -> float:
        """Launches that each layer makes in one micro-batch."""
        once = self.n_layer * self.micro_batches
        own = (n for n in self.lines if n.phase == phase and n.category != "head")
        return sum(n.times // once for n in own)

    def bytes_a_token(self, phase: str) -> float:
        moved = (
            n.times * (n.launch.reads + n.launch.writes) for n in self.lines if n.phase == phase
        )
        return sum(moved) / self.tokens


def predict(step: fake_step.Step, config: Config, sizes: Sizes, rates: Rates) -> Prediction:
    """How often each launch comes and how long it should take."""
    n = config.optim.gradient_accumulation_steps
    lines: dict[tuple[Any, ...], Line] = {}
    for phase, launches, often in (
        ("forward", step.forward, n), ("backward", step.backward, n), ("rest", step.rest, 1),
    ):  # fmt: skip
        for launch in launches:
            key = (phase, launch.what, launch.reads, launch.writes, launch.shape, launch.ops)
            known = lines.get(key)
            if known is not None:
                lines[key] = dataclasses.replace(known, times=known.times + often)
                continue
            category, item = sort(launch, phase, sizes)
            lines[key] = Line(launch, phase, often, rates.us(launch), category, item)
    tokens = config.optim.rows * config.model.block_size
    return Prediction([*lines.values()], config.model.n_layer, n, tokens)


def sizes_of(config: Config, vocab_size: int) -> Sizes:
    """What a model's dimensions are called."""
    known = settings.to_dict(config) | {"vocab_size": vocab_size}
    known["padded_vocab_size"] = ModelShape.of(config.model, vocab_size).padded_vocab_size
    known["micro_batches"] = config.optim.gradient_accumulation_steps
    return Sizes(**{f.name: known[f.name] for f in dataclasses.fields(Sizes)})


def sort(launch: Launch, phase: str, sizes: Sizes) -> tuple[str, str]:
    """(category of `bench.categories`, item) of a launch: whose time it is, and what for."""
    ops = {op.removesuffix(".default").partition(".")[0] for op in launch.ops}
    own = [op.split(".")[1] for op in launch.ops if op.startswith("fastgpt.")]
    if any(line.startswith("muon.py:") for line in launch.lines) and "adam" not in launch.what:
        return "muon", MUON[bool(launch.shape)]
    if launch.shape:
        if sizes.head_sizes & set(launch.shape):
            return "head", "products"
        dw = phase == "backward" and launch.shape[2] == sizes.tokens
        return "linear", "dW" if dw else "dX" if phase == "backward" else "forward"
    if own and own[0] in ADDS:
        return ADDS[own[0]]
    if launch.what != "triton" and own:
        op = spec_of(own[0])
        return op.category, op.label or ("backward" if phase == "backward" else "forward")
    if launch.what.startswith("_scaled_dot_product"):
        return "attention", phase
    if "adam" in launch.what:
        return "optimizer", "AdamW"
    if phase == "rest":
        adds = launch.what == "add_" and launch.writes > 1024
        return "optimizer", "gradient accumulation" if adds else "clipping and scalars"
    big = launch.reads + launch.writes > 2 * sizes.tokens * sizes.n_embd
    if any("dropout" in op or "random" in op or "seed" in op for op in map(str, launch.ops)):
        return "memory", "dropout"
    if any("embedding" in op or "index" in op for op in ops):
        return "memory", "embedding"
    if ops & {"exp", "log", "nll_loss_forward", "_log_softmax"} and big:
        return "head", "softmax and loss"
    if "sum" in ops and launch.writes < launch.reads // 64:
        return "memory", "bias sums"
    if all("convert_element_type" in op or op.startswith(FREE) for op in launch.ops):
        of = "activations" if big and launch.reads > 1e8 else "weights"
        return ("optimizer", f"casts of {'gradients' if phase == 'backward' else of}")
    if "mean" in ops or "rsqrt" in ops:
        return "memory", "norms"
    return "memory", "other passes"


def mfu_of(config: Config, vocab_size: int, ms: float, sheet: Sheet) -> dict[str, float]:
    """MFU in percent by the three counts of `fastgpt.train.metrics`."""
    rate = config.optim.rows * config.model.block_size / ms * 1e3
    flops = dataclasses.asdict(setup.flops_per_token(config, vocab_size))
    return {name: 100 * f * rate / (sheet.tflops * 1e12) for name, f in flops.items()}


def as_ladder(p: Prediction, config: Config, vocab_size: int, rates: Rates) -> ladder.Ladder:
    """The prediction as the waterfall shows a measured step."""
    parts: dict[tuple[str, str], float] = {}
    for line in p.lines:
        at = (line.category, line.item)
        parts[at] = parts.get(at, 0.0) + line.ms
    with torch.device("meta"):
        n_params = GPT(ModelShape.of(config.model, vocab_size)).n_params()
    element = DTYPES[config.system.dtype].itemsize
    work = ladder.count_work(
        sizes_of(config, vocab_size), n_params, element, config.optim.optimizer
    )
    sheet = rates.sheet
    measured = ladder.Measured(
        p.ms, p.ms, rates.matmul, f"{rates.matmul_share:.0%} of the data sheet, assumed",
        rates.copy, sheet.tflops * 1e12, sheet.source, "predicted",
    )  # fmt: skip
    return ladder.build(Breakdown("cuda", 1, p.ms, parts), work, measured)


def asked(
    name: str, flags: dict[str, str], rates: Rates, peer_path: str = ""
) -> tuple[Config, int, fake_step.Request]:
    """A preset's config with flags, its vocabulary, and what to record of it. Raises UserError."""
    flags = {"dtype": "bfloat16", **flags}
    config = setup.with_values(setup.preset_of(name, {**flags, "device": "cpu"}), {"compile": True})
    request = fake_step.Request(name, flags, peer_path, gpu_of(rates.sheet))
    return config, setup.vocabulary(config), request


def of_run(name: str, flags: dict[str, str], device_name: str) -> ladder.Ladder:
    """What is predicted of a preset's step with flags on the GPU of that name. Raises UserError."""
    found = sheet_of(device_name)
    if found is None:
        raise UserError(f"there is no data sheet of {device_name}")
    rates = Rates(found)
    config, vocab_size, request = asked(name, flags, rates)
    (step,) = fake_step.record(request)
    p = predict(step, config, sizes_of(config, vocab_size), rates)
    return as_ladder(p, config, vocab_size, rates)


# --- the command ---------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Run the command. 0: done; 2: bad arguments, or a step that cannot be looked at here."""
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    try:
        return run(argv)
    except UserError as e:
        print(f"bench ledger: {e}", file=sys.stderr)
        return 2


def run(argv: Sequence[str]) -> int:
    argv = [f"{a}=True" if a in ("--all-gpus", "--compare") else a for a in argv]
    positional, flags = settings.split_flags(argv)
    if len(positional) > 1:
        raise UserError(f"{' '.join(positional)}: one preset is wanted")
    name, own = positional[0] if positional else "gpt2", {k: flags.pop(k, "") for k in OWN}
    shares = {k: _share(k, own[k]) for k in OWN if k.endswith("_share") and own[k]}
    rates = Rates(find(own["gpu"] or "h100"), **shares)
    config, vocab_size, request = asked(name, flags, rates, own["peer_path"])
    print(f"{name}: {setup.describe(config, vocab_size)}", flush=True)
    if own["compare"]:
        print(table(STEP_COLUMNS, list(each_step(request, config, vocab_size, rates)), True))
        return 0
    (step,) = fake_step.record(request)
    p = predict(step, config, sizes_of(config, vocab_size), rates)
    if own["all_gpus"]:
        print(table(GPU_COLUMNS, list(each_gpu(step, config, vocab_size, shares)), True))
        return 0
    result = results.Result("ledger", list(argv), settings.to_dict(config))
    found = as_ladder(p, config, vocab_size, rates)
    host_us = dispatch_us()
    show(p, step, config, vocab_size, rates, host_us, peer=bool(own["peer_path"]))
    ladder_table.show(found)
    row = as_json(p, config, vocab_size, rates) | {"host_ms": p.launches() * host_us / 1e3}
    result.rows.append({"key": name, "problem": "", **row})
    if own["peer_path"]:
        del result.rows[0]["memory_bytes"]  # the estimate knows our model only
    result.rows[0]["waterfall"] = found.to_json()
    folder = Path(own["out"]) if own["out"] else None
    if path := result.finish(folder):
        if importlib.util.find_spec("matplotlib") is not None:
            title = f"{name} on {rates.sheet.name}, predicted"
            note = f"predicted, not measured · torch {torch.__version__} · {result.data['command']}"
            paths = [path.with_suffix(f".{kind}") for kind in picture.FORMATS]
            picture.draw(found, title, note, paths, "PREDICTION")
        print(f"written: {path}")
    return 0


def _share(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise UserError(f"--{name}={text}: wanted a share above 0, at most 1")
    return value


def find(gpu: str) -> Sheet:
    """The data sheet that `--gpu` names. Raises UserError."""
    known = {s.name.lower().replace(" ", "-"): s for s in SHEETS}
    wanted = gpu.lower().replace(" ", "-")
    for name, found in known.items():
        if wanted in (name, name.removeprefix("geforce-rtx-"), name.removeprefix("rtx-")):
            return found
    raise UserError(f"--gpu={gpu}: no data sheet of it here; there are {', '.join(known)}")


def gpu_of(sheet: Sheet) -> FakeGpu:
    """The device that PyTorch is told of. Raises UserError: Inductor is asked for NVIDIA's only."""
    if not sheet.arch.startswith("sm_"):
        raise UserError(f"--gpu={sheet.name}: steps can be looked at for NVIDIA's GPUs only")
    number = int(sheet.arch[3:])
    sms = host.SMS[sheet.arch]
    return FakeGpu(f"NVIDIA {sheet.name}", (number // 10, number % 10), sms, sheet.gb * 10**9)


def as_json(p: Prediction, config: Config, vocab_size: int, rates: Rates) -> dict[str, Any]:
    """The row of the result: counts, predictions, and every line."""
    return {
        "gpu": rates.sheet.name,
        "rates": {k: v for k, v in vars(rates).items() if k != "sheet"},
        "launches": {phase: p.launches(phase) for phase in PHASES},
        "launches_a_layer": {phase: p.a_layer(phase) for phase in PHASES[:2]},
        "bytes_a_token": {phase: p.bytes_a_token(phase) for phase in PHASES},
        "predicted_ms": p.ms,
        "predicted_tokens_per_second": p.tokens / p.ms * 1e3,
        "predicted_mfu": mfu_of(config, vocab_size, p.ms, rates.sheet),
        "memory_bytes": memory_of(config, vocab_size, rates.sheet),
        "lines": [dataclasses.asdict(line) for line in p.lines],
    }


def memory_of(config: Config, vocab_size: int, sheet: Sheet, batch_size: int | None = None) -> int:
    """Bytes on a GPU, by the estimate of `fastgpt.train.memory`; of the config's micro-batch."""
    dtype, fused = DTYPES[config.system.dtype], config.system.kernels != "eager"
    shape = ModelShape.of(config.model, vocab_size)
    return memory.estimate(
        shape,
        batch_size or config.optim.batch_size,
        dtype,
        fused=fused,
        muon=config.optim.optimizer == "muon",
        room=sheet.gb * 10**9 // SHARE,
    ).total


def dispatch_us() -> float:
    """Microseconds that this CPU takes to call an op of PyTorch that computes next to nothing.

    The best of many, as other programs only add to it.
    """
    x, best, calls = torch.zeros(1), math.inf, 200
    with torch.no_grad():
        for _ in range(50):
            began = time.perf_counter()
            for _ in range(calls):
                torch.add(x, x, out=x)
            best = min(best, time.perf_counter() - began)
    return best / calls * 1e6


def show(
    p: Prediction,
    step: fake_step.Step,
    config: Config,
    vocab_size: int,
    rates: Rates,
    host_us: float,
    peer: bool = False,
) -> None:
    """Print the table of launches and what follows from it."""
    gib = memory_of(config, vocab_size, rates.sheet) / 2**30
    print("; ".join(step.choices))
    print(table(COLUMNS, list(rows(p))))
    mfu = mfu_of(config, vocab_size, p.ms, rates.sheet)
    print(
        f"launches: {p.launches()} a step; a layer {p.a_layer('forward'):.0f} forward, "
        f"{p.a_layer('backward'):.0f} backward\n"
        f"bytes a token: {p.bytes_a_token('forward'):,.0f} forward, "
        f"{p.bytes_a_token('backward'):,.0f} backward, {p.bytes_a_token('rest'):,.0f} the rest\n"
        f"PREDICTED for {rates.sheet.name}, not measured (products at {rates.matmul / 1e12:.0f} "
        f"TFLOP/s, copies at {rates.copy / 1e12:.2f} TB/s): {p.ms:.1f} ms a step, "
        f"{p.tokens / p.ms * 1e3:,.0f} tokens/s, "
        + ", ".join(f"{k} {v:.1f} %" for k, v in mfu.items())
        + ("" if peer else f"; memory {gib:.1f} GiB by estimate")
    )
    print(
        f"host: {p.launches() * host_us / 1e3:.1f} ms a step to call it all, at {host_us:.2f} us a "
        "call of PyTorch's on this CPU, and the driver's time; where that is longer than the step "
        "a CUDA graph (--cuda_graph) does without"
    )


def rows(p: Prediction) -> Iterator[tuple[str, ...]]:
    """Cells of `COLUMNS`, the longest first within a phase."""
    for phase in PHASES:
        for line in sorted((n for n in p.lines if n.phase == phase), key=lambda n: -n.ms):
            x, often = line.launch, line.times
            if line.ms < 0.001 * p.ms and phase == "rest":
                continue
            per = "layer" if often >= p.n_layer * p.micro_batches else "micro-step"
            yield (
                f"{phase}: {describe(x)}",
                f"{often} ({'step' if phase == 'rest' else per})",
                " ".join(x.lines[:2]),
                f"{line.category}: {line.item}",
                f"{x.reads / 1e6:.1f}", f"{x.writes / 1e6:.1f}",
                f"{x.flops / 1e9:.0f}" if x.flops else "",
                f"{line.us:.1f}", f"{line.ms:.2f}", f"{line.ms / p.ms:.1%}",
            )  # fmt: skip


def describe(x: Launch) -> str:
    """A launch in a few words."""
    name = x.what.removeprefix("extern_kernels.").removeprefix("fastgpt.")
    if x.shape:
        return f"{name} {' x '.join(map(str, x.shape))}"
    if x.what == "triton":
        ops = [op.replace("prims.convert_element_type", "cast").split(".")[0] for op in x.ops]
        ops = [op for op in dict.fromkeys(ops) if not op.startswith(FREE)]
        return "Inductor: " + " ".join(ops[:4]) + (" ..." if len(ops) > 4 else "")
    return name


def each_step(
    request: fake_step.Request, config: Config, vocab_size: int, rates: Rates
) -> Iterator[tuple[str, ...]]:
    """Cells of `STEP_COLUMNS`: the step on our kernels, on PyTorch's alone, and a peer's."""
    eager = dataclasses.replace(request, flags={**request.flags, "kernels": "eager"})
    requests = {"fastgpt": dataclasses.replace(request, peer_path=""),
                "fastgpt --kernels=eager": dataclasses.replace(eager, peer_path="")}  # fmt: skip
    if request.peer_path:
        requests[Path(request.peer_path).resolve().name] = eager
    steps = fake_step.record(*requests.values())
    for (name, asked), step in zip(requests.items(), steps, strict=True):
        kernels = asked.flags.get("kernels", config.system.kernels)
        own = settings.replace(config, kernels=kernels)
        p = predict(step, own, sizes_of(own, vocab_size), rates)
        gib = memory_of(own, vocab_size, rates.sheet) / 2**30
        yield (
            name, f"{p.a_layer('forward'):.0f} + {p.a_layer('backward'):.0f}",
            f"{(p.launches('forward') + p.launches('backward')) // p.micro_batches}",
            f"{(p.bytes_a_token('forward') + p.bytes_a_token('backward')) / 1e3:,.0f}",
            "" if asked.peer_path else f"{gib:.1f}", f"{p.ms:.0f}", f"{p.tokens / p.ms * 1e3:,.0f}",
            f"{mfu_of(own, vocab_size, p.ms, rates.sheet)['mfu']:.1f}",
        )  # fmt: skip


def each_gpu(
    step: fake_step.Step, config: Config, vocab_size: int, shares: dict[str, float]
) -> Iterator[tuple[str, ...]]:
    """Cells of `GPU_COLUMNS`: what to expect of every GPU of the table, by the same launches."""
    sizes, rows = sizes_of(config, vocab_size), config.optim.batch_size
    for sheet in SHEETS:
        p = predict(step, config, sizes, Rates(sheet, **shares))
        rate = p.tokens / p.ms * 1e3
        room = 0.92 * sheet.gb * 1e9
        fitting = (
            b for b in memory.micro_batches(rows) if memory_of(config, vocab_size, sheet, b) < room
        )
        micro = next(fitting, 0)
        yield (
            sheet.name, "yes" if micro == rows else "no", str(micro or "none"), f"{p.ms:.0f}",
            f"{rate:,.0f}", f"{mfu_of(config, vocab_size, p.ms, sheet)['mfu']:.1f}",
            f"{BUDGET_TOKENS / rate / 3600:.1f}",
        )  # fmt: skip
