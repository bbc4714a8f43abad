"""Races to a loss: `bench convergence`, a run a contender and seed.

Each contender may first be given several learning rates, on a seed of its own that does not count
afterwards; the one that ends lowest then runs on all seeds. Contenders share each seed: its weights
to begin with and its batches, so that what they differ by is held against no other's luck. Whether
they differ is for an interval over the seeds to say.

With --keep every finished run stays in a folder, which `fastgpt compare` draws, and no run that is
there is done again: a race that was cut short goes on.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import provenance, results, setup
from bench.setup import at_least
from bench.stats import ONE_PAIR, paired, summarize
from bench.tables import table
from bench.variants import Variant, contenders
from bench.whole_runs import COLOURS, Course, Race, Rows, one_run
from fastgpt.config import settings
from fastgpt.config.schema import Config, PrepareConfig
from fastgpt.data.prepare import ensure
from fastgpt.errors import UserError
from fastgpt.storage.atomic import write_text
from fastgpt_kernels.worker import TaskFailed

PRESET = "shakespeare_char"
# nanoGPT's README ends its GPU run at 1.4697; on the way there 1.5 is met by a steep curve.
TARGET, SMALL_TARGET, SMALL_STEPS = 1.5, 3.6, 600
FIRST = "first"

Run = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A run to be done: whose, at which learning rate (None: the config's), from which seed."""

    variant: Variant
    rate: float | None
    seed: int

    def values(self, config: Config) -> dict[str, Any]:
        """The run's settings by flat name; min_lr keeps its share of the learning rate."""
        flat = settings.to_dict(config) | dict(self.variant.settings) | {"seed": self.seed}
        if self.rate is not None:
            flat["min_lr"] *= self.rate / flat["learning_rate"]
            flat["learning_rate"] = self.rate
        return flat

    def place(self, keep: Path) -> Path:
        rate = "" if self.rate is None else f"-{self.rate:g}"
        return keep / f"{results.slug(self.variant.name)}{rate}-seed{self.seed}"


class Field:
    """What all runs of a race have in common, and where the finished ones are kept."""

    def __init__(self, config: Config, folder: Path, course: Course, keep: Path | None, jobs: int):
        self.config, self.folder, self.course = config, folder, course
        self.keep, self.jobs = keep, jobs

    def run(
        self, entries: Sequence[Entry], progress: Callable[[Entry, Run], object]
    ) -> Iterator[tuple[Entry, Run, str]]:
        """(entry, run, problem) of each, in their order; a variant that failed runs no more."""
        failed: dict[str, str] = {}

        def one(entry: Entry) -> tuple[Entry, Run, str]:
            name = entry.variant.name
            if name not in failed:
                try:
                    return entry, self._one(entry, partial(progress, entry)), ""
                except TaskFailed as e:
                    failed[name] = str(e)
            return entry, {}, failed[name]

        if self.jobs == 1:
            yield from map(one, entries)
            return
        with ThreadPoolExecutor(self.jobs) as pool:
            yield from pool.map(one, entries)

    def _one(self, entry: Entry, progress: Callable[[Run], object]) -> Run:
        values = entry.values(self.config)
        # Where a run is does not change it, nor does how long it may take.
        asked = {k: v for k, v in values.items() if k not in ("out_dir", "data_dir", "input")}
        asked |= dataclasses.asdict(self.course) | {"limit_s": None, "variant": entry.variant.name}
        asked["target"] = repr(self.course.target)
        if self.keep is not None and (run := _kept(entry.place(self.keep), asked)):
            return run
        run = one_run(Race(entry.variant, values, self.folder), self.course, progress)
        if self.keep is not None:
            self._save(entry, values, asked, run)
        return run

    def _save(self, entry: Entry, values: dict[str, Any], asked: dict[str, Any], run: Run) -> None:
        """config.toml and metrics.jsonl as `fastgpt train` has them, and the run itself."""
        place = entry.place(self.keep or Path())
        place.mkdir(parents=True, exist_ok=True)
        known = settings.leaves(Config)
        flat = {k: v for k, v in values.items() if k in known} | {"out_dir": "", "data_dir": "data"}
        flat["input"] = Path(flat["input"]).name
        write_text(place / "config.toml", settings.to_toml(settings.replace(Config(), **flat)))
        records = _records(run, self.config.optim.rows * self.config.model.block_size)
        write_text(place / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in records))
        write_text(place / "race.jsonl", json.dumps({"asked": asked, "run": run}) + "\n")


def _kept(place: Path, asked: dict[str, Any]) -> Run | None:
    """A finished run of just these settings; None if there is none."""
    try:
        found = json.loads((place / "race.jsonl").read_text())
        return found["run"] if found["asked"] == json.loads(json.dumps(asked)) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _records(run: Run, tokens: int) -> Iterator[dict[str, Any]]:
    """The run's log: a line an evaluation and for the steps before it, with their mean loss."""
    seconds = step = 0
    for (now, end, val_loss), loss in zip(run["curve"], run["train_losses"], strict=True):
        if end:
            ms = 1e3 * (now - seconds) / (end - step)
            speed = {"time_ms": round(ms, 3), "tokens_per_second": round(1e3 * tokens / ms, 1)}
            yield {"kind": "train", "step": end - 1, "loss": loss, **speed, "tokens": end * tokens}
        losses = {"train_loss": loss if end else val_loss, "val_loss": val_loss}
        yield {"kind": "eval", "step": end, **losses, "tokens": end * tokens}
        seconds, step = now, end


# --- what comes of the runs ----------------------------------------------------------------------


def arrival(run: Run, target: float) -> tuple[float, int] | None:
    """(seconds, steps) at the first evaluation at or below the target; None: there was none."""
    return next(((s, step) for s, step, loss in run["curve"] if step and loss <= target), None)


def final(run: Run) -> float:
    return run["curve"][-1][2] if run["curve"] else math.inf


def step_ms(run: Run) -> float:
    """Median over the laps."""
    return statistics.median(run["step_ms"]) if run["step_ms"] else math.nan


def best_rate(tried: Sequence[tuple[float, Run]]) -> float:
    """The rate whose run ended lowest; a run that broke off ended nowhere."""
    longest = max(run["steps"] for _, run in tried)
    return min(tried, key=lambda t: final(t[1]) if t[1]["steps"] == longest else math.inf)[0]


def row_of(corpus: str, name: str, runs: Sequence[Run], targets: Sequence[float]) -> dict[str, Any]:
    """A contender's row: its runs by seed and, if all arrived, their times to the target."""
    arrivals = [arrival(run, t) for run, t in zip(runs, targets, strict=False)]
    missed = [run for run, a in zip(runs, arrivals, strict=False) if a is None]
    row: dict[str, Any] = {"key": f"{corpus} {name}", "variant": name, "runs": [*runs]}
    row["problem"] = "" if runs else results.NOT_YET
    if missed:
        best = min((p[2] for r in missed for p in r["curve"]), default=math.nan)
        low, high = min(targets), max(targets)
        target = f"{low:g}" if low == high else f"{low:.3f} to {high:.3f}"
        row["problem"] = f"best loss {best:.3f} after {missed[0]['steps']} steps, target {target}"
    elif runs:
        row["samples_ms"] = samples = [1e3 * a[0] for a in arrivals if a]
        row["steps"] = [a[1] for a in arrivals if a]
        row["median_ms"] = summarize(samples).median
    return row


def compared(row: dict[str, Any], first: dict[str, Any]) -> None:
    """Add what a row differs by from the first one, over the seeds that both have run."""
    n = min(len(row["runs"]), len(first["runs"]))
    ours, theirs = ([r for r in x["runs"][:n]] for x in (row, first))
    if not n:
        return
    measures: dict[str, Callable[[Run], float]] = {"loss": final, "step_ms": step_ms}
    pairs = {key: ([*map(of, ours)], [*map(of, theirs)]) for key, of in measures.items()}
    if not row["problem"] and not first["problem"]:
        for key, name in (("seconds", "samples_ms"), ("steps", "steps")):
            pairs[key] = row[name][:n], first[name][:n]
    row["against"] = first["variant"]
    for key, (a, b) in pairs.items():
        if all(map(math.isfinite, [*a, *b])):
            logs = key != "loss"  # ratios, of which the logarithms are compared
            found = paired(*([*map(math.log, x)] if logs else x for x in (a, b)))
            row[f"paired_{key}"] = dataclasses.asdict(found) | {"verdict": found.verdict}
    if "paired_seconds" in row:
        t = row["paired_seconds"]
        ends = [None if x is None else math.exp(x) for x in (t["low"], t["high"])]
        verdict = {"lower": "faster", "higher": "slower"}.get(t["verdict"], t["verdict"])
        ratio = {"ratio": math.exp(t["mean"]), "low": ends[0], "high": ends[1], "p": t["p"]}
        row["ratio"] = {"to": first["variant"], **ratio, "verdict": verdict}


def said(found: dict[str, Any] | None, ratio: bool) -> str:
    """A paired difference in words: 0.68x [0.65, 0.71] p 0.0004 lower."""
    if found is None:
        return ""
    value = math.exp if ratio else float
    form = "{:.3f}" if ratio else "{:+.4f}"
    text = form.format(value(found["mean"])) + "x" * ratio
    if found["p"] is None:
        return f"{text} ({ONE_PAIR})"
    ends = ", ".join(form.format(value(found[k])) for k in ("low", "high"))
    return f"{text} [{ends}] p {found['p']:.2g} {found['verdict']}"


def show(rows: Rows) -> None:
    """The table of what each took, and what it differs by from the first."""
    lines = []
    for row in rows:
        if row["problem"]:
            print(f"  {row['variant']}: {row['problem']}")
        if not row["runs"]:
            continue
        losses = [*map(final, row["runs"])]
        spread = f"{statistics.fmean(losses):.4f} [{min(losses):.4f}, {max(losses):.4f}]"
        ms = statistics.median(map(step_ms, row["runs"]))
        warm_up = statistics.median(r["warm_up_s"] for r in row["runs"])
        steps = f"{statistics.median(row['steps']):.0f}" if "steps" in row else "--"
        seconds = f"{row['median_ms'] / 1e3:.2f}" if "median_ms" in row else "--"
        cells = [row["variant"], f"{len(losses)}", spread, f"{ms:.1f}", steps, seconds]
        lines.append([*cells, f"{warm_up:.1f}"])
    head = ["variant", "seeds", "last loss [range]", "ms a step", "steps", "seconds", "compiling s"]
    print(table(head, lines))
    for row in rows[1:]:
        if "against" in row:
            print(f"{row['variant']} against {row['against']}, seed by seed:")
            names = {"loss": "last loss", "steps": "steps to the target"}
            names |= {"seconds": "seconds to the target", "step_ms": "ms a step"}
            for key, name in names.items():
                if text := said(row.get(f"paired_{key}"), ratio=key != "loss"):
                    print(f"  {name}: {text}")


def draw(rows: Rows, targets: Sequence[float], title: str, path: Path) -> None:
    """Mean validation loss over seconds and over steps, with bands from the least to the most."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    tails: list[float] = []
    for row, colour in zip(rows, COLOURS * len(rows), strict=False):
        curves = [r["curve"] for r in row["runs"] if r["curve"]]
        points = [*zip(*curves, strict=False)]  # by evaluation, as far as all seeds have come
        if not points:
            continue
        mean, least, most = (
            [f([p[2] for p in at]) for at in points] for f in (statistics.fmean, min, max)
        )
        tails += most[len(most) // 8 :] + least
        for axes, column in zip(panels, (0, 1), strict=True):
            x = [statistics.fmean(p[column] for p in at) for at in points]
            axes.plot(x, mean, color=colour, lw=1.5, label=f"{row['variant']}, {len(curves)} seeds")
            axes.fill_between(x, least, most, color=colour, alpha=0.25, lw=0)
    for axes, label in zip(panels, ("seconds of training", "step"), strict=True):
        axes.axhline(statistics.fmean(targets), color="#888888", lw=0.8, ls="--")
        axes.set_xlabel(label)
        if tails:
            axes.set_ylim(min(*tails, *targets) - 0.02, max(tails))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation loss, nats a token")
    panels[0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


# --- the command ---------------------------------------------------------------------------------


def open_data(preset: str, flags: dict[str, str]) -> tuple[Config, Path]:
    """The run and its token folder: what flags name, the preset's, or local text."""
    named = {"dataset", "input"} & set(flags) or preset != PRESET
    for given in [{}] if named else [{"dataset": PRESET}, {"dataset": "python_stdlib"}]:
        config, _ = setup.configure(preset, given | flags)
        try:
            return config, ensure(PrepareConfig.of(config.data))
        except UserError:
            if given.get("dataset") != PRESET:
                raise
            print("shakespeare_char is not prepared here: Python's standard library instead")
    raise AssertionError("the loop returns or raises")


def target_of(text: str) -> float | str:
    return text if text == FIRST else float(text)


def rates_of(text: str) -> list[float]:
    return [float(x) for x in text.split(",")] if text else []


def main(argv: list[str]) -> int:
    """python -m bench convergence: who reaches a validation loss first.

    Runs of all contenders over several seeds, each in a process of its own, in turn. Evaluations
    always see the same batches and do not count as training time, nor does compiling, which is
    shown beside it. --target=first runs all to the end, and asks when each had the loss at which
    the first contender ends on that seed. --rates tunes each contender's learning rate first. In
    --variants a name may bring settings of its own, as in muon:lr_schedule=wsd. A single run is
    never enough: what is better needs an interval over seeds that says so. Flags of
    `fastgpt train` work here too.
    """
    parser = setup.Parser("convergence", inspect.getdoc(main))
    gpu = torch.cuda.is_available()
    parser.add_argument("preset", nargs="?", default=PRESET)
    parser.add_argument("--target", type=target_of, help="validation loss to reach, or: first")
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--rates", type=rates_of, default=[], help="learning rates to try")
    parser.add_argument("--eval-every", type=at_least(1), default=50 if gpu else 20, help="steps")
    parser.add_argument("--limit-seconds", type=float, default=300.0, help="for one run")
    parser.add_argument("--variants", default="eager,adamw,muon" if gpu else "adamw,muon")
    parser.add_argument("--peer-path", default="", help="a nanoGPT checkout to race")
    parser.add_argument("--keep", type=Path, help="folder in which finished runs stay")
    parser.add_argument("--jobs", type=at_least(1), default=1, help="runs at a time, on a CPU")
    args, flags = parser.parse(argv)
    setup.say_small()
    with parser.user_errors():
        gpu = setup.device_of(flags).type == "cuda"
        small = {"eval_iters": "10", "max_iters": str(SMALL_STEPS), "dropout": "0.0"}
        flags = {"decay_lr": "True", **({} if gpu else small), **flags}
        if "max_iters" in flags:
            flags = {"lr_decay_iters": flags["max_iters"], **flags}
        names = args.variants
        if args.peer_path and "peer" not in names:
            names += ",peer+compile" if gpu else ",peer"
        variants, _ = contenders(names, args.peer_path, gpu)
        if gpu and args.jobs > 1:
            raise UserError(f"--jobs={args.jobs}: a GPU runs one at a time; leave it out")
        config, folder = open_data(args.preset, flags)
    corpus = Path(config.data.input).stem or config.data.dataset
    target = args.target or (TARGET if gpu else SMALL_TARGET)
    known = {"target": target, "corpus": corpus, "seeds": args.seeds, "jobs": args.jobs}
    result = results.Result("convergence", argv, known)
    result.data["settings"] |= provenance.peer(args.peer_path)
    print(f"{corpus} to a validation loss of {target}, {args.seeds} seed(s)", flush=True)
    if args.jobs > 1:
        result.problems.append(f"{args.jobs} runs at a time: their seconds are not comparable")
    steps, every = config.run.max_iters, args.eval_every
    ends = -math.inf if target == FIRST else float(target)
    course = Course(steps, every, every, args.limit_seconds, ends)
    race = Field(config, folder, course, args.keep, args.jobs)
    runs: dict[str, list[Run]] = {v.name: [] for v in variants}
    problems = dict.fromkeys(runs, "")

    def keep(running: Entry | None = None, run: Run | None = None) -> None:
        """Save what there is; the run under way has its curve so far but no time yet."""
        leader = runs[variants[0].name]
        targets = [final(r) for r in leader] if target == FIRST else [ends] * args.seeds
        result.rows[:] = [row_of(corpus, name, found, targets) for name, found in runs.items()]
        for row in result.rows:
            row["problem"] = problems[row["variant"]] or row["problem"]
            if row["problem"]:
                row.pop("samples_ms", None)
            if running is not None and row["variant"] == running.variant.name:
                row["under_way"] = run
            if row is not result.rows[0]:
                compared(row, result.rows[0])
        result.save(args.out)

    keep()
    rates = tune(race, variants, args.rates, config.run.seed + args.seeds, result)
    seeds = range(config.run.seed, config.run.seed + args.seeds)
    entries = [Entry(v, rates.get(v.name), seed) for seed in seeds for v in variants]
    for entry, run, problem in race.run(entries, keep):
        runs[entry.variant.name] += [run] if run else []
        problems[entry.variant.name] = problem
        keep()
    show(result.rows)
    return finish(result, args.out, f"{corpus} to {target}")


def tune(
    race: Field, variants: Sequence[Variant], rates: Sequence[float], seed: int, result: Any
) -> dict[str, float]:
    """The learning rate at which each contender ends lowest, tried on one seed; as said and kept.

    All run to the end for that, whatever the target.
    """
    if not rates:
        return {}
    whole = Field(race.config, race.folder, dataclasses.replace(race.course, target=-math.inf),
                  race.keep, race.jobs)  # fmt: skip
    entries = [Entry(v, rate, seed) for v in variants for rate in rates]
    tried: dict[str, list[tuple[float, Run]]] = {v.name: [] for v in variants}
    for entry, run, problem in whole.run(entries, lambda *_: None):
        if problem:
            continue
        tried[entry.variant.name].append((entry.rate or 0.0, run))
        print(f"  {entry.variant.name} at {entry.rate:g}: {final(run):.4f}", flush=True)
    found = {name: best_rate(runs) for name, runs in tried.items() if runs}
    result.data["settings"]["rates"] = {
        name: {"tried": [[rate, final(run)] for rate, run in runs], "taken": found.get(name)}
        for name, runs in tried.items()
    }
    for name, rate in found.items():
        edge = ", at the edge of what was tried" if rate in (min(rates), max(rates)) else ""
        print(f"  {name}: learning rate {rate:g}{edge}")
    return found


def finish(result: results.Result, out: Path | None, title: str) -> int:
    """Finish the result and draw it beside. The command's exit code."""
    path, also = result.finish(out), ""
    if path and importlib.util.find_spec("matplotlib") is not None:
        lead = [final(r) for r in result.rows[0]["runs"]]
        target = result.data["settings"]["target"]
        targets = lead if target == FIRST else [target]
        if targets and any(row["runs"] for row in result.rows):
            picture = path.with_suffix(".png")
            draw(result.rows, targets, title, picture)
            also = f" and {picture.name}"
    return result.end(out, also)
