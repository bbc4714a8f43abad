"""Model FLOPs: what model FLOPs utilisation (MFU) sets against the device's peak.

Three counts of the FLOPs a token costs, forward and backward, each named wherever it is shown; N is
the number of parameters without position embeddings (the tied head counts once, as a matmul):

    mfu         6N + 12 L C T   nanoGPT; PaLM (Chowdhery et al. 2022, appendix B)
    mfu_causal  6N +  6 L C T   llm.c: causal attention needs half of the scores
    mfu_6n      6N              Kaplan et al. 2020
"""

from __future__ import annotations

from dataclasses import dataclass

from fastgpt.model.gpt import GPT


@dataclass(frozen=True)
class FlopsPerToken:
    """FLOPs a token, by the three counts."""

    mfu: float
    mfu_causal: float
    mfu_6n: float


def flops_per_token(model: GPT) -> FlopsPerToken:
    """The three counts for a model at its full block_size."""
    n = 6.0 * model.n_params()
    scores = 6.0 * model.shape.n_layer * model.shape.n_embd * model.shape.block_size
    return FlopsPerToken(mfu=n + 2 * scores, mfu_causal=n + scores, mfu_6n=n)
