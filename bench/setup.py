"""Which run is measured: a preset and flags; without a GPU, at a small size.

All that bench asks of fastgpt to set up a run is here: settings, device, precision, peak, model.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import results
from fastgpt.config import settings
from fastgpt.config.presets import PRESETS
from fastgpt.config.schema import Config
from fastgpt.errors import UserError
from fastgpt.model.device import Machine, resolve_device
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.train import metrics
from fastgpt_kernels import launch

# The sizes of vocabularies by data set; all others are made of GPT-2's tokens.
VOCABULARIES = {"python_stdlib": 256, "shakespeare_char": 65}
GPT2_VOCAB = 50257
# Without a GPU presets are measured at this size, unless flags say otherwise; laptop is for CPUs.
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64, "batch_size": 4}
SMALL_VOCAB = 512
FOR_CPUS = ("laptop",)


class Parser(argparse.ArgumentParser):
    """The parser of `python -m bench NAME`: `doc` is its help, --out the folder of results."""

    def __init__(self, name: str, doc: str | None, out: bool = True):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=f"python -m bench {name}", description=doc, formatter_class=form)
        if out:
            self.add_argument(
                "--out",
                type=Path,
                default=results.FOLDER if torch.cuda.is_available() else None,
                help="folder for the JSON; default: bench/results with a GPU, else nowhere",
            )

    def parse(self, argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
        """The benchmark's own arguments, and the flags of `fastgpt train` among them."""
        args, rest = self.parse_known_args(argv)
        with self.user_errors():
            positional, flags = settings.split_flags(rest)
            if positional:
                raise UserError(f"{positional[0]}: not understood here")
            settings.apply_flags(Config(), flags)
        return args, flags

    @contextlib.contextmanager
    def user_errors(self) -> Iterator[None]:
        """A UserError inside ends the program with its line, as a bad argument does."""
        try:
            yield
        except UserError as e:
            self.error(str(e))


def at_least(least: int) -> Callable[[str], int]:
    """An argument's type for argparse: whole numbers from `least` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"wanted a whole number, got {text}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return parse


def say_small() -> None:
    """Say that there is no GPU, if so."""
    if not torch.cuda.is_available():
        print(
            "no GPU here: small sizes on one CPU thread show that this runs, and nothing about "
            "speed; laptop, which is made for CPUs, is measured at its own size"
        )


@contextlib.contextmanager
def one_thread(device: str | torch.device) -> Iterator[None]:
    """On a CPU: ops of one thread. On shared cores waiting for others costs more than they give."""
    before = torch.get_num_threads()
    if torch.device(device).type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- settings ------------------------------------------------------------------------------------


def preset_of(name: str, flags: dict[str, Any]) -> Config:
    """A preset with flags, checked; device, precision and compiling as they are here."""
    if name not in PRESETS:
        raise settings.unknown_key(name, list(PRESETS), "", "preset")
    flags = {key: str(value) for key, value in flags.items()}
    config = settings.apply_flags(PRESETS[name](), flags)
    settings.check(config)
    return with_values(config, machine(config).settings)


def configure(preset: str, flags: dict[str, str]) -> tuple[Config, int]:
    """The config of measured steps and its vocabulary's size. Raises UserError.

    One micro-batch a step unless the flags say otherwise; the learning rate is at its peak from the
    first step on, so that a few steps already show whether a variant learns.
    """
    small = device_of(flags).type == "cpu" and preset not in FOR_CPUS
    once = {"gradient_accumulation_steps": 1, "decay_lr": False}
    config = preset_of(preset, {**once, **(SMALL if small else {}), **flags})
    return config, vocabulary(config, small)


def device_of(flags: dict[str, str]) -> torch.device:
    """The device of a run with these flags. Raises UserError if it is not here."""
    return resolve_device(flags.get("device", "auto"))


def vocabulary(config: Config, small: bool = False) -> int:
    """The size of the vocabulary that the config's data set has."""
    return VOCABULARIES.get(config.data.dataset, SMALL_VOCAB if small else GPT2_VOCAB)


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """A copy with settings of these flat names changed; names it does not know are left out."""
    known = settings.leaves(Config)
    return settings.replace(config, **{k: v for k, v in values.items() if k in known})


def describe(config: Config, vocab_size: int) -> str:
    m = config.model
    return (
        f"{m.n_layer} layers, {m.n_head} heads, {m.n_embd} wide, vocabulary {vocab_size}, "
        f"{config.optim.rows} x {m.block_size} tokens a step, dropout {m.dropout:g}, "
        f"{config.system.dtype}"
    )


# --- the model and what it runs on ---------------------------------------------------------------


def machine(config: Config) -> Machine:
    """What a run of these settings computes on; its peak is measured at most once."""
    s = config.system
    return _machine(s.device, s.dtype, s.compile, s.peak_tflops)


_machine = functools.cache(Machine.of)


def arch(device: torch.device) -> str:
    """The GPU's architecture, "sm_90" or so; empty for a CPU."""
    return launch.arch(device.index or 0) if device.type == "cuda" else ""


def first_weights(config: Config, vocab_size: int) -> dict[str, Tensor]:
    """What training starts from, on the CPU."""
    model = GPT(ModelShape.of(config.model, vocab_size))
    return model.init_weights(config.run.seed).state_dict()


def flops_per_token(config: Config, vocab_size: int) -> metrics.FlopsPerToken:
    """By the three counts, of a model without memory: nothing is drawn or stored."""
    with torch.device("meta"):
        return metrics.flops_per_token(GPT(ModelShape.of(config.model, vocab_size)))
