"""Whole runs as real processes: exact resume, kills, signals, bad numbers, bad disks."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastgpt.config import settings
from fastgpt.config.presets import PRESETS
from fastgpt.data.loader import Batches
from fastgpt.data.token_files import open_dataset
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.storage import checkpoint
from fastgpt.train import main, metrics
from fastgpt.train.trainer import Trainer
from tests import runs
from tests.process import Command, fastgpt
from tests.runs import TINY


@pytest.fixture
def text(tmp_path: Path) -> str:
    return f"--input={runs.write_text(tmp_path)}"


def train(cwd: Path, *args: str, **kwargs) -> str:
    return fastgpt(cwd, "train", *TINY, *args, **kwargs)


def resume(cwd: Path, *args: str, **kwargs) -> str:
    return fastgpt(cwd, "train", "--init_from=resume", *args, **kwargs)


def wait_for_records(command: Command, run_dir: Path, n: int, **options) -> None:
    """Waits until the command has logged n lines more."""

    def logged() -> int:
        return len(metrics.read(run_dir / "metrics.jsonl"))

    before = logged()
    command.wait_until(lambda: logged() >= before + n, **options)


def test_a_run_from_nothing_to_text(tmp_path: Path, text: str):
    said = train(tmp_path, text, "--out_dir=out", "--max_iters=60", "--learning_rate=0.01")
    out = tmp_path / "out"
    files = {"config.toml", "metrics.jsonl", "loss.png", "tokenizer.json", "checkpoints"}
    assert {p.name for p in out.iterdir()} >= files
    evals = runs.records(out, "eval")
    assert [r["step"] for r in evals] == [0, 10, 20, 30, 40, 50, 60]
    assert evals[-1]["val_loss"] < evals[0]["val_loss"] - 1.0
    assert [r["step"] for r in runs.records(out)] == list(range(60))
    assert sum(line.startswith("iter ") for line in said.splitlines()) == 60
    assert f"val loss {evals[-1]['val_loss']:.4f} at step 60" in said
    assert "--- sample" in said and "fastgpt sample --out_dir=out" in said
    assert "tokens per iteration will be: 64" in said
    assert said.count("(byte)") == 1 and said.count("\ndata data/text-byte-") == 1
    stars = re.findall(r"\*(\w+)=", said)
    assert {"n_layer", "max_iters", "out_dir", "input"} <= {*stars} and "beta2" not in stars


def test_a_run_on_pythons_library_ends_with_a_function(tmp_path: Path):
    data = tmp_path / "data" / "python_stdlib"
    data.mkdir(parents=True)
    for split in ("train", "val"):
        np.frombuffer(b"x = 1\n" * 99, np.uint8).astype(np.uint16).tofile(data / f"{split}.bin")
    said = train(tmp_path, "--tokenizer=byte", "--max_iters=1")
    assert "*tokenizer=byte" in said and "*dataset" not in said
    assert re.search("^--- sample -+\ndef\\b", said, re.M)


ODD = ("--sampling=epochs", "--dtype=bfloat16", "--gradient_accumulation_steps=3", "--bias=True")


@pytest.mark.parametrize("flags", [(), pytest.param(ODD, marks=pytest.mark.slow)])
def test_resumed_is_bit_for_bit_the_straight_run(flags, tmp_path: Path, text: str):
    train(tmp_path, text, "--out_dir=a", "--max_iters=40", *flags)
    train(tmp_path, text, "--out_dir=b", "--max_iters=25", *flags)
    said = resume(tmp_path, "--out_dir=b", "--max_iters=40")
    assert "resuming from b/checkpoints/step_00000025" in said
    a, b = tmp_path / "a", tmp_path / "b"
    assert runs.records(a) == runs.records(b)
    assert runs.tensor_files(a) == runs.tensor_files(b)
    # The evaluation at 25 is the only thing that the straight run does not have.
    assert [r for r in runs.records(b, "eval") if r["step"] != 25] == runs.records(a, "eval")


@pytest.mark.quick("15-*")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_resuming_is_exact(number, code, tmp_path: Path, text: str):
    many = ("--max_iters=100000", "--eval_interval=50000", "--log_interval=1")
    command = Command(tmp_path, "train", *TINY, text, *many, "--out_dir=out")
    out = tmp_path / "out"
    wait_for_records(command, out, 6)
    start = time.monotonic()
    command.kill(number)
    assert command.wait() == code, command.output
    assert time.monotonic() - start < 30
    step = checkpoint.load(out).state["step"]
    assert f"{number.name}: stopping after step {step}" in command.output
    assert "continue: fastgpt train --init_from=resume --out_dir=out" in command.output
    resume(tmp_path, "--out_dir=out", f"--max_iters={step + 5}")
    train(tmp_path, text, "--out_dir=straight", *many, f"--max_iters={step + 5}")
    assert runs.tensor_files(out) == runs.tensor_files(tmp_path / "straight")


def test_a_signal_during_evaluation_does_not_wait_for_it(tmp_path: Path, text: str):
    long = ("--eval_iters=1000000", "--eval_interval=3", "--max_iters=10")
    command = Command(tmp_path, "train", *TINY, text, *long, "--out_dir=out")
    time.sleep(0.2)
    command.wait_until(lambda: "MFU against" in command.output)
    time.sleep(0.5)
    command.kill(signal.SIGTERM)
    assert command.wait(30) == 143, command.output
    assert checkpoint.load(tmp_path / "out").state["step"] == 0


@pytest.mark.slow
def test_config_repeats_the_run(tmp_path: Path, text: str):
    train(tmp_path, text, "--out_dir=out", "--n_layer=1")
    said = fastgpt(tmp_path, "train", "out/config.toml")
    (again,) = (tmp_path / "runs").iterdir()
    assert f"run runs/{again.name}" in said and again.name.endswith("-out")
    assert (again / "config.toml").read_text() == (tmp_path / "out" / "config.toml").read_text()
    assert runs.tensor_files(again) == runs.tensor_files(tmp_path / "out")


def test_a_learning_rate_that_explodes_stops_the_run(tmp_path: Path, text: str):
    """Before the update; what is needed to look into it is kept."""
    wild = ("--learning_rate=1e30", "--min_lr=0", "--warmup_iters=0", "--grad_clip=0")
    said = train(tmp_path, text, "--out_dir=out", *wild, code=2)
    last = said.splitlines()[-1]
    assert last.startswith("fastgpt: step ") and "is not finite" in last and "Traceback" not in said
    step = int(last.split()[2].rstrip(":"))
    kept = tmp_path / "out" / "nonfinite" / checkpoint.name_of(step)
    assert checkpoint.fault(kept) is None and str(kept.relative_to(tmp_path)) in last
    report = json.loads((kept / "report.json").read_text())
    assert report["step"] == step and report["not_finite"] and report["loss"] in last
    assert load_file(kept / "batch.safetensors")["tokens"].shape == (4, 17)
    assert all(t.isfinite().all() for t in load_file(kept / "model.safetensors").values())
    assert all(int(name[5:]) <= step for name in checkpoint.names(tmp_path / "out"))


def test_a_read_only_folder(tmp_path: Path, text: str):
    disk = tmp_path / "disk"
    disk.mkdir(0o555)
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("root may write anywhere, and may not mount here")
    try:
        said = train(tmp_path, text, f"--out_dir={disk}/out", code=2)
        assert f"cannot write {disk}/out" in said and "name another folder" in said
        assert "Traceback" not in said
    finally:
        subprocess.run(["umount", str(disk)], capture_output=True)


def test_what_cannot_be_resumed(tmp_path: Path, text: str):
    train(tmp_path, text, "--out_dir=out")
    (tmp_path / "other.txt").write_text("Other words.\n" * 300)
    (tmp_path / "ids").mkdir()
    for split in ("train", "val"):
        np.arange(900, dtype=np.uint16).tofile(tmp_path / "ids" / f"{split}.bin")
    before = (tmp_path / "out" / "config.toml").read_text()
    other = "--input=other.txt: the run in out was trained on other data"
    for args, message in (
        (["--bias=True"], "--bias=True: the run in out has bias=False"),
        (["--max_iters=20"], "already at step 20 of --max_iters=20"),
        (["--input=other.txt"], other),
        (["--input=other.txt", "--tokenizer=char"], other),
        (["--dataset=ids"], "--dataset=ids: the run in out was trained on other data"),
    ):
        said = resume(tmp_path, "--out_dir=out", *args, code=2)
        assert message in said and "Traceback" not in said
        assert (tmp_path / "out" / "config.toml").read_text() == before


def test_a_run_in_use_is_left_alone(tmp_path: Path, text: str):
    command = Command(tmp_path, "train", *TINY, text, "--max_iters=100000", "--out_dir=out")
    wait_for_records(command, tmp_path / "out", 3)
    for args in (["--init_from=resume"], [*TINY, text, "--overwrite=True"]):
        said = fastgpt(tmp_path, "train", *args, "--out_dir=out", code=2)
        assert "another process is training this run" in said or "no checkpoint" in said
    command.kill()
    command.wait()


def test_nanogpt_folder_and_evaluation_only(tmp_path: Path):
    data = tmp_path / "data" / "mine"
    data.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("train", "val"):
        rng.integers(0, 50257, 5000).astype(np.uint16).tofile(data / f"{name}.bin")
    said = train(tmp_path, "--dataset=mine", "--out_dir=out", "--eval_only=True", "--n_embd=8")
    assert "vocabulary 50,257" in said
    assert len(runs.records(tmp_path / "out", "eval")) == 1
    assert not runs.records(tmp_path / "out")
    assert not checkpoint.names(tmp_path / "out")


@pytest.mark.slow
def test_one_command_begins_a_run_and_goes_on_with_it(tmp_path: Path, text: str):
    """--init_from=auto, through kills before and after the first checkpoint, as by Slurm."""
    args = (*TINY, text, "--max_iters=400", "--eval_interval=200", "--out_dir=out")
    args += ("--warmup_iters=0", "--init_from=auto")
    for number, code, saves in ((signal.SIGKILL, -9, False), (signal.SIGTERM, 143, True)):
        command = Command(tmp_path, "train", *args)
        command.wait_until(lambda c=command: "iter 5:" in c.output)
        command.kill(number)
        assert command.wait() == code and bool(checkpoint.names(tmp_path / "out")) == saves
    said = fastgpt(tmp_path, "train", *args)
    assert "resuming from out/checkpoints/step_0000" in said
    fastgpt(tmp_path, "train", *args[:-1], "--out_dir=straight")
    files = runs.tensor_files(tmp_path / "straight")
    assert fastgpt(tmp_path, "train", *args) == "fastgpt: out: finished at step 400\n"
    said = fastgpt(tmp_path, "train", *args, "--learning_rate=1e-4", code=2)
    assert "another run stands there, with learning_rate=0.001 instead of 0.0001" in said
    assert runs.tensor_files(tmp_path / "out") == files
    assert "resuming" in fastgpt(tmp_path, "train", *args, "--max_iters=401")


def test_a_dry_run_says_what_a_run_takes_and_leaves_nothing(tmp_path: Path, text: str):
    small = ("--dry_run=True", "--n_layer=1", "--n_head=2", "--n_embd=64", "--device=cpu")
    said = fastgpt(tmp_path, "train", "gpt2", *small)
    assert said.startswith("preset gpt2: 124M parameters, 295B tokens: six days on an H200")
    assert "\n600,000 steps of 15 x 32 x 1,024 tokens: 295B in all\n" in said
    assert "run `fastgpt prepare openwebtext` once" in said and "memory, by estimate: " in said
    assert "4 checkpoints" in said and "\ntime is measured on a GPU only\n" in said
    said = train(tmp_path, text, "--tokenizer=bpe:300", "--dry_run=True")
    assert "\n20 steps of 1 x 4 x 16 tokens: 1.28k in all\n" in said
    assert [p.name for p in tmp_path.iterdir() if p.name[0] != "."] == ["text.txt"]


def test_steps_of_a_dry_run_are_timed():
    model = GPT(ModelShape(1, 2, 16, 8, 50, bias=False)).init_weights(0)
    config = settings.replace(PRESETS["laptop"](), block_size=8, gradient_accumulation_steps=2)
    trainer = Trainer(model, config, Machine(torch.device("cpu"), "float32"))
    assert 0 < main.seconds_per_step(trainer) < 10


@pytest.mark.slow
def test_token_files_of_others_get_their_tokenizer_by_flags(tmp_path: Path, capfd):
    """Without one the last lines name no command that fails; named on a resume, the run is read."""
    vocab = b"".join(b"%s %d\n" % (base64.b64encode(bytes([b])), b) for b in range(256))
    (tmp_path / "bytes.tiktoken").write_bytes(vocab)
    data = tmp_path / "ids"
    data.mkdir()
    for split in ("train", "val"):
        np.frombuffer(b"some text " * 300, np.uint8).astype(np.uint16).tofile(data / f"{split}.bin")
    small = ("--dataset=ids", "--vocab_size=50257", "--n_embd=8", "--max_iters=2", "--n_layer=1")
    said = train(tmp_path, *small, "--out_dir=out")
    assert "fastgpt sample" not in said and "no sample: these token files" in said
    assert "has no tokenizer, so there is no text; if it is known, name it: " in fastgpt(
        tmp_path, "sample", "--out_dir=out", code=2
    )
    flags = ("--tokenizer=bpe", "--vocab_file=bytes.tiktoken")
    said = resume(tmp_path, "--out_dir=out", "--max_iters=3", *flags)
    assert "fastgpt sample --out_dir=out" in said
    made = fastgpt(tmp_path, "sample", "--out_dir=out", "--start=so", "--max_new_tokens=2")
    assert "so" in made


def test_data_cut_off_in_a_run_is_one_line(tmp_path: Path, text: str):
    """Not a SIGBUS: the run ends at the next window or evaluation, and its checkpoints stay."""
    many = ("--max_iters=100000", "--eval_interval=20", "--eval_iters=1")
    command = Command(tmp_path, "train", *TINY, text, *many, "--out_dir=out")
    command.wait_until(lambda: bool(checkpoint.names(tmp_path / "out")))
    (tokens,) = (tmp_path / "data").glob("text-byte-*/*_train_*.bin")
    os.truncate(tokens, 2000)
    assert command.wait() == 2
    last = command.output.splitlines()[-1]
    assert last.startswith("fastgpt: data/text-byte-") and "while it was read" in last
    assert checkpoint.load(tmp_path / "out").state["step"] >= 20


@pytest.mark.parametrize("lost", ["full disk", "closed pipe", "closed terminal"])
def test_lost_output_ends_no_run(lost: str, tmp_path: Path, text: str):
    """The log goes on in metrics.jsonl, and the run ends with its last checkpoint."""
    if lost == "full disk":
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, out = os.pipe() if lost == "closed pipe" else os.openpty()
        os.close(reader)
    command = [sys.executable, "-m", "fastgpt", "train", *TINY, text, "--out_dir=out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=tmp_path, stdout=out, stderr=out, env=environment)
    os.close(out)
    assert done.returncode == 0
    assert runs.records(tmp_path / "out", "eval")[-1]["step"] == 20
    assert runs.latest(tmp_path / "out").name == "step_00000020"


def test_a_diverged_run_ends_before_it_is_saved(tmp_path: Path, text: str):
    """Good checkpoints stay, and a resume can start from any of them."""
    train(tmp_path, text, "--out_dir=out", "--max_iters=20", "--keep_checkpoints=2")
    worse = ("--out_dir=out", "--max_iters=21", "--learning_rate=1e38", "--decay_lr=False")
    said = resume(tmp_path, *worse, "--keep_checkpoints=1", code=2)
    assert "step 21: train loss nan, val loss nan: the run has diverged" in said
    assert "--init_from=resume --checkpoint=step_00000020" in said and "--- sample" not in said
    assert checkpoint.names(tmp_path / "out") == ["step_00000020", "step_00000010"]
    better = ("--out_dir=out", "--checkpoint=step_00000010", "--max_iters=12")
    said = resume(tmp_path, *better, "--learning_rate=1e-3")
    assert "resuming from out/checkpoints/step_00000010" in said
    assert runs.latest(tmp_path / "out").name == "step_00000012"
    assert 'checkpoint = "latest"' in (tmp_path / "out/config.toml").read_text()


def test_resuming_names_settings_that_change_the_run(tmp_path: Path, text: str):
    train(tmp_path, text, "--out_dir=out", "--max_iters=3", "--dropout=0.0")
    other = ("--batch_size=2", "--seed=5", "--op.attention=flash")
    said = resume(tmp_path, "--out_dir=out", "--max_iters=4", *other)
    changes = "rows per step 2 (was 4), seed 5 (was 1337), attention flash (was eager)"
    assert f"other than before: {changes}\n" in said
    assert "other than before" not in resume(tmp_path, "--out_dir=out", "--max_iters=5")


@pytest.mark.parametrize("sampling", ["random", "epochs"])
def test_tokens_seen_outlast_another_batch_size(sampling: str, tmp_path: Path, text: str):
    """In epochs the windows go on where the larger batches stopped: none twice, none left out."""
    one = ("--sampling=" + sampling, "--out_dir=out")
    train(tmp_path, text, *one, "--max_iters=10")
    resume(tmp_path, *one, "--max_iters=14", "--batch_size=2")
    tokens = [r["tokens"] for r in runs.records(tmp_path / "out")]
    assert tokens == [64 * (i + 1) for i in range(10)] + [640 + 32 * (i + 1) for i in range(4)]
    dataset = open_dataset(next((tmp_path / "data").glob("text*")))
    small = Batches(
        dataset.train, rows_per_step=2, block_size=16, seed=1337, sampling=sampling, start=(10, 40)
    )
    large = Batches(dataset.train, rows_per_step=4, block_size=16, seed=1337, sampling="epochs")
    if sampling == "epochs":
        rows = [x for s in range(10, 14) for x in small.starts(s)]
        assert rows == [x for s in (10, 11) for x in large.starts(s)]
