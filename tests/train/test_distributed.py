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
TEXT = "--input=text.txt"
BOTH = pytest.mark.parametrize("parallel", ["ddp", "fsdp"])


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
        # --standalone takes a free port; one thread per rank.
        launch = ["--standalone", f"--nproc_per_node={n}", f"--max_restarts={restarts}"]
        launch += [str(ROOT / "tests" / "parallel_worker.py"), "train", *args]
        self.err = cwd / f".err-{os.urandom(4).hex()}"
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "FAULT": fault}
        program = "torchrun"
        if interpret:  # Triton looks for this when it is imported: too late in a forked rank
            program, environment["TRITON_INTERPRET"] = "torchrun, new interpreters", "1"
        super().__init__(cwd, *launch, environment=environment, program=program, err=self.err)

    @property
    def said(self) -> list[str]:
        """Lines of the ranks on stderr, without torchrun's own words."""
        lines = self.err.read_text().splitlines()
        return [line for line in lines if line.startswith("fastgpt: ")]


def train(cwd: Path, n: int, out: str, *args: str, ok: bool = True, **options) -> Torchrun:
    """Runs n ranks to their end, in the folder `out`."""
    job = Torchrun(cwd, n, *args, f"--out_dir={out}", **options)
    assert (job.wait() == 0) == ok, job.output + job.err.read_text()
    return job


def refused(cwd: Path, out: str, *args: str, **options) -> str:
    """Returns the one line in which two ranks end."""
    job = train(cwd, 2, out, *TINY, *args, ok=False, **options)
    assert len(job.said) == 1, job.err.read_text()
    return job.said[0].removeprefix("fastgpt: ")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A text, and the run of one process, saved at 10 and 20, that others are compared with."""
    folder = tmp_path_factory.mktemp("home")
    runs.write_text(folder)
    fastgpt(folder, "train", *TINY, TEXT, "--out_dir=one")
    return folder


def values(run_dir: Path) -> list[float]:
    """Losses, gradient norms and evaluations, in their order."""
    steps = [x for r in runs.records(run_dir) for x in (r["loss"], r["grad_norm"])]
    evals = runs.records(run_dir, "eval")
    return steps + [x for r in evals for x in (r["train_loss"], r["val_loss"])]


def assert_same(home: Path, name: str, other: str, file: str = "model") -> None:
    """Compares curves and the last checkpoint's tensors, to rounding."""
    assert values(home / name) == pytest.approx(values(home / other), rel=1e-4)
    a, b = (load_file(runs.latest(home / x) / f"{file}.safetensors") for x in (name, other))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


@pytest.mark.quick("2-ddp")
@pytest.mark.parametrize(("n", "parallel"), [(2, "ddp"), (4, "ddp"), (2, "fsdp"), (4, "fsdp")])
def test_any_number_of_ranks_gives_the_curve_of_one(home: Path, n: int, parallel: str):
    """Four micro-batches over 2 or 4 ranks (accumulated or not), three evaluation batches."""
    name = f"{parallel}{n}"
    # Recomputed activations are the same numbers.
    again = f"--activation_checkpointing={n == 2}"
    job = train(home, n, name, *TINY, TEXT, f"--parallel={parallel}", again)
    assert_same(home, name, "one")
    lines = job.output.splitlines()
    assert sum(line.startswith("iter ") for line in lines) == 20, "one log, of one rank"
    last = runs.records(home / name)[-1]
    assert last["ranks"] == n and last["time_ms_min"] <= last["time_ms_max"]


@pytest.mark.quick("fsdp-2")
@pytest.mark.parametrize(("parallel", "n"), [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4)])
def test_muon_on_ranks(home: Path, parallel: str, n: int):
    """Two blocks over 2 or 4 ranks, rows that do not divide; cut, and continued in one process.

    Four ranks leave two of them nothing to make orthogonal.
    """
    name = f"muon-{parallel}{n}"
    args = (*TINY, TEXT, "--optimizer=muon", "--n_embd=34", "--eval_iters=1")
    if not (home / "muon").exists():
        fastgpt(home, "train", *args, "--out_dir=muon")
    train(home, n, name, *args, f"--parallel={parallel}", "--max_iters=10")
    fastgpt(home, "train", "--init_from=resume", f"--out_dir={name}", "--max_iters=20")
    assert_same(home, name, "muon", "optimizer")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run in the interpreter here")
def test_biases_left_to_a_kernel_outlive_the_gathered_weights(home: Path):
    """FSDP frees a branch's parameters when it returns; the norm's kernel reads its bias later."""
    curves = []
    for parallel in ("ddp", "fsdp"):
        args = ("--kernels=triton", "--bias=True", "--max_iters=2", "--n_head=1", "--eval_iters=1")
        name = f"bias-{parallel}"
        train(home, 2, name, *TINY, TEXT, f"--parallel={parallel}", *args, interpret=True)
        curves.append([r["loss"] for r in runs.records(home / name)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


@pytest.mark.slow
@BOTH
def test_compiled_on_two_ranks(home: Path, parallel: str):
    name = f"compiled-{parallel}"
    args = ("--max_iters=4", "--compile=True", f"--parallel={parallel}")
    train(home, 2, name, *TINY, TEXT, *args)
    found, wanted = ([r["loss"] for r in runs.records(home / x)][:4] for x in (name, "one"))
    assert found == pytest.approx(wanted, rel=1e-4)


def test_a_mistake_of_all_ranks_is_said_once(home: Path):
    """Nothing is written."""
    for args, message in (
        ([TEXT, "--max_autotune=True", "--compile=False"], "--max_autotune=True: "),
        (["--input=gone.txt"], "--input=gone.txt: "),
        ([TEXT, "--reduce_dtype=bfloat16", "--parallel=ddp"], "--reduce_dtype=bfloat16: DDP "),
        ([TEXT, "--batch_size=3", "--gradient_accumulation_steps=3"], "--batch_size=3 x --grad"),
    ):
        assert refused(home, "mistake", *args).startswith(message)
        assert not (home / "mistake").exists()


@pytest.mark.quick("adamw")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_device_itself_skips_a_sharded_update(home: Path, optimizer: str):
    """No step waits for the host: fused AdamW takes found_inf for sharded weights too."""
    name = f"skip-{optimizer}"
    args = (f"--optimizer={optimizer}", "--parallel=fsdp", "--log_interval=8", "--eval_interval=99")
    assert refused(home, name, TEXT, *args, fault="nan:1:9").startswith("step 4 on rank 1")
    at = home / name / "nonfinite" / "step_00000004" / "model.safetensors"
    assert all(t.isfinite().all() for t in load_file(at).values())


@pytest.mark.slow
def test_resumed_under_other_layouts(home: Path):
    """4 ranks with FSDP, then 2 with DDP, then one process: the straight run to rounding."""
    train(home, 4, "mixed", *TINY, TEXT, "--max_iters=6", "--parallel=fsdp")
    train(home, 2, "mixed", "--init_from=resume", "--max_iters=13", "--parallel=ddp")
    fastgpt(home, "train", "--init_from=resume", "--out_dir=mixed", "--max_iters=20")
    mixed, one = ([r["loss"] for r in runs.records(home / x)] for x in ("mixed", "one"))
    assert mixed == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_in_the_same_layout_is_exact(home: Path, optimizer: str):
    args = (*TINY, TEXT, "--parallel=fsdp", "--dropout=0.1", f"--optimizer={optimizer}")
    straight, cut = f"straight-{optimizer}", f"cut-{optimizer}"
    train(home, 2, straight, *args)
    train(home, 2, cut, *args, "--max_iters=9")
    train(home, 2, cut, "--init_from=resume", "--max_iters=20")
    assert values(home / straight)[:40] == values(home / cut)[:40]
    assert runs.tensor_files(home / straight) == runs.tensor_files(home / cut)


def test_sigterm_to_torchrun_saves(home: Path):
    args = (*TINY, TEXT, "--out_dir=term", "--max_iters=100000", "--eval_interval=100000")
    job = Torchrun(home, 2, *args)
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
    job = train(home, 2, "one-term", *TINY, TEXT, fault="term:1:9", ok=False)
    assert "SIGTERM: stopping after step 6" in job.output
    assert runs.latest(home / "one-term").name == "step_00000006" and job.said == []
    fastgpt(home, "train", "--init_from=resume", "--out_dir=one-term")
    assert_same(home, "one-term", "one")


def test_a_killed_rank_ends_the_job(home: Path):
    job = train(home, 2, "killed", *TINY, TEXT, fault="kill:1:9", ok=False)
    text = job.err.read_text()
    assert "lost the others (silent: rank 1" in text or "rank      : 1 (local_rank: 1)" in text


@pytest.mark.slow
def test_a_hanging_rank_ends_the_job(home: Path):
    """Bounded by --dist_timeout and torchrun's 30 s between SIGTERM and SIGKILL."""
    said = refused(home, "hung", TEXT, "--dist_timeout=4", fault="hang:1:9")
    assert "silent: rank 1;" in said


@pytest.mark.quick("ddp")
@BOTH
def test_a_crash_of_rank_0_in_a_save_loses_nothing(home: Path, parallel: str):
    """Killed in the save of step 20, with all tensors written: the run goes on from step 10."""
    name = f"crash-{parallel}"
    train(home, 2, name, *TINY, TEXT, f"--parallel={parallel}", fault="crash:0:5", ok=False)
    assert runs.latest(home / name).name == "step_00000010"
    again = fastgpt(home, "train", "--init_from=resume", f"--out_dir={name}")
    assert f"resuming from {name}/checkpoints/step_00000010" in again
    assert_same(home, name, "one")
    assert not [p for p in (home / name / "checkpoints").iterdir() if p.name.startswith(".")]


@pytest.mark.quick("ddp")
@BOTH
def test_a_save_that_cannot_be_written_is_one_line(home: Path, parallel: str):
    name = f"full-{parallel}"
    said = refused(home, name, TEXT, f"--parallel={parallel}", fault="full:0:20000")
    assert f"{name}/checkpoints/" in said


@pytest.mark.quick("ddp")
@BOTH
def test_a_nan_on_one_rank_stops_all_and_names_it(home: Path, parallel: str):
    name = f"nan-{parallel}"
    said = refused(home, name, TEXT, f"--parallel={parallel}", fault="nan:1:9")
    assert said.startswith("step 4 on rank 1: loss nan") and (home / name / "nonfinite").exists()


@pytest.mark.slow
def test_torchrun_restarts_and_the_run_goes_on(home: Path):
    options = {"fault": "kill:1:31", "restarts": 1}
    job = train(home, 2, "restarted", *TINY, TEXT, "--init_from=auto", **options)
    assert "resuming from restarted/checkpoints/step_00000010" in job.output
    assert_same(home, "restarted", "one")


def test_a_restart_has_to_find_its_run(home: Path):
    """--init_from=auto never replaces another run, nor one with a checkpoint."""
    args = (*TINY, TEXT, "--overwrite=True")
    job = train(home, 2, "one", *args, restarts=1, ok=False)
    assert {"--max-restarts: a restart has to find its run" in line for line in job.said} == {True}


@pytest.mark.slow
def test_ranks_choose_one_batch_size(home: Path):
    job = train(home, 2, "auto", *TINY, TEXT, "--max_iters=2", "--batch_size=auto")
    (chosen,) = (x.split()[1] for x in job.output.splitlines() if x.endswith(", chosen"))
    assert f"batch_size = {chosen}\n" in (home / "auto" / "config.toml").read_text()


@pytest.mark.quick("learning_rate*")
@pytest.mark.parametrize(
    "flag", ["learning_rate=0.1", "dtype=bfloat16", "n_layer=1", "max_iters=5", "eval_interval=3"]
)
def test_a_rank_with_another_setting_is_named(home: Path, flag: str):
    """Before the first step; nothing is written."""
    key, _, value = flag.partition("=")
    said = refused(home, f"x-{key}", TEXT, fault=f"flag:1:{flag}")
    assert said.startswith(f"rank 1 has {key}={value}, rank 0 has {key}=")
    assert not (home / f"x-{key}").exists()


def test_a_rank_with_other_data_is_named(home: Path):
    """Two hosts may have other bytes at the same path."""
    for folder, first in ((home / "tok", 0), (home / "host2/tok", 1)):
        folder.mkdir(parents=True)
        tokens = np.arange(4000, dtype=np.uint16) % 50
        tokens[0] = first
        for split in ("train", "val"):
            tokens.tofile(folder / f"{split}.bin")
    said = refused(home, "y", "--dataset=tok", fault=f"cwd:1:{home / 'host2'}")
    assert said.startswith("rank 1 has data=") and ", rank 0 has data=" in said
    assert not (home / "y").exists()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 12])
def test_ranks_share_the_rows(size: int):
    slices = [Ranks(r, size).rows(24) for r in range(size)]
    assert sum((list(range(24)[s]) for s in slices), []) == list(range(24))
    micro = Ranks(0, size).micro_batch(24, 4)
    assert micro <= 4 and 24 // size % micro == 0


def test_the_error_names_numbers_that_divide():
    o = OptimConfig(batch_size=1, gradient_accumulation_steps=10)
    with pytest.raises(UserError, match=r"--gradient_accumulation_steps=8, .* 1, 2, 5, 10 ranks"):
        Ranks(0, 4).check(o)
    Ranks(0, 4).check(OptimConfig(batch_size=1, gradient_accumulation_steps=12))


@pytest.mark.cuda
@BOTH
def test_nccl_with_one_rank_is_the_run_without(home: Path, parallel: str):
    tiny = [x for x in TINY if x != "--device=cpu"] + [TEXT, "--dtype=bfloat16"]
    tiny += ["--compile=False", "--cuda_graph=False"]
    name = f"nccl-{parallel}"
    fastgpt(home, "train", *tiny, f"--out_dir={name}-plain")
    train(home, 1, name, *tiny, f"--parallel={parallel}")
    assert values(home / name) == pytest.approx(values(home / f"{name}-plain"), rel=2e-2)
