"""A kill, an EIO or a full disk at any change of a file: what is there after is old or new, whole.

Each job is done in a forked process whose n-th rename, removal, folder or open for writing is its
last, or fails. After that the folder must hold the old state or the new one, whole, and the same
job must work when it is asked for again.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgpt.config.schema import Config, ExportConfig, ImportConfig, PrepareConfig
from fastgpt.config.settings import replace, to_dict
from fastgpt.data.prepare import prepare
from fastgpt.data.token_files import open_dataset
from fastgpt.data.tokenizer import ByteTokenizer
from fastgpt.errors import UserError
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.storage import checkpoint
from fastgpt.storage import run_dir as run
from fastgpt.weights import hf_tokenizer, hugging_face
from fastgpt.weights.nanogpt import import_checkpoint
from fastgpt.weights.source import export
from tests import runs
from tests.chaos.conftest import chunks
from tests.faults import KILLED, REFUSED, in_child, kill
from tests.weights.test_nanogpt import Reference

SHAPE = ModelShape(1, 2, 8, 8, 256, False)


def fail(code: int) -> Callable[[], None]:
    def fault() -> None:
        raise OSError(code, os.strerror(code))

    return fault


FAULTS = {"kill": kill, "EIO": fail(errno.EIO), "ENOSPC": fail(errno.ENOSPC)}


def save(folder: Path, step: int, keep: int = 3) -> None:
    w = {"w": torch.full((2, 2), float(step))}
    state = {"format": checkpoint.FORMAT, "config": to_dict(Config()), "val_loss": 1.0}
    checkpoint.save(folder, step, w, w, state, best=True, keep=keep)


class Overwrite:
    """A new run in the place of an old one."""

    def prepare(self, home: Path) -> None:
        run.save_config(home / "out", Config())
        (home / "out" / "metrics.jsonl").write_text("old\n")
        save(home / "out", 7)

    def do(self, home: Path) -> None:
        with run.begin(str(home / "out"), "x", True) as folder:
            run.save_config(folder, replace(Config(), n_layer=3))
            (folder / "metrics.jsonl").write_text("new\n")
            save(folder, 2)
            run.settle(folder)

    def check(self, home: Path) -> None:
        folder = run.find(str(home / "out"))
        step = checkpoint.load(folder, warn=pytest.fail).state["step"]
        layers = run.load_config(folder, say=lambda line: None).model.n_layer
        assert (step, layers) in ((7, 12), (2, 3))
        log = (folder / "metrics.jsonl").read_text()
        assert log == ("old\n" if step == 7 else "new\n")


class Save:
    """A checkpoint more, of which one is kept."""

    def prepare(self, home: Path) -> None:
        run.save_config(home / "out", Config())
        for step in (1, 2):
            save(home / "out", step)

    def do(self, home: Path) -> None:
        with run.resumed(str(home / "out")) as folder:
            save(folder, 3, keep=1)

    def check(self, home: Path) -> None:
        saved = checkpoint.load(home / "out", warn=pytest.fail)
        assert saved.state["step"] in (2, 3)
        assert saved.model["w"].eq(saved.state["step"]).all()


class Export:
    """A Hugging Face folder."""

    def prepare(self, home: Path) -> None:
        weights = GPT(SHAPE).init_weights(0).state_dict()
        hugging_face.write(home / "weights", SHAPE, weights)
        hf_tokenizer.write(home / "weights", ByteTokenizer())

    def do(self, home: Path) -> None:
        source = {"init_from": "weights", "weights": str(home / "weights")}
        export(replace(ExportConfig(), to=str(home / "to"), **source))

    def check(self, home: Path) -> None:
        if (home / "to").exists():
            assert hugging_face.read(home / "to").shape == SHAPE
            assert isinstance(hf_tokenizer.read(home / "to"), ByteTokenizer)
            shutil.rmtree(home / "to")

    def after(self, home: Path) -> None:
        assert not list(home.glob(".tmp-*")), "the next export sweeps"


class Import:
    """A run from a checkpoint of nanoGPT's."""

    def prepare(self, home: Path) -> None:
        torch.save(Reference(bias=False).checkpoint(3), home / "ckpt.pt")

    def do(self, home: Path) -> None:
        options = ImportConfig(out_dir=str(home / "out"), data_dir=str(home / "data"))
        import_checkpoint(str(home / "ckpt.pt"), options)

    def check(self, home: Path) -> None:
        if checkpoint.names(home / "out"):
            assert checkpoint.load(home / "out", warn=pytest.fail).state["step"] == 3
            shutil.rmtree(home / "out")


class Prepare:
    """Token files from a text."""

    def prepare(self, home: Path) -> None:
        runs.write_text(home)

    def do(self, home: Path) -> None:
        prepare(PrepareConfig(input=str(home / "text.txt"), data_dir=str(home / "data")))

    def check(self, home: Path) -> None:
        for folder in (home / "data").glob("text-*"):
            dataset = open_dataset(folder)
            starts = np.array([0])
            ids = [dataset.train.gather(starts, len(dataset.train))]
            ids.append(dataset.val.gather(starts, len(dataset.val)))
            text = np.concatenate(ids, axis=1).astype(np.uint8).tobytes()
            assert text == (home / "text.txt").read_bytes()


JOBS = (Overwrite, Save, Export, Import, Prepare)
CASES = [
    pytest.param(job, name, seed, tries, id=f"{job.__name__}-{name}-{seed}")
    for job in JOBS
    for name in FAULTS
    for seed, tries in chunks(0.4 / len(JOBS) / len(FAULTS))
]


@pytest.mark.slow
@pytest.mark.parametrize(("job", "name", "seed", "tries"), CASES)
def test_a_fault_at_any_change(job, name: str, seed: int, tries: int, tmp_path: Path, held):
    torch.set_num_threads(1)  # children are forked
    task, rng = job(), random.Random(f"{job.__name__} {name} {seed}")
    template = tmp_path / "template"
    template.mkdir()
    task.prepare(template)
    most = 60
    for k in range(tries):
        home = tmp_path / f"{k}"
        shutil.copytree(template, home)
        n = rng.randint(1, most)
        code = in_child(lambda home=home: task.do(home), n, FAULTS[name])
        if code == 0:
            most = min(most, n + 5)  # it has fewer changes than that
        assert code in (0, KILLED, REFUSED), f"{name} at change {n}: exit code {code}"
        try:
            task.check(home)
            task.do(home)
            task.check(home)
            if hasattr(task, "after"):
                task.after(home)
        except (UserError, OSError) as e:
            raise AssertionError(f"{name} at change {n}: {e}") from e
        shutil.rmtree(home)
        held(f"{name} at a change of a file: {job.__doc__.rstrip('.').lower()}")
