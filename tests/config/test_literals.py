"""nanoGPT's config files, read as literals; nothing is executed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastgpt.config import settings
from fastgpt.config.literals import assignments
from fastgpt.errors import UserError

LIKE_NANOGPT = """\
\"\"\"A run of mine.\"\"\"
import time
from math import pi

out_dir = 'out-mine'   # a comment
wandb_run_name = 'ft-' + str(time.time())
dataset = 'shakespeare_char'
rows = 5 * 8
gradient_accumulation_steps = rows
batch_size: int = 2 * (3 + 3)
learning_rate = 1e-3
min_lr = learning_rate / 10
max_iters = 5e3
decay_lr = False
dropout = -0.0
"""


def test_a_file_of_assignments(tmp_path: Path):
    path = tmp_path / "train_mine.py"
    path.write_text(LIKE_NANOGPT)
    c = settings.load_python(path)
    assert c.run.out_dir == "out-mine" and c.data.dataset == "shakespeare_char"
    assert (c.optim.gradient_accumulation_steps, c.optim.batch_size) == (40, 12)
    assert c.optim.min_lr == pytest.approx(1e-4) and c.optim.learning_rate == 1e-3
    assert c.log.wandb_run_name.startswith("ft-1") and c.optim.decay_lr is False
    assert c.run.max_iters == 5000 and c.model.gelu == "erf", "nanoGPT's"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("exec('x')", "is no assignment"),
        ("batch_size += 1", "is no assignment"),
        ("batch_size = batch_size = 3", "is no assignment"),
        ("n_layer, n_head = 1, 2", "is no assignment"),
        ("batch_size = __import__('os').getpid()", "is no literal"),
        ("out_dir = open('/etc/passwd').read()", "is no literal"),
        ("batch_size = undefined * 2", "undefined is not assigned above"),
        ("batch_size = [1]", "is no literal"),
        ("batch_size = 9 ** 9 ** 9", "that large"),
        ("batch_size = 0.5 ** 65", "that large"),
        ("batch_size = 1 / 0", "division by zero"),
        ("out_dir = 'x' * 10**9", "is no literal"),
        ("batch_size = 2 ** 62 * 4", "a number that large"),
        ("n_layr = 3", "did you mean n_layer?"),
        ("n_layer = 2.5", "n_layer=2.5: wanted a whole number"),
    ],
)
def test_whatever_else_is_named_by_its_line(line: str, message: str, tmp_path: Path):
    path = tmp_path / "bad.py"
    path.write_text(f"batch_size = 3\n\n{line}\n")
    with pytest.raises(UserError) as e:
        settings.load_python(path)
    assert str(e.value).startswith(f"{path}: line 3: ") and message in str(e.value)


@pytest.mark.parametrize(
    "text", ["n_layer = ", "x = " + "(" * 5000, "\0", "x = " + "-" * 9000 + "1"]
)
def test_what_is_no_python(text: str, tmp_path: Path):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError, match="^[^\n]*bad.py: [^\n]*$"):
        assignments(tmp_path / "bad.py", ())
