"""Training runs with ranks that differ, sealed edits, lost outputs and signals.

Each try runs whole `fastgpt` commands in forked processes. A run that goes on equals the
undisturbed one to the bit, and everything else is refused in one line.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import random
import resource
import signal
import socket
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt import cli
from fastgpt.storage import checkpoint
from fastgpt.storage.atomic import sealed, unsealed
from tests import runs
from tests.chaos.conftest import SIGNALS, Try, cases
from tests.chaos.test_fuzz import ODD, odd_json
from tests.faults import at_change, changes_in, fork, redirect, wait

TRAIN = ("train", *runs.SMALL, "--input=text.txt")


def start(*args: str, before: Callable[[], object] = int, said: str = "said") -> int:
    """Starts a command in a forked process, which calls `before` first. Returns the pid."""

    def run() -> None:
        before()
        cli.main(args)

    return fork(run, said)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, int, float]:
    """Returns a folder with a text and the run `want`, the run's changes of files, its seconds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with contextlib.chdir(folder):
        runs.write_text(Path())
        assert wait(start(*TRAIN, "--out_dir=want")) == 0
        began = time.monotonic()
        n = changes_in(lambda: cli.main([*TRAIN, "--out_dir=../counted"]), "said")
        seconds = time.monotonic() - began
        Path("said").unlink()
        return folder, n, seconds


@pytest.fixture
def changes(undisturbed, tmp_path: Path) -> int:
    """Makes the undisturbed run's folder each try's template. Returns its changes of files."""
    (tmp_path / "template").symlink_to(undisturbed[0])
    return undisturbed[1]


def assert_equals_undisturbed(out: Path) -> None:
    want = Path("want")
    assert runs.tensor_files(out) == runs.tensor_files(want)
    assert runs.records(out) == runs.records(want)
    assert runs.records(out, "eval") == runs.records(want, "eval")


# --- ranks that differ in one flag ----------------------------------------------------------------

# Flags of settings that may not differ, with values that are not those of the other rank.
FLAGS = """overwrite=True max_iters=7 seed=1 val_fraction=0.1 shards=3 sampling=epochs n_layer=2
n_head=4 n_embd=32 block_size=16 dropout=0.0 bias=True gelu=tanh vocab_size=300 batch_size=4
gradient_accumulation_steps=4 optimizer=muon learning_rate=0.1 min_lr=0.0 warmup_iters=3
lr_schedule=wsd lr_decay_fraction=0.5 lr_decay_iters=9 decay_lr=False weight_decay=0.2 beta1=0.8
beta2=0.9 grad_clip=0.5 eval_interval=3 eval_iters=2 target_val_loss=1.0 eval_only=True
log_interval=2 always_save_checkpoint=False keep_checkpoints=2 sample_tokens=5 wandb_log=True
wandb_project=x wandb_run_name=x tensorboard=True dtype=bfloat16 tf32=True
deterministic=True compile=True kernels=eager activation_checkpointing=True parallel=ddp
reduce_dtype=bfloat16 dist_timeout=50.0 backend=x op.attention=flash"""


@pytest.mark.slow
@pytest.mark.parametrize(("what", "tries"), cases(0.03, ["two ranks"]))
def test_ranks_that_differ(what: str, tries, one_try: Try, changes: int, monkeypatch):
    """Checks that both exit with 1, name rank, key and values in one line, and write nothing."""
    monkeypatch.setattr(cli, "WAIT_FOR_RANK_0", 1.0)
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # and taken away after the test
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = [*TRAIN, "--out_dir=out", "--gradient_accumulation_steps=2", "--dist_timeout=60"]
    for k in tries:
        with one_try("a rank with another flag", k):
            flag = FLAGS.split()[k % len(FLAGS.split())]
            with socket.create_server(("127.0.0.1", 0)) as server:
                os.environ["MASTER_PORT"] = str(server.getsockname()[1])
            pids = []
            for rank, more in enumerate(([], [f"--{flag}"])):
                os.environ["RANK"] = os.environ["LOCAL_RANK"] = f"{rank}"
                pids.append(start(*args, *more, said=f"rank{rank}"))
            codes = [wait(pid) for pid in pids]
            said = Path("rank0").read_text() + Path("rank1").read_text()
            lines = [line for line in said.splitlines() if line.startswith("fastgpt: ")]
            wanted = f"fastgpt: rank 1 has {flag}, rank 0 has {flag.partition('=')[0]}="
            assert codes == [1, 1] and len(lines) == 1, f"{flag}: {codes}: {said}"
            assert lines[0].startswith(wanted) and not Path("out").exists(), f"{wanted}: {said}"


# --- files that were edited and sealed again ------------------------------------------------------


def edit_tensors(path: Path, rng: random.Random) -> None:
    """Changes shape, dtype or content of a tensor, removes, renames, doubles or swaps it."""
    tensors = load_file(path)
    name, other = rng.sample(sorted(tensors), 2)
    t, kind, dtype = tensors[name], rng.randrange(9), rng.choice([torch.half, torch.double])
    some, flat = t.clone(), t.reshape(-1)
    some.view(-1)[rng.randrange(t.numel())] = rng.choice([math.nan, -math.inf, 1e30, 7.0])
    shapes = [t[None], flat, flat[:0], t.reshape(t.shape[::-1]), torch.zeros(3)]
    same = [torch.full_like(t, x) for x in (math.nan, math.inf, -1.0, 3e38, 0.0)]
    tensors[name] = rng.choice([[t.to(dtype)], shapes, same, [some]][min(kind, 3)])
    if kind == 4:
        del tensors[name]
    elif kind == 5:
        tensors[rng.choice(["", "x", name + ".x", f"exp_avg.{name}"])] = tensors.pop(name)
    elif kind == 6:
        tensors[name + "x"] = t.clone()
    elif kind == 7:
        tensors[name], tensors[other] = tensors[other], t
    elif kind == 8:
        tensors = {}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)


def edit_config(out: Path, rng: random.Random) -> None:
    """Changes a setting in config.toml, in run.json, or in both."""
    lines = (out / "config.toml").read_text().splitlines()
    at = rng.choice([i for i, line in enumerate(lines) if "=" in line])
    key, value = lines[at].partition(" ")[0], rng.choice((*ODD, 1, 3, 10**6, 0.5, "'x'"))
    lines[at] = rng.choice([f"{key} = {json.dumps(value)}", "", f"{key}x = 1", key, "[op]"])
    text, where = "\n".join(lines) + "\n", rng.randrange(3)
    if where != 0:
        (out / "config.toml").write_text(text)
    if where != 1:
        saved = json.loads(unsealed((out / "run.json").read_bytes()) or "")
        saved = odd_json(saved, rng) if rng.random() < 0.3 else saved | {"config": text}
        (out / "run.json").write_text(sealed(json.dumps(saved)))


def edit_state(path: Path, rng: random.Random) -> None:
    path.write_text(json.dumps(odd_json(json.loads(path.read_text()), rng)))


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))


# Readers of a run, with flags for what could take hours.
_READERS = {
    "train": "--init_from=resume --max_iters=8 --eval_interval=2 --eval_iters=1 --log_interval=1 "
    "--sample_tokens=0 --gradient_accumulation_steps=1 --batch_size=2 --device=cpu",
    "sample": "--num_samples=1 --max_new_tokens=3 --device=cpu",
    "eval": "--limit=40 --device=cpu",
    "export": "--to=to",
}


@pytest.mark.slow
@pytest.mark.parametrize(("reader", "tries"), cases(0.1, _READERS))
def test_edits_that_were_sealed(reader: str, tries, one_try: Try, changes: int):
    """Reads a checkpoint or run.json whose sums are right, or is refused in one line."""
    for k in tries:
        with one_try(f"an edit that was sealed: fastgpt {reader}", k) as rng:
            out, folder = Path("want"), runs.latest(Path("want"))
            name = rng.choice(("model.safetensors", "optimizer.safetensors", "state.json", ""))
            if name.endswith(".safetensors"):
                edit_tensors(folder / name, rng)
            else:
                edit_state(folder / name, rng) if name else edit_config(out, rng)
            runs.seal(folder)
            args = (reader, "--out_dir=want", *_READERS[reader].split())
            code, said = wait(start(*args, before=limit_memory)), Path("said").read_text()
            assert code in (0, 1, 2) and "Traceback" not in said, f"{name}: {code}: {said}"
            if code:
                last = said.splitlines()[-1]
                assert last.startswith("fastgpt: ") and "a bug" not in last, f"{name}: {said}"
            elif reader == "train":
                saved = checkpoint.load(out, warn=pytest.fail)
                tensors = (*saved.model.values(), *saved.optimizer.values())
                assert all(t.isfinite().all() for t in tensors), name


# --- outputs that fail, and terminals that close --------------------------------------------------


def lose_output(kind: str, fds: tuple[int, ...], n: int, ignored: bool) -> None:
    """Makes outputs fail from the n-th change of a file on; in a child, before the command.

    A pipe or a terminal has a reader, whose end closes it. A session's terminal sends SIGHUP too.
    """
    if kind == "full disk":
        full = os.open("/dev/full", os.O_WRONLY)
        at_change(n, lambda: [os.dup2(full, fd) for fd in fds])
        return
    if ignored:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    read, write = os.pipe() if kind == "closed pipe" else os.openpty()
    if not (reader := os.fork()):
        os.close(write)
        while os.read(read, 1 << 16):
            pass
        os._exit(0)
    os.close(read)
    if kind == "closed session":
        os.setsid()
        fcntl.ioctl(write, termios.TIOCSCTTY, 0)
    redirect(write, *fds)
    os.close(write)

    def close() -> None:
        os.kill(reader, signal.SIGKILL)
        os.waitpid(reader, 0)

    at_change(n, close)


KINDS = ("full disk", "closed pipe", "closed terminal", "closed session")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tries"), cases(0.06, KINDS))
def test_lost_outputs(kind: str, tries, one_try: Try, changes: int):
    """Trains to the end, or after the SIGHUP of a session saves and is resumed."""
    for k in tries:
        with one_try(f"lost output: {kind}", k) as rng:
            fds = rng.choice(((1,), (2,), (1, 2)))
            n, ignored = rng.randint(1, changes), rng.random() < 0.3
            lose = lambda a=(kind, fds, n, ignored): lose_output(*a)  # noqa: E731
            code = wait(start(*TRAIN, "--out_dir=out", before=lose))
            if kind == "closed session" and not ignored:
                assert_saved(code, signal.SIGHUP)
                code = wait(start(*TRAIN, "--out_dir=out", "--init_from=auto"))
            assert code == 0, f"{fds} lost at change {n}: exit code {code}"
            assert_equals_undisturbed(Path("out"))


def assert_saved(code: int, number: signal.Signals) -> None:
    """Checks that a run which got a signal in its steps saved where it was stopped."""
    said = Path("said").read_text()
    Path("said").unlink()  # of this start alone
    assert code in (0, -number, 128 + number), f"{number.name}: {code}: {said}"
    if number not in (signal.SIGINT, signal.SIGKILL) and (code > 0 or code and "iter " in said):
        done = max((r["step"] + 1 for r in runs.records(Path("out"))), default=0)
        assert runs.latest(Path("out")).name == checkpoint.name_of(done)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "tries"), cases(0.04, SIGNALS))
def test_runs_ended_again_and_again(number, tries, one_try: Try, changes, undisturbed):
    """Sends up to three signals, and starts the same command after each, as Slurm does."""
    for k in tries:
        with one_try(f"{number.name} again and again: fastgpt train", k) as rng:
            for again in reversed(range(rng.randint(2, 4))):
                pid = start(*TRAIN, "--out_dir=out", "--init_from=auto")
                if again:
                    time.sleep(rng.random() * undisturbed[2])
                    os.kill(pid, number)
                code = wait(pid)
                assert again or code == 0, f"exit code {code}: {Path('said').read_text()}"
                assert_saved(code, number)
            assert_equals_undisturbed(Path("out"))
