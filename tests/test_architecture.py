"""Imports run one way, from the command line down."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each may import those before it, with two exceptions in `may`.
LEVELS = ("errors", "config", "storage", "data", "model", "weights", "inference", "train")
LEVELS += ("api", "doctor", "cli", "__main__", "__init__")


def imports(source: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Yields (line, module) of every import of a file, those inside functions too."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{source}:{node.lineno}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                path = (root / name.replace(".", "/")).with_suffix(".py")
                whole = node.module == "torch" or path.exists()
                yield node.lineno, name if whole else str(node.module)


def found(folder: Path, root: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (place, importing module, imported module) of all files in a folder."""
    for path in sorted(folder.rglob("*.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        for line, name in imports(path, root):
            yield f"{path.relative_to(root)}:{line}: imports {name}", module, name


def wing(module: str) -> str:
    """Returns train for fastgpt.train.trainer, and fastgpt_kernels for all of that package."""
    top, *rest = module.split(".")
    return rest[0] if top == "fastgpt" and rest else top


def may(importer: str, imported: str) -> bool:
    if imported == "fastgpt":  # the version
        return True
    if imported == "fastgpt_kernels":
        return importer == "model" or may(importer, "model")
    if importer == imported:
        return True
    if importer == "model":  # what computes knows no files
        return imported in ("config", "errors")
    return LEVELS.index(imported) < LEVELS.index(importer)


def upward(root: Path) -> list[str]:
    own = ("fastgpt", "fastgpt_kernels")
    arrows = [a for a in found(root / "fastgpt", root) if a[2].split(".")[0] in own]
    # The kernels' table of exports, from which flags are made, imports nothing itself.
    table = [a for a in arrows if wing(a[1]) == "config" and a[2] == "fastgpt_kernels"]
    return [
        place for place, a, b in arrows if not may(wing(a), wing(b)) and (place, a, b) not in table
    ]


def circles(root: Path) -> list[str]:
    graph: dict[str, set[str]] = {}
    for _, a, b in found(root / "fastgpt", root):
        graph.setdefault(a, set()).add(b)

    def reaches(start: str, end: str, seen: set[str]) -> bool:
        seen.add(start)
        nexts = graph.get(start, set())
        return end in nexts or any(reaches(n, end, seen) for n in nexts - seen)

    return sorted(module for module in graph if reaches(module, module, set()))


def forbidden(root: Path) -> list[str]:
    """Returns imports of torch.distributed outside train/, fastgpt in kernels/, bench in either."""
    out = []
    for place, a, b in found(root / "fastgpt", root):
        distributed = f"{b}.".startswith("torch.distributed.") and wing(a) != "train"
        if distributed or b.split(".")[0] == "bench":
            out.append(place)
    kernels = found(root / "kernels", root)
    return out + [place for place, _, b in kernels if b.split(".")[0] in ("fastgpt", "bench")]


@pytest.mark.parametrize("rule", [upward, circles, forbidden])
def test_imports(rule):
    assert rule(ROOT) == []


def test_few_doors():
    entries = [p.name for p in (ROOT / "fastgpt").iterdir() if p.name != "__pycache__"]
    assert len(entries) <= 13, sorted(entries)


@pytest.mark.parametrize(
    ("path", "line", "check"),
    [
        ("fastgpt/data/x.py", "from fastgpt.train import loop", upward),
        ("fastgpt/data/x.py", "from fastgpt.model.gpt import GPT", upward),
        ("fastgpt/model/x.py", "from fastgpt.storage import run_dir", upward),
        ("fastgpt/storage/x.py", "import fastgpt_kernels.attention", upward),
        ("fastgpt/errors.py", "def f():\n    from fastgpt import cli", upward),
        ("fastgpt/inference/x.py", "import torch.distributed as dist", forbidden),
        ("fastgpt/model/x.py", "from torch.distributed.tensor import DTensor", forbidden),
        ("fastgpt/config/x.py", "from torch import distributed", forbidden),
        ("fastgpt/train/x.py", "from bench import setup", forbidden),
        ("kernels/x.py", "import fastgpt.errors", forbidden),
        ("fastgpt/train/x.py", "from fastgpt.train import y", circles),
    ],
)
def test_each_is_found(path, line, check, tmp_path: Path):
    for folder in ("train", "config", "storage", "data", "model", "inference"):
        (tmp_path / "fastgpt" / folder).mkdir(parents=True)
    (tmp_path / "fastgpt" / "cli.py").write_text("from fastgpt.train import y\n")
    (tmp_path / "fastgpt" / "train" / "y.py").write_text("from fastgpt.train.x import a\n")
    (tmp_path / "kernels").mkdir()
    for check_all in (upward, circles, forbidden):
        assert check_all(tmp_path) == []
    (tmp_path / path).write_text(line + "\n")
    assert check(tmp_path)
