"""`fastgpt sample`: text from a trained run."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch

from fastgpt import checkpoint, ops, run
from fastgpt.config import SampleConfig
from fastgpt.data.tokenizers import Tokenizer, decode_stream, load_tokenizer
from fastgpt.device import autocast, resolve_compile, resolve_device, resolve_dtype
from fastgpt.errors import UserError
from fastgpt.generate import generate
from fastgpt.model import GPT, ModelShape


def load_model(
    run_dir: Path, which: str, device: torch.device
) -> tuple[GPT, checkpoint.Checkpoint]:
    """The model of a run's checkpoint, ready to generate."""
    saved = checkpoint.load(run_dir, which, warn=lambda line: print(line, file=sys.stderr))
    model = GPT(ModelShape(**saved.state["model"]), table=ops.choose(device))
    model.load_state_dict(saved.model)
    return model.to(device).eval(), saved


def prompt_ids(tokenizer: Tokenizer, start: str) -> list[int]:
    """Token ids of --start: the text itself, or FILE:path. Raises UserError if there are none."""
    if start.startswith("FILE:"):
        path = Path(start.removeprefix("FILE:"))
        try:
            start = path.read_text(encoding="utf-8")
        except OSError as e:
            raise UserError(f"--start=FILE:{path}: cannot be read: {e.strerror}") from e
        except UnicodeDecodeError as e:
            raise UserError(f"--start=FILE:{path}: is not UTF-8 text") from e
    eot = tokenizer.eot
    if start == "<|endoftext|>" and eot is not None:
        return [eot]
    ids = [int(i) for i in tokenizer.encode(start)]
    if not ids:
        raise UserError("--start: is empty; give some text to go on from")
    return ids


def sample(config: SampleConfig) -> int:
    """Print config.num_samples texts, each as it is made. Returns the exit code."""
    run_dir = run.find(config.out_dir)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    if not (run_dir / "tokenizer.json").exists():
        raise UserError(f"{run_dir}: has no tokenizer.json; its data had none, so there is no text")
    tokenizer = load_tokenizer(run_dir)
    prompt = prompt_ids(tokenizer, config.start)
    model, saved = load_model(run_dir, config.checkpoint, device)
    if resolve_compile(config.compile, device):
        model.compile()
    val_loss = saved.state["val_loss"]
    print(f"{saved.folder}: step {saved.state['step']}, val loss {val_loss:.4f}", file=sys.stderr)
    stop_token = tokenizer.eot if config.stop else None
    for k in range(config.num_samples):
        with autocast(device, dtype):
            ids = generate(
                model,
                prompt,
                config.max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                seed=config.seed + k,
                stop_token=stop_token,
            )
            for text in decode_stream(tokenizer, itertools.chain(prompt, ids)):
                print(text, end="", flush=True)
        print()
        print("---------------")
    return 0
