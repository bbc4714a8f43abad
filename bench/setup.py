"""Which run is measured: a preset and flags; without a GPU, a small size."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import results
from fastgpt.config import settings
from fastgpt.config.presets import PRESETS
from fastgpt.config.schema import Config
from fastgpt.errors import UserError
from fastgpt.model.device import Machine, resolve_device

VOCAB_SIZES = {"laptop": 256, "desktop": 256, "shakespeare_char": 65}
GPT2_VOCAB = 50257

# Without a GPU presets are measured at this size, but for what flags say; laptop is made for CPUs.
SMALL = {
    "n_layer": "2",
    "n_head": "2",
    "n_embd": "64",
    "block_size": "64",
    "batch_size": "4",
}
SMALL_VOCAB = 512
FOR_CPUS = ("laptop",)


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m bench NAME`, whose help is the module's docstring as it stands."""
    return argparse.ArgumentParser(
        prog=f"python -m bench {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_out(parser: argparse.ArgumentParser) -> None:
    """--out, the folder of result files."""
    parser.add_argument(
        "--out",
        type=Path,
        default=results.FOLDER if torch.cuda.is_available() else None,
        help="folder for the JSON; default: bench/results where there is a GPU, else nowhere",
    )


def parse(
    parser: argparse.ArgumentParser, argv: list[str]
) -> tuple[argparse.Namespace, dict[str, str]]:
    """The benchmark's own arguments, and the flags of `fastgpt train` among them."""
    args, rest = parser.parse_known_args(argv)
    try:
        positional, flags = settings.split_flags(rest)
        if positional:
            raise UserError(f"{positional[0]}: not understood here")
        settings.apply_flags(Config(), flags)
    except UserError as e:
        parser.error(str(e))
    return args, flags


def configure(preset: str, flags: dict[str, str]) -> tuple[Config, int]:
    """The config to measure and its vocabulary's size. Raises UserError.

    One micro-batch a step unless the flags say otherwise; the learning rate is at its peak from the
    first step on, so that a few steps already show whether a variant learns.
    """
    if preset not in PRESETS:
        raise settings.unknown_key(preset, list(PRESETS), "", "preset")
    device = resolve_device(flags.get("device", "auto"))
    small = device.type == "cpu" and preset not in FOR_CPUS
    once = {"gradient_accumulation_steps": "1", "decay_lr": "False"}
    given = {**once, **(SMALL if small else {}), **flags}
    config = settings.apply_flags(PRESETS[preset](), given)
    settings.check(config)
    dtype = machine_of(config).dtype
    vocab_size = VOCAB_SIZES.get(preset, SMALL_VOCAB if small else GPT2_VOCAB)
    return settings.replace(config, device=str(device), dtype=dtype), vocab_size


def machine_of(config: Config) -> Machine:
    """The machine that the config asks for. Raises UserError if it is not here."""
    s = config.system
    return Machine.of(s.device, s.dtype, s.compile, s.peak_tflops)


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


def describe(config: Config, vocab_size: int) -> str:
    m, o = config.model, config.optim
    rows = o.rows
    return (
        f"{m.n_layer} layers, {m.n_head} heads, {m.n_embd} wide, vocabulary {vocab_size}, "
        f"{rows} x {m.block_size} tokens a step, dropout {m.dropout:g}, {config.system.dtype}"
    )


def say_small() -> None:
    if not torch.cuda.is_available():
        print(
            "no GPU here: small sizes on one CPU thread show that this runs, and nothing about "
            "speed; laptop, which is made for CPUs, is measured at its own size"
        )


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """A copy with settings of these flat names changed; names it does not know are left out."""
    known = settings.leaves(Config)
    return settings.replace(config, **{k: v for k, v in values.items() if k in known})


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
