"""Settings by flat name: read from flags and files, checked, listed for `--help`, written back."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import re
import shutil
import textwrap
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastgpt.config import literals
from fastgpt.config.schema import Config, CorpusConfig, ModelConfig, Range
from fastgpt.errors import UserError, read_text, reading

C = TypeVar("C")

# Settings of earlier versions: each flag is answered with its line, and old config.toml files may
# hold them.
REMOVED = {
    "op.adamw": "torch.optim.AdamW is the only AdamW; leave the flag out",
    "op.linear": "cuBLAS was measured to be faster; leave the flag out",
    "tune": "`fastgpt tune` measures, and runs use what it found; leave the flag out",
}
REMOVED_VALUES = {"op.attention": ("math", "fa3", "fa4"), "op.mlp": ("triton",)}


@dataclass(frozen=True)
class Leaf:
    """Setting: flat name, section ("" at the top), type or options, bounds, help text.

    Names are unique across sections; those in `op` carry it with them: op.attention.
    """

    name: str
    section: str
    type: type
    options: tuple[Any, ...]
    range: Range | None
    about: str

    @property
    def field(self) -> str:
        """Name inside the section."""
        return self.name.rpartition(".")[2]

    @property
    def wanted(self) -> str:
        if self.options:
            return "one of " + ", ".join(map(str, self.options))
        noun = {int: "a whole number", float: "a number", str: "text in UTF-8"}[self.type]
        return noun + (f" {self.range}" if self.range else "")


def leaves(cls: Any) -> dict[str, Leaf]:
    """Returns all settings of a config class by their flat names, in order."""
    out: dict[str, Leaf] = {}
    for f in dataclasses.fields(cls):
        kind, bounds = typing.cast(Any, f.type), None
        if dataclasses.is_dataclass(kind):
            prefix = "op." if f.name == "op" else ""
            for name, leaf in leaves(kind).items():
                out[prefix + name] = dataclasses.replace(leaf, name=prefix + name, section=f.name)
            continue
        if typing.get_origin(kind) is Annotated:
            kind, bounds = typing.get_args(kind)
        out[f.name] = Leaf(f.name, "", kind, _options(kind), bounds, f.metadata["about"])
    return out


def _options(kind: Any) -> tuple[Any, ...]:
    """Returns the values of bool, of a Literal, or of a union of these; () for other types."""
    if kind is bool:
        return True, False
    return tuple(o for k in typing.get_args(kind) for o in _options(k) or (k,))


def get(config: Any, leaf: Leaf) -> Any:
    return getattr(getattr(config, leaf.section) if leaf.section else config, leaf.field)


def replace(config: C, **values: Any) -> C:
    """Returns a config with other values, by their flat names ("op.attention" too), unchecked.

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
    """Returns flat {name: value}."""
    return {name: get(config, leaf) for name, leaf in leaves(type(config)).items()}


# --- checking values -----------------------------------------------------------------------------


def check_value(leaf: Leaf, value: Any, where: str) -> Any:
    """Returns the value in its setting's type. Raises UserError: the given value, the wanted."""
    shown = value
    if type(value) is int and not -(2**63) <= value < 2**63:  # beyond floats, or beyond printing
        value, shown = None, f"(a number of {value.bit_length()} bits)"
    elif leaf.type is float and type(value) is int:
        value = shown = float(value)
    if leaf.options:
        good = any(value == o and value.__class__ is o.__class__ for o in leaf.options)
    elif isinstance(value, str):
        good = leaf.type is str and not re.search("[\0\ud800-\udfff]", value)
    else:
        good = type(value) is leaf.type and math.isfinite(typing.cast(float, value))
        good = good and (not leaf.range or value in leaf.range)
    if not good:
        raise UserError(f"{where}{leaf.name}={shown}: wanted {leaf.wanted}")
    return value


def find(cls: type, name: str, where: str) -> Leaf:
    """Returns a config class's setting of this name. Raises UserError if it has none."""
    table = leaves(cls)
    if name not in table and name in REMOVED:
        raise UserError(f"{where}{name}: was removed: {REMOVED[name]}")
    if name not in table:
        raise unknown_key(name, list(table), where)
    return table[name]


def unknown_key(key: str, names: Sequence[str], where: str, what: str = "setting") -> UserError:
    """Returns the error for a name that does not exist, with the nearest one that does."""
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    flag = "--" if where == "--" else ""
    listed = f"there are {', '.join(names)}" if len(names) < 12 else "--help lists them all"
    hint = f"did you mean {flag}{close[0]}?" if close else listed
    return UserError(f"{where}{key}: no such {what}; {hint}")


def check(config: Any) -> None:
    """Raises UserError for values that do not fit together, or that no type or bound describes."""
    flat = to_dict(config)
    if not re.fullmatch(r"auto|(cpu|mps)(:0)?|cuda(:\d+)?", flat.get("device", "auto")):
        raise UserError(f"--device={flat['device']}: wanted auto, cpu, cuda, cuda:N or mps")
    if flat.get("init_from") == "weights" and not flat["weights"]:
        raise UserError("--init_from=weights: which? name a folder with --weights=PATH")
    if flat.get("to") == "":
        raise UserError("--to: where to? name a new folder, as --to FOLDER")
    if flat.get("task") == "hellaswag" and not flat["input"]:
        raise UserError("--task=hellaswag: needs its file: --input=hellaswag_val.jsonl")
    if not isinstance(config, Config):
        return
    for name, default in (("checkpoint", "latest"), ("reset_optimizer", False)):
        if flat[name] != default and config.run.init_from != "resume":
            raise UserError(f"--{name}={flat[name]}: goes with --init_from=resume")
    check_model(vars(config.model), "--")
    o = config.optim
    if o.decay_lr and o.lr_schedule == "cosine" and o.min_lr > o.learning_rate:
        raise UserError(
            f"--min_lr={o.min_lr:g}: must not exceed learning_rate={o.learning_rate:g}; "
            "lower it or pass --decay_lr=False"
        )


def check_model(flat: Mapping[str, Any], where: str) -> ModelConfig:
    """Returns the model's settings. Raises UserError for those that no model can have."""
    m = from_dict(flat, where).model
    if m.n_embd % m.n_head:
        divisors = [h for h in range(1, m.n_embd + 1) if m.n_embd % h == 0]
        near = min(divisors, key=lambda h: abs(h - m.n_head))
        wrong = f"{where}n_head={m.n_head}: must divide n_embd={m.n_embd}"
        raise UserError(f"{wrong}; the nearest that does is {near}")
    return m


# --- flags and files -----------------------------------------------------------------------------


def split_flags(args: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Returns positional arguments, and flags (`--key=value`, `--key value`) as {name: text}."""
    positional: list[str] = []
    flags: dict[str, str] = {}
    rest = iter(args)
    for arg in rest:
        key, eq, value = arg[2:].partition("=")
        key = key.replace("-", "_")
        if not arg.startswith("--"):
            positional.append(arg)
            continue
        if not eq and (value := next(rest, "--")).startswith("--"):
            raise UserError(f"--{key}: no value given; write --{key}=VALUE")
        flags[key] = value  # the last one counts, as in nanoGPT
    return positional, flags


def _parse(leaf: Leaf, text: str) -> Any:
    """Returns a flag's text as the setting's type; a text that does not fit unchanged."""
    texts = {str(o): o for o in leaf.options}
    if leaf.options:
        return texts.get({"true": "True", "false": "False"}.get(text, text), text)
    with contextlib.suppress(ValueError):
        return leaf.type(text)
    return text


def apply_flags(config: C, flags: Mapping[str, str]) -> C:
    """Returns `change` of a config by the flags' texts."""
    cls = type(config)
    return change(config, {key: _parse(find(cls, key, "--"), t) for key, t in flags.items()}, "--")


def change(config: C, values: Mapping[str, Any], where: str) -> C:
    """Returns a config with other values, and with those that follow from them.

    Raises UserError for the first bad value, and for values that exclude each other.
    """
    values = dict(values)
    if isinstance(config, Config) and "batch_size" in values:
        values.setdefault("auto_batch_size", auto := values["batch_size"] == "auto")
        if auto:  # the number stays: with the accumulation it gives the global batch
            del values["batch_size"]
    values = {k: check_value(find(type(config), k, where), v, where) for k, v in values.items()}
    given = {name for name, value in values.items() if value}
    if {"dataset", "input"} <= given:
        both = " and ".join(f"{where}{name}={values[name]}" for name in ("dataset", "input"))
        raise UserError(f"{both}: each names the data; leave one out")
    if "shards" in leaves(type(config)) and given & {"dataset", "input"}:
        values = {"shards": CorpusConfig.shards, **values}  # those of the preset, or of the run
        if "dataset" in given:
            values = {"val_fraction": CorpusConfig.val_fraction, **values, "input": ""}
    if "weights" in given:  # those weights, whatever their size
        values = {"init_from": "weights", **values}
    if values.get("init_from") == "resume":
        for name in sorted(given & {"weights", "overwrite", "auto_batch_size"}):
            flag = {"auto_batch_size": "batch_size=auto"}.get(name, f"{name}={values[name]}")
            raise UserError(f"{where}{flag}: does not go with {where}init_from=resume")
    return replace(config, **values)


def load_toml(path: Path) -> Config:
    """Returns the config of a TOML file: flat keys, or keys in their sections, or both."""
    with reading(path, "not a TOML file"):
        return parse_toml(read_text(path, limit=1 << 20), path)


def parse_toml(text: str, path: Path) -> Config:
    """Returns the config in a TOML file's text. Settings that were removed are left out."""
    import tomllib  # with datetime, for runs that read such a file

    with reading(path, "not a TOML file"):
        try:
            tree = tomllib.loads(text)
        except tomllib.TOMLDecodeError as e:
            raise UserError(f"{path}: not a TOML file: {e}") from None
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inside = isinstance(value, dict) and any(f.name == key for f in dataclasses.fields(Config))
        prefix = "op." if key == "op" else ""
        flat |= {prefix + k: v for k, v in value.items()} if inside else {key: value}
    return from_dict(flat, f"{path}: ")


def load_python(path: Path) -> Config:
    """Returns the config of a file of assignments, as nanoGPT's config/*.py; nothing is executed.

    Settings that it does not have are as in nanoGPT.
    """
    values: dict[str, Any] = {"gelu": "erf", "lr_decay_iters": 600_000}
    for name, (value, line) in literals.assignments(path, leaves(Config)).items():
        where = f"{path}: line {line}: "
        leaf = find(Config, name, where)
        if leaf.type is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        values[name] = check_value(leaf, value, where)
    return replace(Config(), **values)


def from_dict(flat: Mapping[str, Any], where: str) -> Config:
    """Returns the config of `to_dict`'s result, without settings that were removed."""
    values = {
        name: check_value(find(Config, name, where), value, where)
        for name, value in flat.items()
        if name not in REMOVED and value not in REMOVED_VALUES.get(name, ())
    }
    return replace(Config(), **values)


def differences(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """Returns (name, value in a, value in b) of all settings that differ."""
    values = to_dict(b)
    return [(name, x, values[name]) for name, x in to_dict(a).items() if x != values[name]]


def to_toml(config: Config) -> str:
    """Returns the config as TOML, from which `parse_toml` makes the same config."""
    lines: list[str] = []
    section = ""
    for leaf in leaves(Config).values():
        if leaf.section != section:
            section = leaf.section
            lines += ["", f"[{section}]"]
        lines.append(f"{leaf.field} = {_toml_value(get(config, leaf))}")
    return "\n".join(lines[1:]) + "\n"


def _toml_value(value: Any) -> str:
    if not isinstance(value, str):
        return repr(value).lower()  # true, 3, 1e-05
    # JSON escapes as TOML does, but for DEL, which TOML does not allow in a text.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


_INDENT = 26


def listing(config: Any) -> str:
    """Returns each setting's flag, help text, and value in `config`, wrapped for the terminal."""
    width = max(min(shutil.get_terminal_size((100, 24)).columns, 100) - _INDENT, 20)
    lines, section = [], None
    for leaf in leaves(type(config)).values():
        if leaf.section != section:
            section = leaf.section
            lines += ["", f"{section} options:".lstrip()]
        options = ",".join(map(str, leaf.options))
        flag = f"  --{leaf.name} " + (f"{{{options}}}" if options else leaf.type.__name__.upper())
        value = get(config, leaf)
        default = repr(value) if isinstance(value, str) and not value.strip() else value
        text = textwrap.wrap(f"{leaf.about} (default:\0{default})", width)
        if len(flag) < _INDENT:
            flag = flag.ljust(_INDENT) + text.pop(0)
        lines += [flag, *(" " * _INDENT + line for line in text)]
    return "\n".join(lines).replace("\0", " ")
