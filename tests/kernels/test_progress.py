"""An error in one line."""

import pytest

from fastgpt_kernels.progress import describe_error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("out of memory\nmore"), "out of memory"),
        (
            RuntimeError("backend='inductor' raised:\nKeyError: 'x'\n\nSet TORCHDYNAMO"),
            "KeyError: 'x'",
        ),
        (RuntimeError("at 3:4:\n  y = x +\nunexpected end"), "unexpected end"),
        (KeyError("x"), "KeyError: 'x'"),
        (OSError(), "OSError"),
        (ValueError("x" * 200), "x" * 100 + " ... " + "x" * 55),
    ],
)
def test_an_error_in_one_line(error, line):
    assert describe_error(error) == line
