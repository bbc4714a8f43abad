"""Several ranks as real processes under torchrun: Gloo, CPU, a tiny model."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastgpt.config.schema import OptimConfig
from fastgpt.errors import UserError
from fastgpt.train.distributed import Ranks
from tests import runs
from tests.process import Command, fastgpt

ROOT = Path(__file__).parents[2]
TINY = (*runs.TINY, "--dropout=0", "--gradient_accumulation_steps=4", "--eval_iters=3")


class Torchrun(Command):
    """`torchrun --standalone` on the worker, stdout and stderr apart."""

    def __init__(
        self,
        cwd: Path,
        n: int,
        *args: str,
        fault: str = "none:0:0",
        restarts: int = 0,
        interpret: bool = False,
    ):
        # --standalone takes a free port; one thread a rank.
        launch = ["--standalone", f"--nproc_per_node={n}", f"--max_restarts={restarts}"]
        launch += [str(ROOT / "tests" / "parallel_worker.py"), *args]
        self.err = cwd / f".err-{os.urandom(4).hex()}"
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "FAULT": fault}
        program = "torchrun"
        if interpret:  # Triton looks for this when it is imported: too late in a forked rank
            program, environment["TRITON_INTERPRET"] = "torchrun, new interpreters", "1"
        super().__init__(cwd, *launch, environment=environment, program=program, err=self.err)

    @property
    def said(self) -> list[str]:
        """What ranks said to stderr, without torchrun's own words."""
        lines = self.err.read_text().splitlines()
        return [line for line in lines if line.startswith("fastgpt: ")]


def train(cwd: Path, n: int, *args: str, code: int = 0, interpret: bool = False) -> Torchrun:
    job = Torchrun(cwd, n, "train", *args, interpret=interpret)
    got = job.wait()
    assert (got == 0) == (code == 0), job.output + job.err.read_text()
    return job


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A text and the run of one process that all others are held against, saved at 10 and 20."""
    folder = tmp_path_factory.mktemp("home")
    runs.write_text(folder)
    fastgpt(folder, "train", *TINY, "--input=text.txt", "--out_dir=one")
    return folder


def values(run_dir: Path) -> list[float]:
    """Losses, gradient norms and evaluations, in their order."""
    steps = [x for r in runs.records(run_dir) for x in (r["loss"], r["grad_norm"])]
    evals = runs.records(run_dir, "eval")
    return steps + [x for r in evals for x in (r["train_loss"], r["val_loss"])]


@pytest.mark.quick("2-ddp")
@pytest.mark.parametrize(("n", "strategy"), [(2, "ddp"), (4, "ddp"), (2, "fsdp"), (4, "fsdp")])
def test_any_number_of_ranks_gives_the_curve_of_one(home: Path, n: int, strategy: str):
    """Four micro-batches over 2 or 4 ranks (accumulated or not), three evaluation batches."""
    name = f"{strategy}{n}"
    args = (*TINY, "--input=text.txt", f"--out_dir={name}", f"--parallel={strategy}")
    # Recomputed activations are the same numbers.
    job = train(home, n, *args, f"--activation_checkpointing={n == 2}")
    assert values(home / name) == pytest.approx(values(home / "one"), rel=1e-4)
    lines = job.output.splitlines()
    assert sum(line.startswith("iter ") for line in lines) == 20, "one log, of one rank"
    last = runs.records(home / name)[-1]
    assert last["ranks"] == n and last["time_ms_min"] <= last["time_ms_max"]
    a, b = (load_file(runs.latest(home / x) / "model.safetensors") for x in (name, "one"))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


@pytest.mark.quick("fsdp-2")
@pytest.mark.parametrize(("strategy", "n"), [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4)])
def test_muon_on_ranks(home: Path, strategy: str, n: int):
    """Two blocks over 2 or 4 ranks, rows that do not divide; cut, and gone on with in one process.

    Four ranks leave two of them nothing to make orthogonal.
    """
    name = f"muon-{strategy}{n}"
    args = (*TINY, "--input=text.txt", "--optimizer=muon", "--n_embd=34", "--eval_iters=1")
    if not (home / "muon").exists():
        fastgpt(home, "train", *args, "--out_dir=muon")
    args = (*args, f"--out_dir={name}", f"--parallel={strategy}")
    train(home, n, *args, "--max_iters=10")
    fastgpt(home, "train", "--init_from=resume", f"--out_dir={name}", "--max_iters=20")
    assert values(home / name) == pytest.approx(values(home / "muon"), rel=1e-4)
    a, b = (load_file(runs.latest(home / x) / "optimizer.safetensors") for x in (name, "muon"))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run in the interpreter here")
def test_biases_left_to_a_kernel_outlive_the_gathered_weights(home: Path):
    """FSDP frees a branch's parameters when it returns; the norm's kernel reads its bias later."""
    curves = []
    for strategy in ("ddp", "fsdp"):
        name = f"bias-{strategy}"
        args = (*TINY, "--input=text.txt", f"--parallel={strategy}", f"--out_dir={name}")
        args += ("--kernels=triton", "--bias=True", "--max_iters=2", "--n_embd=32", "--n_head=1")
        train(home, 2, *args, "--eval_iters=1", interpret=True)
        curves.append([r["loss"] for r in runs.records(home / name)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_compiled_on_two_ranks(home: Path, strategy: str):
    name = f"compiled-{strategy}"
    args = (*TINY, "--input=text.txt", f"--out_dir={name}", "--max_iters=4", "--compile=True")
    train(home, 2, *args, f"--parallel={strategy}")
    losses = [r["loss"] for r in runs.records(home / "one")][:4]
    assert [r["loss"] for r in runs.records(home / name)] == pytest.approx(losses, rel=1e-4)


def test_bf16_gradients_of_ddp_need_nccl(home: Path):
    args = (*TINY, "--input=text.txt", "--out_dir=bf16", "--reduce_dtype=bfloat16")
    job = train(home, 2, *args, "--parallel=ddp", code=2)
    assert len(job.said) == 1 and "--reduce_dtype=float32" in job.said[0], job.err.read_text()


def test_a_mistake_of_all_ranks_is_said_once(home: Path):
    args = (*TINY, "--input=text.txt", "--out_dir=mistake", "--max_autotune=True")
    job = train(home, 2, *args, "--compile=False", code=2)
    assert len(job.said) == 1 and job.said[0].startswith("fastgpt: --max_autotune=True"), job.said
    job = train(home, 2, *TINY, "--input=gone.txt", "--out_dir=mistake", code=2)
    assert len(job.said) == 1 and "gone.txt" in job.said[0], job.said


@pytest.mark.quick("adamw")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_device_itself_skips_a_sharded_update(home: Path, optimizer: str):
    """No step waits for the host: fused AdamW takes found_inf for sharded weights too."""
    args = (*TINY, "--input=text.txt", f"--optimizer={optimizer}", f"--out_dir=skip-{optimizer}")
    args = (*args, "--parallel=fsdp", "--log_interval=8")
    job = Torchrun(home, 2, "train", *args, "--eval_interval=100", fault="nan:1:9")
    assert job.wait() != 0
    assert len(job.said) == 1 and job.said[0].startswith("fastgpt: step 4 on rank 1"), job.said
    at = home / f"skip-{optimizer}" / "nonfinite" / "step_00000004" / "model.safetensors"
    assert all(t.isfinite().all() for t in load_file(at).values())


@pytest.mark.slow
def test_resumed_under_other_layouts(home: Path):
    """4 ranks with FSDP, then 2 with DDP, then one process: the straight run to rounding."""
    train(home, 4, *TINY, "--input=text.txt", "--out_dir=mixed", "--max_iters=6", "--parallel=fsdp")
    again = ("--init_from=resume", "--out_dir=mixed")
    train(home, 2, *again, "--max_iters=13", "--parallel=ddp")
    fastgpt(home, "train", *again, "--max_iters=20")
    mixed = [r["loss"] for r in runs.records(home / "mixed")]
    assert mixed == pytest.approx([r["loss"] for r in runs.records(home / "one")], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_in_the_same_layout_is_exact(home: Path, optimizer: str):
    args = (*TINY, "--input=text.txt", "--parallel=fsdp", "--dropout=0.1")
    args = (*args, f"--optimizer={optimizer}")
    straight, cut = (home / f"{name}-{optimizer}" for name in ("straight", "cut"))
    train(home, 2, *args, f"--out_dir={straight.name}")
    train(home, 2, *args, f"--out_dir={cut.name}", "--max_iters=9")
    train(home, 2, "--init_from=resume", f"--out_dir={cut.name}", "--max_iters=20")
    clock = ("time_ms_min", "time_ms_mean", "time_ms_max", "tokens_per_second_per_rank")
    a, b = (
        [{k: v for k, v in r.items() if k not in clock} for r in runs.records(x)]
        for x in (straight, cut)
    )
    assert a == b
    assert runs.tensor_files(straight) == runs.tensor_files(cut)


def test_sigterm_to_torchrun_saves(home: Path):
    args = (*TINY, "--input=text.txt", "--out_dir=term", "--max_iters=100000", "--parallel=ddp")
    job = Torchrun(home, 2, "train", *args, "--eval_interval=100000")
    end = time.monotonic() + 60
    while "iter 20:" not in job.output and time.monotonic() < end:
        time.sleep(0.1)
    began = time.monotonic()
    job.kill(signal.SIGTERM)
    assert job.wait(30) != 0 and time.monotonic() - began < 30
    assert "SIGTERM: stopping after step" in job.output
    assert int(runs.latest(home / "term").name[5:]) >= 20
    assert job.said == []


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_same_step(home: Path):
    """It comes in step 4, is asked about before step 5, and the answer is there after step 5."""
    args = (*TINY, "--input=text.txt", "--out_dir=one-term", "--parallel=ddp")
    job = Torchrun(home, 2, "train", *args, fault="term:1:9")
    assert job.wait() != 0
    assert "SIGTERM: stopping after step 6" in job.output
    assert runs.latest(home / "one-term").name == "step_00000006" and job.said == []
    fastgpt(home, "train", "--init_from=resume", "--out_dir=one-term")
    assert values(home / "one-term") == pytest.approx(values(home / "one"), rel=1e-4)


def test_a_killed_rank_ends_the_job(home: Path):
    args = (*TINY, "--input=text.txt", "--out_dir=killed", "--parallel=ddp")
    job = Torchrun(home, 2, "train", *args, fault="kill:1:9")
    assert job.wait() != 0
    text = job.err.read_text()
    assert "lost the others (silent: rank 1" in text or "rank      : 1 (local_rank: 1)" in text


@pytest.mark.slow
def test_a_hanging_rank_ends_the_job(home: Path):
    """Bounded by --dist_timeout and torchrun's 30 s between SIGTERM and SIGKILL."""
    args = (*TINY, "--input=text.txt", "--out_dir=hung", "--parallel=ddp", "--dist_timeout=4")
    job = Torchrun(home, 2, "train", *args, fault="hang:1:9")
    assert job.wait() != 0
    assert len(job.said) == 1 and "silent: rank 1;" in job.said[0], job.err.read_text()


@pytest.mark.quick("ddp")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_crash_of_rank_0_in_a_save_loses_nothing(home: Path, strategy: str):
    """Killed in the save of step 20, with all tensors written: the run goes on from step 10."""
    name = f"crash-{strategy}"
    args = (*TINY, "--input=text.txt", f"--out_dir={name}", f"--parallel={strategy}")
    job = Torchrun(home, 2, "train", *args, fault="crash:0:5")
    assert job.wait() != 0
    assert runs.latest(home / name).name == "step_00000010"
    again = fastgpt(home, "train", "--init_from=resume", f"--out_dir={name}")
    assert f"resuming from {name}/checkpoints/step_00000010" in again
    assert values(home / name) == pytest.approx(values(home / "one"), rel=1e-4)
    left = [p.name for p in (home / name / "checkpoints").iterdir() if p.name.startswith(".")]
    assert left == []


@pytest.mark.quick("ddp")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_save_that_cannot_be_written_is_one_line(home: Path, strategy: str):
    args = (*TINY, "--input=text.txt", f"--out_dir=full-{strategy}", f"--parallel={strategy}")
    job = Torchrun(home, 2, "train", *args, fault="full:0:20000")
    assert job.wait() != 0
    assert len(job.said) == 1 and f"full-{strategy}/checkpoints/" in job.said[0], job.said


@pytest.mark.quick("ddp")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_nan_on_one_rank_stops_all_and_names_it(home: Path, strategy: str):
    out = f"--out_dir=nan-{strategy}"
    args = (*TINY, "--input=text.txt", out, f"--parallel={strategy}")
    job = Torchrun(home, 2, "train", *args, fault="nan:1:9")
    assert job.wait() != 0
    assert len(job.said) == 1, job.err.read_text()
    assert job.said[0].startswith("fastgpt: step 4 on rank 1: loss nan")
    assert (home / f"nan-{strategy}" / "nonfinite").exists()


@pytest.mark.slow
def test_torchrun_restarts_and_the_run_goes_on(home: Path):
    args = (*TINY, "--input=text.txt", "--out_dir=restarted", "--parallel=ddp")
    args = (*args, "--init_from=auto")
    job = Torchrun(home, 2, "train", *args, fault="kill:1:31", restarts=1)
    assert job.wait() == 0, job.err.read_text()
    assert "resuming from restarted/checkpoints/step_00000010" in job.output
    assert values(home / "restarted") == pytest.approx(values(home / "one"), rel=1e-4)


def test_a_batch_that_does_not_divide(home: Path):
    args = (*TINY, "--input=text.txt", "--batch_size=3", "--gradient_accumulation_steps=3")
    job = train(home, 2, *args, "--out_dir=odd", code=2)
    assert len(job.said) == 1 and "9 rows do not divide among 2 ranks" in job.said[0]
    assert not (home / "odd").exists()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 12])
def test_ranks_share_the_rows(size: int):
    slices = [Ranks(r, size).rows(24) for r in range(size)]
    assert sum((list(range(24)[s]) for s in slices), []) == list(range(24))
    micro = Ranks(0, size).micro_batch(24, 4)
    assert micro <= 4 and 24 // size % micro == 0


@pytest.mark.quick("learning_rate*")
@pytest.mark.parametrize(
    "flag", ["learning_rate=0.1", "dtype=bfloat16", "n_layer=1", "max_iters=5", "eval_interval=3"]
)
def test_a_rank_with_another_setting_is_named(home: Path, flag: str):
    """Before the first step; nothing is written."""
    key, _, value = flag.partition("=")
    args = (*TINY, "--input=text.txt", f"--out_dir=x-{key}")
    job = Torchrun(home, 2, "train", *args, fault=f"flag:1:{flag}")
    assert job.wait() != 0
    (line,) = job.said
    assert line.startswith(f"fastgpt: rank 1 has {key}={value}, rank 0 has {key}=")
    assert not (home / f"x-{key}").exists()


def test_a_rank_with_other_data_is_named(home: Path):
    """Two hosts may have other bytes at the same path."""
    for folder, first in ((home / "tok", 0), (home / "host2/tok", 1)):
        folder.mkdir(parents=True)
        tokens = np.arange(4000, dtype=np.uint16) % 50
        tokens[0] = first
        for split in ("train", "val"):
            tokens.tofile(folder / f"{split}.bin")
    fault = f"cwd:1:{home / 'host2'}"
    job = Torchrun(home, 2, "train", *TINY, "--dataset=tok", "--out_dir=y", fault=fault)
    assert job.wait() != 0
    (line,) = job.said
    assert line.startswith("fastgpt: rank 1 has data=") and ", rank 0 has data=" in line
    assert not (home / "y").exists()


def test_the_error_names_numbers_that_divide():
    o = OptimConfig(batch_size=1, gradient_accumulation_steps=10)
    with pytest.raises(UserError, match=r"--gradient_accumulation_steps=8, .* 1, 2, 5, 10 ranks"):
        Ranks(0, 4).check(o)
    Ranks(0, 4).check(OptimConfig(batch_size=1, gradient_accumulation_steps=12))


@pytest.mark.cuda
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_nccl_with_one_rank_is_the_run_without(home: Path, strategy: str):
    tiny = [x for x in TINY if x != "--device=cpu"] + ["--input=text.txt", "--dtype=bfloat16"]
    tiny += ["--compile=False", "--cuda_graph=False"]
    name = f"nccl-{strategy}"
    fastgpt(home, "train", *tiny, f"--out_dir={name}-plain")
    train(home, 1, *tiny, f"--out_dir={name}", f"--parallel={strategy}")
    assert values(home / name) == pytest.approx(values(home / f"{name}-plain"), rel=2e-2)


def test_a_restart_has_to_find_its_run(home: Path):
    """--init_from=auto never replaces another run, nor one with a checkpoint."""
    args = (*TINY, "--input=text.txt", "--out_dir=one", "--overwrite=True")
    job = Torchrun(home, 2, "train", *args, restarts=1)
    assert job.wait() != 0
    assert {"--max-restarts: a restart has to find its run" in line for line in job.said} == {True}


@pytest.mark.slow
def test_ranks_choose_one_batch_size(home: Path):
    args = (*TINY, "--input=text.txt", "--out_dir=auto", "--max_iters=2")
    job = train(home, 2, *args, "--batch_size=auto")
    (chosen,) = (x.split()[1] for x in job.output.splitlines() if x.endswith(", chosen"))
    assert f"batch_size = {chosen}\n" in (home / "auto" / "config.toml").read_text()
