"""Named runs. `fastgpt train NAME` starts from one of these; flags change what they set."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from fastgpt.config.schema import Config
from fastgpt.config.settings import replace


def laptop() -> Config:
    """0.8M parameters, 12 x 64 tokens a step: nanoGPT's CPU size, a few minutes on two cores."""
    c = replace(desktop(), n_layer=4, n_head=4, n_embd=128, block_size=64, dropout=0.0)
    return replace(c, batch_size=12, max_iters=2000, lr_decay_iters=2000, eval_iters=20)


def desktop() -> Config:
    """10.7M parameters, 64 x 256 tokens a step, on the same text: minutes on one GPU."""
    return replace(shakespeare_char(), dataset="python_stdlib", always_save_checkpoint=True)


def shakespeare_char() -> Config:
    """nanoGPT's character-level Shakespeare: 10.7M parameters, 64 x 256 tokens a step."""
    c = replace(Config(), dataset="shakespeare_char", max_iters=5000, lr_decay_iters=5000)
    c = replace(c, n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2)
    c = replace(c, gelu="erf")  # nanoGPT's, for the same curve; the GPT-2 sizes have GPT-2's tanh
    c = replace(c, batch_size=64, gradient_accumulation_steps=1)
    c = replace(c, learning_rate=1e-3, min_lr=1e-4, beta2=0.99, warmup_iters=100)
    c = replace(c, eval_interval=250, eval_iters=200, log_interval=10)
    return replace(c, always_save_checkpoint=False)


def _gpt2(n_layer: int, n_head: int, n_embd: int, batch_size: int) -> Config:
    """GPT-2's shapes with nanoGPT's recipe: 480 sequences of 1,024 tokens a step."""
    c = replace(Config(), n_layer=n_layer, n_head=n_head, n_embd=n_embd, batch_size=batch_size)
    c = replace(c, gradient_accumulation_steps=480 // batch_size)
    return replace(c, eval_interval=1000, log_interval=10)


def gpt2() -> Config:
    """124M parameters: 12 layers, 12 heads, 768 wide, 480 x 1,024 tokens a step."""
    return _gpt2(12, 12, 768, batch_size=32)


def gpt2_speedrun() -> Config:
    """124M parameters by Muon to a validation loss of 3.28 on FineWeb, in 4B tokens at most.

    Target and data are llm.c's and modded-nanogpt's; docs/time_to_loss.md says what the recipe is
    from. It has not run to the end on a GPU.
    """
    c = replace(gpt2(), dataset="fineweb10B", shards=41, sampling="epochs", target_val_loss=3.28)
    c = replace(c, optimizer="muon", learning_rate=2e-3, warmup_iters=250)
    c = replace(c, lr_schedule="wsd", max_iters=8000, lr_decay_iters=8000)
    # 10.5M tokens of validation, as those runs look at.
    return replace(c, eval_interval=125, eval_iters=320, always_save_checkpoint=False)


def gpt2_medium() -> Config:
    """350M parameters: 24 layers, 16 heads, 1,024 wide."""
    return _gpt2(24, 16, 1024, batch_size=16)


def gpt2_large() -> Config:
    """774M parameters: 36 layers, 20 heads, 1,280 wide."""
    return _gpt2(36, 20, 1280, batch_size=8)


def gpt2_xl() -> Config:
    """1,558M parameters: 48 layers, 25 heads, 1,600 wide."""
    return _gpt2(48, 25, 1600, batch_size=4)


def finetune_shakespeare() -> Config:
    """nanoGPT's finetuning: GPT-2 XL on Shakespeare, 32 x 1,024 tokens a step, 20 steps."""
    c = replace(Config(), init_from="gpt2-xl", dataset="shakespeare", max_iters=20)
    c = replace(c, batch_size=1, gradient_accumulation_steps=32, learning_rate=3e-5, decay_lr=False)
    return replace(c, eval_interval=5, eval_iters=40, always_save_checkpoint=False)


_GPT2 = (gpt2, gpt2_medium, gpt2_large, gpt2_xl)
_ALL = (laptop, desktop, shakespeare_char, *_GPT2, gpt2_speedrun, finetune_shakespeare)
PRESETS: dict[str, Callable[[], Config]] = {f.__name__: f for f in _ALL}


def default_name() -> str:
    """The preset that fits this machine: `desktop` on a GPU with 4 GB or more, else `laptop`."""
    if not _driver():
        return "laptop"
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory >= 4e9:
        return "desktop"
    return "laptop"


def _driver() -> bool:
    """Whether a GPU's driver is installed; without one, PyTorch need not be loaded and asked."""
    try:
        ctypes.CDLL("libcuda.so.1")
        return True
    except OSError:
        return any(Path(p).exists() for p in ("/dev/nvidiactl", "/dev/kfd"))
