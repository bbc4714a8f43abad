"""Presets: `fastgpt train NAME` starts from one of these lists of flags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastgpt.config.schema import Config
from fastgpt.config.settings import apply_flags, load_python, load_toml, split_flags, unknown_key
from fastgpt.errors import UserError


@dataclass(frozen=True)
class Preset:
    """Flags of a run under a name, with a line about it. Calling it makes its config."""

    name: str
    about: str
    flags: str

    def __call__(self) -> Config:
        return apply_flags(Config(), split_flags(self.flags.split())[1])


shakespeare_char = Preset(  # the exact GELU is nanoGPT's, for the same curve
    "shakespeare_char",
    "nanoGPT's character-level Shakespeare: 10.7M parameters, 64 x 256 tokens per step",
    """--dataset=shakespeare_char --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --dropout=0.2
    --gelu=erf --batch_size=64 --gradient_accumulation_steps=1 --learning_rate=1e-3 --min_lr=1e-4
    --beta2=0.99 --warmup_iters=100 --max_iters=5000 --eval_interval=250 --log_interval=10
    --always_save_checkpoint=False""",
)
desktop = Preset(
    "desktop",
    "10.7M parameters, 64 x 256 tokens per step: minutes on one GPU",
    shakespeare_char.flags + " --dataset=python_stdlib --always_save_checkpoint=True",
)
laptop = Preset(
    "laptop",
    "0.8M parameters, 12 x 64 tokens per step: minutes on two cores",
    f"""{desktop.flags} --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --dropout=0
    --batch_size=12 --max_iters=2000 --eval_iters=20""",
)


def _gpt2(name: str, about: str, shape: str, batch_size: int) -> Preset:
    """Returns a size of GPT-2 with nanoGPT's recipe: 480 sequences of 1,024 tokens per step."""
    accumulate = f"--gradient_accumulation_steps={480 // batch_size}"
    recipe = f"--batch_size={batch_size} {accumulate} --eval_interval=1000 --log_interval=10"
    return Preset(name, about, f"{shape} {recipe}")


gpt2 = _gpt2(
    "gpt2",
    "124M parameters, 295B tokens: six days on an H200 at 576,000 tokens/s",
    "--n_layer=12 --n_head=12 --n_embd=768",
    32,
)
gpt2_medium = _gpt2("gpt2_medium", "350M parameters", "--n_layer=24 --n_head=16 --n_embd=1024", 16)
gpt2_large = _gpt2("gpt2_large", "774M parameters", "--n_layer=36 --n_head=20 --n_embd=1280", 8)
gpt2_xl = _gpt2("gpt2_xl", "1,558M parameters", "--n_layer=48 --n_head=25 --n_embd=1600", 4)
# Data and target are llm.c's and modded-nanogpt's, and so are 10.5M tokens of validation.
# docs/time_to_loss.md gives the recipe's sources. It has not run to the end on a GPU.
gpt2_speedrun = Preset(
    "gpt2_speedrun",
    "124M parameters by Muon to a validation loss of 3.28 on FineWeb: at most 3.93B tokens, which "
    "take an H200 1.9 hours at 576,000 tokens/s",
    f"""{gpt2.flags} --dataset=fineweb10B --shards=41 --sampling=epochs --target_val_loss=3.28
    --optimizer=muon --learning_rate=2e-3 --warmup_iters=250 --lr_schedule=wsd --max_iters=8000
    --eval_interval=125 --eval_iters=320 --always_save_checkpoint=False""",
)
finetune_shakespeare = Preset(
    "finetune_shakespeare",
    "nanoGPT's finetuning of GPT-2 XL on Shakespeare: 32 x 1,024 tokens per step, 20 steps",
    """--init_from=gpt2-xl --dataset=shakespeare --max_iters=20 --batch_size=1 --decay_lr=False
    --gradient_accumulation_steps=32 --learning_rate=3e-5 --eval_interval=5 --eval_iters=40
    --always_save_checkpoint=False""",
)

_ALL = (laptop, desktop, shakespeare_char, gpt2, gpt2_medium, gpt2_large, gpt2_xl)
PRESETS = {preset.name: preset for preset in (*_ALL, gpt2_speedrun, finetune_shakespeare)}


def load(source: str) -> tuple[Config, str]:
    """Returns config and name of a preset, a TOML file, or a Python file like nanoGPT's."""
    path = Path(source)
    if source in PRESETS:
        return PRESETS[source](), source
    if path.suffix == ".toml":
        return load_toml(path), path.parent.name if path.stem == "config" else path.stem
    if path.suffix == ".py":
        name = path.stem.removeprefix("train_")
        try:
            return load_python(path), name
        except UserError as e:
            if isinstance(e.__cause__, FileNotFoundError) and name in PRESETS:
                raise UserError(f"{e}; the preset {name} is built in") from e
            raise
    if path.exists():
        raise UserError(f"{source}: no such preset; train on this text with --input={source}")
    raise unknown_key(source, list(PRESETS), "", what="preset")


def default_name() -> str:
    """Returns the preset for this machine: `desktop` on a GPU with 4 GB or more, else `laptop`."""
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory >= 4e9:
        return "desktop"
    return "laptop"
