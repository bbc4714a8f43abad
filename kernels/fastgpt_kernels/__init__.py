"""Fused Triton kernels for GPT-2-class models, usable in any PyTorch model.

    from fastgpt_kernels import attention, layer_norm, cross_entropy

Where Triton is not installed only `fastgpt_kernels.reference` is there: the same functions in plain
PyTorch. The imports below run before any submodule's, so that a name shared by an op and its file
(`attention`) is always the op here; the file is reached by `from fastgpt_kernels.attention import`.
"""

from importlib.util import find_spec

__all__: list[str] = []

if find_spec("triton"):
    from fastgpt_kernels.attention import attention
    from fastgpt_kernels.layer_norm import add_layer_norm, layer_norm

    __all__ += ["add_layer_norm", "attention", "layer_norm"]
