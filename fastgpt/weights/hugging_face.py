"""Hugging Face's GPT-2 folders, read and written: config.json and model.safetensors.

Nothing of a folder is used before all of it fits: each tensor's name, shape and dtype against what
config.json says a GPT-2 has. Its linear layers are stored the other way round (OpenAI's "Conv1D",
in x out), it always has biases, its vocabulary is not padded, and the output layer is the
embedding. Files from before 2020 name tensors without "transformer." and hold attention masks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from fastgpt.errors import UserError
from fastgpt.model.gpt import ModelShape
from fastgpt.storage.files import explain_os_error, write_text

# n_layer, n_head, n_embd of OpenAI's four; vocabulary 50,257, 1,024 positions.
SIZES = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
WEIGHTS = "model.safetensors"
_GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu": "erf"}
_TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
_MASK = re.compile(r"\.attn\.(bias|masked_bias)$")
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def shape_of_size(name: str) -> ModelShape:
    """OpenAI's gpt2, gpt2-medium, gpt2-large or gpt2-xl."""
    return ModelShape(*SIZES[name], block_size=1024, vocab_size=50257, bias=True, gelu="tanh")


def expected(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Our parameter names with their shapes, the vocabulary not padded, biases throughout."""
    C = shape.n_embd
    out: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (shape.vocab_size, C),
        "transformer.wpe.weight": (shape.block_size, C),
    }
    linears = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C)}
    linears |= {"mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    for i in range(shape.n_layer):
        block = f"transformer.h.{i}."
        for norm in ("ln_1", "ln_2"):
            out |= {f"{block}{norm}.weight": (C,), f"{block}{norm}.bias": (C,)}
        for name, size in linears.items():
            out |= {f"{block}{name}.weight": size, f"{block}{name}.bias": (size[0],)}
    return out | {"transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}


def pad_vocabulary(weight: Tensor, shape: ModelShape) -> Tensor:
    """(vocab_size, C) -> (padded_vocab_size, C), the new rows zero."""
    return F.pad(weight, (0, 0, 0, shape.padded_vocab_size - weight.shape[0]))


def fits(shape: ModelShape, wanted: ModelShape, where: str) -> None:
    """Raise UserError naming the first tensor in which two models differ, or their GELUs."""
    ours, theirs = expected(wanted), expected(shape)
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            got, want = (str(s.get(name, "missing")) for s in (theirs, ours))
            raise UserError(f"{where}: {name} has shape {got}, wanted {want}")
    for key in ("n_head", "gelu"):
        if getattr(shape, key) != getattr(wanted, key):
            got, want = getattr(shape, key), getattr(wanted, key)
            raise UserError(f"{where}: config.json says {key} {got}, wanted {want}")


@dataclass
class Weights:
    """A whole, checked model: our tensors in fp32, the vocabulary padded."""

    shape: ModelShape
    tensors: dict[str, Tensor]
    folder: Path
    source: str


# --- reading -------------------------------------------------------------------------------------


def read(path: Path, size: str | None = None) -> Weights:
    """The model in a folder, or in a safetensors file with or without a config.json beside it.

    `size` names one of SIZES that it must have; a file without config.json needs it. Raises
    UserError, one line that names the file, and of a bad tensor name and both shapes.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"--weights={path}: there is no such file or folder")
    folder = path if path.is_dir() else path.parent
    config = folder / "config.json"
    if config.is_file():
        shape, had_bias = read_config(config)
        if size is not None:
            fits(shape, shape_of_size(size), str(folder))
    elif size is not None:
        shape, had_bias = shape_of_size(size), True
    else:
        raise UserError(
            f"{folder}: has no config.json, so the model's size is unknown; add the file, or name "
            f"the size with --init_from={'|'.join(SIZES)}"
        )
    files = _files(path)
    stored = _locate(files, shape)
    tensors = {name: _load(stored[name], name) for name in expected(shape)}
    _check_head(stored, tensors["transformer.wte.weight"])
    biases = [name for name in tensors if name.endswith(".bias")]
    if not had_bias and not any(tensors[name].any() for name in biases):
        shape = ModelShape(**{**vars(shape), "bias": False})
        tensors = {name: t for name, t in tensors.items() if name not in biases}
    wte = tensors["transformer.wte.weight"]
    tensors["transformer.wte.weight"] = pad_vocabulary(wte, shape)
    return Weights(shape, tensors, folder, str(path))


def read_config(path: Path) -> tuple[ModelShape, bool]:
    """(shape, whether fastgpt's model had biases) of a config.json; UserError if it is not ours.

    The shape always has biases, as the tensors have.
    """
    try:
        config = json.loads(path.read_text())
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from e
    except ValueError as e:
        raise UserError(f"{path}: is not JSON: {e}") from e
    if not isinstance(config, dict) or config.get("model_type", "gpt2") != "gpt2":
        kind = config.get("model_type") if isinstance(config, dict) else "no object"
        raise UserError(f"{path}: model_type is {kind}, only gpt2 can be read")

    def whole(*keys: str) -> int:
        value = next((config[k] for k in keys if config.get(k) is not None), None)
        if type(value) is not int or value < 1:
            raise UserError(f"{path}: {keys[0]} is {value}, wanted a whole number >= 1")
        return value

    n_layer, n_head, n_embd = whole("n_layer"), whole("n_head"), whole("n_embd")
    if n_embd % n_head:
        raise UserError(f"{path}: n_head {n_head} does not divide n_embd {n_embd}")
    activation = config.get("activation_function", "gelu_new")
    if activation not in _GELU:
        known = ", ".join(_GELU)
        raise UserError(f"{path}: activation_function is {activation}, can be {known}")
    must = {
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "n_inner": (None, 4 * n_embd),
    }
    for key, want in must.items():
        allowed = want if isinstance(want, tuple) else (want,)
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path}: {key} is {config[key]}, only {allowed[-1]} can be read")
    shape = ModelShape(
        n_layer,
        n_head,
        n_embd,
        block_size=whole("n_positions", "n_ctx"),
        vocab_size=whole("vocab_size"),
        bias=True,
        gelu=_GELU[activation],
    )
    return shape, config.get("fastgpt_bias", True) is not False


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies, and what its file's header says of it."""

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    index = path / f"{WEIGHTS}.index.json"
    if not index.is_file():
        other = " (only a pickle, which is not opened)" if [*path.glob("*.bin")] else ""
        raise UserError(f"{path}: has no {WEIGHTS}{other}")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise UserError(f"{index}: is damaged ({e})") from e
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            raise UserError(f"{path / name}: missing, though {index.name} lists it")
    return [path / name for name in names]


def _headers(path: Path) -> dict[str, _Stored]:
    """What a safetensors file holds; UserError if it is cut off, naming the tensor."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 0 < length <= min(size - 8, 100 << 20):
                raise UserError(f"{path}: truncated, or no safetensors file ({size} bytes)")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        for key, entry in header.items():
            end = 8 + length + entry["data_offsets"][1]
            if end > size:
                raise UserError(
                    f"{path}: truncated: {key} {tuple(entry['shape'])} ends at byte {end:,}, the "
                    f"file has {size:,}"
                )
        with safe_open(path, "pt"):  # and all else that the format demands
            pass
        return {k: _Stored(path, k, e["dtype"], tuple(e["shape"])) for k, e in header.items()}
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from e
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as e:
        raise UserError(f"{path}: is damaged, or no safetensors file ({e})") from e


def _locate(files: list[Path], shape: ModelShape) -> dict[str, _Stored]:
    """Every tensor by our name; UserError for one missing, unknown, or of another shape or kind."""
    stored: dict[str, _Stored] = {}
    for path in files:
        for key, entry in _headers(path).items():
            if not _MASK.search(key):
                ours = key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}"
                stored[ours] = entry
    wanted = expected(shape)
    for name, want in wanted.items():
        on_disk = want[::-1] if _TRANSPOSED.search(name) else want
        if name not in stored:
            raise UserError(f"{files[0]}: {name} is missing, wanted shape {on_disk}")
        entry = stored[name]
        if entry.shape != on_disk:
            raise UserError(f"{entry.path}: {name} has shape {entry.shape}, wanted {on_disk}")
        if entry.dtype not in _FLOATS:
            raise UserError(
                f"{entry.path}: {name} {on_disk} is of dtype {entry.dtype}, wanted "
                f"{', '.join(_FLOATS)}"
            )
    unknown = stored.keys() - wanted.keys() - {"lm_head.weight"}
    if unknown:
        name = min(unknown)
        raise UserError(
            f"{stored[name].path}: {name} {stored[name].shape} is no part of a GPT-2 of "
            f"{shape.n_layer} layers"
        )
    return stored


def _load(entry: _Stored, name: str) -> Tensor:
    with safe_open(entry.path, "pt") as f:
        tensor = f.get_tensor(entry.key).float()
    return tensor.t().contiguous() if _TRANSPOSED.search(name) else tensor


def _check_head(stored: Mapping[str, _Stored], wte: Tensor) -> None:
    """The output layer may be stored besides the embedding, but has to be the same."""
    head = stored.get("lm_head.weight")
    if head is not None and (
        head.shape != tuple(wte.shape) or not torch.equal(_load(head, "lm_head"), wte)
    ):
        raise UserError(
            f"{head.path}: lm_head.weight {head.shape} is not the embedding {tuple(wte.shape)}: "
            "only models with tied embeddings can be read"
        )


# --- writing -------------------------------------------------------------------------------------


def to_hugging_face(shape: ModelShape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under GPT2LMHeadModel's names and layouts; missing biases become zeros."""
    out = {}
    for name, size in expected(shape).items():
        t = tensors.get(name)
        if t is None and name.endswith(".bias") and not shape.bias:
            t = torch.zeros(size)
        if t is None:
            raise UserError(f"{name} is missing, wanted shape {size}")
        if name == "transformer.wte.weight":
            t = t[: shape.vocab_size]
        if tuple(t.shape) != size:
            raise UserError(f"{name} has shape {tuple(t.shape)}, wanted {size}")
        out[name] = (t.t() if _TRANSPOSED.search(name) else t).contiguous()
    return out


def config_json(shape: ModelShape, eot: int | None) -> dict[str, Any]:
    """GPT2Config's values for a shape; `eot` is both begin and end of text."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
        "n_embd": shape.n_embd,
        "n_inner": None,
        "n_positions": shape.block_size,
        "n_ctx": shape.block_size,
        "vocab_size": shape.vocab_size,
        "activation_function": "gelu_new" if shape.gelu == "tanh" else "gelu",
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": eot,
        "eos_token_id": eot,
        "fastgpt_bias": shape.bias,
    }


def write(
    folder: Path, shape: ModelShape, tensors: Mapping[str, Tensor], eot: int | None = None
) -> None:
    """Write config.json, generation_config.json and model.safetensors into `folder`."""
    ready = to_hugging_face(shape, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    generation = {"bos_token_id": eot, "eos_token_id": eot, "_from_model_config": True}
    try:
        save_file(ready, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod(0o644)
    except SafetensorError as e:
        raise explain_os_error(e, folder / WEIGHTS) from e
    write_text(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    write_text(folder / "config.json", json.dumps(config_json(shape, eot), indent=2) + "\n")
