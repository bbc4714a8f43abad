"""Commands that finetune weights of other programs, and that export and read a model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from fastgpt.config.settings import load_toml
from fastgpt.data.tokenizer import ByteTokenizer
from fastgpt.inference.generate import BatchGenerator, Sampling
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.storage import atomic
from fastgpt.storage.checkpoint import load
from fastgpt.weights import hf_tokenizer, hugging_face
from fastgpt.weights.hugging_face import read
from tests import runs
from tests.models import model_with
from tests.process import fastgpt

os.environ["HF_HUB_OFFLINE"] = "1"
SHAPE = ModelShape(1, 2, 16, 32, 256, True, "tanh")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Makes a text, and a small model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("home")
    runs.write_text(folder)
    hugging_face.write(folder / "weights", SHAPE, GPT(SHAPE).init_weights(3).state_dict())
    shutil.copytree(folder / "weights", folder / "mute")
    hf_tokenizer.write(folder / "weights", ByteTokenizer())
    (folder / "bare").mkdir()
    shutil.copy(folder / "weights" / "model.safetensors", folder / "bare")
    return folder


DATA = ("--input=text.txt", "--tokenizer=byte", "--device=cpu", "--peak_tflops=1")
FEW = ("--max_iters=2", "--eval_iters=1", "--gradient_accumulation_steps=2", "--sample_tokens=0")


def test_finetuning_begins_with_the_given_weights_and_resumes(home: Path):
    """Trains at a learning rate of nearly 0, which leaves the weights as they are."""
    finetune = ("finetune_shakespeare", "--weights=weights", "--block_size=20", *DATA, *FEW)
    still = ("--learning_rate=1e-12", "--weight_decay=0")
    said = fastgpt(home, "train", *finetune, *still, "--out_dir=tuned")
    shape = "1 layers, 2 heads, 16 wide, 20 positions, vocabulary 256, with"
    assert f"weights from weights: {shape}" in said and "warning" not in said
    saved, given = load(home / "tuned"), read(home / "weights")
    assert saved.state["model"] == {**vars(SHAPE), "block_size": 20}
    for name, tensor in given.tensors.items():
        want = tensor[:20] if name == "transformer.wpe.weight" else tensor
        torch.testing.assert_close(saved.model[name], want, rtol=0, atol=1e-10)
    said = fastgpt(home, "train", "--init_from=resume", "--out_dir=tuned", "--max_iters=3")
    assert "resuming from tuned/checkpoints/step_00000002" in said
    assert load(home / "tuned").state["step"] == 3
    config = load_toml(home / "tuned" / "config.toml")
    assert (config.run.init_from, config.run.weights) == ("weights", "weights")
    fastgpt(home, "train", "tuned/config.toml", "--out_dir=again", "--max_iters=1")
    assert load(home / "again").state["model"]["block_size"] == 20


def test_a_run_goes_out_and_comes_back(home: Path):
    """Trains, exports, loads, samples and evaluates the folder, and exports it again."""
    transformers = pytest.importorskip("transformers")
    fastgpt(home, "train", *runs.TINY, *DATA, "--out_dir=out", "--bias=True", "--gelu=erf")
    said = fastgpt(home, "export", "--out_dir=out", "--to", "folder", "--checkpoint=latest")
    assert "exported to folder" in said and "vocab.json, merges.txt" in said
    saved = load(home / "out")
    model = model_with(ModelShape(**saved.state["model"]), saved.model)
    reference = transformers.GPT2LMHeadModel.from_pretrained(home / "folder").eval()
    ids = torch.arange(32).view(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), reference(ids).logits, rtol=1e-5, atol=1e-5)
    # The likeliest continuation is the same, character by character.
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "folder")
    assert tokenizer.model_max_length == 16
    pipeline = transformers.pipeline("text-generation", model=reference, tokenizer=tokenizer)
    greedy = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    (got,) = pipeline("a cat", **greedy)
    byte = ByteTokenizer()
    prompt = byte.encode("a cat").tolist()
    batch = BatchGenerator(model, 1, len(prompt) + 8, Sampling(temperature=0))
    assert got["generated_text"] == byte.decode(i for (i,) in batch.stream([prompt], 8, [0]))
    fastgpt(home, "export", "--weights=folder", "--to=folder2")
    first, second = ((home / f / "model.safetensors").read_bytes() for f in ("folder", "folder2"))
    assert first == second
    args = ("--num_samples=1", "--max_new_tokens=20", "--start=a cat", "--device=cpu")
    a = fastgpt(home, "sample", "--out_dir=out", "--checkpoint=latest", *args)
    b = fastgpt(home, "sample", "--weights=folder", *args)
    for part in (reference, tokenizer):
        part.save_pretrained(home / "saved")
    c = fastgpt(home, "sample", "--weights=saved", *args)
    assert a.split("\n")[1] == b.split("\n")[1] == c.split("\n")[1]
    evals = ("--limit=300", "--device=cpu")
    a = fastgpt(home, "eval", "--out_dir=out", "--checkpoint=latest", *evals)
    dataset = next((home / "data").glob("text-byte-*"))
    b = fastgpt(home, "eval", "--weights=folder", f"--dataset={dataset}", *evals)
    losses = [json.loads(said.splitlines()[-1])["loss"] for said in (a, b)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["export", "--weights=weights"], "--to: where to? name a new folder, as --to FOLDER"),
        (["export", "--weights=weights", "--to=weights"], "--to=weights: is not empty"),
        (["export", "--weights=weights", "--to=text.txt"], "--to=text.txt: is not empty"),
        (["export", "--out_dir=none", "--to=x"], "--out_dir=none: no run there"),
        (["sample", "--out_dir=bare"], "weights of another program are read with --weights=bare"),
        (["sample", "--weights=bare"], "bare: has no config.json, so the model's size is unknown"),
        (["sample", "--weights=mute"], "mute: has no tokenizer that can be read, so there is no"),
        (
            ["train", "laptop", "--weights=weights", *DATA],
            "--block_size=64: weights has 32 positions; pass --block_size=32 or less",
        ),
        (
            ["train", "laptop", "--weights=weights", "--block_size=32", "--n_embd=96", *DATA],
            "--n_embd=96: weights has 16; leave the flag out",
        ),
        (
            ["train", "laptop", "--init_from=gpt2-xl", "--weights=weights", *DATA],
            "weights: config.json says n_layer 1, gpt2-xl has 48",
        ),
        (["train", "laptop", "--vocab_size=100", *DATA], "--vocab_size=100: the data in data/"),
        (["import"], "import: one checkpoint is wanted, 0 given"),
    ],
)
def test_bad_requests(command, message, home: Path):
    out = ["--out_dir=nothing"] if command[0] == "train" else []
    said = fastgpt(home, *command, *out, code=2)
    assert message in said.splitlines()[-1] and "Traceback" not in said
    assert not (home / "nothing").exists() and not (home / "x").exists()


def test_a_folder_that_is_being_exported_to_is_left_alone(home: Path):
    (home / ".tmp-busy").mkdir()
    with atomic.lock(home / ".tmp-busy", "busy"):
        said = fastgpt(home, "export", "--weights=weights", "--to=busy", code=2)
    assert "--to=busy: another process is exporting to it" in said


@pytest.mark.slow
def test_a_tokenizer_that_changed_is_named(home: Path):
    """Takes another tokenizer than the weights', then flips a byte of a run's own."""
    data = ("--weights=weights", "--block_size=20", *DATA, "--tokenizer=char")
    said = fastgpt(home, "train", "laptop", *data, *FEW, "--out_dir=flip")
    assert "warning: these weights know the ids of byte, the data in data/text-char-" in said
    path = home / "flip" / "tokenizer.json"
    path.write_text(path.read_text().replace("acd", "adc"))
    for command in (["sample"], ["eval"], ["export", "--to=x"]):
        said = fastgpt(home, *command, "--out_dir=flip", code=2)
        assert "is not the tokenizer that the checkpoint was trained with" in said.splitlines()[-1]
    fastgpt(home, "train", "--init_from=resume", "--out_dir=flip", "--max_iters=3")
    fastgpt(home, "sample", "--out_dir=flip", "--num_samples=1", "--max_new_tokens=2")
