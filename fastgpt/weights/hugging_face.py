"""Hugging Face's GPT-2 folders of config.json and model.safetensors, read and written.

Names, shapes and dtypes of all tensors are compared with config.json before any is loaded. In these
files the weights of linear layers are transposed (OpenAI's "Conv1D", in x out). There always are
biases, the vocabulary is not padded, and the output layer is the embedding. Files from before 2020
name tensors without "transformer." and hold attention masks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from fastgpt.config import settings
from fastgpt.errors import UserError, open_regular, read_text, reading
from fastgpt.model.gpt import ModelShape
from fastgpt.storage.atomic import explain_os_error, umask, write_text

# n_layer, n_head, n_embd of OpenAI's four; vocabulary 50,257, 1,024 positions.
SIZES = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
WEIGHTS = "model.safetensors"
_WTE, _HEAD = "transformer.wte.weight", "lm_head.weight"
_GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu": "erf"}
_TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
_MASK = re.compile(r"\.attn\.(bias|masked_bias)$")
_FLOATS: dict[Any, str] = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

Kind = tuple[str, tuple[int, ...]]  # a tensor's dtype, as safetensors names it, and shape


@dataclass
class Weights:
    """Whole and checked model in fastgpt's tensors, in fp32 and with a padded vocabulary."""

    shape: ModelShape
    tensors: dict[str, Tensor]
    folder: Path
    source: str


def shape_of_size(name: str) -> ModelShape:
    """Returns the shape of OpenAI's gpt2, gpt2-medium, gpt2-large or gpt2-xl."""
    return ModelShape(*SIZES[name], block_size=1024, vocab_size=50257, bias=True, gelu="tanh")


# --- checks of all files of weights ---------------------------------------------------------------


def expected(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Returns fastgpt's parameter names with their shapes, without padding of the vocabulary."""
    C = shape.n_embd
    out: dict[str, tuple[int, ...]] = {_WTE: (shape.vocab_size, C)}
    out["transformer.wpe.weight"] = shape.block_size, C
    linears = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C)}
    linears |= {"mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    for i in range(shape.n_layer):
        block = f"transformer.h.{i}."
        for name, size in {"ln_1": (C,), "ln_2": (C,), **linears}.items():
            out |= {f"{block}{name}.weight": size, f"{block}{name}.bias": size[:1]}
    out |= {"transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}
    return {name: size for name, size in out.items() if shape.bias or not name.endswith(".bias")}


def kinds(tensors: Mapping[str, Any]) -> dict[str, Kind]:
    """Returns dtypes and shapes. An object that is no tensor has the shape ()."""
    pairs = {k: (getattr(t, "dtype", None), getattr(t, "shape", ())) for k, t in tensors.items()}
    return {k: (_FLOATS.get(dtype, str(dtype)), tuple(size)) for k, (dtype, size) in pairs.items()}


def check(
    path: Path, found: Mapping[str, Kind], wanted: Mapping[str, tuple[int, ...]], n_layer: int
) -> None:
    """Raises UserError for a tensor that is missing, unknown, or of another shape or dtype.

    The output layer may be stored, too. Then `tie` compares it with the embedding.
    """
    if _HEAD in found:
        wanted = {**wanted, _HEAD: wanted[_WTE]}
    for name, want in wanted.items():
        if name not in found:
            raise UserError(f"{path}: {name} is missing, wanted shape {want}")
        dtype, shape = found[name]
        if shape != want:
            raise UserError(f"{path}: {name} has shape {shape}, wanted {want}")
        if dtype not in _FLOATS.values():
            floats = ", ".join(_FLOATS.values())
            raise UserError(f"{path}: {name} {want} is of dtype {dtype}, wanted {floats}")
    if unknown := found.keys() - wanted.keys():
        name = f"{min(unknown)} {found[min(unknown)][1]}"
        raise UserError(f"{path}: {name} is no part of a GPT-2 of {n_layer} layers")


def pad_vocabulary(weight: Tensor, shape: ModelShape) -> Tensor:
    """Pads (vocab_size, C) to (padded_vocab_size, C) with rows of zeros."""
    return F.pad(weight, (0, 0, 0, shape.padded_vocab_size - weight.shape[0]))


def tie(path: Path, tensors: dict[str, Tensor], shape: ModelShape) -> None:
    """Removes the output layer, which must equal the embedding, and pads the embedding."""
    wte, head = tensors[_WTE], tensors.pop(_HEAD, None)
    if head is not None and not torch.equal(head, wte):
        raise UserError(
            f"{path}: {_HEAD} {tuple(head.shape)} is not the embedding {tuple(wte.shape)}: "
            "only models with tied embeddings can be read"
        )
    tensors[_WTE] = pad_vocabulary(wte, shape)


# --- reading --------------------------------------------------------------------------------------


def read(path: Path, size: str | None = None) -> Weights:
    """Reads a folder, or a safetensors file with or without a config.json beside it.

    `size` names one of SIZES, which the model must have and a file without config.json needs.
    Raises UserError, for a bad tensor with its name and both shapes.
    """
    if not path.exists():
        raise UserError(f"--weights={path}: there is no such file or folder")
    folder = path if path.is_dir() else path.parent
    if (folder / "config.json").is_file():
        said, had_bias = read_config(folder / "config.json")
    elif size is not None:
        said, had_bias = shape_of_size(size), True
    else:
        raise UserError(
            f"{folder}: has no config.json, so the model's size is unknown; add the file, or name "
            f"the size with --init_from={'|'.join(SIZES)}"
        )
    shape = said if size is None else shape_of_size(size)
    for key, want in vars(shape).items():
        if (got := getattr(said, key)) != want:
            raise UserError(f"{folder}: config.json says {key} {got}, {size} has {want}")
    files = _files(path)
    parts: dict[str, Any] = {}
    for file in files:
        with reading(file, "is damaged, or no safetensors file", SafetensorError):
            open_regular(file).close()
            stored = safe_open(file, "pt")
            names = [key for key in stored.keys() if not _MASK.search(key)]  # noqa: SIM118
            parts |= {name: stored.get_slice(name) for name in names}
    own = ("transformer.", "lm_head.")
    parts = {k if k.startswith(own) else f"transformer.{k}": part for k, part in parts.items()}
    sizes = expected(shape).items()
    sizes_there = {name: size[::-1] if _TRANSPOSED.search(name) else size for name, size in sizes}
    found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    check(files[0], found, sizes_there, shape.n_layer)
    tensors = {name: _turned(name, part[:].float()) for name, part in parts.items()}
    tie(path, tensors, shape)
    if not had_bias and not any(t.any() for n, t in tensors.items() if n.endswith(".bias")):
        shape = replace(shape, bias=False)
        tensors = {name: tensors[name] for name in expected(shape)}
    return Weights(shape, tensors, folder, str(path))


def _turned(name: str, tensor: Tensor) -> Tensor:
    """Returns the transpose of a linear layer's weight, for reading and for writing."""
    return (tensor.t() if _TRANSPOSED.search(name) else tensor).contiguous()


def read_config(path: Path) -> tuple[ModelShape, bool]:
    """Returns (shape, True unless fastgpt's model had no biases) of a config.json.

    The shape always has biases, as the tensors have. Raises UserError for other models.
    """
    with reading(path, "is not JSON"):
        config = json.loads(read_text(path, limit=1 << 20))
    kind = config.get("model_type", "gpt2") if isinstance(config, dict) else "no object"
    if kind != "gpt2":
        raise UserError(f"{path}: model_type is {kind}, only gpt2 can be read")

    sizes = {key: config.get(key) for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
    sizes["block_size"] = config.get("n_positions", config.get("n_ctx"))
    settings.check_model(sizes, f"{path}: ")
    activation = str(config.get("activation_function", "gelu_new"))
    if activation not in _GELU:
        known = ", ".join(_GELU)
        raise UserError(f"{path}: activation_function is {activation}, can be {known}")
    only: dict[str, Any] = {"layer_norm_epsilon": 1e-5, "scale_attn_weights": True}
    only |= {"add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False}
    if config.get("n_inner") is not None:
        only["n_inner"] = 4 * sizes["n_embd"]
    for key, want in only.items():
        if config.get(key, want) != want:
            raise UserError(f"{path}: {key} is {config[key]}, only {want} can be read")
    shape = ModelShape(**sizes, bias=True, gelu=_GELU[activation])
    return shape, config.get("fastgpt_bias", True) is not False


def _files(path: Path) -> list[Path]:
    """Returns a model's safetensors file, or the parts that an index lists."""
    if path.is_file() or (path / WEIGHTS).is_file():
        return [path if path.is_file() else path / WEIGHTS]
    index = path / f"{WEIGHTS}.index.json"
    if not index.is_file():
        other = " (only a pickle, which is not opened)" if [*path.glob("*.bin")] else ""
        raise UserError(f"{path}: has no {WEIGHTS}{other}")
    with reading(index, "is damaged"):
        files = [path / name for name in set(json.loads(read_text(index))["weight_map"].values())]
    for file in files:
        if file.parent != path or not file.is_file():
            raise UserError(f"{file}: missing, though {index.name} lists it")
    return sorted(files)


# --- writing --------------------------------------------------------------------------------------


def write(
    folder: Path, shape: ModelShape, tensors: Mapping[str, Tensor], eot: int | None = None
) -> None:
    """Writes config.json, generation_config.json and model.safetensors into `folder`.

    `tensors` are fastgpt's. Biases that the model does not have are written as zeros. `eot` is both
    begin and end of text.
    """
    sizes = expected(replace(shape, bias=True))
    missing = sizes.keys() - expected(shape).keys()
    whole = {name: torch.zeros(sizes[name]) for name in missing} | dict(tensors)
    if _WTE in whole:
        whole[_WTE] = whole[_WTE][: shape.vocab_size]
    check(folder, kinds(whole), sizes, shape.n_layer)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        ready = {name: _turned(name, tensor) for name, tensor in whole.items()}
        save_file(ready, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod(0o666 & ~umask())
    except SafetensorError as e:
        raise explain_os_error(e, folder / WEIGHTS) from e
    generation = {"bos_token_id": eot, "eos_token_id": eot}
    config = {key: getattr(shape, key) for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
    config |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_inner": None}
    config |= {"n_positions": shape.block_size, "n_ctx": shape.block_size}
    config |= {"activation_function": "gelu_new" if shape.gelu == "tanh" else "gelu"}
    config |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    config |= {"layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "torch_dtype": "float32"}
    config |= {"tie_word_embeddings": True, "fastgpt_bias": shape.bias, **generation}
    generation |= {"_from_model_config": True}
    for name, values in {"generation_config": generation, "config": config}.items():
        write_text(folder / f"{name}.json", json.dumps(values, indent=2) + "\n")
