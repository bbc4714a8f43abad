"""nanoGPT's meta.pkl, read without trusting it.

A pickle is a program. Before it runs, each of its instructions is looked at, and only those that
make dicts, lists, strings and plain numbers are let through: no globals, no calls, no persistent
ids, nothing nested or repeated that could cost much memory. The unpickler refuses globals as well.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any, NoReturn

from fastgpt.data.tokenizers import CharTokenizer, Tokenizer
from fastgpt.errors import UserError, open_regular

MAX_BYTES = 16 << 20  # a vocabulary of all Unicode characters takes 11 MB
_PLAIN = frozenset(
    ("PROTO", "FRAME", "STOP", "MARK", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS")
    + ("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "SHORT_BINUNICODE", "BINUNICODE")
    + ("BINUNICODE8", "UNICODE", "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1")
    + ("BINFLOAT", "FLOAT", "NONE", "NEWTRUE", "NEWFALSE", "MEMOIZE", "BINPUT", "LONG_BINPUT")
    + ("PUT", "BINGET", "LONG_BINGET", "GET")
)


class _NoGlobals(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"global {module}.{name}")


def read_meta(path: Path) -> tuple[int, Tokenizer | None]:
    """(vocab_size, character tokenizer if `itos` is one). UserError unless it is plain."""
    try:
        with open_regular(path) as f:
            data = f.read(MAX_BYTES + 1)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path} is refused: over {MAX_BYTES:,} bytes are no vocabulary; remove it")
    meta = _load(path, data)
    vocab_size = meta.get("vocab_size") if isinstance(meta, dict) else None
    if type(vocab_size) is not int or not 1 <= vocab_size <= 1 << 16:
        raise UserError(
            f"{path} holds no vocab_size in 1 .. 65536: remove it (GPT-2's vocabulary is assumed "
            "then) or prepare the data again"
        )
    itos = meta.get("itos")
    if isinstance(itos, dict) and list(itos) == list(range(vocab_size)):
        chars = list(itos.values())
        if all(isinstance(c, str) and len(c) == 1 for c in chars) and len(set(chars)) == vocab_size:
            return vocab_size, CharTokenizer(chars)
    return vocab_size, None


def _load(path: Path, data: bytes) -> Any:
    try:
        for n, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name not in _PLAIN:
                what = f" {argument!r}"[:60] if argument is not None else ""
                raise pickle.UnpicklingError(f"it asks for {opcode.name}{what}")
            if opcode.name in ("BINPUT", "LONG_BINPUT", "PUT") and int(argument or 0) > n:
                raise pickle.UnpicklingError(f"it asks for memo slot {argument}")
        return _NoGlobals(io.BytesIO(data)).load()
    except Exception as e:  # a damaged pickle raises nearly anything
        raise UserError(
            f"{path} is refused, nothing in it was run: {e}; only plain dicts, strings and "
            "numbers are read. Remove it (GPT-2's vocabulary is assumed then) or prepare again"
        ) from None
