"""Log lines, records, trackers, FLOPs, and the parts of a log that resuming keeps."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from unittest.mock import MagicMock, call

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastgpt.cli import main
from fastgpt.config.presets import PRESETS
from fastgpt.config.schema import Config, LogConfig
from fastgpt.config.settings import replace
from fastgpt.data import progress
from fastgpt.errors import UserError
from fastgpt.model.gpt import ModelShape
from fastgpt.storage import checkpoint
from fastgpt.storage import run_dir as run
from fastgpt.train import metrics
from tests import runs
from tests.fakes import FakeTensorMode, fake_model
from tests.runs import TINY

RECORD = {"loss": 0.80104, "lr": 1e-3, "grad_norm": 2.0}
RECORD |= {"mfu": 0.11066, "mfu_causal": 0.1, "mfu_6n": 0.09}


SMALL = replace(
    Config(), batch_size=1, gradient_accumulation_steps=1, block_size=100, max_iters=6000
)  # 100 tokens per step


def log(run_dir: Path, start: int = 0, keeps: bool = True, seal: dict | None = None, **changes):
    return closing(metrics.Metrics(run_dir, replace(SMALL, **changes), start, keeps, seal))


def test_lines_are_nanogpts(tmp_path: Path, capsys):
    with log(tmp_path) as m:
        m.train(4980, 498_100, 0.033222, RECORD)
        m.evaluation(5000, 500_000, 0.62241, 1.70444)
        m.evaluation(6000, 600_000, 0.62241, 1.70444)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "iter 4980: loss 0.8010, time 33.22ms, mfu 11.07%",
        "step 5000: train loss 0.6224, val loss 1.7044",
        "500k tokens seen, 3.01k tok/s, ETA 33s, next evaluation in 33s",
    ]
    assert lines[4] == "600k tokens seen, 3.01k tok/s", "at the end nothing is left"


@pytest.mark.parametrize(
    ("interval", "start", "step"), [(1, 0, 10), (10, 0, 10), (100, 0, 0), (10, 25, 30)]
)
def test_speed_and_time_left_are_said_early_and_every_ten_minutes(
    interval: int, start: int, step: int, tmp_path: Path, capsys, monkeypatch
):
    now, said = 0.0, []
    monkeypatch.setattr(progress, "_clock", lambda: now)
    with log(tmp_path, start, log_interval=interval) as m:
        for k in range(-(-start // interval) * interval, 2000, interval):
            now = 100.0 * (k // 100)
            m.train(k, 100 * k, 0.5, RECORD)
            said += [k] * (", next evaluation in " in capsys.readouterr().out)
    assert said == [step, 600, 1200, 1800]


def test_the_first_rank_alone_keeps_the_log(tmp_path: Path, monkeypatch):
    synced: list[int] = []
    monkeypatch.setattr(metrics.os, "fsync", synced.append)
    with log(tmp_path) as m:
        synced.clear()
        m.seal()
        assert synced == [m._file.fileno()]
    with log(tmp_path / "other", keeps=False) as m:
        m.train(0, 100, 0.5, RECORD)
        m.seal()
    assert len(synced) == 1 and not (tmp_path / "other").exists()


def test_an_evaluation_says_how_far_it_is(tmp_path: Path, capsys, monkeypatch):
    """At most every ten seconds, counted from the last line of the log."""
    now = 0.0
    monkeypatch.setattr(progress, "_clock", lambda: now)
    with log(tmp_path) as m:
        for k in range(1, 31):
            now = 1.0 * k
            m.working(f"evaluating {k}")
            if k == 15:
                m.train(0, 100, 0.5, RECORD)
    lines = [line for line in capsys.readouterr().out.splitlines() if "evaluating" in line]
    assert lines == ["evaluating 10", "evaluating 25"]


def test_records(tmp_path: Path):
    with log(tmp_path) as m:
        m.train(2, 300, 0.5, RECORD)
        m.evaluation(3, 300, 1.0, 2.0)
    train, evaluation = metrics.read(tmp_path / "metrics.jsonl")
    speed = {"time_ms": 500.0, "tokens_per_second": 200.0, "tokens": 300}
    assert train == {**RECORD, "kind": "train", "step": 2, **speed}
    want = {"kind": "eval", "step": 3, "train_loss": 1.0, "val_loss": 2.0, "tokens": 300}
    assert evaluation == want


def test_resuming_keeps_what_came_before_the_checkpoint(tmp_path: Path, capsys):
    """A digit of it that changed is said, by the sha256 in the checkpoint."""
    with log(tmp_path) as m:
        for step in range(5):
            m.evaluation(step, 0, 1.0, 2.0)
            if step == 3:
                seal = m.seal()
            m.train(step, 0, 0.5, RECORD)
    path = tmp_path / "metrics.jsonl"
    text = path.read_text() + '{"kind": "train", "st'  # cut off by a kill
    for was, warned in (("0.80104", False), ("0.80105", True)):
        path.write_text(text.replace("0.80104", was, 1))
        capsys.readouterr()
        with log(tmp_path, 3, seal=seal) as m:
            m.train(3, 0, 0.5, RECORD)
        kept = [(r["kind"], r["step"]) for r in metrics.read(path)]
        first = [(kind, step) for step in range(3) for kind in ("eval", "train")]
        assert kept == [*first, ("eval", 3), ("train", 3)]
        said = capsys.readouterr().out
        assert ("metrics.jsonl: is not what it was at step 3" in said) == warned


@pytest.mark.parametrize(
    "line", ['{"kind": "train"', "[]", "3", '{"kind": "train"}', '{"kind": "train", "step": "x"}']
)
def test_a_line_that_is_no_record_is_named(line: str, tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="line 1 is not JSON, or no record"):
        metrics.read(tmp_path / "metrics.jsonl")


def test_durations_and_counts():
    for seconds, text in (
        *((5, "5s"), (59.4, "59s"), (59.6, "1m 00s"), (65, "1m 05s"), (3599, "59m 59s")),
        *((3600, "1h 00m"), (7380, "2h 03m"), (86399, "23h 59m"), (86400, "1d 00h")),
        (273600, "3d 04h"),
    ):
        assert metrics.duration(seconds) == text
    for n, text in (
        *((980, "980"), (12345, "12.3k"), (4.56e6, "4.56M"), (7.89e9, "7.89B")),
        *((999, "999"), (1000, "1k"), (1e6, "1M"), (1e9, "1B")),
    ):
        assert metrics.count(n) == text


@pytest.fixture
def wandb(monkeypatch) -> MagicMock:
    fake = MagicMock()
    fake.init.return_value = fake
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


def test_a_whole_run_is_one_run_there_too(home: Path, wandb: MagicMock):
    """Names and units; resuming goes on with the same one."""
    options = ("--input=text.txt", "--wandb_log=True", "--wandb_project=p", "--out_dir=out")
    assert train(*options) == 0
    with pytest.raises(SystemExit):
        main(["train", "--init_from=resume", "--out_dir=out", "--max_iters=3"])
    first, second = (c.kwargs for c in wandb.init.call_args_list)
    assert first["id"] == second["id"] == run.identity(Path("out")).id
    assert first["resume"] == "allow" and (first["project"], first["name"]) == ("p", "out")
    wandb.define_metric.assert_called_with("*", step_metric="iter")
    assert wandb.finish.call_count == 2
    logged = metrics.read(Path("out/metrics.jsonl"))
    told = [c.args[0] for c in wandb.log.mock_calls]
    assert len(told) == len(logged)
    evaluation, step = logged[:2]
    losses = {"train/loss": evaluation["train_loss"], "val/loss": evaluation["val_loss"]}
    assert told[0] == {"iter": 0, **losses}
    told = told[1]
    assert told["iter"] == 0 and told["batch/loss"] == step["loss"] and told["lr"] == step["lr"]
    assert told["mfu"] == pytest.approx(100 * step["mfu"]), "percent, as on the console"


@pytest.mark.parametrize("which", ["login", "init"])
def test_no_login_leaves_the_old_run_as_it_was(home: Path, wandb: MagicMock, which, capsys):
    assert train("--input=text.txt", "--out_dir=out") == 0
    before = runs.tensor_files(home / "out")
    listed = sorted(str(p) for p in (home / "out").rglob("*"))
    function = getattr(wandb, which)
    function.side_effect = RuntimeError("api_key not configured (no-tty)\nmore")
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
    function.side_effect = None
    assert train(*options, "--out_dir=new") == 0 and checkpoint.names(home / "new")


def test_a_tracker_that_fails_later_is_said_once(tmp_path: Path, wandb: MagicMock, capsys):
    wandb.log.side_effect = RuntimeError("no route")
    with log(tmp_path, wandb_log=True) as m:
        m.evaluation(0, 0, 1.0, 2.0)
        m.evaluation(1, 0, 1.0, 2.0)
    assert capsys.readouterr().err.count("warning: W&B: no route") == 1
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == 2


def test_tensorboard_gets_the_same_names(tmp_path: Path, monkeypatch):
    module = MagicMock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with log(tmp_path, tensorboard=True) as m:
        m.evaluation(4, 0, 1.0, 2.0)
    made = call.SummaryWriter(str(tmp_path / "tensorboard"))
    added = made.add_scalar("train/loss", 1.0, 4), made.add_scalar("val/loss", 2.0, 4)
    assert module.mock_calls == [made, *added, made.close()]


@pytest.mark.parametrize(
    ("flag", "package"), [("wandb_log", "wandb"), ("tensorboard", "tensorboard")]
)
def test_a_missing_tracker_is_named(flag, package, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        UserError, match=rf"{flag}=True: {package} is not .*; pip install {package}$"
    ):
        metrics.check_trackers(LogConfig(**{flag: True}))


@pytest.mark.quick("gpt2", "finetune_shakespeare", "shakespeare_char")
@pytest.mark.parametrize("preset", [p for p in PRESETS if p not in ("desktop", "laptop")])
def test_presets_run_the_matmuls_that_are_counted(preset, monkeypatch):
    """PyTorch counts 6N + 12 L C T for the matmuls that run, at full size."""
    m = PRESETS[preset]().model
    shape = ModelShape.of(m, 50257)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(shape, None, monkeypatch)
        idx = torch.zeros(1, m.block_size, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(idx, idx).backward()
    # All of the scores are computed here; the rows that pad the vocabulary are not.
    padding = (shape.padded_vocab_size - shape.vocab_size) * m.n_embd
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    flops, scores = metrics.flops_per_token(model), 6 * m.n_layer * m.n_embd * m.block_size
    assert flops["mfu"] - flops["mfu_causal"] == flops["mfu_causal"] - flops["mfu_6n"] == scores
    want = flops["mfu"] - 6 * (vectors + padding)
    assert counter.get_total_flops() == pytest.approx(want * m.block_size, rel=1e-9)
