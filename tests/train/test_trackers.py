"""W&B and TensorBoard: names, units, one run over resumes; a start that fails costs nothing."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from fastgpt.cli import main
from fastgpt.config.schema import Config, LogConfig
from fastgpt.config.settings import replace
from fastgpt.errors import UserError
from fastgpt.storage import checkpoint, run
from fastgpt.train import metrics
from tests import runs
from tests.runs import TINY


class FakeWandb(types.ModuleType):
    """As much of wandb as is used; remembers what it was told."""

    def __init__(self, login: Exception | None = None, init: Exception | None = None):
        super().__init__("wandb")
        self.errors = {"login": login, "init": init}
        self.started: list[dict] = []
        self.logged: list[dict] = []
        self.metrics: list[tuple] = []
        self.finished = 0

    def _maybe(self, what: str) -> None:
        if error := self.errors[what]:
            raise error

    def login(self) -> bool:
        self._maybe("login")
        return True

    def init(self, **settings):
        self._maybe("init")
        self.started.append(settings)
        return self

    def define_metric(self, *args, **kwargs) -> None:
        self.metrics.append((args, kwargs))

    def log(self, values: dict) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def train(*args: str) -> int:
    with pytest.raises(SystemExit) as e:
        main(["train", *TINY, "--max_iters=2", "--eval_interval=2", "--sample_tokens=0", *args])
    return int(e.value.code or 0)


@pytest.fixture
def home(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    runs.write_text(tmp_path)
    return tmp_path


def test_a_whole_run_is_one_run_there_too(home: Path, wandb: FakeWandb):
    """Names and units; resuming goes on with the same one."""
    options = ("--input=text.txt", "--wandb_log=True", "--wandb_project=p", "--out_dir=out")
    assert train(*options) == 0
    with pytest.raises(SystemExit):
        main(["train", "--init_from=resume", "--out_dir=out", "--max_iters=3"])
    first, second = wandb.started
    assert first["id"] == second["id"] == run.identity(Path("out")).id
    assert first["resume"] == "allow" and (first["project"], first["name"]) == ("p", "out")
    assert wandb.metrics[0] == (("*",), {"step_metric": "iter"}) and wandb.finished == 2
    logged = metrics.read(Path("out/metrics.jsonl"))
    evals = [r for r in logged if r["kind"] == "eval"]
    assert wandb.logged[0] == {
        "iter": 0,
        "train/loss": evals[0]["train_loss"],
        "val/loss": evals[0]["val_loss"],
    }
    step = next(r for r in logged if r["kind"] == "train")
    told = wandb.logged[1]
    assert told["iter"] == 0 and told["batch/loss"] == step["loss"] and told["lr"] == step["lr"]
    assert told["mfu"] == pytest.approx(100 * step["mfu"]), "percent, as on the console"
    assert len(wandb.logged) == len(logged)


@pytest.mark.parametrize("which", ["login", "init"])
def test_no_login_leaves_the_old_run_as_it_was(home: Path, wandb: FakeWandb, which, capsys):
    assert train("--input=text.txt", "--out_dir=out") == 0
    before = runs.tensor_files(home / "out")
    listed = sorted(str(p) for p in (home / "out").rglob("*"))
    wandb.errors[which] = RuntimeError("api_key not configured (no-tty)\nmore")
    capsys.readouterr()
    options = ("--input=text.txt", "--wandb_log=True")
    assert train(*options, "--out_dir=out", "--overwrite=True") == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith("fastgpt: --wandb_log=True: "), err
    assert "api_key not configured (no-tty)" in err[0] and "WANDB_MODE=offline" in err[0]
    assert runs.tensor_files(home / "out") == before
    assert sorted(str(p) for p in (home / "out").rglob("*")) == listed
    # In a new folder nothing is left, and the same command goes on once the login works.
    assert train(*options, "--out_dir=new") == 2 and not (home / "new").exists()
    wandb.errors[which] = None
    assert train(*options, "--out_dir=new") == 0 and checkpoint.names(home / "new")


def test_a_tracker_that_fails_later_is_said_once(tmp_path: Path, wandb: FakeWandb, capsys):
    config = replace(Config(), wandb_log=True)
    with metrics.Metrics(tmp_path, config, start_step=0, tokens_per_step=1) as log:

        def broken(values):
            raise ConnectionError("no route")

        wandb.log = broken
        log.evaluation(0, 1.0, 2.0)
        log.evaluation(1, 1.0, 2.0)
    assert capsys.readouterr().err.count("warning: W&B: no route") == 1
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == 2


def test_tensorboard_gets_the_same_names(tmp_path: Path, monkeypatch):
    added: list[tuple] = []

    class Writer:
        def __init__(self, folder: str):
            assert folder == str(tmp_path / "tensorboard")

        def add_scalar(self, *what) -> None:
            added.append(what)

        def close(self) -> None:
            added.append(("closed",))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    config = replace(Config(), tensorboard=True)
    with metrics.Metrics(tmp_path, config, start_step=0, tokens_per_step=1) as log:
        log.evaluation(4, 1.0, 2.0)
    assert added == [("train/loss", 1.0, 4), ("val/loss", 2.0, 4), ("closed",)]


@pytest.mark.parametrize("flag", ["wandb_log", "tensorboard"])
def test_a_missing_tracker_is_named(flag, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=rf"--{flag}=True: .* is not installed; pip install"):
        metrics.check_trackers(LogConfig(**{flag: True}))
