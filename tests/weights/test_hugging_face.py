"""Hugging Face's GPT-2 folders in and out, compared with transformers itself; bad folders."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt.errors import UserError
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.weights import hugging_face
from fastgpt.weights.hugging_face import expected, read, write
from tests.models import model_with, random_model

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="needs transformers (extra [test])")

# n_layer, n_head, n_embd, block_size, vocab_size, bias, gelu
SHAPES = [
    ModelShape(1, 1, 8, 4, 11, True, "tanh"),
    ModelShape(2, 3, 24, 16, 128, True, "erf"),
    ModelShape(3, 4, 32, 9, 130, False, "tanh"),
    ModelShape(2, 2, 64, 33, 257, False, "erf"),
]


def assert_same_logits(model: GPT, reference) -> None:
    """Compares at every T up to block_size, to 1e-5 of the largest logit."""
    for T in range(1, model.shape.block_size + 1):
        ids = torch.randint(
            model.shape.vocab_size, (2, T), generator=torch.Generator().manual_seed(T)
        )
        with torch.no_grad():
            a, b = model(ids), reference(ids).logits
        error, largest = (a - b).abs().max().item(), b.abs().max().item()
        assert error <= 1e-5 * largest, f"T={T}: {error:.2e}, largest logit {largest:.2f}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_export_is_what_transformers_loads(shape: ModelShape, tmp_path: Path):
    model = random_model(shape, 0.2)
    write(tmp_path, shape, model.state_dict(), eot=3)
    reference, info = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert reference.config.vocab_size == shape.vocab_size, "the padding stays here"
    assert reference.generation_config.eos_token_id == reference.config.eos_token_id == 3
    assert_same_logits(model, reference.eval())
    back = read(tmp_path)
    assert back.shape == shape
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.tensors[name], tensor), name
    assert back.tensors.keys() == model.state_dict().keys()
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o644


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_what_transformers_saves_is_read(shape: ModelShape, tmp_path: Path):
    config = transformers.GPT2Config(
        n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd,
        n_positions=shape.block_size, vocab_size=shape.vocab_size,
        activation_function="gelu_new" if shape.gelu == "tanh" else "gelu",
    )  # fmt: skip
    reference = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in reference.parameters():
            p.normal_(0.0, 0.2)
    reference.save_pretrained(tmp_path / "whole")
    reference.save_pretrained(tmp_path / "parts", max_shard_size="2KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    for folder in ("parts", "whole"):
        weights = read(tmp_path / folder)
        assert weights.shape == shape
        assert_same_logits(model_with(shape, weights.tensors), reference)
    write(tmp_path / "again", shape, weights.tensors)
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("whole", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


SHAPE = ModelShape(2, 2, 16, 8, 40, True, "tanh")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, SHAPE, random_model(SHAPE).state_dict())
    return tmp_path


def change(folder: Path, tensors) -> None:
    path = folder / "model.safetensors"
    stored = load_file(path) | tensors
    save_file({k: v for k, v in stored.items() if v is not None}, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_openai_s_own_names_masks_and_half_precision(folder: Path, dtype):
    """Reads names without "transformer.", attention masks, and a stored output layer."""
    before = read(folder).tensors
    stored = {k: v.to(dtype) for k, v in load_file(folder / "model.safetensors").items()}
    hub = {k.removeprefix("transformer."): v for k, v in stored.items()}
    hub |= {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(2)}
    hub |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    hub["lm_head.weight"] = stored["transformer.wte.weight"].clone()
    save_file(hub, folder / "model.safetensors")
    for name, tensor in read(folder).tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name].to(dtype).float()), name


NAME = "transformer.h.1.mlp.c_fc.weight"
WTE = "transformer.wte.weight"
BIAS = "transformer.h.2.ln_1.bias"
TENSORS = [
    ({NAME: None}, f"{NAME} is missing, wanted shape (16, 64)"),
    ({NAME: torch.zeros(16, 63)}, f"{NAME} has shape (16, 63), wanted (16, 64)"),
    ({NAME: torch.zeros(64, 16)}, f"{NAME} has shape (64, 16), wanted (16, 64)"),
    ({NAME: torch.zeros(16, 64).int()}, f"{NAME} (16, 64) is of dtype I32, wanted F32, F16"),
    ({NAME: torch.zeros(16, 64).double()}, f"{NAME} (16, 64) is of dtype F64"),
    ({WTE: torch.zeros(41, 16)}, f"{WTE} has shape (41, 16), wanted (40, 16)"),
    ({BIAS: torch.zeros(16)}, f"{BIAS} (16,) is no part of a GPT-2 of 2 layers"),
    (
        {"lm_head.weight": torch.ones(40, 16)},
        "lm_head.weight (40, 16) is not the embedding (40, 16): only models with tied",
    ),
]
FILES = [0, 5, 200, -1, -3000, b"x" * 500, b"\x02\0\0\0\0\0\0\0[]"]
FILES += [b"\x08\0\0\0\0\0\0\0" + b'{"a": 1}' + b"0" * 99]
CONFIGS = [
    ({"n_embd": 32}, f"{WTE} has shape (40, 16), wanted (40, 32)"),
    ({"n_layer": 4096}, "model.safetensors: transformer.h.2.ln_1.weight is missing, wanted shape"),
    ({"n_layer": 4097}, "config.json: n_layer=4097: wanted a whole number >= 1 and <= 4,096"),
    ({"n_layer": 10**400}, "n_layer=(a number of 1329 bits): wanted a whole number"),
    ({"n_embd": 10**6, "n_head": 1}, "wte.weight has shape (40, 16), wanted (40, 1000000)"),
    ({"n_layer": 1}, "transformer.h.1.attn.c_attn.bias (48,) is no part of a GPT-2 of 1"),
    ({"n_positions": 9}, "transformer.wpe.weight has shape (8, 16), wanted (9, 16)"),
    ({"n_head": 3}, "config.json: n_head=3: must divide n_embd=16"),
    ({"n_head": None}, "n_head=None: wanted a whole number >= 1"),
    ({"model_type": "llama"}, "model_type is llama, only gpt2 can be read"),
    ({"activation_function": "relu"}, "activation_function is relu, can be gelu_new"),
    ({"activation_function": []}, "activation_function is [], can be gelu_new"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06, only 1e-05 can be read"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ({"n_inner": 63}, "n_inner is 63, only 64 can be read"),
]
DAMAGED = "model.safetensors: is damaged, or no safetensors file"
BROKEN = [("tensors", *case) for case in TENSORS] + [("config", *case) for case in CONFIGS]
BROKEN += [("file", data, DAMAGED) for data in FILES]


@pytest.mark.parametrize(("kind", "changes", "message"), BROKEN)
def test_folders_that_do_not_fit(folder: Path, kind: str, changes, message: str):
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "tensors":
        change(folder, changes)
    elif kind == "config":
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    else:
        whole = weights.read_bytes()
        weights.write_bytes(changes if isinstance(changes, bytes) else whole[:changes])
    with pytest.raises(UserError) as e:
        read(folder)
    assert message in str(e.value)


def test_a_size_that_was_named_is_demanded(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="config.json says n_layer 2, gpt2 has 12"):
        read(folder, "gpt2")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json.*--init_from=gpt2"):
        read(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"wte.weight has shape \(40, 16\), wanted \(50257, 1024\)"):
        read(folder / "model.safetensors", "gpt2-medium")


def test_files_that_are_missing(folder: Path):
    assert read(folder / "model.safetensors").shape == SHAPE, "with its config.json beside it"
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no model.safetensors \(only a pickle, which is not"):
        read(folder)
    with pytest.raises(UserError, match="--weights=nowhere: there is no such file or folder"):
        read(Path("nowhere"))
    index = {"weight_map": {"transformer.wte.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model-00001-of-00001.safetensors: missing, though"):
        read(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x"}}')
    with pytest.raises(UserError, match="missing, though"):
        read(folder)


def test_openai_s_sizes():
    """Counts all parameters, with the positions, as OpenAI does."""
    millions = {"gpt2": 124, "gpt2-medium": 355, "gpt2-large": 774, "gpt2-xl": 1558}
    for size, want in millions.items():
        shapes = expected(hugging_face.shape_of_size(size)).values()
        assert round(sum(torch.Size(s).numel() for s in shapes) / 1e6) == want


def test_a_hugging_face_model_trained_on_gets_its_biases_back(tmp_path: Path):
    """Tests that a bias that is no longer zero counts, though the model is marked as without."""
    shape = replace(SHAPE, bias=False)
    write(tmp_path, shape, random_model(shape).state_dict())
    assert not read(tmp_path).shape.bias
    change(tmp_path, {"transformer.h.0.ln_1.bias": torch.ones(16)})
    assert read(tmp_path).shape.bias
