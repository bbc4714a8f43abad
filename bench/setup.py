"""Configs of measured runs, and the arguments that the commands share."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import results
from fastgpt.config import settings
from fastgpt.config.presets import PRESETS
from fastgpt.config.schema import Config
from fastgpt.errors import UserError
from fastgpt.model.device import Machine, resolve_device
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.train import metrics

# Vocabulary sizes by data set; all others have GPT-2's tokens.
VOCABULARIES = {"python_stdlib": 256, "shakespeare_char": 65}
# On a CPU all presets but laptop have this size, unless flags say otherwise.
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64, "batch_size": 4}


class Parser(argparse.ArgumentParser):
    """Parser of `python -m bench NAME`; `doc` is its help, --out the folder of results."""

    def __init__(self, name: str, doc: str | None):
        form, prog = argparse.RawDescriptionHelpFormatter, f"python -m bench {name}"
        super().__init__(prog=prog, description=doc, formatter_class=form)
        kept = torch.cuda.is_available() and (results.ROOT / ".git").exists()
        out = results.FOLDER if kept else Path("out/bench")
        self.add_argument("--out", type=Path, default=out, help="folder of the results")

    def parse(self, argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
        """Returns the benchmark's arguments, and the flags of `fastgpt train`. Raises UserError."""
        args, rest = self.parse_known_args(argv)
        positional, flags = settings.split_flags(rest)
        if positional:
            raise UserError(f"{positional[0]}: unexpected argument")
        settings.apply_flags(Config(), flags)
        if not torch.cuda.is_available():
            torch.set_num_threads(1)  # on shared cores waiting threads cost more than they give
            print("no GPU: small sizes on one thread, which say nothing about speed")
        return args, flags

    def add_sustained(self) -> None:
        """Adds --sustained[=SECONDS]; 0 without it."""
        about = "load the device before timing until its clock has settled, for SECONDS at most"
        most = 20.0 if torch.cuda.is_available() else 0.5
        self.add_argument("--sustained", type=float, nargs="?", const=most, default=0.0, help=about)


def at_least(least: int) -> Callable[[str], int]:
    """Returns a type for argparse: whole numbers from `least` on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"wanted a number of at least {least}, got {text}")
        return int(text)

    return parse


def configure(preset: str, flags: dict[str, str], whole: bool = False) -> tuple[Config, int]:
    """Returns the config of measured steps and the size of its vocabulary. Raises UserError.

    A step has one micro-batch unless `whole` or a flag says otherwise.
    """
    if preset not in PRESETS:
        raise settings.unknown_key(preset, list(PRESETS), "", "preset")
    small = resolve_device(flags.get("device", "auto")).type == "cpu" and preset != "laptop"
    once = {} if whole and not small else {"gradient_accumulation_steps": 1}
    wanted = {"decay_lr": False, **once, **(SMALL if small else {})}
    values = {key: str(value) for key, value in wanted.items()} | flags
    config = settings.apply_flags(PRESETS[preset](), values)
    settings.check(config)
    config = with_values(config, machine(config).settings)
    return config, VOCABULARIES.get(config.data.dataset, 512 if small else 50257)


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """Returns a copy with other settings by flat name, without unknown names."""
    known = settings.leaves(Config)
    return settings.replace(config, **{k: v for k, v in values.items() if k in known})


def describe(config: Config, vocab_size: int) -> str:
    """Returns the sizes of a run in words."""
    m, dtype = config.model, config.system.dtype
    tokens = f"{config.optim.rows} x {m.block_size} tokens per step"
    sizes = f"{m.n_layer} layers, {m.n_head} heads, {m.n_embd} wide, vocabulary {vocab_size}"
    return f"{sizes}, {tokens}, dropout {m.dropout:g}, {dtype}"


def machine(config: Config) -> Machine:
    """Returns the machine of these settings; its peak is measured at most once."""
    s = config.system
    return _machine(s.device, s.dtype, s.compile, s.peak_tflops)


_machine = functools.cache(Machine.of)


def flops_per_token(config: Config, vocab_size: int) -> dict[str, float]:
    """Returns the three counts of a model on the meta device."""
    with torch.device("meta"):
        return metrics.flops_per_token(GPT(ModelShape.of(config.model, vocab_size)))
