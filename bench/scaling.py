"""python -m bench scaling: step time against the number of GPUs, on paper; nothing is measured.

The global batch stays, its sequences are shared by n GPUs in nodes of 8. With N parameters, a
gradient of b bytes each, G tokens a step and F FLOPs a token:

    compute     G / n * F / (peak * MFU)
    all-reduce  a ring inside each node, then one between nodes on all of their links together:
                2 (g - 1) / g * N b / nvlink  +  2 (k - 1) / k * N b / (g * link)
                for k nodes of g GPUs; and a latency for each bucket and hop
    overlap     the all-reduce runs beside the backward pass of the last micro-batch (two thirds
                of its time), but for the last bucket, which nothing is left to hide
    fsdp        weights in bf16 gathered twice a micro-batch and gradients scattered once a step,
                all over the same links, beside all of the computing

Sources: ring volumes from Patarasuk and Yuan (2009); link speeds are NVIDIA's for H100 (450 GB/s a
direction by NVLink, 400 Gbit/s a GPU between nodes), of which NCCL reaches the shares below. All of
these are assumptions, each with a flag; what a cluster does is for `fastgpt train` to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from bench import setup
from bench.tables import table
from fastgpt.config.presets import PRESETS
from fastgpt.model.gpt import ModelShape
from fastgpt.train import memory

NODE = 8


def _assumed(value: float, what: str) -> Any:
    return field(default=value, metadata={"help": what})


@dataclass(frozen=True)
class Cluster:
    """What the model assumes of the machines; speeds a GPU and direction."""

    peak_tflops: float = _assumed(989.4, "peak of a GPU, TFLOP/s")
    mfu: float = _assumed(0.5, "MFU of one GPU by itself")
    nvlink_gbs: float = _assumed(450.0 * 0.8, "GB/s a GPU reaches inside a node, one direction")
    link_gbs: float = _assumed(50.0 * 0.8, "GB/s a GPU reaches between nodes, one direction")
    latency_us: float = _assumed(15.0, "microseconds a bucket and hop")
    bucket_mb: float = _assumed(25.0, "MB in a bucket")


@dataclass(frozen=True)
class Job:
    """What is trained: parameters, FLOPs a token, and the global batch cut into micro-batches."""

    name: str
    parameters: int
    flops_per_token: float
    rows: int
    block_size: int
    batch_size: int


@dataclass(frozen=True)
class Step:
    """Milliseconds of a step on `gpus`; `problem`: why the batch cannot be shared."""

    gpus: int
    compute: float = 0.0
    communication: float = 0.0
    exposed: float = 0.0
    problem: str = ""

    @property
    def total(self) -> float:
        return self.compute + self.exposed

    @property
    def efficiency(self) -> float:
        """Share of the time that computes."""
        return 0.0 if self.problem else self.compute / self.total


def job(preset: str) -> Job:
    config = PRESETS[preset]()
    o, flops = config.optim, setup.flops_per_token(config, setup.GPT2_VOCAB).mfu
    parameters = memory.n_parameters(ModelShape.of(config.model, setup.GPT2_VOCAB))
    return Job(preset, parameters, flops, o.rows, config.model.block_size, o.batch_size)


def ring_ms(volume: float, cluster: Cluster, gpus: int, passes: float) -> float:
    """Milliseconds to move `volume` bytes; `passes`: 2 to all-reduce, 1 to gather or scatter."""
    g, k = min(gpus, NODE), max(1, gpus // NODE)
    inside = passes * (g - 1) / g * volume / (cluster.nvlink_gbs * 1e9)
    between = passes * (k - 1) / k * volume / (g * cluster.link_gbs * 1e9)
    buckets = max(1.0, volume / (cluster.bucket_mb * 1e6))
    hops = (g > 1) + (k - 1).bit_length()
    return 1e3 * (inside + between) + buckets * hops * cluster.latency_us * 1e-3


def step(job: Job, cluster: Cluster, gpus: int, grad_bytes: int = 4, fsdp: bool = False) -> Step:
    """The model's step time for `gpus`: 1 to 8, or whole nodes."""
    if job.rows % gpus:
        return Step(gpus, problem=f"{job.rows} sequences do not divide by {gpus}")
    rows = job.rows // gpus
    micro = min(job.batch_size, rows)
    micro_steps = -(-rows // micro)
    rate = cluster.peak_tflops * 1e12 * cluster.mfu
    compute = 1e3 * rows * job.block_size * job.flops_per_token / rate
    if gpus == 1:
        return Step(gpus, compute)
    volume = float(job.parameters * grad_bytes)
    last_bucket = ring_ms(min(volume, cluster.bucket_mb * 1e6), cluster, gpus, 2.0)
    if fsdp:
        gathers = 2 * micro_steps * ring_ms(2.0 * job.parameters, cluster, gpus, 1.0)
        communication, hidden = gathers + ring_ms(volume, cluster, gpus, 1.0), compute
    else:
        communication, hidden = ring_ms(volume, cluster, gpus, 2.0), compute / micro_steps * 2 / 3
    exposed = max(last_bucket, communication - hidden)
    return Step(gpus, compute, communication, exposed)


def advice(job: Job, cluster: Cluster, counts: Sequence[int], limit: float) -> str:
    """Where data parallelism stops paying by this model, and what would change that."""
    steps = [step(job, cluster, n) for n in counts]
    bad = next((s for s in steps if s.problem or s.efficiency < limit), None)
    if bad is None:
        return (
            f"{job.name}: pays up to {counts[-1]} GPUs (at least {limit:.0%} of the time computes)"
        )
    if bad.problem:
        return (
            f"{job.name}: stops at {bad.gpus} GPUs: {bad.problem}; a larger "
            "--gradient_accumulation_steps that divides, if the learning rate bears the batch"
        )
    halved = step(job, cluster, bad.gpus, grad_bytes=2)
    doubled = step(replace(job, rows=2 * job.rows), cluster, bad.gpus)
    return (
        f"{job.name}: stops paying at {bad.gpus} GPUs ({bad.efficiency:.0%} of the time computes): "
        f"gradients reduced in bf16 make it {halved.efficiency:.0%}, twice the global batch "
        f"{doubled.efficiency:.0%}"
    )


def main(argv: list[str]) -> int:
    parser = setup.Parser("scaling", __doc__, out=False)
    for f in fields(Cluster):
        flag = "--" + f.name.replace("_", "-")
        parser.add_argument(flag, type=float, default=f.default, help=f.metadata["help"])
    parser.add_argument("--limit", type=float, default=0.9, help="least share that must compute")
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in vars(Cluster())}
    if bad := next((f for f, v in given.items() if not v > 0), None):
        parser.error(f"--{bad.replace('_', '-')} must be more than 0, got {given[bad]:g}")
    cluster = Cluster(**given)
    print("a model on paper, not a measurement; assumed: ", end="")
    print(", ".join(f"{f} {v:g}" for f, v in given.items()))
    counts = [1, 2, 4, 8, *(NODE * n for n in (2, 4, 8, 16, 32, 64))]
    heads = ["GPUs", "rows each", "compute ms", "all-reduce ms", "step ms"]
    heads += ["computing", "bf16 reduce", "fsdp", "tokens/s"]
    notes = []
    for preset in ("gpt2", "gpt2_xl"):
        # 480 sequences do not divide by every count here: whole nodes of 8 want 512.
        work = replace(job(preset), rows=512)
        lines = []
        for n in counts:
            ddp, half = step(work, cluster, n), step(work, cluster, n, grad_bytes=2)
            sharded = step(work, cluster, n, fsdp=True)
            times = [f"{ms:.1f}" for ms in (ddp.compute, ddp.communication, ddp.total)]
            shares = [f"{s.efficiency:.0%}" for s in (ddp, half, sharded)]
            rate = f"{work.rows * work.block_size / ddp.total / 1e3:.2f}M"
            lines.append([f"{n}", f"{work.rows // n}", *times, *shares, rate])
        size = f"{work.parameters / 1e6:.0f}M parameters, 512 x {work.block_size} tokens"
        print(f"\n{preset}: {size}")
        print(table(heads, lines))
        notes.append(advice(work, cluster, counts, args.limit))
    print("\n" + "\n".join(notes))
    return 0
