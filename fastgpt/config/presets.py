"""Named runs. `fastgpt train NAME` starts from one of these; flags change what they set."""

from __future__ import annotations

from collections.abc import Callable

from fastgpt.config.schema import Config


def laptop() -> Config:
    """0.8M parameters, 12 x 64 tokens a step: nanoGPT's CPU size, a few minutes on two cores."""
    c = shakespeare_char()
    c.data.dataset = "python_stdlib"
    c.model.n_layer, c.model.n_head, c.model.n_embd = 4, 4, 128
    c.model.block_size, c.model.dropout = 64, 0.0
    c.optim.batch_size = 12
    c.run.max_iters = c.optim.lr_decay_iters = 2000
    c.log.eval_iters = 20
    c.log.always_save_checkpoint = True
    return c


def desktop() -> Config:
    """10.7M parameters, 64 x 256 tokens a step, on the same text: minutes on one GPU."""
    c = shakespeare_char()
    c.data.dataset = "python_stdlib"
    c.log.always_save_checkpoint = True
    return c


def shakespeare_char() -> Config:
    """nanoGPT's character-level Shakespeare: 10.7M parameters, 64 x 256 tokens a step."""
    c = Config()
    c.model.gelu = "erf"  # as nanoGPT's, for the same curve; the GPT-2 sizes have GPT-2's tanh
    c.data.dataset = "shakespeare_char"
    c.model.n_layer, c.model.n_head, c.model.n_embd = 6, 6, 384
    c.model.block_size, c.model.dropout = 256, 0.2
    c.optim.batch_size, c.optim.gradient_accumulation_steps = 64, 1
    c.optim.learning_rate, c.optim.min_lr = 1e-3, 1e-4
    c.optim.beta2, c.optim.warmup_iters = 0.99, 100
    c.run.max_iters = c.optim.lr_decay_iters = 5000
    c.log.eval_interval, c.log.eval_iters, c.log.log_interval = 250, 200, 10
    c.log.always_save_checkpoint = False
    return c


def _gpt2(n_layer: int, n_head: int, n_embd: int, batch_size: int) -> Config:
    """GPT-2's shapes with nanoGPT's recipe: 480 sequences of 1,024 tokens a step."""
    c = Config()
    c.model.n_layer, c.model.n_head, c.model.n_embd = n_layer, n_head, n_embd
    c.optim.batch_size = batch_size
    c.optim.gradient_accumulation_steps = 480 // batch_size
    c.log.eval_interval, c.log.log_interval = 1000, 10
    return c


def gpt2() -> Config:
    """124M parameters: 12 layers, 12 heads, 768 wide, 480 x 1,024 tokens a step."""
    return _gpt2(12, 12, 768, batch_size=32)


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
    c = Config()
    c.run.init_from = "gpt2-xl"
    c.data.dataset = "shakespeare"
    c.optim.batch_size, c.optim.gradient_accumulation_steps = 1, 32
    c.optim.learning_rate, c.optim.decay_lr = 3e-5, False
    c.run.max_iters = 20
    c.log.eval_interval, c.log.eval_iters = 5, 40
    c.log.always_save_checkpoint = False
    return c


PRESETS: dict[str, Callable[[], Config]] = {
    f.__name__: f
    for f in (
        laptop,
        desktop,
        shakespeare_char,
        gpt2,
        gpt2_medium,
        gpt2_large,
        gpt2_xl,
        finetune_shakespeare,
    )  # fmt: skip
}


def default_name() -> str:
    """The preset that fits this machine: `desktop` on a GPU with 4 GB or more, else `laptop`."""
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory >= 4e9:
        return "desktop"
    return "laptop"
