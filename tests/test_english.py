"""Plain English of docstrings, by counts: CONTRIBUTING.md has the rules."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("fastgpt", "kernels", "bench", "tests")
NO_VERB = re.compile(r"\W*(what|whether|why|where|who\w*|of|as|how|when|which|if)\b", re.I)
KINDS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings() -> Iterator[tuple[str, ast.AST, str]]:
    """Yields (place, node, docstring) of all modules, classes and functions."""
    for path in (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, KINDS) and (text := ast.get_docstring(node)):
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", node, text


def test_docstrings_begin_with_a_verb_or_a_noun():
    found = [(place, NO_VERB.match(text)) for place, _, text in docstrings()]
    bad = [place for place, match in found if match]
    assert len(bad) <= 0.02 * len(found), bad


def test_docstrings_of_modules_are_short():
    modules = [(place, text) for place, node, text in docstrings() if isinstance(node, ast.Module)]
    assert len([place for place, text in modules if text.count("\n") >= 10]) <= 3


def test_the_subject_has_a_name():
    paths = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "kernels" / "README.md"]
    paths += [p for folder in FOLDERS[:3] for p in (ROOT / folder).rglob("*.py")]
    found = [str(p) for p in paths for _ in re.finditer(r"\bours\b", p.read_text(), re.I)]
    assert len(found) <= 5, found
