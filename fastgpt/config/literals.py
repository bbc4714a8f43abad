"""Reader of nanoGPT's config files: Python files of assignments, of which nothing is executed.

Values are literals, names assigned above, and sums and products of these. The only calls are str,
int, float and time.time(), with which nanoGPT's files name a run. Imports are skipped. Every other
statement is refused with its line.
"""

from __future__ import annotations

import ast
import operator
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fastgpt.errors import UserError, read_text, reading

_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}
_CALLS: dict[str, Callable[[Any], Any]] = {"str": str, "int": int, "float": float}
_LARGEST = 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """Returns the value of an expression of literals and `names`. ValueError for others."""
    match node:
        case ast.Constant(value) if type(value) in (int, float, str, bool):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Name(id=name):
            raise ValueError(f"{name} is not assigned above")
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            if _is_number(value := _value(operand, names)):
                return -value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = _value(left, names), _value(right, names)
            if isinstance(op, ast.Add) and isinstance(a, str) and isinstance(b, str):
                return a + b
            if _is_number(a) and _is_number(b):
                if isinstance(op, ast.Pow) and not (abs(a) <= _LARGEST and -64 <= b <= 64):
                    raise ValueError("a power that large")
                result = _OPERATORS[type(op)](a, b)
                if not _is_number(result) or abs(result) >= _LARGEST:
                    raise ValueError("a number that large")
                return result
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _CALLS:
            return _CALLS[name](_value(argument, names))
        case ast.Call() if ast.unparse(node) == "time.time()":
            return time.time()
    raise ValueError(f"{ast.unparse(node)[:60]} is no literal")


def assignments(path: Path, settings: Iterable[str]) -> dict[str, tuple[Any, int]]:
    """Returns {name: (value, line)} of a Python file, from the last assignment of each name.

    Names outside `settings` that only serve later assignments are left out. Raises UserError with
    the line of any statement that is no assignment of literals.
    """
    with reading(path, "is no Python file", SyntaxError, MemoryError):
        text = read_text(path, limit=1 << 20)
        tree = ast.parse(text)
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    used: set[str] = set()
    for node in tree.body:
        why = "is no assignment"
        match node:
            case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):
                continue
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=expression)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as expression)
            ):
                try:
                    values[name], lines[name] = _value(expression, values), node.lineno
                    used |= {n.id for n in ast.walk(expression) if isinstance(n, ast.Name)}
                    continue
                except (ValueError, TypeError, ArithmeticError, RecursionError) as e:
                    why = str(e)
        source = f"line {node.lineno}: {text.splitlines()[node.lineno - 1].strip()[:80]}"
        rule = "such a file is not run, only assignments of literals are read"
        raise UserError(f"{path}: {source}: {why}; {rule}")
    helpers = used.difference(settings)
    return {name: (values[name], line) for name, line in lines.items() if name not in helpers}
