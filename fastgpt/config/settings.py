"""A config's settings by flat name: read from flags and TOML files, checked, written back."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastgpt.config import literals
from fastgpt.config.schema import Config, Range, SourceConfig
from fastgpt.errors import UserError, read_text, reading

C = TypeVar("C")

# Settings of earlier versions: each flag is answered with its line, and old config.toml files may
# hold them.
REMOVED = {
    "op.adamw": "torch.optim.AdamW is the only AdamW; leave the flag out",
    "tune": "`fastgpt tune` measures, and runs use what it found; leave the flag out",
}


@dataclass(frozen=True)
class Leaf:
    """One setting: its flat name, its section ("" at the top), its type and its bounds.

    Names are unique across sections; those in `op` carry it with them: op.attention.
    """

    name: str
    section: str
    type: Any
    range: Range | None

    @property
    def field(self) -> str:
        """Its name inside its section."""
        return self.name.rpartition(".")[2]


def leaves(cls: type) -> dict[str, Leaf]:
    """All settings of a config class by their flat names, in order."""
    out: dict[str, Leaf] = {}
    hints = typing.get_type_hints(cls, include_extras=True)
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        if dataclasses.is_dataclass(kind):
            prefix = "op." if f.name == "op" else ""
            for name, leaf in leaves(typing.cast(type, kind)).items():
                out[prefix + name] = dataclasses.replace(leaf, name=prefix + name, section=f.name)
            continue
        bounds = None
        if typing.get_origin(kind) is Annotated:
            kind, *notes = typing.get_args(kind)
            bounds = next((note for note in notes if isinstance(note, Range)), None)
        out[f.name] = Leaf(f.name, "", kind, bounds)
    return out


def get(config: Any, leaf: Leaf) -> Any:
    return getattr(getattr(config, leaf.section) if leaf.section else config, leaf.field)


def replace(config: C, **values: Any) -> C:
    """A new config with other values, by their flat names ("op.attention" too), unchecked.

    A name that the config does not have raises KeyError.
    """
    table = leaves(type(config))
    parts: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        leaf = table[name]
        parts.setdefault(leaf.section, {})[leaf.field] = value
    top = parts.pop("", {})
    top |= {s: dataclasses.replace(getattr(config, s), **new) for s, new in parts.items()}
    return dataclasses.replace(config, **top)  # type: ignore[type-var]


def to_dict(config: Any) -> dict[str, Any]:
    """Flat {name: value}."""
    return {name: get(config, leaf) for name, leaf in leaves(type(config)).items()}


# --- checking one value --------------------------------------------------------------------------


def _wanted(leaf: Leaf) -> str:
    options = _options(leaf.type)
    if options:
        return "one of " + ", ".join(str(o) for o in options)
    noun = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}[leaf.type]
    return noun + (f" {leaf.range}" if leaf.range else "")


def _options(kind: Any) -> tuple[Any, ...]:
    """Allowed values of a Literal, or of a union of a Literal and bool."""
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return sum(((True, False) if k is bool else _options(k) for k in typing.get_args(kind)), ())
    return ()


def _parse(leaf: Leaf, text: str) -> Any:
    """A flag's text as the setting's type; text that does not fit comes back as it is."""
    kind = leaf.type
    words = {"True": True, "true": True, "False": False, "false": False}
    if kind is bool or bool in typing.get_args(kind):
        return words.get(text, text)
    if kind in (int, float):
        for read in (kind, literals.arithmetic):
            with contextlib.suppress(ValueError):
                return read(text)
    return text


def check_value(leaf: Leaf, value: Any, where: str) -> Any:
    """The value in its setting's type. Raises UserError: what was given, what is wanted."""
    kind = leaf.type
    if type(value) is int and not -(2**63) <= value < 2**63:  # beyond floats, or beyond printing
        raise UserError(
            f"{where}{leaf.name}=(a number of {value.bit_length()} bits): wanted {_wanted(leaf)}"
        )
    if kind is float and type(value) is int:
        value = float(value)
    options = _options(kind)
    if options:
        good = any(value == o and type(value) is type(o) for o in options)
    else:
        good = type(value) is kind
        if good and kind in (int, float):
            good = math.isfinite(value) and (leaf.range is None or leaf.range.check(value))
        if good and kind is str:
            good = "\0" not in value
            if any(0xD800 <= ord(c) < 0xE000 for c in value):  # bytes of a name that is no UTF-8
                raise UserError(
                    f"{where}{leaf.name}={value}: wanted text in UTF-8; rename the file"
                )
    if not good:
        raise UserError(f"{where}{leaf.name}={value}: wanted {_wanted(leaf)}")
    return value


def unknown_key(key: str, names: Sequence[str], where: str, what: str = "setting") -> UserError:
    """The error for a name that does not exist, with the nearest one that does."""
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    flag = "--" if where == "--" else ""
    listed = f"there are {', '.join(names)}" if len(names) < 12 else "--help lists them all"
    hint = f"did you mean {flag}{close[0]}?" if close else listed
    return UserError(f"{where}{key}: no such {what}; {hint}")


def check(config: Any) -> None:
    """What the type and bounds of a single value do not show. Raises UserError."""
    flat = to_dict(config)
    if not re.fullmatch(r"auto|(cpu|mps)(:0)?|cuda(:\d+)?", flat.get("device", "auto")):
        raise UserError(f"--device={flat['device']}: wanted auto, cpu, cuda, cuda:N or mps")
    if flat.get("init_from") == "weights" and not flat["weights"]:
        raise UserError("--init_from=weights: which? name a folder with --weights=PATH")
    if isinstance(config, SourceConfig) and config.init_from == "resume" and config.weights:
        raise UserError("--weights: goes with --init_from=weights or gpt2..., not with resume")
    if flat.get("to") == "":
        raise UserError("--to: where to? name a new folder, as --to FOLDER")
    if flat.get("task") == "hellaswag" and not flat["input"]:
        raise UserError("--task=hellaswag: needs its file: --input=hellaswag_val.jsonl")
    if not isinstance(config, Config):
        return
    m, o = config.model, config.optim
    if m.n_embd % m.n_head:
        divisors = [h for h in range(1, m.n_embd + 1) if m.n_embd % h == 0]
        near = min(divisors, key=lambda h: abs(h - m.n_head))
        raise UserError(
            f"--n_head={m.n_head}: must divide n_embd={m.n_embd}; the nearest that does is {near}"
        )
    if o.decay_lr and o.lr_schedule == "cosine" and o.min_lr > o.learning_rate:
        raise UserError(
            f"--min_lr={o.min_lr:g}: must not exceed learning_rate={o.learning_rate:g}; "
            "lower it or pass --decay_lr=False"
        )


# --- from flags and files ------------------------------------------------------------------------


def split_flags(args: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Positional arguments, and flags as {name: text}; `--key=value` or `--key value`."""
    positional: list[str] = []
    flags: dict[str, str] = {}
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--"):
            positional.append(arg)
            continue
        key, eq, value = arg[2:].partition("=")
        key = key.replace("-", "_")
        if not eq:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{key}: no value given; write --{key}=VALUE")
            value = rest.pop(0)
        flags[key] = value  # the last one counts, as in nanoGPT
    return positional, flags


def apply_flags(config: C, flags: Mapping[str, str]) -> C:
    """A new config with the flags' values. Raises UserError for the first bad one."""
    table = leaves(type(config))
    if "auto_batch_size" in table and flags.get("batch_size") == "auto":
        # The configured batch size stays: with the accumulation it says what the global batch is.
        flags = {"auto_batch_size": "True", **{k: v for k, v in flags.items() if k != "batch_size"}}
    values = {}
    for key, text in flags.items():
        if key in REMOVED:
            raise UserError(f"--{key}: was removed: {REMOVED[key]}")
        if key not in table:
            raise unknown_key(key, list(table), "--")
        values[key] = check_value(table[key], _parse(table[key], text), "--")
    return replace(config, **values)


def load_toml(path: Path) -> Config:
    """A config from a TOML file: flat keys, or keys in their sections, or both."""
    with reading(path, "not a TOML file"):
        text = read_text(path, limit=1 << 20)
    return parse_toml(text, path)


def parse_toml(text: str, path: Path) -> Config:
    """`load_toml` of a file's text; `path` is what errors call it."""
    try:
        with reading(path, "not a TOML file"):
            tree = tomllib.loads(text)
    except UserError as e:
        if isinstance(e.__cause__, tomllib.TOMLDecodeError):
            raise UserError(f"{path}: not a TOML file: {e.__cause__}") from None
        raise
    table, values = leaves(Config), {}
    sections = {leaf.section for leaf in table.values()}
    for key, value in tree.items():
        group = value.items() if isinstance(value, dict) and key in sections else [(key, value)]
        for name, v in group:
            name = f"op.{name}" if key == "op" else name
            if name in REMOVED:
                continue
            if name not in table:
                raise unknown_key(name, list(table), f"{path}: ")
            values[name] = check_value(table[name], v, f"{path}: ")
    return replace(Config(), **values)


def load_python(path: Path) -> Config:
    """A config from a file of assignments, as nanoGPT's config/*.py are; nothing in it is run.

    What it does not say is as in nanoGPT, whose GELU is the exact one.
    """
    table, values = leaves(Config), {}
    for name, (value, line) in literals.assignments(path).items():
        where = f"{path}: line {line}: "
        if name not in table:
            raise unknown_key(name, list(table), where)
        if table[name].type is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        values[name] = check_value(table[name], value, where)
    return replace(Config(), **{"gelu": "erf", **values})


def from_dict(flat: Mapping[str, Any], where: str) -> Config:
    """The inverse of `to_dict`; names that this version does not know are left out."""
    table = leaves(Config)
    known = {k: check_value(table[k], v, where) for k, v in flat.items() if k in table}
    return replace(Config(), **known)


def differences(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """(name, value in a, value in b) of all settings that differ."""
    ours, theirs = to_dict(a), to_dict(b)
    return [(name, ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]]


def to_toml(config: Config) -> str:
    """The config as TOML that `load_toml` reads back to the same config."""
    lines: list[str] = []
    section = ""
    for leaf in leaves(Config).values():
        if leaf.section != section:
            section = leaf.section
            lines += ["", f"[{section}]"]
        lines.append(f"{leaf.field} = {_toml_value(get(config, leaf))}")
    return "\n".join(lines[1:]) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    escaped = "".join(
        f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else {"\\": "\\\\", '"': '\\"'}.get(c, c)
        for c in value
    )
    return f'"{escaped}"'
