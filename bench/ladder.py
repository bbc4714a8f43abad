"""The waterfall's arithmetic: from a peak, a trace's breakdown and a measured step to its rungs.

MFU counts F = 6N + 12 L C T FLOPs a token (train/metrics.py). F falls into parts: linear layers,
head, attention and a rest (norm and bias parameters, 0.03 %). Before any loss the step takes
F / peak; each rung adds the time that its part takes beyond its own FLOPs at the matmul peak that
is measured here:

    F / datasheet peak                                        100 % MFU
    + matmul peak      F / measured peak - F / datasheet peak
    + linear layers    their kernels - their FLOPs / measured peak
    + attention        its kernels - 12 L C T tokens / measured peak
    + head and loss    its kernels - 6 V C tokens / measured peak
    + memory-bound     its kernels - the rest of F / measured peak
    + optimizer        its kernels
    + Muon             its kernels, if it is the optimizer: its products are no model FLOPs
    + other            kernels that no rule knows, if any ran
    + gaps             time in which no kernel runs
    + residual         what the rungs miss of the measured step; can be negative
    = measured step

MFU's count credits attention with all T x T scores; causal kernels skip half. That credit,
6 L C T tokens / measured peak, makes the attention's rung shorter (`causal_credit_ms`), and with
very good kernels negative; the bound beside it counts the causal half only. MFU points are those
lost between one rung and the next, F / peak over the time so far, so they depend on the order.

On a GPU kernels count as traced. The profiler slows launching, not kernels, so the gaps are what
the measured step leaves beside the kernels, but never more than the trace shows. On a CPU it slows
every op: all parts shrink by measured step / traced step (`scale`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from bench.categories import Sizes
from bench.trace import Breakdown, Gemm

FORMAT, VERSION = "fastgpt-waterfall", 1


@dataclass(frozen=True)
class Measured:
    """What was measured besides the trace; FLOP/s, bytes/s (reads plus writes), ms."""

    step_ms: float  # median step without the profiler
    traced_ms: float  # the traced window's step by the clock, with the profiler
    matmul_flops: float
    matmul_source: str
    copy_bytes: float
    datasheet_flops: float | None = None  # None: a device without a data sheet
    datasheet_source: str = ""


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of a step, counted from the shapes."""

    total_flops: float  # 6N + 12LCT, all tokens
    linear_flops: float
    attention_flops: float  # 12LCT: all scores, as MFU counts
    head_flops: float
    causal_kernel_flops: float  # 2 products forward, 5 backward, half of the scores
    memory_bytes: float
    loss_bytes: float
    optimizer_bytes: float
    muon_flops: float
    muon_bytes: float

    @property
    def rest_flops(self) -> float:
        return self.total_flops - self.linear_flops - self.attention_flops - self.head_flops


def count_work(s: Sizes, n_params: int, element: int, optimizer: str = "adamw") -> Work:
    """FLOPs and bytes of one step; n_params without position embeddings, element bytes a value.

    Bytes, each tensor read or written once a kernel (M tokens, C wide, b bytes an element):
    first norm 2 MCb forward, 3 backward; every add + norm 4 and 4; GELU 8 and 12; embedding writes
    MCb, its gradient reads MCb and adds up fp32 rows, 8 MC; dropout 2 MCb + M C mask each way;
    gradients of the biases that no other kernel sums read 5 MCb a layer. The loss reads and
    overwrites the logits, 2 MVb. AdamW moves 28 bytes a parameter and finding the norm 4; copies of
    the weights are written once a step, b. Gradients add up where products end, at no cost here.
    Muon moves 20 bytes of a block's matrices, and what it makes orthogonal in and out, 4b.
    """
    m, c, layers, b = s.tokens, s.n_embd, s.n_layer, element
    tokens = m * s.micro_batches
    per_token = c * b * (5 + layers * (16 + 20)) + c * b * 2 + 8 * c
    if s.bias:
        per_token += 5 * c * b * layers
    if s.dropout:
        per_token += (1 + 2 * layers) * 2 * (2 * c * b + c)
    blocks = 12 * layers * c * c
    copies = b * (blocks + s.padded_vocab_size * c) if b < 4 else 0
    muon = blocks if optimizer == "muon" else 0
    return Work(
        total_flops=tokens * (6.0 * n_params + 12 * layers * c * s.block_size),
        linear_flops=tokens * 6.0 * 12 * layers * c * c,
        attention_flops=tokens * 12.0 * layers * c * s.block_size,
        head_flops=tokens * 6.0 * s.padded_vocab_size * c,
        causal_kernel_flops=tokens * 7.0 * layers * c * s.block_size,
        memory_bytes=float(tokens * per_token),
        loss_bytes=2.0 * tokens * s.padded_vocab_size * b,
        optimizer_bytes=float(28 * (n_params - muon) + 4 * n_params + copies),
        # Of five iterations: q, k, v and c_proj each three products of C x C x C, the MLP's two
        # matrices as many as nine, or five where they are in fp32 (fastgpt.train.muon).
        muon_flops=5 * (4 * 3 + 2 * (9 if b < 4 else 5)) * 2.0 * c**3 * layers if muon else 0.0,
        muon_bytes=(20.0 + 4 * b) * muon,
    )


@dataclass
class Rung:
    """One bar. `ms` is what it adds; `takes_ms` the whole part, of which `credit_ms` stand above.

    `bound_ms` is the least the part could take here (None: no such thing), `bound` how that was
    computed. `items` are the part's ms by kind.
    """

    name: str
    ms: float
    mfu_points: float = 0.0  # lost; negative if the rung is a gain
    mfu_after: float = 0.0  # % once this rung is counted
    takes_ms: float | None = None
    credit_ms: float = 0.0
    bound_ms: float | None = None
    bound: str = ""
    help: str = ""
    items: dict[str, float] = field(default_factory=dict)


@dataclass
class Ladder:
    """The rungs from the ideal step to the measured one; see the module's docstring."""

    device: str
    step_ms: float
    mfu: float  # %, of the measured step
    rungs: list[Rung]
    residual_share: float  # of the measured step
    scale: float
    causal_credit_ms: float
    gemms: list[Gemm]
    others: dict[str, float]
    measured: Measured
    work: Work

    def to_json(self) -> dict[str, Any]:
        """Schema: the fields of Ladder, Rung, Gemm, Measured and Work by name; times in ms."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @property
    def peak(self) -> str:
        """What 100 % MFU is."""
        m = self.measured
        flops, source = m.datasheet_flops or m.matmul_flops, m.datasheet_source or m.matmul_source
        return f"{flops / 1e12:.4g} TFLOP/s ({source})"


def build(parts: Breakdown, work: Work, m: Measured) -> Ladder:
    """The ladder of a step; every rung's ms, down to the residual, sum to m.step_ms."""
    on_gpu = parts.device == "cuda"
    scale = 1.0 if on_gpu else m.step_ms / m.traced_ms
    named = ("linear", "attention", "head", "memory", "optimizer", "muon")
    ms = {c: parts.ms(c) * scale for c in named}
    other, gaps = parts.ms("other") * scale, (parts.ms("gaps") + parts.ms("data")) * scale
    if on_gpu:
        gaps = max(0.0, min(gaps, m.step_ms - sum(ms.values()) - other))
    peak = m.datasheet_flops or m.matmul_flops

    def at_peak(flops: float) -> float:
        return flops / m.matmul_flops * 1e3

    def moved(n_bytes: float) -> float:
        return n_bytes / m.copy_bytes * 1e3

    def part(name: str, key: str, credit: float, bound: float, how: str, advice: str) -> Rung:
        items = {k: v * scale for k, v in parts.items(key).items()}
        return Rung(name, ms[key] - credit, 0, 0, ms[key], credit, bound, how, advice, items)

    ideal = work.total_flops / peak * 1e3
    rate = f"at {m.copy_bytes / 1e9:,.0f} GB/s"
    credit = at_peak(work.attention_flops / 2)
    rungs = [Rung("ideal", ideal, takes_ms=ideal, bound=f"{_tera(work.total_flops)} (6N + 12LCT)")]
    if m.datasheet_flops:
        lost = at_peak(work.total_flops) - ideal
        why = "power and clocks set it"
        rungs.append(Rung("matmul peak", lost, bound_ms=lost, bound=m.matmul_source, help=why))
    rungs += [
        part(
            "linear layers", "linear", at_peak(work.linear_flops), at_peak(work.linear_flops),
            f"{_tera(work.linear_flops)} at the matmul peak", _slowest(parts.gemms, m, scale),
        ),
        part(
            "attention", "attention", at_peak(work.attention_flops),
            at_peak(work.causal_kernel_flops),
            f"{_tera(work.causal_kernel_flops)} (7 products, causal half) at the matmul peak",
            f"MFU credits masked scores with {credit:.3g} ms, counted in here; "
            "compare --op.attention=triton, hopper, cudnn, flash, fa4",
        ),
        part(
            "head and loss", "head", at_peak(work.head_flops),
            at_peak(work.head_flops) + moved(work.loss_bytes),
            f"{_tera(work.head_flops)} at the matmul peak, logits' {_giga(work.loss_bytes)} {rate}",
            "gradient in place of the logits, one pass: --op.linear_cross_entropy=triton",
        ),
        part(
            "memory-bound ops", "memory", at_peak(work.rest_flops), moved(work.memory_bytes),
            f"{_giga(work.memory_bytes)} {rate}, the copy bandwidth here",
            "fuse what stands alone: fewer passes over the activations",
        ),
        part(
            "optimizer and casts", "optimizer", 0.0, moved(work.optimizer_bytes),
            f"{_giga(work.optimizer_bytes)} {rate}",
            "fused clipping and update; more tokens a step share it",
        ),
    ]  # fmt: skip
    if ms["muon"] > 0:
        rungs.append(
            part(
                "Muon", "muon", 0.0, at_peak(work.muon_flops) + moved(work.muon_bytes),
                f"{_tera(work.muon_flops)} at the matmul peak, {_giga(work.muon_bytes)} {rate}",
                "once a step: more tokens a step share it, and so do more GPUs",
            )
        )  # fmt: skip
    if other > 0:
        names = ", ".join(list(parts.others)[:2])
        rungs.append(Rung("other", other, takes_ms=other, help=f"not recognised: {names}"))
    rungs.append(
        Rung(
            "gaps: launch, data, host", gaps, takes_ms=gaps, bound_ms=0.0,
            bound="time in which no kernel runs" if on_gpu else "Python, dispatch, reading data",
            help="larger micro-batches, torch.compile, CUDA graphs",
            items={k: v * scale for c in ("gaps", "data") for k, v in parts.items(c).items()},
        )
    )  # fmt: skip
    residual = m.step_ms - sum(r.ms for r in rungs)
    rungs.append(Rung("residual", residual, help="measured step minus all rungs"))
    so_far, mfu = 0.0, 100.0
    for rung in rungs:
        so_far += rung.ms
        rung.mfu_after = 100 * ideal / so_far
        rung.mfu_points, mfu = mfu - rung.mfu_after, rung.mfu_after
    return Ladder(
        device=parts.device, step_ms=m.step_ms, mfu=100 * ideal / m.step_ms, rungs=rungs,
        residual_share=residual / m.step_ms, scale=scale, causal_credit_ms=credit,
        gemms=parts.gemms, others=parts.others, measured=m, work=work,
    )  # fmt: skip


def _slowest(gemms: list[Gemm], m: Measured, scale: float) -> str:
    """The shape of the linear layers that has most to win."""
    linear = [g for g in gemms if g.part != "head"]
    if not linear:
        return "no shapes in the trace"

    def to_win(g: Gemm) -> float:
        return g.ms * scale - g.flops / m.matmul_flops * 1e3

    worst = max(linear, key=to_win)
    share = worst.flops / m.matmul_flops * 1e3 / (worst.ms * scale)
    return (
        f"most to win: {worst.part} {worst.m} x {worst.n} x {worst.k} at {share:.0%} of the "
        f"matmul peak, {to_win(worst):.3g} ms"
    )


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.3g} TFLOP" if flops >= 1e11 else f"{flops / 1e9:.3g} GFLOP"


def _giga(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.3g} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.3g} MB"
