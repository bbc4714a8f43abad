"""Each example runs as it stands, on fewer and smaller steps; the notebook from top to bottom."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from subprocess import check_output

import pytest
import torch

import fastgpt
from fastgpt import api
from fastgpt.data.tokenizer import ByteTokenizer
from fastgpt.errors import UserError
from tests import runs

FIT = api.fit  # the fixture's makes everything small
EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL: dict = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 2}
SMALL |= {"gradient_accumulation_steps": 1, "eval_iters": 1, "peak_tflops": 1.0}
SMALL |= {"device": "cpu", "compile": False}


@pytest.fixture(autouse=True)
def one_thread():
    """Limits PyTorch to one thread, since tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(tmp_path: Path, monkeypatch) -> Path:
    """A folder to work in, with a text that stands for the standard library."""
    monkeypatch.chdir(tmp_path)
    text = runs.write_text(tmp_path)

    def smaller(config="laptop", **changes):
        own = {"input": str(text), "tokenizer": "byte"}
        fewer = {"max_iters": 2, "eval_interval": 2, "log_interval": 1}
        if changes.get("init_from") == "weights":
            fewer["block_size"] = 16
        return FIT(config, **{**own, **changes, **SMALL, **fewer})

    monkeypatch.setattr(api, "fit", smaller)
    return tmp_path


def test_the_examples_in_their_order(small: Path, capsys, monkeypatch):
    """Later ones use the run that the ones before left."""
    monkeypatch.setattr(sys, "argv", ["example"])
    said = {}
    for name in ("train", "generate", "finetune", "corpus"):
        runpy.run_path(str(EXAMPLES / f"{name}.py"))
        said[name] = capsys.readouterr().out
    assert "loss.png" in said["train"] and (small / "runs").is_dir()
    assert "parameters, byte tokenizer" in said["generate"] and "--- seed 2" in said["generate"]
    assert "weights from exported" in said["finetune"] and "The rain" in said["finetune"]
    assert "(char)" in said["corpus"] and "7 times 8 is" in said["corpus"]


def test_the_kernels_example_learns(capsys):
    runpy.run_path(str(EXAMPLES / "kernels.py"))
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0] / 4, "40 steps on one batch know it by heart"
    assert len((EXAMPLES / "kernels.py").read_text().splitlines()) <= 35


def test_the_notebook_runs_from_top_to_bottom(small: Path, capsys, monkeypatch):
    """In one namespace, as a kernel does; of the waterfall's command only what it is."""
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text())
    assert notebook["nbformat"] == 4 and all(c["id"] for c in notebook["cells"])
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert all(c["outputs"] == [] for c in cells), "committed without results"
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: commands.append(command))
    monkeypatch.setattr(fastgpt, "__file__", fastgpt.__file__)
    (small / "pyproject.toml").touch()  # what stands for the checkout
    space: dict = {}
    for cell in cells:
        exec("".join(cell["source"]), space)  # our own file
    out = capsys.readouterr().out
    assert "GPU:" in out and "loss.png" in out and "--- seed 2" in out
    (command,) = commands
    left = [f"examples/{p.name}/x" for p in small.iterdir() if p.is_dir()] + [
        "examples/waterfall/x"
    ]
    monkeypatch.undo()
    ignored = check_output(["git", "check-ignore", *left], cwd=EXAMPLES.parent, text=True)
    assert ignored.split() == left and len(left) == 3
    assert command[1:4] == ["-m", "bench", "waterfall"] and command[-2] == "--seconds=2"


def test_fit_refuses_what_the_command_line_refuses(small: Path):
    for changes, message in (
        ({"n_layr": 3}, "^n_layr: no such setting; did you mean n_layer?"),
        ({"n_layer": "3"}, "^n_layer=3: wanted a whole number >= 1"),
        ({"n_head": 3}, "^--n_head=3: must divide n_embd=128"),
    ):
        with pytest.raises(UserError, match=message):
            FIT("laptop", **changes)
    with pytest.raises(UserError, match="nope: no such preset"):
        FIT("nope")


def test_fit_reads_files_and_load_finds_what_was_made(small: Path):
    (small / "mine.py").write_text("n_layer = 1 + 0\nn_embd = 2 * 8\nn_head = 2\n")
    run = fastgpt.fit("mine.py", out_dir="out")
    model, tokenizer = fastgpt.load(run, checkpoint="latest", device="cpu")
    assert isinstance(tokenizer, ByteTokenizer) and model.shape.n_embd == 16
    text = fastgpt.generate(model, tokenizer, "a cat", max_new_tokens=9, temperature=0)
    assert text == fastgpt.generate(model, tokenizer, "a cat", max_new_tokens=9, temperature=0)
    again = fastgpt.fit(str(run / "config.toml"), out_dir="again")
    assert again == Path("again") and (again / "checkpoints" / "latest").exists()
    for bad in ((model, None, "a"), (model, tokenizer, "")):
        with pytest.raises(UserError):
            fastgpt.generate(*bad)
    with pytest.raises(UserError, match="no run there"):
        fastgpt.load("nowhere")


def test_importing_fastgpt_loads_nothing():
    """Nor does asking what it has; a name that it does not have is an AttributeError."""
    program = "import sys, fastgpt; dir(fastgpt); print('torch' in sys.modules, fastgpt.__all__)"
    env = {"PYTHONPATH": f"{EXAMPLES.parent}:{EXAMPLES.parent / 'kernels'}"}
    got = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert got.stdout == "False ['UserError', 'fit', 'generate', 'load']\n", got.stderr
    assert fastgpt.UserError is UserError
    with pytest.raises(AttributeError, match="has no attribute 'nope'"):
        fastgpt.nope  # noqa: B018
