"""Fused Triton kernels for GPT-2-class models, usable in any PyTorch model.

    from fastgpt_kernels import attention, layer_norm, cross_entropy

Where Triton is not installed only `fastgpt_kernels.reference` is there: the same functions in plain
PyTorch. The imports below run before any submodule's, so that a name shared by an op and its file
(`attention`) is always the op here; the file is reached by `from fastgpt_kernels.attention import`.
"""

from importlib.util import find_spec

__all__: list[str] = []

if find_spec("triton"):
    from fastgpt_kernels.adamw import AdamWTensors, adamw_step
    from fastgpt_kernels.attention import attention
    from fastgpt_kernels.cross_entropy import cross_entropy
    from fastgpt_kernels.decode_attention import decode_attention
    from fastgpt_kernels.decode_linear import decode_linear
    from fastgpt_kernels.gelu import bias_gelu
    from fastgpt_kernels.layer_norm import add_layer_norm, layer_norm
    from fastgpt_kernels.linear import linear
    from fastgpt_kernels.linear_cross_entropy import linear_cross_entropy
    from fastgpt_kernels.mlp import mlp

    __all__ += [
        "AdamWTensors",
        "adamw_step",
        "add_layer_norm",
        "attention",
        "bias_gelu",
        "cross_entropy",
        "decode_attention",
        "decode_linear",
        "layer_norm",
        "linear",
        "linear_cross_entropy",
        "mlp",
    ]
