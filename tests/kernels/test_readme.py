"""Every example of kernels/README.md runs as it stands, and every op of the model has one."""

import re
from pathlib import Path

import pytest

import fastgpt_kernels

README = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()
SETUP, *EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_every_op_of_the_model_has_an_example() -> None:
    called = "\n".join(EXAMPLES)
    for name in (name for name, op in fastgpt_kernels.OPS.items() if op.flag):
        assert re.search(rf"\b{name}\(", called), f"no example calls {name}"
        assert re.search(rf"^\| `{name}`", README, flags=re.MULTILINE), f"no row for {name}"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.split("(")[0].split()[-1])
def test_example_runs(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs on the reference without a GPU, and on the kernels with one, as for a user."""
    monkeypatch.setattr("fastgpt_kernels.launch.INTERPRETED", False)
    exec(compile(SETUP + example, "kernels/README.md", "exec"), {})
    assert example.strip().count("\n") <= 6, "an example is five lines or so"
