"""Python interface: `fastgpt.fit`, `fastgpt.load`, `fastgpt.generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastgpt.config import presets, settings
from fastgpt.config.schema import Config, SourceConfig
from fastgpt.data.tokenizer import Tokenizer
from fastgpt.errors import UserError
from fastgpt.inference.generate import BatchGenerator, Sampling
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT
from fastgpt.train.main import train
from fastgpt.weights.source import open_source


def fit(config: Config | str | None = None, /, **changes: Any) -> Path:
    """Trains a model as `fastgpt train` does. Returns the folder of its run.

    config   name of a preset, path of a TOML file or of a Python file like nanoGPT's, or a Config;
             None: the preset that fits this machine
    changes  settings by the names of their flags, as values: `max_iters=500, compile=False`

    Logs to stdout. An interrupt ends the step, saves, and returns as well. Raises UserError for
    settings that the command line would refuse.
    """
    name = "python"
    if config is None:
        config = presets.default_name()
    if isinstance(config, str):
        config, name = presets.load(config)
    config = settings.change(config, changes, "")
    settings.check(config)
    return train(config, name)[1]


def load(
    folder: str | Path = "",
    *,
    checkpoint: str = "best",
    device: str = "auto",
    dtype: str = "auto",
) -> tuple[GPT, Tokenizer | None]:
    """Returns a trained model, and its tokenizer if that is known.

    folder      a run's folder (empty: the newest under runs/), a Hugging Face GPT-2 folder, or
                gpt2, gpt2-medium, ..., which are downloaded once
    checkpoint  of a run: best, latest, or a folder's name under checkpoints/

    `model(ids)` of int64 ids (B, T) gives logits (B, T, V). Raises UserError for a folder that
    cannot be read.
    """
    path, name = Path(folder), str(folder)
    if name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl") and not path.exists():
        source = settings.replace(SourceConfig(), init_from=name)
    elif name and ((path / "config.json").is_file() or path.suffix == ".safetensors"):
        source = SourceConfig(init_from="weights", weights=name)
    else:
        source = SourceConfig(out_dir=name, checkpoint=checkpoint)
    found = open_source(source)
    found.check_finite()
    return found.model(Machine.of(device, dtype)), found.tokenizer


def generate(
    model: GPT,
    tokenizer: Tokenizer | None,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 200,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 1337,
    stop: bool = False,
) -> str:
    """Returns the text that follows `prompt`, without it. The same seed gives the same text.

    The settings are those of `fastgpt sample`; `stop` ends the text at the end-of-text token.
    Raises UserError without a tokenizer, and for a prompt that has no tokens.
    """
    if tokenizer is None:
        raise UserError("this model's tokenizer is not known; generate ids with model(ids)")
    ids = tokenizer.encode(prompt).tolist()
    if not ids:
        raise UserError("the prompt is empty; give some text to go on from")
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    batch = BatchGenerator(model, 1, len(ids) + max_new_tokens, sampling)
    made = batch.stream([ids], max_new_tokens, [seed], tokenizer.eot if stop else None)
    # A model may know more ids than its tokenizer, as nanoGPT's 50,304 for 50,257.
    return tokenizer.decode([i for (i,) in made if i is not None and i < tokenizer.vocab_size])
