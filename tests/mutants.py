"""Change one thing in a core module and see whether the tests that mirror it notice.

    python -m tests.mutants [--count=300] [--seed=0] [--only=fastgpt/storage] [--list]

A mutant swaps an operator or a comparison, moves a number by one, turns a condition round, or drops
a statement. Its module's mirror tests run in a process of their own, on a copy of the sources; they
have to fail. Those that survive are printed with their line.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Core modules, and the tests that mirror them.
MIRRORS = {
    "fastgpt/errors.py": ("tests/test_cli.py",),
    "fastgpt/storage/files.py": ("tests/storage",),
    "fastgpt/storage/run.py": ("tests/storage/test_run.py",),
    "fastgpt/storage/checkpoint.py": ("tests/storage/test_checkpoint.py",),
    "fastgpt/config/settings.py": ("tests/config",),
    "fastgpt/config/literals.py": ("tests/config/test_literals.py",),
    "fastgpt/data/batches.py": ("tests/data/test_batches.py",),
    "fastgpt/data/tokens.py": ("tests/data/test_tokens.py", "tests/data/test_batches.py"),
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


def killed(copy: Path, path: str, mutant: str, tests: tuple[str, ...], seconds: float) -> bool:
    """Whether the tests fail, or never end, with the mutant in the place of its module."""
    target = copy / path
    good = target.read_text()
    target.write_text(mutant)
    environment = {**os.environ, "PYTHONPATH": f"{copy}:{copy / 'kernels'}"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        got = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, timeout=seconds
        )
        return got.returncode != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        target.write_text(good)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--timeout", type=float, default=300.0)
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args()
    rng = random.Random(asked.seed)
    every = [
        (path, i)
        for path in MIRRORS
        if path.startswith(asked.only)
        for i in range(len(list(places(ast.parse((ROOT / path).read_text())))))
    ]
    chosen = sorted(rng.sample(every, min(asked.count, len(every))))
    copy = Path(tempfile.mkdtemp(prefix="fastgpt-mutants-"))
    for name in ("fastgpt", "kernels", "tests", "bench", "pyproject.toml", "examples"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
    survivors, tried = [], 0
    for path, i in chosen:
        mutant, what = mutate((ROOT / path).read_text(), i)
        if asked.list:
            print(f"{path} {what}")
            continue
        tried += 1
        if not killed(copy, path, mutant, MIRRORS[path], asked.timeout):
            survivors.append(f"{path} {what}")
            print(f"survived: {survivors[-1]}", flush=True)
    shutil.rmtree(copy)
    if tried:
        share = 100 * (tried - len(survivors)) / tried
        print(f"{tried} mutants, {tried - len(survivors)} killed ({share:.0f} %)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
