"""nanoGPT's ckpt.pt, read without trust and made into a run that can be resumed.

A .pt file is a zip of a pickle, which is a program, and of the tensors' bytes. Before any of it is
run, the zip must be a plain one, and the pickle may name only parts of tensors. Then PyTorch's
restricted unpickler (weights_only) reads it.

As in fastgpt, iter_num is the number of updates done, and batch_size times
gradient_accumulation_steps is the batch of all GPUs.
"""

from __future__ import annotations

import contextlib
import pickle
import pickletools
import shlex
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.config import settings
from fastgpt.config.schema import Config, ImportConfig
from fastgpt.data.token_files import has_tokens, open_dataset
from fastgpt.data.tokenizer import GPT2_VOCAB, Tokenizer, make_tokenizer
from fastgpt.errors import UserError, open_regular, reading
from fastgpt.model.gpt import ModelShape
from fastgpt.storage import checkpoint
from fastgpt.storage import run_dir as run
from fastgpt.weights.hugging_face import check, expected, kinds, pad_vocabulary, tie

_STORAGES = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in _STORAGES),
}
_CALLS_BY_STACK = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
_MAX_PICKLE = 64 << 20
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Settings of the machine or the account rather than of the run.
_NOT_TAKEN = {"device", "dtype", "compile", "backend", "init_from", "out_dir", "eval_only"}
_NOT_TAKEN |= {"wandb_log", "data_dir"}


def load(path: Path) -> Any:
    """Returns the contents of torch.save's file, tensors on the CPU.

    Raises UserError, and runs nothing, if the file is hostile.
    """
    others = (pickle.UnpicklingError, RuntimeError, zipfile.BadZipFile)
    with reading(path, "is damaged or refused, nothing in it was run", *others):
        if why := _refusal(path):
            raise UserError(f"{path}: is refused, nothing in it was run: {why}")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _refusal(path: Path) -> str | None:
    """Returns why the file is no plain zip whose pickle names only parts of tensors, or None."""
    with open_regular(path) as f:
        if f.read(4) != b"PK\x03\x04":
            return "not in torch.save's zip format; load and save it again with PyTorch >= 1.6"
    with zipfile.ZipFile(path) as archive:
        entries = {e.filename: e for e in archive.infolist()}
        pickles = [n for n in entries if n.endswith(".pkl")]
        root = pickles[0].rpartition("/")[0] if pickles else ""
        stored = all(e.compress_type == zipfile.ZIP_STORED for e in entries.values())
        once = len(entries) == len(archive.infolist()) and pickles == [f"{root}/data.pkl"]
        if not (stored and once and entries[pickles[0]].file_size <= _MAX_PICKLE):
            return "its zip is not torch.save's: one data.pkl, and nothing twice or compressed"
        program = archive.read(pickles[0])
    for opcode, argument, _ in pickletools.genops(program):
        asks = opcode.name == "GLOBAL" and argument not in _GLOBALS
        if asks or opcode.name in _CALLS_BY_STACK:
            what = str(argument or opcode.name).replace(" ", ".")[:80]
            return f"its pickle asks for {what}, which is no part of a tensor"
    return None


def read(
    path: Path, gelu: str
) -> tuple[ModelShape, dict[str, Tensor], dict[str, Tensor], Config, int, float]:
    """Returns (shape, tensors, optimizer's state, config, step, best loss) of a checkpoint."""
    data = load(path)
    with reading(path, "is damaged, or no checkpoint of nanoGPT's train.py", RuntimeError):
        shape, tensors = model_of(path, data, gelu)
        optimizer = optimizer_of(path, data, shape, tensors)
        step, best = data.get("iter_num", 0), float(data.get("best_val_loss", "inf"))
        if type(step) is not int or not 0 <= step < 1 << 53:
            raise UserError(f"{path}: iter_num is {step!r}, wanted a whole number >= 0")
        return shape, tensors, optimizer, config_of(path, data, shape), step, best


def model_of(
    path: Path, data: Mapping[str, Any], gelu: str
) -> tuple[ModelShape, dict[str, Tensor]]:
    """Returns (shape, tensors in fp32 with the vocabulary padded, in nanoGPT's order)."""
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    sizes: dict[str, Any] = {name: data["model_args"].get(name) for name in names}
    settings.check_model(sizes, f"{path}: model_args: ")
    stored = {str(k).removeprefix("_orig_mod."): v for k, v in data["model"].items()}
    # Versions without flash attention keep causal masks as buffers.
    masks = [k for k, (_, size) in kinds(stored).items() if k.endswith(".bias") and len(size) == 4]
    stored = {k: v for k, v in stored.items() if k not in masks}
    shape = ModelShape(**sizes, bias="transformer.ln_f.bias" in stored, gelu=gelu)
    check(path, kinds(stored), expected(shape), shape.n_layer)
    tensors = {name: t.float() for name, t in stored.items()}
    tie(path, tensors, shape)
    return shape, tensors


def optimizer_of(
    path: Path, data: Mapping[str, Any], shape: ModelShape, order: Iterable[str]
) -> dict[str, Tensor]:
    """Returns AdamW's state under fastgpt's names, or {} if the checkpoint has none.

    `order` lists the parameters as the model does. AdamW numbers them by groups. Matrices and
    embeddings, which decay, are the first.
    """
    saved = data.get("optimizer")
    if not saved or not saved["state"]:
        return {}
    sizes, state = expected(shape), saved["state"]
    names = sorted(order, key=lambda name: len(sizes[name]) < 2)
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    if len(numbers) != len(names) or set(state) != set(numbers):
        found = f"{len(numbers)} parameters and state for {len(state)}"
        raise UserError(f"{path}: its optimizer has {found}, the model has {len(names)}")
    out: dict[str, Tensor] = {}
    for number, name in zip(numbers, names, strict=True):
        entry = state[number]
        out[f"step.{name}"] = torch.tensor(float(entry["step"]))
        wanted = {f"optimizer's {key} of {name}": sizes[name] for key in _MOMENTS}
        moments = {f"optimizer's {key} of {name}": entry[key] for key in _MOMENTS if key in entry}
        check(path, kinds(moments), wanted, shape.n_layer)
        for key in _MOMENTS:
            moment = entry[key].float()
            embedding = name == "transformer.wte.weight"
            out[f"{key}.{name}"] = pad_vocabulary(moment, shape) if embedding else moment
    return out


def config_of(path: Path, data: Mapping[str, Any], shape: ModelShape) -> Config:
    """Returns the run's settings that fastgpt has, and defaults for the rest."""
    table, saved = settings.leaves(Config), data.get("config") or {}
    given = {k: v for k, v in saved.items() if k in table and k not in _NOT_TAKEN} | vars(shape)
    values = {k: settings.check_value(table[k], v, f"{path}: ") for k, v in given.items()}
    return settings.replace(Config(), **values)


def find_tokenizer(config: Config, vocab_size: int) -> Tokenizer | None:
    """Returns the data folder's tokenizer, or GPT-2's if the vocabulary has its size."""
    for folder in (Path(config.data.dataset), Path(config.data.data_dir) / config.data.dataset):
        if has_tokens(folder) and (tokenizer := open_dataset(folder).tokenizer) is not None:
            return tokenizer
    with contextlib.suppress(UserError):  # the run is whole without it
        if GPT2_VOCAB <= vocab_size <= GPT2_VOCAB + 128:
            return make_tokenizer("gpt2", cache=Path(config.data.data_dir) / ".cache")
    return None


def import_checkpoint(source: str, options: ImportConfig) -> int:
    """Makes a run of CKPT.pt for `fastgpt import`. Returns the exit code."""
    path = Path(source)
    shape, tensors, optimizer, config, step, best = read(path, options.gelu)
    dataset = options.dataset or config.data.dataset
    config = settings.replace(config, dataset=dataset, data_dir=options.data_dir)
    tokenizer = find_tokenizer(config, shape.vocab_size)
    state = {"format": checkpoint.FORMAT, "model": vars(shape), "config": settings.to_dict(config)}
    state |= {"last_eval": -1, "val_loss": best, "best_val_loss": best, "scaler": {}}
    # nanoGPT does not name its data, so the run may go on with any.
    state |= {"data": None, "tokenizer": tokenizer.fingerprint if tokenizer else None}
    state |= {"imported_from": path.name}
    with run.begin(options.out_dir, path.stem, options.overwrite) as run_dir:
        run.save_config(run_dir, config)
        if tokenizer is not None:
            tokenizer.save(run_dir)
        keep = config.log.keep_checkpoints
        saved = checkpoint.save(run_dir, step, tensors, optimizer, state, best=True, keep=keep)
    moments, place = "with" if optimizer else "without", shlex.quote(str(run_dir))
    print(f"{path}: {shape}, step {step}, val loss {best:.4f}, {moments} optimizer state")
    print(f"imported to {saved}")
    if tokenizer is None:
        print("no tokenizer found: sample needs one; name the data's folder with --dataset")
    else:
        print(f"sample:   fastgpt sample --out_dir={place}")
    print(f"continue: fastgpt train --init_from=resume --out_dir={place}")
    return 0
