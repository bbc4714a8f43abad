"""Settings written in Python, read without running it: arithmetic, and nanoGPT's config files.

Such a file is assignments; `ast` shows what is in it. Values are literals, names assigned above,
and sums and products of these. Of all calls only str, int, float and time.time() are known, which
nanoGPT's own files use to name a run; imports are passed over. All else is refused by its line.
"""

from __future__ import annotations

import ast
import operator
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastgpt.errors import UserError, read_text, reading

_NUMBERS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_CALLS: dict[str, Callable[[Any], Any]] = {"str": str, "int": int, "float": float}
_LARGEST = 2**63


class _Unknown(ValueError):
    """Something that is no literal; the message says what."""


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def value_of(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """The value of an expression of literals, `names`, sums and products. ValueError for others."""
    match node:
        case ast.Constant(value) if type(value) in (int, float, str, bool):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Name(id=name):
            raise _Unknown(f"{name} is not assigned above")
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = value_of(operand, names)
            if _number(value):
                return -value if isinstance(sign, ast.USub) else value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _NUMBERS:
            a, b = value_of(left, names), value_of(right, names)
            if isinstance(op, ast.Add) and isinstance(a, str) and isinstance(b, str):
                return a + b
            if _number(a) and _number(b):
                if isinstance(op, ast.Pow) and not (abs(a) <= _LARGEST and -64 <= b <= 64):
                    raise _Unknown("a power that large")
                result = _NUMBERS[type(op)](a, b)
                if not _number(result) or abs(result) >= _LARGEST:
                    raise _Unknown("a number that large")
                return result
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _CALLS:
            return _CALLS[name](value_of(argument, names))
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="time"), attr="time"), args=[], keywords=[]
        ):
            return time.time()
    raise _Unknown(f"{ast.unparse(node)[:60]} is no literal")


def arithmetic(text: str) -> Any:
    """The number that "5 * 8" or "2**16" is. ValueError if it is none."""
    if len(text) > 200:
        raise ValueError("too long")
    try:
        value = value_of(ast.parse(text.strip(), mode="eval").body, {})
    except (SyntaxError, ArithmeticError, RecursionError, MemoryError) as e:
        raise ValueError(str(e)) from e
    if not _number(value):
        raise ValueError("no number")
    return value


def assignments(path: Path) -> dict[str, tuple[Any, int]]:
    """{name: (value, line)} of a Python file, the last assignment of each counting.

    Names that only serve those after them are left out. Raises UserError for whatever is no
    assignment of literals, with its line.
    """
    with reading(path, "is no Python file", SyntaxError, MemoryError):
        text = read_text(path, limit=1 << 20)
        tree = ast.parse(text)
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    used: set[str] = set()
    for node in tree.body:
        expression: ast.expr | None
        match node:
            case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):
                continue
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=expression)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as expression)
            ):
                why = ""
            case _:
                name, expression, why = "", None, "is no assignment"
        if expression is not None:
            try:
                values[name] = value_of(expression, values)
                lines[name] = node.lineno
                used |= {n.id for n in ast.walk(expression) if isinstance(n, ast.Name)}
                continue
            except (ValueError, TypeError, ArithmeticError, RecursionError) as e:
                why = str(e)
        source = text.splitlines()[node.lineno - 1].strip()[:80]
        raise UserError(
            f"{path}: line {node.lineno}: {source}: {why}; such a file is not run, only "
            "assignments of literals are read"
        )
    return {name: (values[name], line) for name, line in lines.items() if name not in used}
