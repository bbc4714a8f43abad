"""nanoGPT's checkpoints, whose runs go on as in nanoGPT, and hostile files."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastgpt.config.schema import OptimConfig
from fastgpt.data.loader import Batches
from fastgpt.data.token_files import open_dataset
from fastgpt.errors import UserError
from fastgpt.model.gpt import ModelShape
from fastgpt.train.optim import learning_rate
from fastgpt.weights.nanogpt import load, read
from tests import runs
from tests.fakes import Reduce
from tests.models import gpt2_logits
from tests.process import fastgpt

ARGS = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 65}
CONFIG = {
    "dataset": "letters", "batch_size": 3, "gradient_accumulation_steps": 2, "learning_rate": 3e-2,
    "min_lr": 1e-3, "warmup_iters": 3, "lr_decay_iters": 20, "max_iters": 9, "weight_decay": 0.1,
    "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0, "decay_lr": True, "eval_interval": 100,
    "eval_iters": 2, "log_interval": 1, "dropout": 0.0, "device": "cuda", "dtype": "float16",
    "compile": True, "wandb_log": True, "out_dir": "out-letters", "always_save_checkpoint": False,
    "init_from": "scratch", "backend": "nccl",
}  # fmt: skip


class Reference:
    """nanoGPT's training step: tensors under its names, in its order, AdamW over its two groups."""

    def __init__(self, bias: bool):
        self.shape = ModelShape(**ARGS, bias=bias, gelu="erf")
        block = {"ln_1": (16,), "attn.c_attn": (48, 16), "attn.c_proj": (16, 16)}
        block |= {"ln_2": (16,), "mlp.c_fc": (64, 16), "mlp.c_proj": (16, 64)}
        layers = {f"h.{i}.{name}": size for i in range(2) for name, size in block.items()}
        sizes: dict[str, tuple[int, ...]] = {"wte.weight": (65, 16), "wpe.weight": (12, 16)}
        for name, size in {**layers, "ln_f": (16,)}.items():
            sizes |= {f"{name}.weight": size} | ({f"{name}.bias": size[:1]} if bias else {})
        generator = torch.Generator().manual_seed(0)
        self.p = {
            f"transformer.{name}": torch.nn.Parameter(
                torch.randn(size, generator=generator) * (0.1 if len(size) > 1 else 0.3)
                + (1.0 if "ln" in name and name.endswith("weight") else 0.0)
            )
            for name, size in sizes.items()
        }
        matrices = [p for p in self.p.values() if p.ndim >= 2]
        vectors = [p for p in self.p.values() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": CONFIG["weight_decay"]}]
        groups += [{"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95))

    def step(self, step: int, tokens: torch.Tensor) -> float:
        """Updates on (rows, T + 1) tokens. Returns the loss before it."""
        config = OptimConfig(learning_rate=3e-2, min_lr=1e-3, warmup_iters=3, lr_decay_iters=20)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        logits = gpt2_logits(self.p, self.shape, tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.p.values()), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def checkpoint(self, step: int, compiled: bool = False) -> dict:
        """Returns what train.py saves, with a second output layer and the loss as a tensor."""
        model = torch.nn.Module().state_dict()  # an OrderedDict with metadata, as a module's is
        model.update({k: v.detach() for k, v in self.p.items()})
        model["lm_head.weight"] = model["transformer.wte.weight"]
        if compiled:
            model = {f"_orig_mod.{k}": v for k, v in model.items()}
        return {
            "model": model,
            "optimizer": self.optimizer.state_dict(),
            "model_args": {**ARGS, "bias": self.shape.bias, "dropout": 0.0},
            "iter_num": step,
            "best_val_loss": torch.tensor(3.25),
            "config": CONFIG,
        }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Makes nanoGPT's data folder of headerless ids below 65, with a vocabulary of characters."""
    folder = tmp_path / "data" / "letters"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        ids = np.minimum(rng.geometric(0.2, 3000), 65) - 1
        ids.astype(np.uint16).tofile(folder / f"{split}.bin")
    itos = {i: chr(32 + i) for i in range(65)}
    meta = {"vocab_size": 65, "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return tmp_path


@pytest.mark.quick("False")
@pytest.mark.parametrize("bias", [False, True])
def test_a_nanogpt_run_goes_on_with_the_losses_it_would_have_had(data: Path, bias: bool):
    split = open_dataset(data / "data" / "letters").train
    batches = Batches(split, rows_per_step=6, block_size=12, seed=1337, sampling="random")
    reference = Reference(bias)
    losses = []
    for step in range(14):
        if step == 5:
            torch.save(reference.checkpoint(5, compiled=bias), data / "ckpt.pt")
        losses.append(reference.step(step, torch.from_numpy(batches.tokens(step))))
    said = fastgpt(data, "import", "ckpt.pt", "--out_dir=run")
    assert "step 5, val loss 3.2500, with optimizer state" in said
    more = ("--max_iters=14", "--device=cpu", "--peak_tflops=1")
    said = fastgpt(data, "train", "--init_from=resume", "--out_dir=run", *more)
    assert "resuming from run/checkpoints/step_00000005" in said
    got = {r["step"]: r["loss"] for r in runs.records(data / "run")}
    assert list(got) == list(range(5, 14))
    for step, loss in got.items():
        assert loss == pytest.approx(losses[step], rel=2e-6), f"step {step}"
    few = ("--num_samples=1", "--max_new_tokens=5", "--start=A")
    assert "---------------" in fastgpt(data, "sample", "--out_dir=run", *few)


def stepped() -> Reference:
    reference = Reference(bias=True)
    reference.step(0, torch.zeros(2, 13, dtype=torch.int64))
    return reference


GOOD = stepped().checkpoint(1)


def save(folder: Path, **changes) -> Path:
    data = {k: v for k, v in (GOOD | changes).items() if v is not None}
    torch.save(data, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def test_masks_and_no_optimizer(tmp_path: Path):
    """Reads causal masks of older versions, and a checkpoint of weights only."""
    model = changed(**{"transformer.h.0.attn.bias": torch.ones(1, 1, 12, 12)})
    save(tmp_path, model=model, optimizer=None, config=None, iter_num=7)
    said = fastgpt(tmp_path, "import", "ckpt.pt", "--out_dir=run", "--gelu=tanh")
    assert "step 7" in said and "without optimizer state" in said and "tanh GELU" in said
    assert "no tokenizer found" in said


def hostile(kind: str, folder: Path) -> Path:
    """Returns a checkpoint that would write a file if any of it were run."""
    path = folder / "ckpt.pt"
    evil = Reduce(os.system, (f"touch {folder / 'ran'}",))
    bad = pickle.dumps(evil, protocol=2)
    ways = {"value": {}, "protocol 4": {"pickle_protocol": 4}}
    ways["legacy"] = {"_use_new_zipfile_serialization": False}
    if kind in ways:
        torch.save({**GOOD, "extra": evil}, path, **ways[kind])
        return path
    torch.save(GOOD, path)
    with zipfile.ZipFile(path) as archive:
        entries = [(e.filename, archive.read(e)) for e in archive.infolist()]
    name = next(n for n, _ in entries if n.endswith("data.pkl"))
    second = {"second pickle": name.replace("data.pkl", "constants.pkl"), "other root": "data.pkl"}
    if kind == "replaced":
        entries = [(n, bad if n == name else content) for n, content in entries]
    elif kind != "compressed":
        entries.append((second.get(kind, name), bad))
    method = zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that comes twice
        for entry in entries:
            archive.writestr(*entry)
    if kind == "bare pickle":
        path.write_bytes(bad)
    return path


MORE = ("second pickle", "other root", "same name twice", "compressed")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("value", "its pickle asks for posix.system, which is no part of a tensor"),
        ("protocol 4", "its pickle asks for STACK_GLOBAL"),
        ("replaced", "its pickle asks for posix.system"),
        ("legacy", "not in torch.save's zip format"),
        ("bare pickle", "not in torch.save's zip format"),
        *((kind, "its zip is not torch.save's: one data.pkl, and nothing") for kind in MORE),
    ],
)
def test_hostile_files_are_refused_and_nothing_is_run(kind: str, message: str, tmp_path: Path):
    path = hostile(kind, tmp_path)
    with pytest.raises(UserError) as e:
        load(path)
    assert message in str(e.value) and "nothing in it was run" in str(e.value)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Reduce(os.system, (f"touch {tmp_path / 'ran'}",))))
    assert (tmp_path / "ran").exists(), "it would have been noticed"


def test_other_bad_files(tmp_path: Path):
    whole = save(tmp_path).read_bytes()
    for data in (whole[: len(whole) // 2], whole[:-30], b"PK\x03\x04" + b"x" * 100):
        (tmp_path / "ckpt.pt").write_bytes(data)
        with pytest.raises(UserError, match="is damaged"):
            load(tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="none.pt: cannot be read: No such file"):
        load(tmp_path / "none.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="no checkpoint of nanoGPT's train.py .KeyError"):
        read(tmp_path / "ckpt.pt", "erf")


def changed(**tensors) -> dict:
    return {k: v for k, v in (GOOD["model"] | tensors).items() if v is not None}


def moments(first: dict | None) -> dict:
    """Returns another optimizer, with these moments of the first parameter, or without any."""
    state = {k: v for k, v in (GOOD["optimizer"]["state"] | {0: first}).items() if v}
    return {"optimizer": {**GOOD["optimizer"], "state": state}}


FC, WTE, HEAD = "transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight", "lm_head.weight"
FIRST, GROUPS = GOOD["optimizer"]["state"][0], GOOD["optimizer"]["param_groups"]
ZEROS = torch.zeros(64, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": changed(**{FC: None})}, f"{FC} is missing, wanted shape (64, 16)"),
        ({"model": changed(**{FC: ZEROS.T})}, f"{FC} has shape (16, 64), wanted (64, 16)"),
        ({"model": changed(**{FC: ZEROS.int()})}, f"{FC} (64, 16) is of dtype torch.int32"),
        ({"model": changed(lm_head=torch.zeros(3))}, "lm_head (3,) is no part of a GPT-2 of 2"),
        ({"model": {**changed(), "x": None}}, "x () is no part of a GPT-2 of 2 layers"),
        (
            {"model": changed(**{HEAD: torch.zeros(65, 16)})},
            f"{HEAD} (65, 16) is not the embedding",
        ),
        ({"model_args": {**ARGS, "vocab_size": 70}}, f"{WTE} has shape (65, 16), wanted (70, 16)"),
        ({"model_args": {**ARGS, "n_head": 3}}, "n_head=3: must divide n_embd=16"),
        ({"model_args": {**ARGS, "n_layer": "2"}}, "model_args: n_layer=2: wanted a whole"),
        ({"model_args": None}, "ckpt.pt: is damaged, or no checkpoint of nanoGPT's"),
        ({"iter_num": -1}, "iter_num is -1, wanted a whole number >= 0"),
        ({"best_val_loss": torch.ones(2)}, "ckpt.pt: is damaged, or no checkpoint of"),
        ({"config": {**CONFIG, "learning_rate": "x"}}, "learning_rate=x: wanted a number > 0"),
        (moments({**FIRST, "exp_avg": ZEROS}), f"exp_avg of {WTE} has shape (64, 16), wanted (65,"),
        (
            moments({"step": 1, "exp_avg": FIRST["exp_avg"]}),
            f"exp_avg_sq of {WTE} is missing, wanted shape",
        ),
        (moments(None), "its optimizer has 28 parameters and state for 27, the model has 28"),
        ({"optimizer": {**GOOD["optimizer"], "param_groups": GROUPS[:1]}}, "has 10 parameters"),
    ],
)
def test_checkpoints_that_do_not_fit(changes, message, tmp_path: Path):
    save(tmp_path, **changes)
    said = fastgpt(tmp_path, "import", "ckpt.pt", "--out_dir=run", code=2)
    assert message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()
