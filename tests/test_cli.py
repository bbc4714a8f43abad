"""The command line: help, mistakes in one line without a traceback, exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt import cli
from fastgpt.config import settings
from fastgpt.data.token_files import load_scans, save_scans
from fastgpt.errors import RankError, SharedError, UserError
from fastgpt.storage import run_dir
from fastgpt_kernels.cache import keep
from tests import runs
from tests.process import fastgpt
from tests.runs import TINY

ROOT = Path(__file__).parents[1]


def run(capsys, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as e:
        cli.main(args)
    out, err = capsys.readouterr()
    return int(e.value.code or 0), out, err


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_overview_and_version(capsys):
    for args in ([], ["--help"], ["help"]):
        code, out, _ = run(capsys, *args)
        assert code == 0 and "fastgpt train" in out and "shakespeare_char" in out
        assert max(map(len, out.splitlines())) <= 100
        assert re.findall(r"^  fastgpt (\w+)", out, re.M) == [*cli.COMMANDS]
    for args in ("--version", "version"):
        assert run(capsys, args)[1].startswith("fastgpt 0.")


ENV = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}


def python(*args: str, **options) -> str:
    """Returns what a Python process prints that must end well."""
    command = [sys.executable, *args]
    got = subprocess.run(command, capture_output=True, text=True, env=ENV, **options)
    assert got.returncode == 0, got.stderr
    return got.stdout.strip()


def test_help_needs_no_docstrings():
    """`python -OO` strips them."""
    assert python("-OO", "-m", "fastgpt", "--help") == python("-m", "fastgpt", "--help")
    out = python("-OO", "-m", "fastgpt", "train", "--help")
    assert "None" not in out and "Transformer blocks." in out


# --- mistakes are one line -----------------------------------------------------------------------

# Mistakes that are found without PyTorch, and their messages; files are those of `places`.
LIGHT = {
    "trian": "fastgpt trian: no such command; did you mean train?",
    "train gpt22": "gpt22: no such preset; did you mean gpt2?",
    "train full/thesis.tex": "full/thesis.tex: no such preset; train on this text with --input=",
    "train zzz": "zzz: no such preset; there are laptop, desktop",
    "train laptop gpt2": "laptop gpt2: one preset or file is wanted",
    "train --n_layer=0": "--n_layer=0: wanted a whole number >= 1",
    "train laptop --n_head=3": "--n_head=3: must divide n_embd=128; the nearest",
    "train laptop --min_lr=1": "--min_lr=1: must not exceed",
    "train laptop --batch_size=5*x": "--batch_size=5*x: wanted a whole number",
    "train laptop --device=gpu": "--device=gpu: wanted auto, cpu, cuda",
    "train laptop --init_from=weights": "--init_from=weights: which? name a folder",
    "train laptop --weights=none": "--weights=none: there is no such file",
    "train laptop --input=none.txt": "--input=none.txt: there is no such file",
    "train laptop --input=a\nb\x1b[31m": r"--input=a\nb\x1b[31m: there is no such file",
    "train laptop --dataset=nope": "--dataset=nope: ",
    "train --input=a --dataset=b": "--dataset=b and --input=a: each names the data; leave one out",
    "eval --dataset=b --input=a": "--dataset=b and --input=a: each names the data; leave one out",
    "prepare a --dataset=a": "a a: one corpus is wanted",
    "train --init_from=resume --overwrite=True": "--overwrite=True: does not go with --init_",
    "train --init_from=resume --batch_size=auto": "--batch_size=auto: does not go with --init_",
    "train --init_from=resume --weights=x": "--weights=x: does not go with --init_from=resume",
    "train laptop --tokenizer=nope --input=bad.py": "--tokenizer=nope",
    "train laptop --out_dir=full": "--out_dir=full: is not empty",
    "train shakespeare_char": "run `fastgpt prepare shakespeare_char` once",
    "train --init_from=resume": "no run with a checkpoint under runs/ yet",
    "train --init_from=resume --out_dir=x": "--out_dir=x: no run there",
    "train config/train_gpt2.py": "cannot be read: No such file or directory; the preset gpt2 is",
    "train bad.py": "bad.py: line 2: os.remove('bad.toml'): is no assignment",
    "train bad.toml": "bad.toml: n_layr: no such setting",
    "train loop.toml": "loop.toml: cannot be read: Too many levels of symbolic links",
    "train full.toml": "full.toml: is a folder, a file is wanted",
    "train pipe.toml": "pipe.toml: is a FIFO, a file is wanted",
    "train /dev/zero.toml": "/dev/zero.toml: cannot be read: No such file",
    "train deep.toml": "deep.toml: not a TOML file",
    "train huge.toml": "huge.toml: n_layer=(a number of 1329 bits): wanted a whole",
    "train digits.toml": "digits.toml: not a TOML file",
    "train laptop --n_embd=768000000001 --n_head=1000000": "wanted a whole number >= 1 and <= 1,",
    f"train laptop --vocab_size={2**62}": "wanted a whole number >= 0 and <= 1,000,000,000",
    f"train laptop --eval_iters={2**62}": "wanted a whole number >= 1 and <= 1,000,000",
    "train laptop --dist_timeout=1e300": "--dist_timeout=1e+300: wanted a number > 0 and <= 1,",
    "train laptop --workers=4000": "--workers=4000: wanted a whole number >= 0 and <= 1,024",
    "train laptop --input=~nouser/x": "--input=~nouser/x: there is no such file",
    f"train laptop --n_layer={'9' * 5000}": "wanted a whole number >= 1",
    f"train laptop --input={'x' * 5000}": "File name too long",
    "sample hello": "hello: not a flag; the prompt is given as --start=TEXT",
    "sample --top_p=0": "--top_p=0.0: wanted a number > 0 and <= 1",
    "sample --device=tpu": "--device=tpu: wanted auto, cpu",
    "sample --init_from=resume --weights=x": "--weights=x: does not go with --init_from=resume",
    "eval --task=hellaswag --weights=x": "--task=hellaswag: needs its file",
    "export --weights=x": "--to: where to? name a new folder",
    "export --too=x": "--too: no such setting; did you mean --to?",
    "import": "import: one checkpoint is wanted, 0 given",
    "import x.pt --gelu=x": "--gelu=x: wanted one of erf, tanh",
    "import /dev/zero": "/dev/zero: cannot be read: there is no such file",
    "compare no run": "fastgpt: no: no run there (no config.toml); fastgpt train makes one",
    "compare": "compare: two runs or more are wanted, 0 given",
    "compare one": "compare: two runs or more are wanted, 1 given",
    "prepare": "prepare: which corpus?",
    "prepare a b": "a b: one corpus is wanted",
    "prepare a --shards=0": "--shards=0: wanted a whole number >= 1 and <= 103",
    "prepare shakespear": "did you mean shakespeare",
    "doctor x": "x: no such preset; there are laptop, desktop",
}


@pytest.fixture
def places(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("n_layr = 3")
    (tmp_path / "bad.py").write_text("import os\nos.remove('bad.toml')\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "full.toml").symlink_to("full")
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "deep.toml").write_text("a = " + "[" * 5000)
    (tmp_path / "huge.toml").write_text(f"n_layer = {10**400}")
    (tmp_path / "digits.toml").write_text(f"n_layer = {'9' * 5000}")


PROGRAM = """
import contextlib, io, json, sys
from fastgpt.cli import main
said = []
for args in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main(args.split(" "))
        except SystemExit as e:
            said.append((args, e.code, err.getvalue(), "torch" in sys.modules))
print(json.dumps(said))
"""


def test_help_and_mistakes_do_not_load_torch(places):
    """Runs all in one process: the first that loads PyTorch is named."""
    helps = [f"{command} --help" for command in cli.COMMANDS]
    out = python("-c", PROGRAM, input=json.dumps([*helps, *LIGHT]))
    for args, code, err, loaded in json.loads(out.splitlines()[-1]):
        assert not loaded and code == (2 if args in LIGHT else 0), args[:80]
        if args in LIGHT:
            assert err.startswith("fastgpt: ") and LIGHT[args] in err, err
            assert err.count("\n") == 1 and "\x1b" not in err and "Traceback" not in err, err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--device=cpu", "--dtype=float16"], "--dtype=float16: needs a GPU"),
        (["--device=cuda:99"], "--device=cuda:99: "),
        (["--input=\udcff.txt"], "\\udcff.txt: wanted text in UTF-8"),
        (["--input=text.txt", "--block_size=1024"], "block_size"),
    ],
)
def test_other_mistakes_leave_nothing_behind(args, message, capsys, tmp_path: Path):
    runs.write_text(tmp_path, n_lines=3)
    code, _, err = run(capsys, "train", "laptop", *args)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


UNTIL_ITER_0 = """
import io, os, sys
from fastgpt.cli import main
class Stdout(io.StringIO):
    def write(self, text):
        if text.startswith("iter 0"):
            os.write(1, " ".join(sys.modules).encode())
            os._exit(0)
sys.stdout = Stdout()
main(sys.argv[1:])
"""


def test_a_start_loads_little(tmp_path: Path):
    """Nothing for a terminal, a picture or a GPU. Making an optimizer loads a lot of PyTorch."""
    path = runs.write_text(tmp_path)
    loaded = python("-c", UNTIL_ITER_0, "train", *TINY, f"--input={path}", "--max_iters=1").split()
    spare = {"rich", "matplotlib", "tomllib", "http.server", "tensorboard", "wandb"}
    spare |= {f"fastgpt_kernels.{name}" for name in ("tune", "self_check", "worker")}
    assert len(loaded) > 1000 and not spare & {*loaded}
    program = "import sys, fastgpt.train.main; print(*sys.modules)"
    heavy = {"torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "triton"}
    assert not heavy & {*python("-c", program).split()}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ("WORLD_SIZE=4", "WORLD_SIZE is set, MASTER_ADDR is not: start with torchrun"),
        *((f"WORLD_SIZE={text}", "WORLD_SIZE=") for text in ("x", "-1", "1e3", "9" * 5000, "")),
        ("WORLD_SIZE=4 RANK=0 MASTER_ADDR=x", "MASTER_PORT is not: start with torchrun"),
        ("RANK=0 MASTER_ADDR=x MASTER_PORT=abc", "MASTER_PORT=abc: wanted a whole number"),
        ("RANK=0 MASTER_ADDR=x MASTER_PORT=65536", "MASTER_PORT=65536: wanted a whole number"),
    ],
)
def test_variables_that_torchrun_sets(variables: str, message: str, capsys, monkeypatch):
    for pair in variables.split():
        monkeypatch.setenv(*pair.split("="))
    code, _, err = run(capsys, "train", "laptop", "--device=cpu")
    assert code == 2 and message in err and err.count("\n") == 1


def test_no_home_folder_is_no_reason_to_fail(tmp_path: Path, monkeypatch):
    """Nor is a cache folder of nobody's; neither makes a folder called ~."""
    path = runs.write_text(tmp_path)
    for home, cache in (("~nouser", ""), ("", "~nouser/x")):
        monkeypatch.setenv("HOME", home or str(tmp_path))
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        save_scans(path, {})
        assert load_scans(path) == {} and "XDG" in str(keep("tune", "x", {"a": 1}))
    assert not list(tmp_path.glob("~*"))


def test_a_rank_waits_for_rank_0_to_speak_and_speaks_if_it_was_alone(capsys, monkeypatch):
    monkeypatch.setattr(cli, "WAIT_FOR_RANK_0", 0.01)
    for error, said in (
        (UserError("no such file"), "fastgpt: rank 3: no such file\n"),
        (SharedError("rank 0 could not save"), ""),
        (RankError("rank 3: loss nan"), "fastgpt: rank 3: loss nan\n"),
    ):
        monkeypatch.setenv("RANK", "3")
        cli._print_mistake(error)
        assert capsys.readouterr().err == said
        monkeypatch.setenv("RANK", "0")
        cli._print_mistake(error)
        assert capsys.readouterr().err == f"fastgpt: {error}\n"


def test_prepare_then_train_then_again(tmp_path: Path):
    path = runs.write_text(tmp_path)
    said = fastgpt(tmp_path, "prepare", f"--input={path}", "--tokenizer=char")
    assert "train and" in said and "(char)" in said
    said = fastgpt(tmp_path, "prepare", f"--input={path}", "--tokenizer=char")
    assert "already there" in said
    for _ in range(2):
        fastgpt(tmp_path, "train", *TINY, f"--input={path}", "--tokenizer=char", "--max_iters=2")
    assert len(list((tmp_path / "runs").iterdir())) == 2
    assert len([p for p in (tmp_path / "data").iterdir() if p.name[0] != "."]) == 1


def test_doctor_is_one_screen(tmp_path: Path):
    out = fastgpt(tmp_path, "doctor")
    for row in ("torch", "triton", "GPU", "precision", "peak", "ops", "disk", "data", "runs"):
        assert f"\n{row} " in out, row
    assert len(out.splitlines()) < 40 and "attention: eager" in out


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device", "x/y"), 2, "x/y: No space left on device; a file"),
        (KeyError("a\nb"), 1, "fastgpt: a bug in fastgpt"),
    ],
    ids=["system", "bug"],
)
def test_errors_of_the_system_are_one_line_and_a_bug_keeps_its_traceback(
    error, code, message, capsys, monkeypatch
):
    def broken(args):
        raise error

    monkeypatch.setattr(cli, "_run", broken)
    got, _, err = run(capsys, "train")
    assert got == code and message in err.splitlines()[-1]
    assert ("Traceback" in err and "in broken" in err) == (code == 1) == (err.count("\n") > 1)


def test_output_that_is_full_closed_cut_off_or_ascii():
    """Says that a disk is full, writes nothing to nowhere, and escapes what an encoding lacks."""
    python = f"{sys.executable} -m fastgpt"
    script = f"""
    {python} --help > /dev/full; echo "full $?"
    {python} --help >&-; echo "closed $?"
    {python} --help 2>&- >/dev/null; echo "no errors $?"
    {python} --help | head -1
    PYTHONIOENCODING=ascii {python} train laptop --input=größe.txt; echo "ascii $?"
    """
    got = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=ENV)
    *said, first, last = got.stdout.splitlines()
    assert said == ["full 2", "closed 0", "no errors 0"] and last == "ascii 2", got
    assert first.startswith("fastgpt 0.")
    assert got.stderr.splitlines() == [
        "fastgpt: standard output, or a file: No space left on device",
        "fastgpt: --input=gr\\xf6\\xdfe.txt: there is no such file or folder",
    ]


@pytest.mark.parametrize("flag", ["--batch_size=auto", "--weights=w"])
def test_a_run_is_gone_on_with_by_the_flags_that_began_it(flag):
    """--init_from=auto, as torchrun restarts it, with another split of the same global batch."""
    args = ["laptop", "--out_dir=out", "--init_from=auto", flag]
    args += ["--gradient_accumulation_steps=8"] * ("auto" in flag)
    config, _ = cli._training(args)
    split = {"batch_size": config.optim.rows // 2, "gradient_accumulation_steps": 2}
    Path("out/checkpoints/step_00000010").mkdir(parents=True)
    run_dir.save_config(Path("out"), settings.replace(config, **split))
    again, _ = cli._training(args)
    assert again.run.init_from == "resume" and again.optim.rows == config.optim.rows
