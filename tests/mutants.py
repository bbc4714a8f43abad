"""Change one thing in a core module and see whether the tests that mirror it notice.

    python -m tests.mutants [--count=300] [--seed=0] [--only=fastgpt/storage] [--list]
    python -m tests.mutants --again=LOG      only those that survived by the output of a run

A mutant swaps an operator or a comparison, moves a number by one, turns a condition round, or drops
a statement. Its module's mirror tests run in a process of their own, on a copy of the sources: the
fastest first, no slow ones, and as many as take `--budget` seconds. One has to fail. What became of
each mutant is printed at once; docs/reliability.md names those that change nothing.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

# What every fork would take seconds to import, as tests/conftest.py wants it without a GPU.
os.environ.update(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")
import matplotlib.figure  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401

del os.environ["TRITON_INTERPRET"]

FORK = multiprocessing.get_context("fork")
ROOT = Path(__file__).parents[1]
# Core modules, and the tests that mirror them.
MIRRORS = {
    "fastgpt/errors.py": ("tests/test_errors.py", "tests/test_cli.py"),
    "fastgpt/storage/files.py": ("tests/storage",),
    "fastgpt/storage/run.py": ("tests/storage/test_run.py",),
    "fastgpt/storage/checkpoint.py": ("tests/storage/test_checkpoint.py",),
    "fastgpt/config/settings.py": ("tests/config",),
    "fastgpt/config/literals.py": ("tests/config/test_literals.py",),
    "fastgpt/data/loader.py": ("tests/data/test_loader.py",),
    "fastgpt/data/token_files.py": ("tests/data/test_token_files.py",),
    "fastgpt/train/metrics.py": ("tests/train/test_metrics.py",),
    "fastgpt/train/curves.py": ("tests/train/test_compare.py",),
    "fastgpt/train/compare.py": ("tests/train/test_compare.py",),
    "fastgpt/train/optim.py": ("tests/train/test_optim.py",),
    "fastgpt/train/step.py": ("tests/train/test_step.py",),
    "fastgpt/train/mfu.py": ("tests/train/test_mfu.py",),
    "fastgpt/model/ops.py": ("tests/model/test_ops.py",),
    "fastgpt/model/peaks.py": ("tests/model/test_peaks.py",),
    "kernels/fastgpt_kernels/ops/norm/kernels.py": ("tests/kernels/test_layer_norm.py",),
    "kernels/fastgpt_kernels/ops/gelu/kernels.py": ("tests/kernels/test_gelu.py",),
    "bench/ladder.py": ("tests/bench/test_waterfall.py",),
}
_SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip


def places(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """(node, what can be changed of it) of all that a mutant can be made of."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in _SWAPS:
            yield node, "op"
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPS:
            yield node, "comparison"
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield node, "number"
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield node, "truth"
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            yield node, "condition"
        elif isinstance(node, ast.Expr | ast.AugAssign) and not (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            yield node, "statement"


def mutate(source: str, index: int) -> tuple[str, str]:
    """(the source with its place number `index` changed, what was changed)."""
    tree = ast.parse(source)
    node, kind = list(places(tree))[index]
    line = getattr(node, "lineno", 0)
    before = ast.unparse(node).splitlines()[0][:70]
    if kind == "op":
        node.op = _SWAPS[type(node.op)]()  # type: ignore[attr-defined]
    elif kind == "comparison":
        node.ops[0] = _SWAPS[type(node.ops[0])]()  # type: ignore[attr-defined]
    elif kind == "number":
        node.value += 1  # type: ignore[attr-defined]
    elif kind == "truth":
        node.value = not node.value  # type: ignore[attr-defined]
    elif kind == "condition":
        node.test = ast.UnaryOp(ast.Not(), node.test)  # type: ignore[attr-defined]
    else:
        # In place of the statement, so that what holds it need not be known.
        node.__class__, node.__dict__ = ast.Pass, {"lineno": line, "col_offset": 0}  # type: ignore
        return ast.unparse(ast.fix_missing_locations(tree)), f"line {line}: `{before}` left out"
    after = ast.unparse(node).splitlines()[0][:70]
    return ast.unparse(ast.fix_missing_locations(tree)), f"line {line}: `{before}` -> `{after}`"


class Durations:
    """A plugin of pytest: the seconds that each test that passed took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed:
            self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration


def run_tests(copy: Path, tests: list[str], plugin: Durations | None, answer: Connection) -> None:
    """In a process of its own: the tests at the copy; sends pytest's code and the durations."""
    os.setsid()
    os.chdir(copy)
    # This module is of the package `tests` of the sources; the copy has its own.
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    paths = [str(copy), str(copy / "kernels")]
    sys.path[:] = paths + [path for path in sys.path if Path(path).parent != ROOT.parent]
    os.environ["PYTHONPATH"] = ":".join(paths)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], [plugin] if plugin else [])
    answer.send((int(code), plugin.seconds if plugin else {}))


def outcome(
    copy: Path, tests: list[str], timeout: float, plugin: Durations | None = None
) -> tuple[int, dict[str, float]]:
    """(pytest's exit code, or -1 if it did not end; seconds by test if asked for).

    A fork of this process has PyTorch and pytest imported already, and none of our own modules.
    """
    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=run_tests, args=(copy, tests, plugin, theirs))
    child.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(timeout) else (-1, {})
    except EOFError:  # it died of the mutant
        return 1, {}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid or 0, signal.SIGKILL)
        child.join()


def fastest_first(copy: Path, tests: tuple[str, ...], budget: float) -> list[str]:
    """The tests, not the slow ones, by the time they take; as many as fit into `budget` seconds."""
    code, seconds = outcome(copy, ["-m", "not slow", *tests], 1800, Durations())
    if code != 0:
        raise SystemExit(
            f"without a mutant there are failures: pytest -m 'not slow' {' '.join(tests)}"
        )
    order = sorted(seconds, key=lambda test: seconds[test])
    totals = accumulate(seconds[test] for test in order)
    return [test for test, total in zip(order, totals, strict=True) if total <= budget]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--again", type=Path, help="a file with the output of a run")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of tests, a mutant")
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args()
    every = [
        (path, i)
        for path in MIRRORS
        if path.startswith(asked.only)
        for i in range(len(list(places(ast.parse((ROOT / path).read_text())))))
    ]
    chosen = sorted(random.Random(asked.seed).sample(every, min(asked.count, len(every))))
    mutants = [(path, *mutate((ROOT / path).read_text(), i)) for path, i in chosen]
    if asked.again:
        lines = asked.again.read_text().splitlines()
        mutants = [m for m in mutants if f"survived: {m[0]} {m[2]}" in lines]
    if asked.list:
        print(*(f"{path} {what}" for path, _, what in mutants), sep="\n")
        return 0
    copy = Path(tempfile.mkdtemp(prefix="fastgpt-mutants-"))
    for name in ("fastgpt", "kernels", "tests", "bench", "pyproject.toml", "examples"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
    order: dict[tuple[str, ...], list[str]] = {}
    killed = 0
    for path, mutant, what in mutants:
        mirror = MIRRORS[path]
        if mirror not in order:
            order[mirror] = fastest_first(copy, mirror, asked.budget)
        (copy / path).write_text(mutant)
        code, _ = outcome(copy, order[mirror], 30 + 3 * asked.budget)
        shutil.copy(ROOT / path, copy / path)
        killed += code != 0
        how = {0: "survived", -1: "killed (no end)"}.get(code, "killed")
        print(f"{how}: {path} {what}", flush=True)
    shutil.rmtree(copy)
    print(f"{len(mutants)} mutants, {killed} killed ({100 * killed / max(1, len(mutants)):.0f} %)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
