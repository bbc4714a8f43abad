"""From the device's peak down to the measured training step: where every millisecond goes.

    python -m bench waterfall [PRESET] [--key=value ...]

--out=DIR is where the results go (bench/results on a GPU, out/bench elsewhere), --seconds=10 about
how long to time steps, --traced_steps=3 how many the profiler looks at. All other flags are those
of `fastgpt train`; without a preset it is gpt2 on a GPU and laptop elsewhere.

The step is the trainer's own, `Trainer.step` with prefetched batches of random tokens, compiled
and on the kernels that `fastgpt train` would use; the vocabulary is that of the preset's
corpus: 256 bytes, 65 characters or GPT-2's 50,257. It is timed without the profiler (device
events on a GPU, medians) before and after it is traced; reading the loss for a log line is not in
it, and neither is the CUDA graph that `fastgpt train` makes of a small model's step: a trace does
not say which op a graph's kernel is of. Without a GPU it is one thread's step. Written are a
result file, whose one row has the rungs (schema: bench/ladder.py), a PNG and an SVG.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench import ladder, ladder_table, picture, results, roof, setup, trace
from bench.categories import DATA_SCOPE, Sizes
from bench.turns import mark, ms_between
from bench.variants import Ours, Variant, build
from fastgpt.config import settings
from fastgpt.config.schema import Config
from fastgpt.data.loader import Batches, Prefetcher
from fastgpt.data.token_files import TokenFile, TokenSplit
from fastgpt.errors import UserError
from fastgpt.model.device import measured_peak, synchronize
from fastgpt.model.kernels import describe

OWN = ("out", "seconds", "traced_steps")
MAX_RESIDUAL = 0.02
ATTEMPTS = 3


def main(argv: Sequence[str]) -> int:
    """Run the command. 0: done; 1: the rungs miss the step by more than 2 %; 2: bad arguments."""
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    try:
        config, name, own = parse(argv)
        return run(config, name, own, argv)
    except torch.OutOfMemoryError:
        o, m = config.optim, config.model
        why = (
            f"out of memory at --batch_size={o.batch_size} x --block_size={m.block_size}: "
            "a smaller --batch_size fits"
        )
    except (UserError, trace.TraceError) as e:
        why = str(e)
    print(f"bench waterfall: {why}", file=sys.stderr)
    return 2


def parse(argv: Sequence[str]) -> tuple[Config, str, dict[str, str]]:
    """Settings of the run, the preset's name, and this command's own flags."""
    positional, flags = settings.split_flags(argv)
    if len(positional) > 1:
        raise UserError(f"{' '.join(positional)}: one preset is wanted")
    name = positional[0] if positional else ("gpt2" if torch.cuda.is_available() else "laptop")
    own = {key: flags.pop(key) for key in OWN if key in flags}
    for key, kind in (("seconds", float), ("traced_steps", int)):
        try:
            good = key not in own or 0 < kind(own[key]) <= 3600
        except ValueError:
            good = False
        if not good:
            raise UserError(f"--{key}={own[key]}: wanted a number above 0, at most 3600")
    config = setup.preset_of(name, flags)
    if config.system.device == "mps":
        raise UserError("--device=mps: traces of it hold no kernels; pass --device=cpu")
    return config, name, own


def run(config: Config, name: str, own: dict[str, str], argv: Sequence[str]) -> int:
    seconds = float(own.get("seconds", 10))
    result = results.Result("waterfall", list(argv), settings.to_dict(config))
    default = Path("out/bench") if config.system.device == "cpu" else results.FOLDER
    out = Path(own["out"]) if "out" in own else default
    result.rows.append({"key": name, "problem": results.NOT_YET})
    result.save(out)
    with setup.one_thread(config.system.device), Steps(config) as steps:
        choices = describe(steps.trainer.selected)

        def keep(found: ladder.Ladder, samples: list[float]) -> str:
            row = {"key": name, "samples_ms": samples, "problem": "", "ops": choices}
            result.rows[:] = [row | {"tokens": steps.tokens, "waterfall": found.to_json()}]
            path = result.save(out)
            assert path is not None
            return draw(result, found, steps, name, path)

        found, samples = measure(steps, seconds, int(own.get("traced_steps", 3)), keep)
        head = f"{name} on {result.data['environment']['device']}"
        head += " (a CPU picture: no GPU was used)" if found.device == "cpu" else ""
        print(f"{head}\nops: {choices}")
        ladder_table.show(found)
        whole = abs(found.residual_share) <= MAX_RESIDUAL
        if not whole:
            missed = f"the rungs miss the measured step by {found.residual_share:+.1%}"
            result.problems.append(missed)
            print(f"bench waterfall: {missed}; is something else running here?", file=sys.stderr)
        also = keep(found, samples)
    print(f"written: {result.finish(out)}{also}")
    return 0 if whole else 1


def draw(result: results.Result, found: ladder.Ladder, steps: Steps, name: str, path: Path) -> str:
    """The picture beside the result, and what is said of it."""
    if importlib.util.find_spec("matplotlib") is None:
        return "; no picture: matplotlib is not installed"
    where, system = result.data["environment"], steps.config.system
    footer = " · ".join(
        [
            where["device"],
            f"{system.dtype}, {'compiled' if system.compile else 'not compiled'}",
            f"{steps.tokens:,} tokens a step",
            f"torch {where['torch']}",
            result.data["date"][:10],
            f"commit {where['commit']}",
            result.data["command"],
        ]
    )
    title = f"{name}, {steps.trainer.model.n_params() / 1e6:.3g}M parameters, on {where['device']}"
    pictures = [path.with_suffix(f".{kind}") for kind in picture.FORMATS]
    picture.draw(found, title, footer, pictures, "CPU picture" if found.device == "cpu" else "")
    return ", .png and .svg"


class Steps:
    """The trainer's steps, one after another, as the training loop runs them. A context manager."""

    def __init__(self, config: Config):
        self.config, self.device = config, torch.device(config.system.device)
        self.step = 0
        m, o, system = config.model, config.optim, config.system
        self.tokens = o.rows * m.block_size
        vocab_size = setup.vocabulary(config)
        as_trained = {"kernels": system.kernels, "compile": system.compile}
        stepper = build(Variant("as trained", as_trained), config, vocab_size)
        self.trainer = cast(Ours, stepper).trainer
        shape = self.trainer.model.shape
        names = [f.name for f in dataclasses.fields(Sizes)]
        known = settings.to_dict(config) | {"padded_vocab_size": shape.padded_vocab_size}
        known |= {"vocab_size": vocab_size, "micro_batches": o.gradient_accumulation_steps}
        self.sizes = Sizes(**{name: known[name] for name in names})

    def __enter__(self) -> Steps:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            c = self.config
            count = max(1 << 20, 8 * c.model.block_size)
            ids = np.random.default_rng(0).integers(0, self.sizes.vocab_size, count)
            ids.astype("<u2").tofile(folder / "train.bin")
            batches = Batches(
                TokenSplit("train", [TokenFile(folder / "train.bin")]),
                rows_per_step=c.optim.rows,
                block_size=c.model.block_size,
                seed=c.run.seed,
                sampling=c.data.sampling,
            )
            if c.system.compile:
                rows = torch.from_numpy(batches.tokens(0, slice(c.optim.batch_size)))
                self.trainer.warm_up(0, rows.to(self.device))
            self.prefetcher = stack.enter_context(closing(Prefetcher(batches, self.device)))
            gc.freeze()  # as fastgpt.train.loop: no collector's pause in a step
            gc.disable()
            stack.callback(gc.enable)
            stack.callback(gc.unfreeze)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def run(self, count: int) -> list[float]:
        """Run `count` + 1 steps. ms from the beginning of each to that of the next: `count`."""
        marks = []
        for _ in range(count + 1):
            marks.append(mark(self.device))
            with record_function(trace.STEP_SCOPE):
                with record_function(DATA_SCOPE):
                    tokens = self.prefetcher.get(self.step)
                self.trainer.step(self.step, tokens)
            self.step += 1
        synchronize(self.device)
        self.trainer.check()
        return [ms_between(a, b) for a, b in zip(marks, marks[1:], strict=False)]


def measure(
    steps: Steps,
    seconds: float,
    traced_steps: int,
    keep: Callable[[ladder.Ladder, list[float]], object] = lambda found, samples: None,
) -> tuple[ladder.Ladder, list[float]]:
    """The ladder of the step, and the ms of every step timed without the profiler.

    `keep` gets both after each trace: the first one is there even if time ends.
    """
    model, dtype = steps.trainer.model, steps.trainer.machine.torch_dtype
    one = statistics.median(steps.run(3))
    count = int(min(max(seconds * 1e3 / 4 / one, 5), 200))
    samples = steps.run(count)
    base = peaks(steps.config)
    work = ladder.count_work(
        steps.sizes,
        model.n_params(),
        torch.finfo(dtype).bits // 8,
        optimizer=steps.config.optim.optimizer,
    )
    best: ladder.Ladder | None = None
    for _ in range(ATTEMPTS):
        parts, traced_ms = traced(steps, traced_steps)
        samples += steps.run(count)
        step_ms = statistics.median(samples)
        found = ladder.build(parts, work, replace(base, step_ms=step_ms, traced_ms=traced_ms))
        if best is None or abs(found.residual_share) < abs(best.residual_share):
            best = found
            keep(best, samples)
        if abs(best.residual_share) <= MAX_RESIDUAL:
            break
    assert best is not None
    return best, samples


def traced(steps: Steps, count: int) -> tuple[trace.Breakdown, float]:
    """The breakdown of `count` steps, and their mean ms by the clock."""
    activities = [ProfilerActivity.CPU]
    if steps.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with warnings.catch_warnings():
        # To keep them it would make objects of them all, which takes longer than all else here.
        warnings.filterwarnings("ignore", ".*Profiler clears events")
        with profile(activities=activities, record_shapes=True) as profiler:
            times = steps.run(count + 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        parts = trace.breakdown(trace.load(path), steps.sizes)
    if parts.device != steps.device.type:
        raise UserError(
            "the profiler recorded no kernels: may this user trace the GPU (performance counters)?"
        )
    return parts, statistics.fmean(times[1:])


def peaks(config: Config) -> ladder.Measured:
    """Matmul peak and copy bandwidth measured here, and the data sheet's figure if there is one.

    `step_ms` and `traced_ms` are left at 0.
    """
    machine = setup.machine(config)
    matmul, peak = measured_peak(machine.device, machine.torch_dtype), machine.peak
    sheet = peak if peak.source != matmul.source else None  # the peak is measured without one
    return ladder.Measured(
        step_ms=0.0,
        traced_ms=0.0,
        matmul_flops=matmul.flops,
        matmul_source=matmul.source,
        copy_bytes=roof.copy_bandwidth(machine.device),
        datasheet_flops=sheet.flops if sheet else None,
        datasheet_source=sheet.source if sheet else "",
    )
