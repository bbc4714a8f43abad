"""Train GPT-2-class models as fast as one CUDA GPU allows.

In Python, without the command line:

    import fastgpt
    run = fastgpt.fit("laptop", max_iters=500)        # what `fastgpt train laptop` does
    model, tokenizer = fastgpt.load(run)               # or a Hugging Face GPT-2 folder
    print(fastgpt.generate(model, tokenizer, "def main", max_new_tokens=100))

These functions, and PyTorch with them, are loaded when they are first used.
"""

from typing import TYPE_CHECKING, Any

from fastgpt_kernels import __version__ as __version__

__all__ = ["UserError", "fit", "generate", "load"]

if TYPE_CHECKING:
    from fastgpt.api import fit, generate, load
    from fastgpt.errors import UserError


def __getattr__(name: str) -> Any:
    if name in __all__:
        from fastgpt import api

        return getattr(api, name)
    raise AttributeError(f"module 'fastgpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
