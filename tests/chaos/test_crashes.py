"""Kills, signals, EIO and full disks: the result of each is the old state or the new one, whole.

Each command runs in a forked process whose n-th rename, removal, folder or open for writing fails
or is its last, or which gets a signal at a random moment. Then the same command must work.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from fastgpt import cli
from fastgpt.data.token_files import open_dataset
from fastgpt.data.tokenizer import ByteTokenizer
from fastgpt.model import build
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.storage import checkpoint
from fastgpt.storage import run_dir as run
from fastgpt.weights import hf_tokenizer, hugging_face
from fastgpt_kernels import cache
from fastgpt_kernels.registry import model_specs
from tests import runs
from tests.chaos.conftest import SIGNALS, Try, cases
from tests.chaos.test_fuzz import make_run
from tests.faults import KILLED, at_change, changes_in, fork, in_child, kill, wait
from tests.weights.test_nanogpt import Reference

SHAPE = ModelShape(1, 2, 16, 8, 256, False)  # as of runs.SMALL


FAULTS = {name: Mock(side_effect=OSError(getattr(errno, name), name)) for name in ("EIO", "ENOSPC")}
FAULTS["kill"] = kill


class Command:
    """Command of `fastgpt`: its files, its arguments, and what holds after it was cut off."""

    args: tuple[str, ...] = ()
    prepare = check = after = lambda self: None

    def do(self) -> None:
        cli.main(self.args)


class Prepare(Command):
    """fastgpt prepare"""

    args = ("prepare", "--input=text.txt", "--tokenizer=byte")

    def prepare(self) -> None:
        runs.write_text(Path())

    def check(self) -> None:
        for folder in Path("data").glob("text-*"):
            dataset = open_dataset(folder)
            splits = [s.gather(np.array([0]), len(s)) for s in (dataset.train, dataset.val)]
            text = np.concatenate(splits, axis=1).astype(np.uint8).tobytes()
            assert text == Path("text.txt").read_bytes()


class Export(Command):
    """fastgpt export"""

    args = ("export", "--init_from=weights", "--weights=weights", "--to=to")

    def prepare(self) -> None:
        hugging_face.write(Path("weights"), SHAPE, GPT(SHAPE).init_weights(0).state_dict())
        hf_tokenizer.write(Path("weights"), ByteTokenizer())

    def check(self) -> None:
        if Path("to").exists():
            found, want = (hugging_face.read(Path(name)).tensors for name in ("to", "weights"))
            assert all(torch.equal(found[name], t) for name, t in want.items())
            assert isinstance(hf_tokenizer.read(Path("to")), ByteTokenizer)
            shutil.rmtree("to")

    def after(self) -> None:
        assert Path("to").exists() and not list(Path().glob(".tmp-*"))


class Import(Command):
    """fastgpt import"""

    args = ("import", "ckpt.pt", "--out_dir=out")

    def prepare(self) -> None:
        torch.save(Reference(bias=False).checkpoint(3), "ckpt.pt")

    def check(self) -> None:
        if checkpoint.names(Path("out")):
            assert checkpoint.load(Path("out"), warn=pytest.fail).state["step"] == 3
            shutil.rmtree("out")


class Overwrite(Export):
    """fastgpt train --init_from=weights --overwrite=True"""

    args = ("train", *runs.SMALL, "--input=text.txt", "--out_dir=out", "--overwrite=True")
    args += ("--init_from=weights", "--weights=weights", "--max_iters=2", "--eval_interval=1")
    args += ("--keep_checkpoints=1",)

    def prepare(self) -> None:
        super().prepare()
        make_run(Path("out"))
        Prepare().prepare()
        assert wait(fork(Prepare().do)) == 0

    def check(self) -> None:
        """Checks that the run is the old one or the new one, by checkpoint, settings and log."""
        folder = run.find("out")
        shape = checkpoint.load(folder, warn=pytest.fail).state.get("model")
        layers = run.load_config(folder, say=lambda line: None).model.n_layer
        old = any(record["val_loss"] == 2.5 for record in runs.records(folder, "eval"))
        assert (shape, layers, old) in ((None, 12, True), (vars(SHAPE), 1, False))

    def after(self) -> None:
        """Checks that nothing of the run that was cut off is left."""
        assert len(runs.records(Path("out"), "eval")) == 3
        assert checkpoint.names(Path("out"))[0] == checkpoint.name_of(2)
        left = [p.name for p in (*Path("out").iterdir(), *Path("out/checkpoints").iterdir())]
        assert not [name for name in left if name[0] == "." and name != ".lock"]


class Compare(Command):
    """fastgpt compare"""

    args = ("compare", "a", "b")

    def prepare(self) -> None:
        for name in "ab":
            make_run(Path(name))
        assert wait(fork(self.do)) == 0
        Path("compare.png").rename("want.png")

    def check(self) -> None:
        picture = Path("compare.png")
        assert not picture.exists() or picture.read_bytes() == Path("want.png").read_bytes()


class Tune(Command):
    """fastgpt tune"""

    args = ("tune", "laptop", "--compile=True")

    def do(self) -> None:
        """Runs it on a GPU that is said to be there, with times that are said to be measured."""
        os.environ["XDG_CACHE_HOME"] = os.path.abspath("cache")
        tune = importlib.import_module("fastgpt_kernels.tune")
        machine = Machine(torch.device("cuda", 0), "bfloat16", True)
        build.Machine.of = lambda *args: machine  # type: ignore[assignment]
        tune.arch_on, tune.failures = lambda device: "sm_90", lambda checks: {}
        tune.in_child = lambda checks, compile: {c.implementation: [1.0] * 9 for c in checks}
        cache.environment = lambda device: "an H100"  # type: ignore[assignment]
        super().do()

    def check(self) -> None:
        if (kept := Path("cache/fastgpt/tune.json")).exists():
            for entry in json.loads(kept.read_text())["an H100"].values():
                assert entry.keys() == {"implementation", "reason"}

    def after(self) -> None:
        kept = json.loads(Path("cache/fastgpt/tune.json").read_text())["an H100"]
        assert len(kept) == len(model_specs())


WRITERS = (Prepare, Export, Import, Overwrite)
COMMANDS = (*WRITERS, Tune, Compare)


def finish(task: Command) -> None:
    """Checks what a command that was cut off has left, and runs it again."""
    task.check()
    code = wait(fork(task.do, "said"))
    assert code == 0, f"exit code {code} when asked for again: {Path('said').read_text()[-900:]}"
    task.after()
    task.check()


@pytest.fixture
def start(tmp_path: Path, monkeypatch) -> Callable:
    """Returns a job whose files are made, the number of its changes, and its seconds."""

    def make(job):
        task = job()
        (tmp_path / "template").mkdir()
        monkeypatch.chdir(tmp_path / "template")
        task.prepare()
        shutil.copytree(tmp_path / "template", tmp_path / "first", symlinks=True)
        monkeypatch.chdir(tmp_path / "first")
        began = time.monotonic()
        return task, changes_in(task.do, "said"), time.monotonic() - began

    return make


@pytest.mark.slow
@pytest.mark.parametrize(("job", "fault", "tries"), cases(0.3, WRITERS, FAULTS))
def test_a_fault_at_any_change(job, fault: str, tries, one_try: Try, start):
    task, changes, _ = start(job)
    for k in tries:
        with one_try(f"{fault} at a change of a file: {job.__doc__}", k) as rng:
            code = in_child(task.do, rng.randint(1, changes + 1), FAULTS[fault])
            assert code in (0, 2, KILLED), f"exit code {code}"
            finish(task)


@pytest.mark.slow
@pytest.mark.parametrize(("job", "tries"), cases(0.08, COMMANDS))
def test_a_signal_at_any_moment(job, tries, one_try: Try, start):
    """Sends it before a change of a file, or after a share of the command's usual time."""
    task, changes, seconds = start(job)
    for k in tries:
        with one_try(f"a signal at any moment: {job.__doc__}", k) as rng:
            number, n = rng.choice(SIGNALS), rng.choice((0, rng.randint(1, changes)))

            def cut_off(number=number, n=n) -> None:
                at_change(n, lambda: os.kill(os.getpid(), number))
                task.do()

            pid = fork(cut_off, "said")
            if not n:
                time.sleep(rng.random() * seconds)
                os.kill(pid, number)
            code = wait(pid)
            assert code in (0, -number, 128 + number), f"{number.name}: exit code {code}"
            finish(task)
